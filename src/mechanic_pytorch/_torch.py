"""What is asked of torch: its wrappers around `step`, whether a value may be read, the lr of a group."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.optim import ASGD, LBFGS, Adafactor, Optimizer, Rprop
from torch.optim.optimizer import _use_grad_for_differentiable

# Their updates are not in proportion to lr: it is a first step size, a bound, part of a history, a first guess.
NOT_IN_PROPORTION = (Rprop, Adafactor, ASGD, LBFGS)


def unwrapped(step: Any) -> Any:
    """Return a class's `step` without what torch wraps around it.

    torch wraps `Base.step` in hooks and a profiler record as soon as one plain `Base` exists. Those of the mechanized
    step have fired for both. Its own bases are also wrapped in a switch of the grad mode, to what it is already.
    """
    inner = step
    while (hooks := getattr(inner, "__code__", None) in _WRAPPERS) or _hides_from_compiler(inner):
        inner = inner.__wrapped__
        if hooks:
            step = inner
    return step


def _hides_from_compiler(function: Any) -> bool:
    """Return True if this is a `torch.compiler.disable`, by which torch.compile wraps the step of some optimizers.

    Its attributes alone do not tell: `functools.wraps` copies them to what is wrapped around it.
    """
    hidden = getattr(function, "_torchdynamo_orig_callable", None)
    return hidden is not None and hidden is getattr(function, "__wrapped__", None)


_WRAPPERS = [
    wrap(lambda optimizer: None).__code__ for wrap in (Optimizer.profile_hook_step, _use_grad_for_differentiable)
]


def requires_closure(step: Callable[..., Any]) -> bool:
    """Return True if a base must have a closure. It then evaluates the closure more than once (LBFGS)."""
    closure = inspect.signature(step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def is_capturing() -> bool:
    """Return True while a CUDA graph records the step. `torch.compile` cannot trace the question, and need not."""
    if torch.compiler.is_compiling():
        return False
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def in_backward() -> bool:
    """Return True if this is called by a hook, while gradients are computed."""
    return bool(torch._C._current_graph_task_id() != -1)


def can_sync(optimizer: Optimizer) -> bool:
    """Return True if the host may read a value.

    It may not while `torch.compile` or a CUDA graph records the step, nor where there are no values.
    """
    return not (torch.compiler.is_compiling() or is_capturing()) and has_values(optimizer)


def has_values(optimizer: Optimizer) -> bool:
    """Return True if the weights are more than shapes, to which their class or device "meta" may reduce them."""
    params: list[Tensor] = next((group["params"] for group in optimizer.param_groups if group["params"]), [])
    return not params or has_memory(params[0])


def has_memory(p: Any) -> bool:
    """Return True if a tensor is more than a shape."""
    here = p.to_local() if hasattr(type(p), "to_local") else p  # a `DTensor`
    return not (here.is_meta or isinstance(here, FakeTensor))


def uncompiled(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same function for a compiler to leave alone."""
    disabled: Callable[..., Any] = torch.compiler.disable(step)  # type: ignore[no-untyped-call]
    return disabled


def reads_found_inf(optimizer: Optimizer) -> bool:
    """Return True if the base reads `found_inf`, the tensor by which a `GradScaler` asks it to skip a step."""
    # A pickle or deepcopy of torch's own has lost the flag.
    is_torchs = getattr(optimizer, "mechanic_base", type(optimizer)).__module__.startswith("torch.optim.")
    supports = getattr(optimizer, "_step_supports_amp_scaling", is_torchs)
    return supports and all(group.get("fused") for group in optimizer.param_groups)


def lrs(groups: Sequence[dict[str, Any]], key: str = "lr") -> list[float]:
    """Return the lr of each group, or what is under another key; a base that has none, or sets it, counts as lr 1."""
    values = [group.get(key, group.get("lr")) for group in groups]
    return [1.0 if lr is None else float(lr) for lr in values]
