"""Where Mechanic keeps its state, and how that state survives what people do to optimizers.

Per parameter, in `optimizer.state[p]`: the sum of updates and, for parameters of less than 32 bits, the compensation.
They are written only after the base's first step, because many bases take an empty `state[p]` for "not started".

Per optimizer, in `optimizer.param_groups[0]`: the tuner's vectors and two counters. Parameter groups are what every
checkpointing tool carries whole and uncast; a key of `optimizer.state` that is not a parameter is what some refuse.

All keys start with `mechanic_`; all values are tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from mechanic_pytorch.distributed import Spread, local, spread

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DELTA = "mechanic_delta"
COMPENSATION = "mechanic_compensation"
STEPS = "mechanic_steps"
SKIPPED_STEPS = "mechanic_skipped_steps"


class TunerState(NamedTuple):
    """The tuner's memory: one entry per beta, each of shape (n,), all 0 at the start (m, v, r, s in the paper)."""

    max_product: Tensor
    sum_squared_products: Tensor
    reward: Tensor
    scales: Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the real dtype in which a parameter's sums are kept: float32, or float64 for 64-bit numbers."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


# --- the tuner's state ------------------------------------------------------------------------------------------------


def attach_tuner(optimizer: Optimizer, n: int) -> None:
    """Give the optimizer a tuner that has seen nothing, unless it has one already."""
    home = optimizer.param_groups[0]
    for key in _TUNER_KEYS:
        home.setdefault(key, torch.zeros(n))
    for key in (STEPS, SKIPPED_STEPS):
        home.setdefault(key, torch.zeros((), dtype=torch.int64))


def read_tuner(optimizer: Optimizer, n: int) -> TunerState:
    """Return the tuner's own tensors, first moved to where the parameters are if these have moved or been cast."""
    attach_tuner(optimizer, n)
    home, params = optimizer.param_groups[0], [p for group in optimizer.param_groups for p in group["params"]]
    if params:
        wide = any(accumulator_dtype(p.dtype) is torch.float64 for p in params)
        for key in _TUNER_KEYS:
            home[key] = home[key].to(params[0].device, torch.float64 if wide else torch.float32)
        for key in (STEPS, SKIPPED_STEPS):
            home[key] = home[key].to(params[0].device)
    return TunerState(*(home[key] for key in _TUNER_KEYS))


def clear(optimizer: Optimizer, n: int) -> None:
    """Forget everything: a new tuner, no sums. The base's own state stays."""
    for key in (*_TUNER_KEYS, STEPS, SKIPPED_STEPS):
        optimizer.param_groups[0].pop(key, None)
    for state in optimizer.state.values():
        for key in (DELTA, COMPENSATION):
            state.pop(key, None)
    attach_tuner(optimizer, n)


_TUNER_KEYS = tuple(f"mechanic_{name}" for name in TunerState._fields)


# --- the parameters' state --------------------------------------------------------------------------------------------


@dataclass
class Bucket:
    """Parameters that have a gradient and share a device, a dtype, a direction and a spread, as kernels take them.

    `owners` are the parameters themselves; the other lists hold plain, dense, real tensors that share their memory
    (a complex parameter appears as its real view, a sharded one as its local part; a sparse gradient, alone, is a dense
    copy).
    """

    spread: Spread  # the process groups that hold the other parts
    sign: float  # -1 where the base maximizes: the tuner's g is the gradient of what is minimized
    owners: list[Tensor] = field(default_factory=list)
    state: list[dict[str, Tensor]] = field(default_factory=list)  # what is to be stored, under its keys
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    deltas: list[Tensor] = field(default_factory=list)
    compensations: list[Tensor] = field(default_factory=list)  # empty, or one for each parameter
    is_new: bool = False  # some parameter takes part for the first time


