"""The tuner's numbers: where they are stored, how they survive what people do to parameter groups, what they say.

They are in `optimizer.param_groups[0]`, or with `per_group` in each parameter group: parameter groups are what every
checkpointing tool carries whole and uncast; a key of `optimizer.state` that is not a parameter is what some refuse. All
keys start with `mechanic_`; the values are tensors, and a few numbers. A `Tuner` is a view of them that needs no
optimizer: what it returns has a row for each of G tuners, of which there is one without `per_group`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mechanic_pytorch import _auto
from mechanic_pytorch._auto import Bet, Learned, Memory, Rounding
from mechanic_pytorch._base_step import BaseStep
from mechanic_pytorch._buckets import Work
from mechanic_pytorch._config import Config, TunerState
from mechanic_pytorch._numbers import (
    all_finite,
    column,
    columns,
    maximum,
    minimum,
    quick,
    stack,
    tensors,
    unwarned,
    where,
)
from mechanic_pytorch._torch import lrs

VECTORS = tuple(f"mechanic_{name}" for name in TunerState._fields)
SCALES = VECTORS[3]
MEMORY = "mechanic_unit"  # "auto": the fields of `Memory`; the key is that of the first checkpoints
LR_SUMS = "mechanic_lr_sums"  # of scale * lr and of lr over all steps, and the largest lr
LR_FACTOR = "mechanic_lr_factor"  # "auto": by which the base's lr is multiplied
LR_LIMIT = "mechanic_lr_limit"  # "auto": what lr times that is promised to be at most; < 0 until it is settled
FROZEN_SCALE = "mechanic_frozen_scale"  # 0 while the scale is learned
STEPS = "mechanic_steps"
SKIPPED_STEPS = "mechanic_skipped_steps"
COUNTS = (STEPS, SKIPPED_STEPS)

NO_FLOAT64 = ("mps",)  # where the tuner's numbers are float32: squares overflow at 1e19, and sums stop at 2^24


def tensors_of_row(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the key of each tensor in a row; and for each of its numbers, in proportion to which power of lr it is."""
    memory = {MEMORY: _auto.MEMORY_POWERS} if config.is_auto else {}
    vectors = {key: (power,) * len(config.betas) for key, power in zip(VECTORS, (1, 2, 0, -1), strict=True)}
    return {**vectors, **memory, LR_SUMS: (0, 1, 1)}


def numbers_of_row(config: Config) -> dict[str, float]:
    """Return the key of each number in a row, with its first value."""
    # The frozen scale is always there: a flattened checkpoint holds only what a new optimizer has.
    return {FROZEN_SCALE: 0.0, **({LR_FACTOR: 1.0, LR_LIMIT: -1.0} if config.is_auto else {})}


def is_ours(key: str) -> bool:
    """Return True if a key of a parameter group belongs to Mechanic."""
    return key.startswith("mechanic_")


def entries_of(group: dict[str, Any]) -> dict[str, Any]:
    """Return a group's lr and Mechanic's entries, without a sync: enough for a `Tuner`."""
    return {key: group[key] for key in group if key in ("lr", "initial_lr") or is_ours(key)}


