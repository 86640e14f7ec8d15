"""The parameters of one step, sorted as kernels take them: what is stored for them, and rolled back on an error."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mechanic_pytorch import kernels
from mechanic_pytorch._config import Config
from mechanic_pytorch._torch import has_memory
from mechanic_pytorch.distributed import ShardGroups, is_dtensor, local, shard_groups, sum_over_processes
from mechanic_pytorch.kernels import Kernel
from mechanic_pytorch.kernels.arguments import Scales

# What is stored for each parameter, in `optimizer.state[p]`: one slot; below 32 bits, also the compensation.
DELTA = "mechanic_delta"  # the sum of updates
REFERENCE = "mechanic_reference"  # with `s_init="auto"`: the weights from which their way is measured
COMPENSATION = "mechanic_compensation"
SLOTS = {DELTA, REFERENCE}
PER_PARAMETER = {*SLOTS, COMPENSATION}

State = dict[Any, dict[str, Any]]  # `optimizer.state`


def slot(config: Config) -> str:
    """Return under which key a parameter's slot is."""
    return REFERENCE if config.is_auto else DELTA


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a parameter's sums are kept: of 32 bits, or of 64 for 64-bit numbers."""
    real = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
    return real.to_complex() if dtype.is_complex else real


def values_of(tensor: Tensor) -> Tensor:
    """Return the numbers of a plain tensor; of a sparse one, those that it holds."""
    return tensor if tensor.layout is torch.strided else tensor._values()


