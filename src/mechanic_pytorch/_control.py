"""What users may do to the scale: freeze it, and bound it.

A frozen step is the base's own, at lr * scale: nothing is measured, nothing is moved, no weights are copied. The sum of
updates stays what it was, and so does what it is multiplied by; a later `unfreeze` hence goes on from the weights as
they are then, as after any edit of them. Two things are kept up: counts and sums (`_state.prepared`), some operations
on single numbers, and `skip_nonfinite`, one pass over the gradients; in a sharded run also one sum over the processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import ASGD, LBFGS, Adafactor, Rprop

from mechanic_pytorch import _base, _buckets, _state, _steps
from mechanic_pytorch._base import LrTimes
from mechanic_pytorch._buckets import Bucket
from mechanic_pytorch._state import TunerState
from mechanic_pytorch.distributed import Spread, sum_over_processes

# Their updates are not in proportion to lr: it is a first step size, a bound, part of a history, a first guess.
NOT_IN_PROPORTION = (Rprop, Adafactor, ASGD, LBFGS)


def freeze(optimizer: Any) -> None:
    """Note the scales that a step is to use from now on. A host read; no other process is asked.

    Raises:
        ValueError: there is no scale yet, or no lr to multiply by it.
    """
    who = type(optimizer).__name__
    if any(group.get("lr") is None for group in optimizer.param_groups) or isinstance(optimizer, NOT_IN_PROPORTION):
        got = optimizer._mechanic_made_from[1].__name__
        raise ValueError(
            f"{who}: freeze_scale needs a base with an lr in each parameter group, to which its updates are in "
            f"proportion. Got {got}. Remedy: let the scale adapt, or build this optimizer with another base."
        )
    scales = _state.read_tuner(optimizer).scales.sum(-1).reshape(-1).tolist()
    for i, (scale, (_, groups)) in enumerate(zip(scales, _state.tuners(optimizer), strict=True)):
        if scale == 0.0 and any(group["params"] for group in groups):
            which = f" in parameter group {i}" if len(scales) > 1 else ""
            raise ValueError(
                f"{who}: freeze_scale needs a scale that is learned. Got 0{which}. Remedy: make some steps first, in "
                "which all groups have a gradient, or load the state of an optimizer that has made them."
            )
    for home, scale in zip(_state.homes(optimizer), scales, strict=True):
        home[_state.FROZEN_SCALE] = scale


def unfreeze(optimizer: Any) -> None:
    """Let the scale be learned again."""
    for home in _state.homes(optimizer):
        home[_state.FROZEN_SCALE] = 0.0


def check_can_grow(optimizer: Any) -> None:
    """Refuse a parameter group that would have no scale.

    Raises:
        ValueError: scales are frozen, one per group.
    """
    if optimizer.mechanic_config.per_group and _state.is_frozen(optimizer):
        raise ValueError(
            f"{type(optimizer).__name__}: add_param_group with per_group=True needs scales that adapt, for the new "
            "group has none yet. Got frozen ones. Remedy: call optimizer.unfreeze_scale() first."
        )


def frozen_step(
    optimizer: Any,
    buckets: list[Bucket],
    spreads: Sequence[Spread],
    base_step: Callable[[], Any],
    loss: Any,
    lr_times: LrTimes,
) -> Any:
    """Make the base's step at lr times the frozen scale; return what it returns, or `loss` if it is skipped."""
    config = optimizer.mechanic_config
    scale = _state.read_tuner(optimizer).scales.sum(-1)
    optimizer._start_is_known = True  # where a scale is, there was a start
    skip, found_inf, we_skip = scale.new_zeros((), dtype=torch.bool), None, _steps.needs_us(optimizer, buckets)
    if config.skip_nonfinite:
        skip = _is_not_finite(optimizer, buckets, spreads, like=scale)
    elif hasattr(optimizer, "found_inf"):
        skip = optimizer.found_inf.to(scale.device).reshape(()) > 0
    if config.skip_nonfinite or hasattr(optimizer, "found_inf"):
        found_inf = skip if _base.skips_by_itself(optimizer) else None
    if _steps.is_left_out(optimizer, skip, we_skip):
        return loss
    unasked = skip if we_skip and not _base.can_ask_host(optimizer) else None
    before = [[x.clone() for x in bucket.params] for bucket in buckets] if unasked is not None else []
    undone = _buckets.undone_where(unasked, optimizer, buckets, before)
    unseen, found = _state.unseen_by_base(optimizer.state), _base.found_inf(optimizer, found_inf)
    lr = _base.largest_lr(optimizer, scale, lr_times.factors)
    frozen = _state.for_each_group(optimizer, [home[_state.FROZEN_SCALE] for home in _state.homes(optimizer)])
    lr_times.factors = [a * b for a, b in zip(lr_times.factors, frozen, strict=True)]
    with undone, unseen, found, lr_times:
        loss = base_step()
    _buckets.commit(optimizer, buckets, _state.prepared(optimizer, None, skip, skip, unit=None, lr=lr, scale=scale))
    _steps.report(optimizer, buckets)
    return loss


def _is_not_finite(optimizer: Any, buckets: Sequence[Bucket], spreads: Sequence[Spread], like: Tensor) -> Tensor:
    """Tell whether a gradient is not finite, here or in another process that shares the tuner; shape ()."""
    parts = {spread: like.new_zeros(4) for spread in [(), *spreads]}
    for bucket in buckets:
        # The largest entry cannot overflow, as a sum of squares could; times 0 it is 0, or NaN.
        grads = [g if g.layout is torch.strided else g._values() for g in bucket.grads]
        largest = torch.nn.utils.get_total_norm([g for g in grads if g.numel()], math.inf)
        parts[bucket.spread] += largest.to(like) * 0.0
    parts = {spread: _base.unscaled(optimizer, part) for spread, part in parts.items()}
    return sum_over_processes(parts, spreads).isfinite().all().logical_not()


def bounded(state: TunerState, limit: Tensor | None) -> TunerState:
    """Return the tuner, its scales made smaller by one factor if their sum, in any order, could exceed `limit`.

    Args:
        state: the vectors, shape (..., n).
        limit: shape (...), or None, which bounds nothing.
    """
    if limit is None:
        return state
    margin = 1 - (state.scales.shape[-1] + 8) * torch.finfo(state.scales.dtype).eps
    factor = (margin * limit / state.scales.sum(-1)).clamp_max(1.0).unsqueeze(-1)
    return state._replace(scales=state.scales * factor)