def collect(optimizer: Optimizer, process_group: ProcessGroup | None) -> tuple[list[Bucket], list[Spread]]:
    """Sort the parameters that have a gradient into buckets, each parameter once.

    Args:
        optimizer: the optimizer.
        process_group: the group over which plain tensors are parts of larger ones, or None.

    Returns:
        The buckets, and how any of the parameters, with or without gradient, are spread over processes.
    """
    buckets: dict[tuple[torch.device, torch.dtype, Spread, float], Bucket] = {}
    spreads: dict[Spread, None] = {}
    seen: set[Tensor] = set()
    for group in optimizer.param_groups:
        sign = -1.0 if group.get("maximize", getattr(optimizer, "maximize", False)) else 1.0
        for p in group["params"]:
            over = spread(p, process_group)
            spreads[over] = None
            if p.grad is None or p in seen:
                continue
            seen.add(p)
            bucket = buckets.setdefault((p.device, p.dtype, over, sign), Bucket(over, sign))
            stored = optimizer.state.get(p, {})
            bucket.is_new |= DELTA not in stored
            dtype = accumulator_dtype(p.dtype)
            kept = {DELTA: _kept(stored, DELTA, p, dtype.to_complex() if p.is_complex() else dtype)}
            bucket.owners.append(p)
            bucket.state.append(kept)
            grad = local(p.grad, like=p)
            bucket.params.append(_real(local(p)))
            bucket.grads.append(_real(grad if grad.layout is torch.strided else grad.to_dense()))
            bucket.deltas.append(_real(local(kept[DELTA])))
            if p.dtype.itemsize < 4:
                # bfloat16, not the parameter's dtype: what float16 loses can be too small for float16.
                kept[COMPENSATION] = _kept(stored, COMPENSATION, p, torch.bfloat16)
                bucket.compensations.append(local(kept[COMPENSATION]))
    return list(buckets.values()), list(spreads)


def store(optimizer: Optimizer, buckets: list[Bucket]) -> None:
    """Write the buckets' tensors into the optimizer's state, where they stay and are changed in place."""
    for bucket in buckets:
        for p, kept in zip(bucket.owners, bucket.state, strict=True):
            optimizer.state[p].update(kept)


def _kept(stored: dict[str, Tensor], key: str, p: Tensor, dtype: torch.dtype) -> Tensor:
    if key in stored:
        return stored[key].to(p.device, dtype)  # the same tensor, unless the parameter was moved or cast
    return torch.zeros_like(p, dtype=dtype, requires_grad=False)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def check_group(who: str, group: dict[str, Any]) -> None:
    """Refuse what cannot work.

    Raises:
        ValueError: `differentiable=True`.
    """
    if group.get("differentiable"):
        raise ValueError(
            f"{who}: differentiable must be False. Got True. Remedy: use the plain base to differentiate through "
            "steps; Mechanic's step is not differentiable."
        )


# --- checkpoints and failures -----------------------------------------------------------------------------------------


def check_loadable(who: str, state_dict: dict[str, Any], n: int) -> None:
    """Refuse a checkpoint whose tuner has another number of betas; nothing has been changed yet.

    Raises:
        ValueError: the numbers differ.
    """
    for group in state_dict["param_groups"]:
        for key in _TUNER_KEYS:
            if key in group and len(group[key]) != n:
                raise ValueError(
                    f"{who}: the checkpoint's tuner must have as many betas as the optimizer. Got {len(group[key])} in "
                    f"the checkpoint and {n} here. Remedy: pass mechanize the betas that it was saved with, or drop "
                    "the keys that start with 'mechanic_' from its param_groups[0] and state to start the tuner afresh."
                )


def restore_uncast(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Put the saved sums back in the dtype they were saved in.

    `Optimizer.load_state_dict` has just cast them to the dtype of their parameter, which for bfloat16 destroys them.
    They are copied, so that two optimizers never share one.
    """
    saved_ids = (i for group in state_dict["param_groups"] for i in group["params"])
    params = (p for group in optimizer.param_groups for p in group["params"])
    for p, saved_id in zip(params, saved_ids, strict=True):
        for key, value in state_dict["state"].get(saved_id, {}).items():
            if key in (DELTA, COMPENSATION):
                optimizer.state[p][key] = value.detach().to(p.device, copy=True)


@contextmanager
def undone_on_error(optimizer: Optimizer, buckets: list[Bucket], *, whole_state: bool) -> Iterator[list[list[Tensor]]]:
    """Yield copies of the buckets' parameters, and put these and the base's state back if the block raises.

    What the base adds to a parameter's state at its first step is always taken back. State that it changes in place is
    put back only with `whole_state`, which costs a copy of it.
    """
    before = [[x.clone() for x in bucket.params] for bucket in buckets]
    if whole_state:
        guarded = [p for group in optimizer.param_groups for p in group["params"]]
    else:
        guarded = [p for bucket in buckets if bucket.is_new for p in bucket.owners]
    copied = copy.deepcopy if whole_state else dict
    saved = {p: copied(optimizer.state[p]) for p in guarded if p in optimizer.state}
    try:
        yield before
    except BaseException:
        for bucket, copies in zip(buckets, before, strict=True):
            for x, x_before in zip(bucket.params, copies, strict=True):
                x.copy_(x_before)
        for p in guarded:
            if p in saved:
                optimizer.state[p] = saved[p]
            else:
                optimizer.state.pop(p, None)
        raise