@dataclass
class Bucket:
    """Parameters that have a gradient and share a tuner, a device, a dtype, a direction and their shard groups.

    The lists beside `params` are what kernels take: plain, dense, real tensors that share their memory (a complex
    parameter appears as its real view, a sharded one as its local shard). A sparse gradient, alone, is not dense until
    `measure` has made a copy of it.
    """

    kernel: Kernel  # that of their device
    shard_groups: ShardGroups  # that hold the other shards
    row: int  # of the tuner
    sign: float  # -1 where the base maximizes: the tuner's g is the gradient of what is minimized
    slot: str  # the key of what is stored for each parameter
    group: dict[str, Any]  # the parameter group of all of them, where that asks for `fused`; else, of the first
    params: list[Tensor] = field(default_factory=list)  # the parameters themselves
    state: list[dict[str, Tensor]] = field(default_factory=list)  # what is to be stored, under its keys
    locals: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    stored: list[Tensor] = field(default_factory=list)  # what is stored under `slot`
    compensations: list[Tensor] = field(default_factory=list)  # empty, or one for each parameter
    before: list[Tensor] = field(default_factory=list)  # copies of `locals` from before the base's step, if needed
    update_squared: Tensor | None = None  # |u|^2 of the base's update in a plain step, once moved; shape ()
    newcomers: list[int] = field(default_factory=list)  # indices of parameters that take part for the first time
    has_new_shapes: bool = False  # some parameter has another shape than what is stored for it

    @property
    def is_new(self) -> bool:
        """Whether something will be stored for some parameter that is not stored yet, or has another shape."""
        return bool(self.newcomers) or self.has_new_shapes

    def add(self, p: Tensor, grad: Tensor, stored: dict[str, Tensor]) -> None:
        """Take in a parameter, its gradient and what is stored for it, which in another shape counts for nothing."""
        ours, dtype = stored.get(self.slot), p.dtype
        sums_in = accumulator_dtype(dtype)
        if any([key in stored and stored[key].shape != p.shape for key in (self.slot, COMPENSATION)]):  # noqa: C419
            self.has_new_shapes, stored, ours = True, {}, None
        elif ours is None:
            self.newcomers.append(len(self.params))
        if ours is None and self.slot == REFERENCE:
            ours = p.detach().to(sums_in, copy=True)
        ours = _stored(ours, p, sums_in)
        state = {self.slot: ours}
        self.params.append(p)
        self.state.append(state)
        if dtype.itemsize < 4:
            # bfloat16, not the parameter's dtype: what float16 loses can be too small for float16.
            state[COMPENSATION] = _stored(stored.get(COMPENSATION), p, torch.bfloat16)
            self.compensations.append(local(state[COMPENSATION]))
        if is_dtensor(p):
            grad, p, ours = local(grad, like=p), local(p), local(ours)
        if dtype.is_complex:
            grad, p, ours = (torch.view_as_real(tensor.resolve_conj()) for tensor in (grad, p, ours))
        self.grads.append(grad)
        self.locals.append(p)
        self.stored.append(ours)

    def measure(self, grad_scale: Tensor | None) -> Tensor:
        """Return the sums, the gradient being that of what is minimized; shape (4,), or (5,) of plain steps.

        Fills `before`, if it is there. Sparse gradients are replaced by dense copies first.

        Args:
            grad_scale: by which the gradients are still multiplied, any shape of one number, or None.
        """
        self.grads = [grad if grad.layout is torch.strided else grad.to_dense() for grad in self.grads]
        sums = self.kernel.measure(
            self.locals,
            self.grads,
            self.stored,
            self.before or None,
            self.compensations or None,
            self.slot == REFERENCE,
            self._factor(grad_scale),
        )
        return sums if self.sign > 0 else torch.cat([-sums[:1], sums[1:]])

    def _factor(self, grad_scale: Tensor | None) -> Tensor | None:
        return None if grad_scale is None else grad_scale.to(self.stored[0]).reshape(()).reciprocal()

    def measure_update(self, indices: Sequence[int], grad_scale: Tensor | None) -> Tensor:
        """Return `[0, |u|^2, |g|^2, |x|^2, 0]` of the base's update u of some parameters; shape (5,)."""
        nothing, dtype = self.stored[0].new_zeros(()), self.stored[0].dtype
        if not indices:
            return nothing.expand(5)
        x = [self.before[i].to(dtype) for i in indices]
        u = [self.locals[i].to(dtype) - x_before for i, x_before in zip(indices, x, strict=True)]
        grads, factor = [self.grads[i] for i in indices], self._factor(grad_scale)
        _, _, g_squared, x_squared = self.kernel.measure(x, grads, u, grad_factor=factor)
        return torch.stack([nothing, self.kernel.measure(x, u, u)[0], g_squared, x_squared, nothing])

    def nonfinite(self) -> Tensor:
        """Return 0, or NaN if a gradient is not finite; shape ()."""
        # The largest entry cannot overflow, as a sum of squares could; times 0 it is 0, or NaN.
        grads = [values_of(grad) for grad in self.grads]
        return torch.nn.utils.get_total_norm([g for g in grads if g.numel()], math.inf) * 0.0

    def count_moved(self) -> int:
        """Return how many weights are not where they started. Syncs."""
        ways: Sequence[Tensor] = self.stored
        if self.slot == REFERENCE:
            ways = torch._foreach_sub(self.locals, self.stored)
            if self.compensations:
                torch._foreach_add_(ways, self.compensations)
        return sum(int(way.count_nonzero()) for way in ways)


