"""How the base optimizer is called: without hooks that have fired already, with what it expects to find."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.optim import Optimizer
from torch.optim.optimizer import _use_grad_for_differentiable


def unwrapped_step(optimizer: Optimizer, mixin: type[Optimizer]) -> Callable[..., Any]:
    """Return the `step` of the base, the class that follows `mixin`, without what torch wraps around it.

    torch wraps `Base.step` in hooks and a profiler record as soon as one plain `Base` exists. Those of the mechanized
    step have fired for both. Its own bases are also wrapped in a switch of the grad mode, to what it is already.

    It is a function, not a method: torch.compile, where it breaks a graph, finds a method again by its name, which is
    that of the mechanized step.
    """
    classes = type(optimizer).__mro__
    step = classes[classes.index(mixin) + 1].step  # type: ignore[attr-defined]
    return unwrapped(step)  # type: ignore[no-any-return]


def unwrapped(step: Any) -> Any:
    """Return a class's `step` without what torch wraps around it."""
    inner = step
    while (hooks := getattr(inner, "__code__", None) in _WRAPPERS) or _hides_from_compiler(inner):
        inner = inner.__wrapped__
        if hooks:
            step = inner
    return step


def _hides_from_compiler(function: Any) -> bool:
    """Tell whether this is a `torch.compiler.disable`, by which torch.compile wraps the step of some optimizers.

    Its attributes alone do not tell: `functools.wraps` copies them to what is wrapped around it.
    """
    hidden = getattr(function, "_torchdynamo_orig_callable", None)
    return hidden is not None and hidden is getattr(function, "__wrapped__", None)


_WRAPPERS = [
    wrap(lambda optimizer: None).__code__ for wrap in (Optimizer.profile_hook_step, _use_grad_for_differentiable)
]


def requires_closure(step: Callable[..., Any]) -> bool:
    """Tell whether a base cannot step without a closure, which means that it evaluates it more than once (LBFGS)."""
    closure = inspect.signature(step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def first_evaluation(closure: Callable[[], Any], lr_times: LrTimes) -> tuple[Any, Callable[[], Any]]:
    """Evaluate the closure with autograd on; return its loss, and a closure that begins by repeating that answer."""
    with torch.enable_grad():
        loss = closure()
    pending = [loss]

    def replay() -> Any:
        if pending:
            return pending.pop()
        with lr_times.paused(), torch.enable_grad():
            return closure()

    return loss, replay


def is_capturing() -> bool:
    """Tell whether a CUDA graph records the step. No compiler can look into the question, nor has to."""
    if torch.compiler.is_compiling():
        return False
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def can_ask_host(optimizer: Optimizer) -> bool:
    """Tell whether the host can look at a value: not while `torch.compile` or a CUDA graph records the step.

    Nor where there are no values.
    """
    return not (torch.compiler.is_compiling() or is_capturing()) and has_values(optimizer)


def has_values(optimizer: Optimizer) -> bool:
    """Tell whether the weights are more than shapes, to which their class or device "meta" may reduce them."""
    params: list[Tensor] = next((group["params"] for group in optimizer.param_groups if group["params"]), [])
    return not (params and (params[0].is_meta or isinstance(params[0], FakeTensor)))


def uncompiled(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same function for a compiler to leave alone."""
    disabled: Callable[..., Any] = torch.compiler.disable(step)  # type: ignore[no-untyped-call]
    return disabled


def skips_by_itself(optimizer: Optimizer) -> bool:
    """Tell whether the base looks at `found_inf`, the tensor by which a `GradScaler` asks it not to step."""
    base = type(optimizer)._mechanic_made_from[1]  # type: ignore[attr-defined]
    # A pickle or deepcopy of torch's own has lost the flag.
    supports = getattr(optimizer, "_step_supports_amp_scaling", base.__module__.startswith("torch.optim."))
    return supports and all(group.get("fused") for group in optimizer.param_groups)


@contextmanager
def found_inf(optimizer: Any, skip: Tensor | None) -> Iterator[None]:
    """Let the base find our `found_inf`, if it looks at it, and a `GradScaler` its own again afterwards."""
    if skip is None:
        yield
        return
    theirs = {"found_inf": optimizer.found_inf} if hasattr(optimizer, "found_inf") else {}
    optimizer.found_inf = skip.to(torch.float32)
    try:
        yield
    finally:
        del optimizer.found_inf
        vars(optimizer).update(theirs)


def unscaled(optimizer: Optimizer, dots: Tensor) -> Tensor:
    """Do what a `GradScaler` left to the base, to the four sums.

    Two of them hold g, once and twice, and are divided by the loss scale. All become NaN if the scaler has found an
    overflow: the step is then skipped, by all processes that add up these sums.
    """
    grad_scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    if grad_scale is not None:
        inverse = 1.0 / grad_scale.to(dots).reshape(())
        one = torch.ones_like(inverse)
        dots = dots * torch.stack([inverse, one, inverse * inverse, one])
    overflow: Tensor | None = getattr(optimizer, "found_inf", None)
    return dots if overflow is None else dots.masked_fill(overflow.to(dots.device).reshape(()) > 0, torch.nan)


class LrTimes:
    """A block in which the base finds the lr of each group multiplied by its factor; the user's come back afterwards.

    What somebody writes to an lr in the block stays: the base writes ours, code in `paused` writes the user's.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.factors: Sequence[float] = ()  # one for each group, before the block begins
        self._changed: list[tuple[dict[str, Any], float, Any, Any]] = []

    def __enter__(self) -> None:
        self._changed = [
            (group, factor, group["lr"], group["lr"] * factor)
            for group, factor in zip(self.optimizer.param_groups, self.factors, strict=True)
            if group.get("lr") is not None and factor != 1.0
        ]
        for group, _, _, ours in self._changed:
            group["lr"] = ours

    def __exit__(self, *error: object) -> None:
        for group, factor, theirs, ours in self._changed:
            group["lr"] = theirs if group["lr"] is ours else group["lr"] / factor  # the base has set it
        self._changed = []

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let a block within, a closure, find the user's."""
        inside = bool(self._changed)
        if inside:
            self.__exit__()
        try:
            yield
        finally:
            if inside:
                self.__enter__()


def lrs(groups: Sequence[dict[str, Any]], key: str = "lr") -> list[float]:
    """Return the lr of each group, or what is under another key; a base that has none, or sets it, counts as lr 1."""
    values = [group.get(key, group.get("lr")) for group in groups]
    return [1.0 if lr is None else float(lr) for lr in values]


def largest_lr(optimizer: Any, like: Tensor, factors: Sequence[float]) -> float | Tensor:
    """Return the largest lr of the groups that share a tuner, or, with `per_group`, that of each, shape (G,).

    Each counts times its factor. It is a tensor like `like`, not looked at, if there are several or one of them is a
    tensor.
    """
    values = [1.0 if lr is None else lr for lr in (group.get("lr") for group in optimizer.param_groups)]
    per_group = optimizer.mechanic_config.per_group
    if not per_group and not any(isinstance(lr, Tensor) for lr in values):
        return max(factor * lr for factor, lr in zip(factors, values, strict=True))
    tensors = [
        factor * (lr.to(like).reshape(()) if isinstance(lr, Tensor) else like.new_full((), lr))
        for factor, lr in zip(factors, values, strict=True)
    ]
    return torch.stack(tensors) if per_group else torch.stack(tensors).max()