class Tuner:
    """The numbers that one optimizer has learned, read from its parameter groups and written there.

    Args:
        config: the options.
        is_proportional: whether the base's updates are in proportion to its lr.
    """

    def __init__(self, config: Config, *, is_proportional: bool = True) -> None:
        self.config = config
        self.groups: list[dict[str, Any]] = []
        self._is_proportional = is_proportional
        self._has_scale = False  # "auto": every row has its first scale
        self._former: Sequence[dict[str, Any]] = ()  # the groups that held a row last

    def at(self, groups: list[dict[str, Any]], *, is_new: bool = False) -> Tuner:
        """Take the parameter groups as they are now, and return this tuner.

        Rows of groups that have gone or moved go to the groups that have taken their place; other groups get new ones.

        Args:
            groups: of the optimizer.
            is_new: whether the optimizer has no state, so that rows of groups that have gone are not its own.
        """
        self.groups = groups
        if STEPS in groups[0] and all(SCALES in row for row in self.rows):
            return self
        now = {id(row) for row in self.rows}
        gone = [old for old in self._former if id(old) not in now]
        self._take_over([] if is_new else gone)
        if STEPS not in groups[0]:
            groups[0].update({key: torch.zeros((), dtype=torch.int64, device="cpu") for key in COUNTS})
        for row in self.rows:
            if self.config.is_auto and MEMORY not in row:
                self._has_scale = False
            for key, powers in tensors_of_row(self.config).items():
                if key not in row:
                    row[key] = torch.zeros(len(powers), dtype=torch.float64, device="cpu")
            for key, number in numbers_of_row(self.config).items():
                row.setdefault(key, number)
        self._former = [*self.rows, *gone]  # groups that are rebuilt come one by one
        return self

    def _take_over(self, gone: Sequence[dict[str, Any]]) -> None:
        """Give rows and counts back to the groups they belong to."""
        keys = (*tensors_of_row(self.config), *numbers_of_row(self.config))
        for new in self.rows:
            ids = {id(p) for p in new["params"]}
            for old in gone if self.config.per_group else [*self.groups, *gone]:
                theirs = SCALES in old and (not self.config.per_group or any(id(p) in ids for p in old["params"]))
                if theirs and SCALES not in new:
                    new.update({key: old.pop(key) for key in keys if key in old})
        for old in [*self.groups, *gone]:
            if STEPS not in self.groups[0] and STEPS in old:
                self.groups[0].update({key: old.pop(key) for key in COUNTS})

    def clear(self) -> None:
        """Forget everything, and begin again."""
        for group in self.groups:
            for key in [key for key in group if is_ours(key)]:
                del group[key]
        self._former = ()
        self.at(self.groups)

    # --- Reading ---------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The parameter groups that hold a row."""
        return self.groups if self.config.per_group else self.groups[:1]

    @property
    def members(self) -> list[list[dict[str, Any]]]:
        """For each row, the parameter groups whose scale it learns."""
        return [[group] for group in self.groups] if self.config.per_group else [self.groups]

    def for_each_group(self, values: list[float]) -> list[float]:
        """Return for each parameter group the value of its row."""
        return values if self.config.per_group else values * len(self.groups)

    def _read(self, key: str) -> Tensor:
        if self.config.per_group:
            return torch.stack([row[key] for row in self.rows])
        tensor: Tensor = self.rows[0][key]
        return tensor.unsqueeze(0)

    def read(self) -> TunerState:
        """Return the vectors, shape (G, n), after moving all numbers to the device of the parameters."""
        self._former = list(self.rows)
        params = [p for group in self.groups for p in group["params"]]
        if params:
            device = params[0].device
            dtype = torch.float32 if device.type in NO_FLOAT64 else torch.float64
            for row in self.rows:
                if row[LR_SUMS].device != device or row[LR_SUMS].dtype != dtype:
                    row.update({key: row[key].to(device, dtype) for key in tensors_of_row(self.config)})
                    row.update({key: row[key].to(device) for key in COUNTS if key in row})
        return self.state

    @property
    def state(self) -> TunerState:
        """The vectors, shape (G, n)."""
        return TunerState(*(self._read(key) for key in VECTORS))

    @property
    def scale(self) -> Tensor:
        """The sum of s, for the lr that the user sees, shape (G,)."""
        scales = [row[SCALES].sum() * float(row.get(LR_FACTOR, 1.0)) for row in self.rows]
        return torch.stack(scales)

    @property
    def steps(self) -> int:
        """How many steps were made, skipped ones included. Syncs."""
        return int(self.groups[0][STEPS])

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped. Syncs."""
        return int(self.groups[0][SKIPPED_STEPS])

    @property
    def is_frozen(self) -> bool:
        """Whether the scale is frozen: those of all groups that have parameters are, or none."""
        return any(row.get(FROZEN_SCALE) for row in self.rows)

    def effective_lr(self) -> list[float]:
        """Return, for each parameter group, its lr times its scale. Syncs."""
        scales = self.scale.expand(len(self.groups)).tolist()
        return [lr * scale for lr, scale in zip(lrs(self.groups), scales, strict=True)]

    def average_lrs(self) -> list[float]:
        """Return for each row max(lr) * sum(scale * lr) / sum(lr) over its steps, 0 before the first. Syncs."""
        sums = self._read(LR_SUMS).tolist()
        return [highest * effective / plain if plain else 0.0 for effective, plain, highest in sums]

    def learned_lr(self) -> list[float]:
        """Return for each parameter group its average lr; groups of one row are in proportion to their lr. Syncs."""
        peaks, shares = self.average_lrs(), lrs(self.groups, "initial_lr")
        ratios = [share / max(shares) if any(shares) else 1.0 for share in shares]
        return peaks if self.config.per_group else [peaks[0] * ratio for ratio in ratios]

    # --- A step ----------------------------------------------------------------------------------------------------

    @property
    def seeks(self) -> bool:
        """Whether "auto" has yet to find its first scale."""
        return self.config.is_auto and not self._has_scale

    def lr_factors(self, *, can_sync: bool) -> list[float]:
        """Return for each parameter group the number by which the base's lr is multiplied, 1 without "auto".

        Syncs until every row has its first scale. Then it reads lrs alone, and not those that are tensors.
        """
        if self.config.is_auto and can_sync:
            memories = [Memory(*numbers) for numbers in self._read(MEMORY).tolist()] if self.seeks else []
            if self._is_proportional:
                for row, groups, memory in itertools.zip_longest(self.rows, self.members, memories):
                    self._choose_lr_factor(row, groups, memory)
            self._has_scale = self.is_frozen or all(memory.pace > 0 for memory in memories)
        return self.for_each_group([float(row.get(LR_FACTOR, 1.0)) for row in self.rows])

    def _choose_lr_factor(self, row: dict[str, Any], groups: list[dict[str, Any]], memory: Any) -> None:
        """Multiply the base's lr such that no update is lost in rounding, and none overflows (`_auto.Rounding`)."""
        if memory and memory.highest == 0:  # nothing has been seen
            factor = 1 / (max(lrs(groups, "initial_lr")) or 1.0)
            row[LR_FACTOR] = factor if 0 < factor < math.inf else 1.0
        elif memory and row[LR_LIMIT] < 0:
            if memory.pace:
                ratio = memory.pace * memory.highest / memory.longest
                row[LR_LIMIT] *= -1
            else:
                ratio = memory.loudest  # of an update that was too short, 0 if there was none; see `first_scale`
                if ratio:
                    row[MEMORY][Memory._fields.index("loudest")] = _auto.NOTHING_LOST
            factor = Rounding.of(groups).growth(ratio, abs(row[LR_LIMIT]))
            self._rescale(row, factor)
            row[LR_LIMIT] *= factor
        if not any(isinstance(group.get("lr"), Tensor) for group in groups):
            excess = max(lrs(groups)) * row[LR_FACTOR] / abs(row[LR_LIMIT])
            if excess > 1 / _auto.LOWER:  # lr is larger than it promised to be
                self._rescale(row, 2.0 ** -math.ceil(math.log2(excess)))

    def _rescale(self, row: dict[str, Any], factor: float) -> None:
        """Multiply the base's lr by a power of two, and let nothing else change: the scale and all in its units."""
        row[LR_FACTOR] *= factor
        row[FROZEN_SCALE] /= factor
        for key, powers in tensors_of_row(self.config).items():
            for i, power in enumerate(powers):
                if power:
                    row[key][i].mul_(factor**power)

    def largest_lr(self, factors: Sequence[float], like: Tensor) -> float | Tensor:
        """Return for each row the largest lr of its groups, each times its factor.

        A number, or a tensor of shape (G,) like `like`, which is not read: if there are several, or one is a tensor.
        """
        values = [1.0 if lr is None else lr for lr in (group.get("lr") for group in self.groups)]
        if not self.config.per_group and not any(isinstance(lr, Tensor) for lr in values):
            return max(factor * lr for factor, lr in zip(factors, values, strict=True))
        tensors = [
            factor * (lr.to(like).reshape(()) if isinstance(lr, Tensor) else like.new_full((), lr))
            for factor, lr in zip(factors, values, strict=True)
        ]
        return torch.stack(tensors) if self.config.per_group else torch.stack(tensors).amax(0, keepdim=True)

    @unwarned
    def bet(self, old: TunerState, dots: Tensor, factors: Sequence[float]) -> Bet:
        """Return what `tune` takes: with "auto" in the units of the first update.

        Args:
            old: the vectors, shape (G, n).
            dots: the sums, shape (G, 4), or (G, 5) of plain steps, from before the base's step.
            factors: by which the base's lr is multiplied in each parameter group.
        """
        lr = self.largest_lr(factors, like=dots)
        if not self.config.is_auto:
            return Bet(old, old, dots, self.config.tune_params, dots, lr)
        memory = Memory(*columns(quick(self._read(MEMORY))))
        return _auto.bet(quick(old), memory, quick(dots), quick(lr), self.config.betas, self.config.s_decay)

    @unwarned
    def settle(self, bet: Bet, new: TunerState) -> tuple[Learned, Tensor, Tensor]:
        """Return what was learned, `new` being what `tune` has made of a bet; no effective lr exceeds `max_lr`.

        Also returns whether the step is to be skipped, shape (), because a number is not finite, and which rows it
        leaves as they are, shape () or (G,): all if it is skipped, and those of groups of which nothing was measured,
        which have no gradient in any process.
        """
        rows = len(self.rows)
        limit = self._scale_limit(tensors(bet.lr, rows))
        if bet.memory is None:
            learned = Learned(_auto.bounded(new, limit))
        else:
            limit, memory = quick(limit), bet.memory
            if limit is not None:  # what the bound takes from a scale is no fall, which would end a search
                memory = memory._replace(peak=minimum(memory.peak, limit))
            learned = _auto.settle(bet, _auto.bounded(new, limit), memory)
            learned = learned._replace(state=_auto.bounded(learned.state, limit))
        skip = ~all_finite(learned.state)
        unchanged = skip | (bet.measured == 0).all(-1) if self.config.per_group else skip
        learned = learned.unchanged_where(unchanged, bet.old)
        tuned = tensors(learned._replace(memory=None, time=None), rows)
        tuned = tuned._replace(memory=learned.memory, time=learned.time)  # `recorded` alone takes them, as they are
        return tuned, tensors(skip, rows).reshape(()), tensors(unchanged, rows)

    def first_scale(self, learned: Learned, work: Work, bet: Bet, base: BaseStep, unchanged: Tensor) -> Learned:
        """Return what was learned, with a first scale in rows whose first update was just made, or that begin again.

        Rows begin again where parameters that are new bring a gradient too long for the scale of the others.

        Args:
            learned: what this step has learned.
            work: what was stepped.
            bet: that of this step.
            base: the base's step.
            unchanged: which rows stay as they are, shape () or (G,).
        """
        # Of several processes, some may have no newcomers: there, nobody counts as new.
        new_rows = set() if any(work.shard_groups) else work.new_rows
        if learned.memory is None or not (self.seeks or new_rows):
            return learned
        can_grow = self._is_proportional and base.can_sync
        least = [
            Rounding.of(groups).least_ratio(abs(row[LR_LIMIT])) * can_grow
            for row, groups in zip(self.rows, self.members, strict=True)
        ]

        def on_device(numbers: Iterable[float]) -> Tensor:  # filled there: copying would block a GPU
            return torch.stack([bet.measured.new_full((), number) for number in numbers])

        learned, bet = tensors(learned, len(least)), tensors(bet, len(least))
        assert learned.memory is not None
        learned = _auto.first_scale(
            learned,
            learned.memory,
            bet,
            work.first_lengths(new_rows, like=bet.measured, grad_scale=base.grad_scale, masked=base.masked),
            is_new=on_device(float(i in new_rows) for i in range(len(least))),
            unchanged=unchanged,
            least_ratio=on_device(least),
        )
        return learned._replace(state=_auto.bounded(learned.state, self._scale_limit(bet.lr)))

    def _scale_limit(self, lr: float | Tensor) -> Tensor | None:
        """Return the largest scale that `max_lr` allows, shape (G,), or None."""
        max_lr = self.config.max_lr
        return None if max_lr is None else max_lr / maximum(self._read(LR_SUMS)[..., 2], lr)

    @unwarned
    def recorded(
        self,
        scale: Tensor,
        lr: float | Tensor,
        skip: Tensor,
        unchanged: Tensor,
        learned: Learned | None = None,
        update: Tensor | None = None,
    ) -> Callable[[], object]:
        """Return a function that records a step in one call, so that no interrupt leaves it half recorded.

        Args:
            scale: of this step, shape (G,).
            lr: the largest of this step's.
            skip: whether it is to count as skipped, shape ().
            unchanged: which rows it leaves as they were, shape () or (G,).
            learned: the new numbers; None leaves them as they are.
            update: |u| of the base's update, shape (G,), of a plain step.
        """
        before, rows = quick(self._read(LR_SUMS)), column(quick(unchanged))
        scale, lr = quick(scale), quick(lr)
        effective, plain, highest = columns(before)
        sums = stack([effective + scale * lr, plain + lr, maximum(highest, lr)])
        values = {LR_SUMS: where(rows, before, sums)}
        if learned is not None and learned.memory is not None and update is not None:
            memory = _auto.moved(learned, scale, quick(update.to(self.rows[0][MEMORY])), lr)
            values[MEMORY] = where(rows, quick(self._read(MEMORY)), stack(memory))
        if learned is not None:
            values.update(zip(VECTORS, learned.state, strict=True))
        first = self.groups[0]
        places, contents = [first[STEPS], first[SKIPPED_STEPS]], [first[STEPS] + 1, first[SKIPPED_STEPS] + skip]
        for key, value in values.items():
            places += [row[key] for row in self.rows]
            contents += tensors(value, len(self.rows)).unbind()
        return functools.partial(torch._foreach_copy_, places, contents)

    def count_skipped(self) -> None:
        """Count a step that was not made."""
        torch._foreach_add_([self.groups[0][key] for key in COUNTS], 1)

    # --- Freezing --------------------------------------------------------------------------------------------------

    def freeze(self, who: str, base: str) -> None:
        """Note the scales that a step is to use from now on. Syncs; no other process is asked.

        Raises:
            ValueError: there is no scale yet, or no lr to multiply by it.
        """
        if any(group.get("lr") is None for group in self.groups) or not self._is_proportional:
            raise ValueError(
                f"{who}: freeze_scale needs a base with an lr in each parameter group, to which its updates are in "
                f"proportion. Got {base}. Remedy: let the scale adapt, or build this optimizer with another base."
            )
        scales = self.read().scales.sum(-1).tolist()
        for i, (scale, groups) in enumerate(zip(scales, self.members, strict=True)):
            if scale == 0.0 and any(group["params"] for group in groups):
                which = f" in parameter group {i}" if len(scales) > 1 else ""
                raise ValueError(
                    f"{who}: freeze_scale needs a scale that is learned. Got 0{which}. Remedy: make some steps first, "
                    "in which all groups have a gradient, or load the state of an optimizer that has made them."
                )
        for row, scale in zip(self.rows, scales, strict=True):
            row[FROZEN_SCALE] = scale

    def check_can_grow(self, who: str) -> None:
        """Refuse a parameter group that would have no scale.

        Raises:
            ValueError: scales are frozen, one per group.
        """
        if self.config.per_group and self.is_frozen:
            raise ValueError(
                f"{who}: add_param_group with per_group=True needs scales that adapt, because the new group has none "
                "yet. Got frozen ones. Remedy: call optimizer.unfreeze_scale() first."
            )

    def unfreeze(self) -> None:
        """Let the scale be learned again."""
        for row in self.rows:
            row[FROZEN_SCALE] = 0.0

    def frozen_scales(self) -> list[float]:
        """Return for each parameter group its frozen scale."""
        return self.for_each_group([row[FROZEN_SCALE] for row in self.rows])
