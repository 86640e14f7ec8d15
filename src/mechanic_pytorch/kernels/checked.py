"""A kernel that is trusted only after a check: each of its variants is compared once with another kernel.

The first call of a variant, that is, of a function with some dtypes, options and device, is first made by both kernels
on copies of the beginnings of all tensors. If the results differ, or the kernel cannot be compiled or launched (where
there is no C compiler, say), a warning says so, and from then on the other kernel does all work on that device. The
comparison reads from the device; no later call does.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mechanic_pytorch._torch import is_capturing
from mechanic_pytorch.kernels.arguments import Scales, Tensors
from mechanic_pytorch.kernels.rule import Rule

SHOWN = (0.3, 0.5, 0.25)  # scales by which kernels are compared
SHOWN_GRAD_FACTOR = 0.25
BEGINNING = 2**12  # numbers of each tensor that are compared
# Of the largest number of a list: its sums are added in another order, or a few numbers rounded differently.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 2**-5, torch.float16: 2**-8}


class Checked:
    """The kernel that `load` returns, where it agrees with the kernel `safe`; else that.

    Attributes:
        name: of the first.
        failures: what was wrong with it, for each device on which it is not used.
    """

    def __init__(self, name: str, load: Callable[[], Any], safe: Any) -> None:
        self.name, self.failures = name, dict[torch.device, str]()
        self._load, self._safe = functools.cache(load), safe
        self._agreed: set[tuple[Any, ...]] = set()

    def measure(
        self,
        params: Tensors,
        grads: Tensors,
        stored: Tensors,
        before: Tensors | None = None,
        compensations: Tensors | None = None,
        plain: bool = False,
        grad_factor: Tensor | None = None,
    ) -> Tensor:
        """Return the four sums, and fill `before`."""
        lists = [params, grads, stored, before, compensations]

        def call(kernel: Any, params: Any, grads: Any, stored: Any, before: Any, compensations: Any) -> Any:
            factor = None if grad_factor is None else torch.full_like(grad_factor, SHOWN_GRAD_FACTOR)
            sums = kernel.measure(params, grads, stored, before, compensations, plain, factor)
            g, x, *way = sums[2:].sqrt()
            delta = torch.stack(torch._foreach_norm(stored)).norm() + x  # its length, or a bound of it
            cosines = sums[:2] / torch.stack([delta * g, delta * x]).clamp_min(1e-30)  # 0 but for rounding, or not
            return [*(before or []), g, x, *way, torch.cat([cosines, torch.ones_like(cosines)])]

        kernel = self._chosen(("measure", plain, grad_factor is None), lists, call)
        sums: Tensor = kernel.measure(params, grads, stored, before, compensations, plain, grad_factor)
        return sums

    def move(
        self,
        params: Tensors,
        before: Tensors,
        stored: Tensors,
        compensations: Tensors | None,
        scales: Scales,
    ) -> Tensor | None:
        """Rescale the base optimizer's step from `before` to `params`, in place; return |update|^2 if it is plain."""

        def call(kernel: Any, params: Any, before: Any, stored: Any, compensations: Any) -> list[Tensor]:
            squares = kernel.move(params, before, stored, compensations, _shown(scales))
            return [*_results(params, stored, compensations), *([] if squares is None else [squares.sqrt()])]

        kernel = self._chosen(("move", scales.follow is None), [params, before, stored, compensations], call)
        squares: Tensor | None = kernel.move(params, before, stored, compensations, scales)
        return squares

    def step_and_move(
        self,
        rule: Rule,
        params: Tensors,
        grads: Tensors,
        stored: Tensors,
        compensations: Tensors | None,
        scales: Scales,
    ) -> Tensor | None:
        """Make the base's step and rescale it, in place; return |update|^2 if it is plain."""
        options = rule.options

        def call(kernel: Any, params: Any, grads: Any, stored: Any, compensations: Any, *states: Any) -> list[Tensor]:
            steps_at_all = {"found_inf": torch.zeros_like(options["found_inf"])} if "found_inf" in options else {}
            here = rule._replace(states=states, options={**options, **steps_at_all})
            squares = kernel.step_and_move(here, params, grads, stored, compensations, _shown(scales))
            more = [] if squares is None else [squares.sqrt()]
            return [*_results(params, stored, compensations), *more, *(t for state in states for t in state)]

        flags = options.get("nesterov"), options["maximize"], options.get("grad_scale") is None
        lists = [params, grads, stored, compensations, *rule.states]
        kernel = self._chosen(("step_and_move", rule.function, flags, scales.follow is None), lists, call)
        squares: Tensor | None = kernel.step_and_move(rule, params, grads, stored, compensations, scales)
        return squares

    def can_step(self, params: Tensors, *others: Tensors) -> bool:
        """Return True if `step_and_move` can be called."""
        if not params or params[0].device in self.failures:
            return False
        try:
            kernel = self._load()
        except Exception as error:
            self._fail(params[0].device, "import", error)
            return False
        return bool(kernel.can_step(params, *others))

    def _chosen(self, variant: tuple[Any, ...], lists: Sequence[Tensors | None], call: Callable[..., Any]) -> Any:
        """Return the kernel to call, after a comparison if this variant is new."""
        first = lists[0]
        if not first or first[0].device in self.failures:
            return self._safe
        device = first[0].device
        dtypes = tuple(None if tensors is None else frozenset(t.dtype for t in tensors) for tensors in lists)
        key = (device, dtypes, *variant)
        if key in self._agreed:
            return self._load()
        if is_capturing():
            return self._safe  # a graph cannot hold a comparison; people make a few steps before they capture one
        try:
            results = [call(kernel, *map(_beginnings, lists)) for kernel in (self._load(), self._safe)]
            difference = max(_difference(a, b) for a, b in zip(*results, strict=True))
            if difference > 1:
                raise ArithmeticError(f"it differs by {difference:.3g} times the tolerance")
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._fail(device, str(variant[0]), error)
            return self._safe
        self._agreed.add(key)
        return self._load()

    def _fail(self, device: torch.device, what: str, error: Exception) -> None:
        self.failures[device] = f"{what}: {type(error).__name__}: {error}".partition("\n")[0]
        warnings.warn(
            f"mechanic_pytorch: the kernel {self.name!r} cannot be trusted on {device}, and the run goes on with "
            f"'foreach', which is slower. Got {self.failures[device]}. Remedy: where a C compiler is missing, which "
            "Triton needs, install one; set MECHANIC_KERNEL=foreach to silence this warning; report any other cause.",
            stacklevel=2,
        )


