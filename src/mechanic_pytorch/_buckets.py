"""The parameters of one step, sorted as kernels take them; what of them is stored, and put back if the step fails."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mechanic_pytorch import kernels
from mechanic_pytorch._state import COMPENSATION, REFERENCE, accumulator_dtype, slot
from mechanic_pytorch.distributed import Spread, is_dtensor, local, spread
from mechanic_pytorch.kernels import Kernel


@dataclass
class Bucket:
    """Parameters that have a gradient and share a tuner, a device, a dtype, a direction and a spread.

    `owners` are the parameters themselves; the other lists are what kernels take: plain, dense, real tensors that share
    their memory (a complex parameter appears as its real view, a sharded one as its local part). A sparse gradient,
    alone, is not dense until `densify` has made a copy of it.
    """

    kernel: Kernel  # that of their device
    spread: Spread  # the process groups that hold the other parts
    tuner: tuple[int, ...]  # the index of its row, () if all share one
    sign: float  # -1 where the base maximizes: the tuner's g is the gradient of what is minimized
    slot: str  # the key of what is stored for each parameter
    group: dict[str, Any]  # the parameter group of all of them, where that asks for `fused`; else, of the first
    owners: list[Tensor] = field(default_factory=list)
    state: list[dict[str, Tensor]] = field(default_factory=list)  # what is to be stored, under its keys
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)  # what is stored under `slot`
    compensations: list[Tensor] = field(default_factory=list)  # empty, or one for each parameter
    is_new: bool = False  # some parameter takes part for the first time
    has_new_shapes: bool = False  # some parameter has another shape than what is stored for it

    def add(self, p: Tensor, grad: Tensor, stored: dict[str, Tensor]) -> None:
        """Take in a parameter with its gradient and what is stored for it."""
        dtype = accumulator_dtype(p.dtype)
        start = p.detach() if self.slot == REFERENCE else None
        ours = _kept(stored, self.slot, p, dtype.to_complex() if p.is_complex() else dtype, start)
        state = {self.slot: ours}
        self.is_new |= self.slot not in stored
        self.owners.append(p)
        self.state.append(state)
        if is_dtensor(p):
            grad, p, ours = local(grad, like=p), local(p), local(ours)
        if p.is_complex():
            grad, p, ours = (torch.view_as_real(tensor.resolve_conj()) for tensor in (grad, p, ours))
        self.grads.append(grad)
        self.params.append(p)
        self.kept.append(ours)
        if p.dtype.itemsize < 4:
            # bfloat16, not the parameter's dtype: what float16 loses can be too small for float16.
            state[COMPENSATION] = _kept(stored, COMPENSATION, self.owners[-1], torch.bfloat16)
            self.compensations.append(local(state[COMPENSATION]))

    def measure(self, copies: Sequence[Tensor] | None) -> Tensor:
        """Return the four sums, the gradient being that of what is minimized; shape (4,). Fill the copies."""
        sums = self.kernel.measure(
            self.params, self.grads, self.kept, copies, self.compensations or None, self.slot == REFERENCE
        )
        return torch.cat([self.sign * sums[:1], sums[1:]])

    def count_moved(self) -> int:
        """Return how many weights are not where they started. Copies to the host."""
        ways: Sequence[Tensor] = self.kept
        if self.slot == REFERENCE:
            ways = torch._foreach_sub(self.params, self.kept)
            if self.compensations:
                torch._foreach_add_(ways, self.compensations)
        return sum(int(way.count_nonzero()) for way in ways)

    def densify(self) -> None:
        """Replace sparse gradients by dense copies."""
        self.grads = [grad if grad.layout is torch.strided else grad.to_dense() for grad in self.grads]


def collect(optimizer: Any) -> tuple[list[Bucket], list[Spread]]:
    """Sort the parameters that have a gradient into buckets, each parameter once.

    Args:
        optimizer: the optimizer, mechanized.

    Returns:
        The buckets, and how any of the parameters, with or without gradient, are spread over processes.
    """
    buckets: dict[tuple[Any, ...], Bucket] = {}
    config = optimizer.mechanic_config
    whole_or_named: Spread = () if config.process_group is None else (config.process_group,)
    # A process that holds none of the parameters takes part in the sums, too.
    spreads: dict[Spread, None] = {} if config.process_group is None else {whole_or_named: None}
    seen: set[int] = set()
    for i, group in enumerate(optimizer.param_groups):
        sign = -1.0 if group.get("maximize", getattr(optimizer, "maximize", False)) else 1.0
        tuner = (i,) if config.per_group else ()
        rule = i if group.get("fused") else -1  # `_fused` may make the base's step, with the options of one group
        for p in group["params"]:
            over = spread(p) if is_dtensor(p) else whole_or_named
            spreads[over] = None
            grad = p.grad
            if grad is None or id(p) in seen:
                continue
            seen.add(id(p))
            key = (tuner, p.device, p.dtype, over, sign, rule)
            bucket = buckets.get(key)
            if bucket is None:
                bucket = buckets[key] = Bucket(kernels.select(p.device), over, tuner, sign, slot(config), group)
            stored = optimizer.state.get(p, {})
            fits = all(key not in stored or stored[key].shape == p.shape for key in (bucket.slot, COMPENSATION))
            bucket.has_new_shapes |= not fits
            bucket.add(p, grad, stored if fits else {})
    return list(buckets.values()), list(spreads)


def move(buckets: list[Bucket], before: list[list[Tensor]], scales: Sequence[Tensor]) -> None:
    """Rescale the step that the base has made; `scales` are what kernels take, one per tuner."""
    for bucket, starts in zip(buckets, before, strict=True):
        converted = (scale[bucket.tuner].to(bucket.kept[0]) for scale in scales)
        bucket.kernel.move(bucket.params, starts, bucket.kept, bucket.compensations or None, *converted)


def commit(optimizer: Optimizer, buckets: list[Bucket], write: Callable[[], object]) -> None:
    """Write down a step whose weights have moved, and finish even if interrupted.

    Args:
        optimizer: the optimizer.
        buckets: whose tensors go to its state, where they stay and are changed in place.
        write: what `_state.prepared` returned.
    """
    try:
        _store(optimizer, buckets)
        write()
    except BaseException:
        _store(optimizer, buckets)
        write()
        raise


def _store(optimizer: Optimizer, buckets: list[Bucket]) -> None:
    for bucket in buckets:
        for p, kept in zip(bucket.owners, bucket.state, strict=True):
            state = optimizer.state[p]
            state.update(kept)
            if COMPENSATION not in kept:
                state.pop(COMPENSATION, None)  # the parameter has been cast


def _kept(stored: dict[str, Tensor], key: str, p: Tensor, dtype: torch.dtype, start: Tensor | None = None) -> Tensor:
    kept = stored.get(key)
    if kept is None and start is not None:
        return start.to(dtype, copy=True)
    if kept is None:
        return torch.zeros_like(p, dtype=dtype, requires_grad=False)
    return kept.to(p.device, dtype)  # the same tensor, unless the parameter was moved or cast


@contextmanager
def undone_on_error(
    optimizer: Optimizer, buckets: list[Bucket], before: list[list[Tensor]], *, whole_state: bool
) -> Iterator[None]:
    """Put the buckets' parameters, of which `before` holds copies, and the base's state back if the block raises.

    What the base adds to a parameter's state at its first step is always taken back. State that it changes in place is
    put back only with `whole_state`, which costs a copy of it.
    """
    if whole_state:
        guarded = [p for group in optimizer.param_groups for p in group["params"]]
    else:
        guarded = [p for bucket in buckets if bucket.is_new for p in bucket.owners]
    copied = copy.deepcopy if whole_state else dict
    saved = {p: copied(optimizer.state[p]) for p in guarded if p in optimizer.state}
    try:
        yield
    except BaseException:
        for bucket, copies in zip(buckets, before, strict=True):
            torch._foreach_copy_(bucket.params, copies)
        for p in guarded:
            if p in saved:
                optimizer.state[p] = saved[p]
            else:
                optimizer.state.pop(p, None)
        raise


@contextmanager
def undone_where(
    skip: Tensor | None, optimizer: Optimizer, buckets: list[Bucket], before: list[list[Tensor]]
) -> Iterator[None]:
    """Put the same things back where `skip` holds, without a look at it; None does nothing. It costs a copy of them.

    State that the block creates becomes 0 there, as bases have it at their start.
    """
    if skip is None:
        yield
        return
    states = [optimizer.state[p] for bucket in buckets for p in bucket.owners]
    saved = [{key: value.clone() for key, value in state.items() if isinstance(value, Tensor)} for state in states]
    yield
    for bucket, copies in zip(buckets, before, strict=True):
        for x, x_before in zip(bucket.params, copies, strict=True):
            x.copy_(torch.where(skip.to(x.device), x_before, x))
    for state, old in zip(states, saved, strict=True):
        for key, value in state.items():
            if isinstance(value, Tensor):
                value.copy_(torch.where(skip.to(value.device), old.get(key, torch.zeros_like(value)), value))
