"""The two functions that touch big tensors, in interchangeable versions.

A kernel is a module with two functions over parallel lists of plain, dense, real tensors. All tensors of one call
share a device, and their parameters a dtype; `stored` are float32 (float64 for float64 parameters). Kernels know
nothing of parameter groups, optimizer state, sharding or the tuner.

What is stored for each parameter is one of two things: `delta`, the sum of the base's updates (Algorithm 1), or
`x_ref`, from which the displacement of the parameter is measured (plain steps, `s_init="auto"`).

`measure(params, grads, stored, before)` returns the four sums that the tuner needs, as one tensor of shape (4,) in the
dtype of `stored`: `[<delta, g>, <delta, x>, |g|^2, |x|^2]`. The sums are additive over any partition of the tensors, so
they may be added over buckets, devices and shards. `before` is None, or tensors like `params` that it fills with their
values on the way, for `move`. With `plain=True` it takes `stored` for x_ref, and the displacement
`x + compensation - x_ref` for delta, of which it also returns `|delta|^2`; shape (5,). Where `grad_factor`, shape (),
is given, gradients are multiplied by it first, because the squares of what a `GradScaler` has scaled may overflow.

`move(params, before, stored, compensations, scales)` is called after the base optimizer has turned `before` into
`params`. It changes these in place, and nothing else (`arguments.py` says what scales are):

    update = params - before
    params = before + (scales.new - scales.old) * delta + scales.new * update
    delta  = delta + update

which is `before + scales.new * delta_new - scales.old * delta_old` with less cancellation. Where `scales.follow` is
given, it takes `stored` for x_ref, and the step is plain:

    params = before + scales.new * update
    x_ref  = x_ref + scales.follow * (before - x_ref)

and `|update|^2` is returned, summed over all tensors, shape (), in the dtype of `stored`; else None.

The scales are tensors of shape (). `compensations` is None, or, for parameters of less than 32 bits, one tensor per
parameter that holds what rounding took from it (Kahan): it is added back before the move and renewed after it. A
compensation that could not come from rounding its parameter belongs to a value that someone has since overwritten, and
counts as zero.

A kernel may also have `step_and_move(rule, params, grads, stored, compensations, scales)`, which makes the step of a
base whose rule it is given (`rule.py`) and moves in the same pass, and `can_step(params, *others)`, which returns True
if it can for these tensors. The result is that of the base's step followed by `move`, except for rounding.

`for_loop` is the reference. Every other kernel must equal it; `tests/test_kernels.py` says how closely.
"""

import functools
import importlib.util
import os
from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from mechanic_pytorch.kernels import blocks, for_loop, foreach
from mechanic_pytorch.kernels.arguments import Scales, Tensors
from mechanic_pytorch.kernels.checked import Checked
from mechanic_pytorch.kernels.rule import Rule

__all__ = ["KERNELS", "Kernel", "SteppingKernel", "in_use", "makes_steps", "missing_for_triton", "select"]


class Kernel(Protocol):
    """What a kernel module offers."""

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
        """Return the sums, and fill `before`."""
        ...

    def move(
        self,
        params: Tensors,
        before: Tensors,
        stored: Tensors,
        compensations: Tensors | None,
        scales: Scales,
    ) -> Tensor | None:
        """Rescale the base's step, in place; return |update|^2 if it is plain."""
        ...


class SteppingKernel(Kernel, Protocol):
    """What those offer that make the step of a base, too."""

    def can_step(self, params: Tensors, /, *others: Tensors) -> bool:
        """Return True if `step_and_move` can be called for these tensors."""
        ...

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
        ...


def makes_steps(kernel: Kernel) -> TypeGuard[SteppingKernel]:
    """Return True if a kernel has the two functions of a `SteppingKernel`."""
    return hasattr(kernel, "step_and_move")


# And "triton", which is imported when it is first used.
KERNELS: dict[str, Kernel] = {"blocks": blocks, "foreach": foreach, "for_loop": for_loop}


def select(device: torch.device, *, has_memory: bool = True) -> Kernel:
    """Return the fastest kernel for a device, or the one that the environment variable `MECHANIC_KERNEL` names.

    Args:
        device: that of the tensors.
        has_memory: whether they are more than shapes. Those that are not (`FakeTensor`) know only torch's operations.

    Raises:
        ValueError: `MECHANIC_KERNEL` names no kernel, or one that cannot run there.
    """
    name, names = os.environ.get("MECHANIC_KERNEL"), sorted({*KERNELS, "triton"})
    if not has_memory:
        name = "foreach"
    elif name is None:
        if torch.compiler.is_compiling():
            name = "foreach"
        elif device.type == "cpu":
            name = "blocks"
        else:
            name = "foreach" if missing_for_triton(device) else "triton"
    elif name not in names:
        raise ValueError(
            f"mechanic_pytorch: MECHANIC_KERNEL must be one of {names}. Got {name!r}. "
            "Remedy: unset it to let the package choose."
        )
    elif name == "triton" and (missing := missing_for_triton(device)):
        raise ValueError(
            f"mechanic_pytorch: MECHANIC_KERNEL='triton' needs {missing}. Got parameters on {device}. "
            "Remedy: unset it to let the package choose."
        )
    if name not in KERNELS:
        KERNELS[name] = Checked(name, lambda: importlib.import_module(f"{__name__}.triton"), foreach)
    return KERNELS[name]


def in_use(device: torch.device) -> str:
    """Return the name of the kernel that is used on a device; if it replaces one that failed, also why."""
    kernel = select(device)
    if isinstance(kernel, Checked):
        failure = kernel.failures.get(device)
        return kernel.name if failure is None else f"foreach, because {kernel.name} failed: {failure}"
    return next(name for name, each in KERNELS.items() if each is kernel)


@functools.cache
def missing_for_triton(device: torch.device) -> str:
    """Return what is missing to run Triton on a device; nothing, if it runs."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton"
    if device.type == "cpu":
        return "" if os.environ.get("TRITON_INTERPRET") == "1" else "a GPU, or TRITON_INTERPRET=1"
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 8:
        return "an NVIDIA GPU of compute capability 8.0 or more, or an AMD GPU"
    return ""