@dataclass
class Work:
    """What one step works on, and the shard groups of all parameters, with or without gradient."""

    buckets: list[Bucket]
    shard_groups: list[ShardGroups]
    groups: Sequence[dict[str, Any]]  # the optimizer's parameter groups
    state: State  # its state
    sums: int  # how many `measure` returns

    @property
    def is_empty(self) -> bool:
        """Whether nothing has a gradient, in any process."""
        return not self.buckets and not any(self.shard_groups)

    @property
    def is_new(self) -> bool:
        """Whether some parameter takes part for the first time, so that state will be created."""
        return any(bucket.is_new for bucket in self.buckets)

    def keep_before(self) -> None:
        """Let `Bucket.measure` copy the weights on its way."""
        for bucket in self.buckets:
            bucket.before = [torch.empty_like(x) for x in bucket.locals]

    def total(
        self,
        of_bucket: Callable[[Bucket], Tensor],
        *,
        like: Tensor,
        masked: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return sums over all shards of all buckets for each row of the tuner, shape (G, 4), or (G, 5) of plain steps.

        Args:
            of_bucket: what to add up: that many numbers, or one.
            like: a tensor with G rows, of the result's dtype and device.
            masked: what makes them NaN where a `GradScaler` has found an overflow in this process.
        """
        partial = {shards: like.new_zeros(len(like), self.sums) for shards in [(), *self.shard_groups]}
        for bucket in self.buckets:
            partial[bucket.shard_groups][bucket.row].add_(of_bucket(bucket).to(like))
        if masked is not None:
            partial = {shards: masked(sums) for shards, sums in partial.items()}
        return sum_over_processes(partial, self.shard_groups)

    @property
    def new_rows(self) -> set[int]:
        """The rows of the tuner for which some parameter takes part for the first time, in this process."""
        return {bucket.row for bucket in self.buckets if bucket.newcomers}

    def first_lengths(
        self, of_rows: set[int], *, like: Tensor, grad_scale: Tensor | None, masked: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return for each row |u| of the update that the base has just made, |g|, and |x| before it, shape (G,).

        Args:
            of_rows: where they are of those parameters alone that take part for the first time, in this process.
            like: as for `total`.
            grad_scale: as for `Bucket.measure`.
            masked: as for `total`.
        """

        def measured(bucket: Bucket) -> Tensor:
            indices = bucket.newcomers if bucket.row in of_rows else range(len(bucket.params))
            return bucket.measure_update(indices, grad_scale)

        _, update, gradient, weights, _ = self.total(measured, like=like, masked=masked).sqrt().unbind(-1)
        return update, gradient, weights

    def _forget_ways(self, rows: Tensor) -> None:
        """Let the ways of parameters without a gradient begin where they are, in rows that are true, shape (G,)."""
        here = {id(p) for bucket in self.buckets for p in bucket.params}
        for group, row in zip(self.groups, rows.expand(len(self.groups)), strict=True):
            for p in group["params"]:
                entry = self.state.get(p, {})
                if id(p) in here or REFERENCE not in entry or entry[REFERENCE].shape != p.shape:
                    continue
                reference, x = local(entry[REFERENCE]), local(p)
                if COMPENSATION in entry:
                    x = x.to(reference) + local(entry[COMPENSATION])
                reference.copy_(torch.where(row.to(reference.device), x.to(reference), reference))

    def move(self, scales: Scales) -> None:
        """Rescale the step that the base has made; `scales` have shape (G,)."""
        for bucket in self.buckets:
            here = scales.of_row(bucket.row, like=bucket.stored[0])
            bucket.update_squared = bucket.kernel.move(
                bucket.locals, bucket.before, bucket.stored, bucket.compensations or None, here
            )

    def update_length(self, scales: Scales) -> Tensor | None:
        """Return |u| of the base's update, shape (G,), if a step by these scales was plain and has been moved."""
        if scales.follow is None:
            return None

        def squared(bucket: Bucket) -> Tensor:
            assert bucket.update_squared is not None
            return bucket.update_squared

        return self.total(squared, like=scales.new)[:, 0].sqrt()

    def commit(self, recorded: Callable[[], Callable[[], object]], restarted: Tensor | None = None) -> None:
        """Write down a step whose weights have moved, and finish even if interrupted.

        Args:
            recorded: `Tuner.recorded`, with its arguments.
            restarted: which rows of the tuner have begun again, shape (G,), if any can have.
        """
        record = None
        try:
            record = recorded()
            self.store(restarted)
            record()
        except BaseException:
            record = record or recorded()  # not again once it has written: it would count the step twice
            self.store(restarted)
            record()
            raise

    def store(self, restarted: Tensor | None) -> None:
        """Put what is to be stored into the optimizer's state, where it stays and is changed in place."""
        if restarted is not None:
            self._forget_ways(restarted)
        for bucket in self.buckets:
            for p, ours in zip(bucket.params, bucket.state, strict=True):
                entry = self.state[p]
                entry.update(ours)
                if COMPENSATION not in ours:
                    entry.pop(COMPENSATION, None)  # the parameter has been cast

    @contextmanager
    def rolled_back_on_error(self, whole_state_of: Sequence[Tensor] | None) -> Iterator[None]:
        """Put the weights and the base's state back if the block raises.

        What the base adds to a parameter's state at its first step is always taken back. State that it changes in place
        is put back only for the parameters in `whole_state_of`, which costs a copy of it.
        """
        copied: Callable[[Any], Any] = dict if whole_state_of is None else copy.deepcopy
        guarded = whole_state_of
        if guarded is None:
            guarded = [p for bucket in self.buckets if bucket.is_new for p in bucket.params]
        saved = {p: copied(self.state[p]) for p in guarded if p in self.state}
        try:
            yield
        except BaseException:
            for bucket in self.buckets:
                if bucket.before:
                    torch._foreach_copy_(bucket.locals, bucket.before)
            for p in guarded:
                if p in saved:
                    self.state[p] = saved[p]
                else:
                    self.state.pop(p, None)
            raise

    @contextmanager
    def rolled_back_where(self, skip: Tensor) -> Iterator[None]:
        """Roll weights and state back on the device where `skip` is true. No sync; it costs a copy of them.

        State that the block creates becomes 0 there, as bases have it at their start.
        """
        for bucket in self.buckets:
            bucket.before = bucket.before or [x.clone() for x in bucket.locals]
        params = [p for bucket in self.buckets for p in bucket.params]
        saved = [{key: t.clone() for key, t in self.state[p].items() if isinstance(t, Tensor)} for p in params]
        yield
        for bucket in self.buckets:
            for x, x_before in zip(bucket.locals, bucket.before, strict=True):
                x.copy_(torch.where(skip.to(x.device), x_before, x))
        for p, old in zip(params, saved, strict=True):
            for key, value in self.state[p].items():  # not the dict of before, if the base's state begins here
                if isinstance(value, Tensor):
                    value.copy_(torch.where(skip.to(value.device), old.get(key, torch.zeros_like(value)), value))


def gather(groups: Sequence[dict[str, Any]], state: State, config: Config, *, maximize: bool = False) -> Work:
    """Sort the parameters that have a gradient into buckets, each parameter once.

    Args:
        groups: the optimizer's parameter groups.
        state: its state.
        config: the options.
        maximize: what holds for groups that do not say.
    """
    buckets: dict[tuple[Any, ...], Bucket] = {}
    whole_or_named: ShardGroups = () if config.process_group is None else (config.process_group,)
    # A process that holds none of the parameters takes part in the sums, too.
    all_groups: dict[ShardGroups, None] = {} if config.process_group is None else {whole_or_named: None}
    seen: set[int] = set()
    for i, group in enumerate(groups):
        sign = -1.0 if group.get("maximize", maximize) else 1.0
        row = i if config.per_group else 0
        rule = i if group.get("fused") else -1  # `_fused` may make the base's step, with the options of one group
        for p in group["params"]:
            over = shard_groups(p) if is_dtensor(p) else whole_or_named
            all_groups[over] = None
            grad = p.grad
            if grad is None or id(p) in seen:
                continue
            seen.add(id(p))
            key = (row, p.device, p.dtype, over, sign, rule)
            bucket = buckets.get(key)
            if bucket is None:
                kernel = kernels.select(p.device, has_memory=has_memory(p))
                bucket = buckets[key] = Bucket(kernel, over, row, sign, slot(config), group)
            bucket.add(p, grad, state.get(p, {}))
    return Work(list(buckets.values()), list(all_groups), groups, state, sums=5 if config.is_auto else 4)


def _stored(found: Tensor | None, p: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is stored for a parameter, the same tensor unless that was moved or cast; zeros if nothing is."""
    if found is None:
        return torch.zeros_like(p, dtype=dtype, requires_grad=False)
    return found if found.dtype == dtype and found.device == p.device else found.to(p.device, dtype)