def _beginnings(tensors: Tensors | None) -> list[Tensor] | None:
    """Return copies of the first numbers of each tensor, finite, hardly any 0, at addresses as odd as theirs."""
    if tensors is None:
        return None
    copies = []
    for t in tensors:
        side = math.ceil(BEGINNING ** (1 / max(t.ndim, 1)))
        line = t.detach()[(slice(side),) * t.ndim].flatten()
        offset = t.data_ptr() % 16 // t.element_size()
        copy = torch.empty(offset + line.numel(), dtype=t.dtype, device=t.device)[offset:]
        wide = line.double().nan_to_num(0.0).clamp(-1e4, 1e4)  # squares must be finite
        # Zeros would hide much: what is stored is 0 at first, and so is the base's state.
        fraction = torch.arange(1, len(wide) + 1, device=t.device) * 0.618033988 % 1
        noise = fraction * (wide.abs().mean() + 1e-3 * (wide == 0))
        copies.append(copy.copy_(wide + noise))
    return copies


def _shown(scales: Scales) -> Scales:
    """Return other scales in the place of those given, which may be too small at first to show a difference."""
    old, new, follow = SHOWN
    plain = scales.follow is not None
    return Scales(
        torch.full_like(scales.old, old),
        torch.full_like(scales.new, new),
        torch.full_like(scales.new, follow) if plain else None,
    )


def _results(params: Tensors, stored: Tensors, compensations: Tensors | None) -> list[Tensor]:
    """Return what was moved, in the dtype and with the size of parameters: of these, rounding moves what is stored."""
    exact = params if compensations is None else torch._foreach_add(list(compensations), list(params))
    pairs = zip(params, exact, stored, strict=True)
    return [torch.cat([x_exact.flatten(), ours.flatten()]).to(x.dtype) for x, x_exact, ours in pairs]


def _difference(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference, as a multiple of the tolerance; infinite where one is not finite."""
    a, b = actual.double(), expected.double()
    if a.numel() == 0:
        return 0.0
    size = torch.maximum(a.abs().max(), b.abs().max()).clamp_min(1e-30)
    return float(((a - b).abs().max() / (TOLERANCE[actual.dtype] * size)).nan_to_num(torch.inf, torch.inf))
