r"""`s_init="auto"`: plain steps of the base, at a scale that is learned from the way the weights have really gone.

A step is the base's own, S times as long, and nothing else:

    x = x + S * u

S is learned by the bets of Algorithm 1 (`tune`), on D = x - x_ref, the way that the weights have really gone: with
delta = D / S. x_ref is stored, not delta, so whatever is done to the weights between two steps is in D. This file is
what happens before `tune` (`bet`) and after it (`settle`): eight rules that replace the constants of Algorithm 1. They
are pure functions of numbers, one for each tuner. docs/safety.md gives the reasons, docs/design-notes.md what the
constants were chosen on.

**Start** (`first_scale`). |u| is the length of the first update and |x| that of the weights then, 1 if they are all 0.
The first step already moves the weights by `RELATIVE` of their length: s_init = RELATIVE * |x| / |u|. s_decay is
counted in |u| / (the longest |x| so far), and eps is 0. Multiplying all updates by a constant then changes nothing: so
no base lr matters. The scale stays 0 until the first nonzero update and gradient. Under a warm-up |u| is rescaled to
the largest lr.

**Time** (`settle`). A step whose lr is the part w of the largest so far counts as the part w of a step: the new vectors
are old + w * (new - old). At lr 0 nothing changes. During the search, until the scale has fallen to `FOUND` of its
largest, w is 1, because the schedule may be over soon.

**Schedule** (`of_schedule`). The search finds the largest effective lr that wins, whatever the schedule does meanwhile:
as long as bets win, the scale makes up for an lr that falls. And until a scale was lost, no schedule raises the
effective lr above the largest before it: what is more is taken from the scale. A warm-up may, but not by more than
`FASTEST` times in a step, as an lr would that is set by hand from 1e-8 to 1.

**Noise** (`bet`). While lr rests at its highest, a loss counts as much as a gain, and noise alone lets no scale grow. A
schedule that moves lr, up in a warm-up or down from its highest, takes noise out of the weights at its end, so the
scale that pays best at the moment is too small: losses count half.

**Memory** (`settle`). After the search x_ref follows the weights: each step takes it nearer by k / (steps since then),
where k is `FOLLOW` while lr rests at its highest and `FOLLOW_MOVING` while it moves.

**Falls** (`settle`). A scale that has fallen to `LOST` of its largest was wrong, or its bets were about another
problem. It goes on from `REGAINED` of its largest, or `REGAINED_MOVING` while lr moves, with empty vectors; that is the
new s_init. If <D, g> there gets `RUNAWAY` times as large as when it fell, the weights run away, and it falls again.
From the first fall on, `CEILING` times the largest effective lr before it is a ceiling. A step against it raises it by
the part 1 / (steps since then).

**Bad batches** (`bet`). A step is shortened in proportion if the longest gradient that a momentum may still hold,
max(|g|, `MOMENTUM` * that of before), is more than `LONGER` times as long as the longest of late.

**Newcomers** (`first_scale`). A step that would be shortened as a bad batch, but because of the gradient of parameters
that take part for the first time, is another problem, for which the scale of the others may be far too large: layers in
turns, or no longer frozen. All begins again as at the start, from |u| and |x| of the newcomers; the step is not
shortened, and x_ref is x. Not so in sharded runs, where processes may disagree on who is new.

**Rounding** (`Rounding`). u is a difference of stored weights, of which a tiny lr or gradient leaves little. So a base,
if its updates are in proportion to lr, finds every lr multiplied by one number, and nobody else does. At first that
number makes the largest lr 1. A first update that is shorter than the weights by more than half of their digits is not
used: the number grows and the next step tries again. Later it changes by powers of two, which round nothing: once,
until the first update would be as long as the weights, if more than a quarter of its digits are lost; and whenever lr
grows past what it promised to be.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mechanic_pytorch._config import TuneParams, TunerState
from mechanic_pytorch.kernels.arguments import Scales

RELATIVE = 1e-3  # by how much of their length the first step moves the parameters
LOWER = 1 - 1e-6  # of the highest lr, or of the largest scale: what is more is rounding
LOSS_WEIGHT_MOVING = 0.5  # what a step that lost counts, against one that gained, while lr moves; where it rests, 1
FOUND = 0.75  # of its largest, to which the scale has to fall for the search to be over
LOST = 0.1  # of its largest: where a scale was wrong
FASTEST = 2.0  # by how much a schedule may raise the largest effective lr in a step
RUNAWAY = 10.0  # times the loss of the last time, from which on the least scale was wrong, too
REGAINED, REGAINED_MOVING = 0.2, 0.3  # of its largest, where it then goes on
CEILING = 0.5  # of the largest effective lr before a scale was lost: what it does not exceed again at once
FOLLOW, FOLLOW_MOVING = 1.0, 0.3  # how closely x_ref follows: the power of time by which the way is forgotten
LONGER = 3.0  # than the longest gradient of late, from which on a step is shortened
LATE, ADMITTED = 0.99, 2.0  # how fast the longest gradient is forgotten, and by how much one step may raise it
MOST_LR = 2.0**60  # the largest lr that a base is given
MOMENTUM = 0.9  # how much of a gradient the base may hold after a step


class Memory(NamedTuple):
    """What is remembered of the run, shape (G,) each, all 0 at first; stored side by side."""

    pace: Tensor  # |u| / lr of the first update
    longest: Tensor  # |x|
    highest: Tensor  # lr
    floor: Tensor  # s_init, times the highest lr
    peak: Tensor  # the largest scale since it was last learned from empty vectors
    age: Tensor  # 0 during the search; then 1 + the steps since, each counted by its lr
    gradient: Tensor  # the longest |g| of late
    momentum: Tensor  # the longest |g| that the base may still hold
    loudest: Tensor  # the largest effective lr since the scale was last learned from empty vectors
    ceiling: Tensor  # of the effective lr; 0 if there is none
    loss: Tensor  # <D, g> where the scale was lost last; 0 if it gained there, or never was


# Which power of lr each field is in proportion to.
MEMORY_POWERS = (0, 0, 1, 0, -1, 0, 0, 0, 0, 0, 0)


class Bet(NamedTuple):
    """What `tune` takes; and what "auto" knows by then, else None."""

    state: TunerState
    dots: Tensor  # the four sums of delta, shape (G, 4)
    params: TuneParams
    measured: Tensor  # the four sums as they were measured
    lr: float | Tensor  # the largest of this step's; a number, or shape (G,)
    memory: Memory | None = None
    length: Tensor | None = None  # of the coming step, 1 unless it is shortened, shape (G,)
    is_moving: Tensor | None = None  # whether a schedule moves lr, shape (G,)


class Learned(NamedTuple):
    """The tuner after a step; with "auto", also what makes the step a plain one."""

    state: TunerState
    memory: Memory | None = None
    length: Tensor | None = None  # of the step, shape (G,)
    follow: Tensor | None = None  # by what part of D x_ref follows the weights, shape (G,)
    restarted: Tensor | None = None  # whether newcomers have made it begin again, shape (G,), if they may have

    def is_nonfinite(self) -> Tensor:
        """Return whether any number of the vectors is not finite, shape ()."""
        # A list, here and in `Tuner.recorded`: torch 2.11 compiles no stack of a tuple that `_replace` has made.
        return torch.stack([*self.state]).isfinite().all().logical_not()

    def unchanged_where(self, rows: Tensor, old: TunerState) -> Learned:
        """Return the old vectors in these rows, shape () or (G,), and an x_ref that rests."""
        state = either(rows, old, self.state)
        follow = None if self.follow is None else torch.where(rows, 0.0, self.follow)
        return self._replace(state=state, follow=follow)

    def scales(self, old: TunerState) -> Scales:
        """Return the numbers by which a kernel moves, shape (G,) each."""
        scale = self.state.scales.sum(-1)
        if self.length is None or self.follow is None:
            return Scales(old.scales.sum(-1), scale)
        return Scales(self.length * scale, self.length * scale, self.follow)


def bounded(state: TunerState, limit: Tensor | None) -> TunerState:
    """Return the tuner, its scales made smaller by one factor if their sum, in any order, could exceed `limit`.

    Args:
        state: the vectors, shape (G, n).
        limit: shape (G,), or None, which bounds nothing.
    """
    if limit is None:
        return state
    margin = 1 - (state.scales.shape[-1] + 8) * torch.finfo(state.scales.dtype).eps
    factor = (margin * limit / state.scales.sum(-1)).clamp_max(1.0).unsqueeze(-1)
    return state._replace(scales=state.scales * factor)


def moves(memory: Memory, lr: float | Tensor) -> Tensor:
    """Return whether lr is higher than ever, or below its highest, `memory` being that of before; shape (G,)."""
    return (lr > memory.highest) | (lr < LOWER * memory.highest)


def either(rows: Tensor, state: TunerState, other: TunerState) -> TunerState:
    """Return the vectors of `state` in these rows, shape () or (G,), and those of `other` elsewhere."""
    condition = rows.unsqueeze(-1)
    return TunerState(*(torch.where(condition, a, b) for a, b in zip(state, other, strict=True)))


def times(factor: Tensor, state: TunerState) -> TunerState:
    """Return vectors whose scale is multiplied by a factor, shape (G,)."""
    by = factor.unsqueeze(-1)
    return state._replace(reward=by * state.reward, scales=by * state.scales)


def of_schedule(memory: Memory, scale: Tensor, loss: Tensor, lr: float | Tensor) -> Tensor:
    """Return by what the scale is to be multiplied because of what the schedule does, shape (G,).

    Args:
        memory: that of the last step.
        scale: that of the last step.
        loss: <D, g>.
        lr: the largest of this step's.
    """
    now = lr * scale
    wins = (memory.age == 0) & (loss < 0) & (scale >= LOWER * memory.peak)
    least = torch.where(wins, memory.loudest, 0.0)
    most = torch.where(memory.ceiling == 0, memory.loudest * torch.where(lr > memory.highest, FASTEST, 1.0), math.inf)
    return torch.where(now > 0, now.clamp(least, most) / now, 1.0)


def bet(
    state: TunerState, memory: Memory, dots: Tensor, lr: float | Tensor, betas: tuple[float, ...], s_decay: float
) -> Bet:
    """Return what `tune` needs: vectors and memory of now, the four sums of D / S, the numbers, how long a step is.

    Args:
        state: the vectors, shape (G, n).
        memory: that of the last step.
        dots: the four sums of D, shape (G, 4).
        lr: the largest of this step's.
        betas: of the options.
        s_decay: of the options.
    """
    change = of_schedule(memory, state.scales.sum(-1), dots[..., 0], lr)
    state = times(change, state)
    scale, g, x = state.scales.sum(-1), dots[..., 2].sqrt(), dots[..., 3].sqrt()
    is_known = scale > 0
    held = torch.maximum(g, MOMENTUM * memory.momentum)
    shortened = torch.where(is_known & (held > 0), LONGER * memory.gradient / held, 1.0).clamp_max(1.0)
    gradient = torch.maximum(LATE * memory.gradient, torch.minimum(g, ADMITTED * memory.gradient))
    is_moving = moves(memory, lr)
    highest, longest = memory.highest.clamp_min(lr), torch.maximum(memory.longest, x)
    memory = memory._replace(
        highest=highest, longest=longest, gradient=gradient, momentum=held, peak=change * memory.peak
    )
    by = torch.where(is_known, shortened / scale, 0.0)
    sums = torch.cat([by.unsqueeze(-1) * dots[..., :2], dots[..., 2:]], -1)
    decay = torch.where(is_known, s_decay * memory.pace * highest / longest, 0.0)
    s_init = torch.where(is_known, memory.floor / highest, 0.0)
    loss_weight = torch.where(is_moving, LOSS_WEIGHT_MOVING, 1.0).to(decay)
    params = TuneParams(betas, decay.unsqueeze(-1), s_init.unsqueeze(-1), 0.0, loss_weight.unsqueeze(-1))
    return Bet(state, sums, params, dots, lr, memory, shortened, is_moving)


def settle(bet: Bet, new: TunerState, memory: Memory) -> Learned:
    """Return the tuner after a step, what is remembered, and by what part of D x_ref follows the weights.

    Args:
        bet: what `tune` was given.
        new: what `tune` has made of it.
        memory: that of the bet.
    """
    old, lr, loss = bet.state, bet.lr, bet.measured[..., 0]
    tiny = torch.finfo(memory.highest.dtype).tiny
    time = (lr / memory.highest.clamp_min(tiny)).clamp_max(1.0)
    was_found, has_ceiling = memory.age > 0, memory.ceiling > 0
    time = torch.where(was_found, time, time > 0)
    new = new._replace(scales=torch.where(new.sum_squared_products == 0, old.scales, new.scales))
    weight = time.unsqueeze(-1)
    new = TunerState(*(torch.lerp(a, b, weight) for a, b in zip(old, new, strict=True)))
    scale = new.scales.sum(-1)

    effective = lr * scale
    is_over = has_ceiling & (effective > memory.ceiling)
    ceiling = torch.where(is_over, memory.ceiling * (1 + time / memory.age.clamp_min(1.0)), memory.ceiling)
    factor = torch.where(is_over, ceiling / effective, 1.0).clamp_max(1.0)
    new, scale = times(factor, new), factor * scale
    loudest = torch.maximum(memory.loudest, lr * scale)

    is_least = scale * memory.highest * LOWER <= memory.floor
    runs_away = is_least & (memory.loss > 0) & (loss > RUNAWAY * memory.loss)
    is_lost = (scale < LOST * memory.peak) | runs_away
    is_found = was_found | (scale < FOUND * memory.peak)
    assert bet.is_moving is not None
    moving = bet.is_moving.to(scale)
    regained = memory.peak * (REGAINED + moving * (REGAINED_MOVING - REGAINED))
    fresh = evenly(regained, like=new)
    new = either(is_lost, fresh, new)
    lower = CEILING * loudest
    lower = torch.where(has_ceiling, torch.minimum(ceiling, lower), lower)

    age = torch.where(is_lost, 1.0, memory.age.clamp_min(1.0)) + time
    power = FOLLOW + moving * (FOLLOW_MOVING - FOLLOW)
    follow = torch.where(is_lost | ~is_found, 0.0, power * time / (age + power + 7))
    memory = memory._replace(
        floor=torch.where(is_lost, regained * memory.highest, memory.floor),
        peak=torch.where(is_lost, regained, torch.maximum(memory.peak, scale)),
        age=torch.where(is_found, age, 0.0),
        loudest=torch.where(is_lost, 0.0, loudest),
        ceiling=torch.where(is_lost, lower, ceiling),
        loss=torch.where(is_lost, loss.clamp_min(0.0), memory.loss),
    )
    return Learned(new, memory, bet.length, follow)


def first_scale(
    learned: Learned,
    memory: Memory,
    bet: Bet,
    lengths: tuple[Tensor, Tensor, Tensor],
    *,
    is_new: Tensor,
    unchanged: Tensor,
    least_ratio: Tensor,
) -> Learned:
    """Return the tuner with a first scale.

    A row gets its first scale if the step that the base has just made was the first with an update. It begins again
    if parameters took part for the first time in a step that was to be shortened, and their gradient is the reason.

    Args:
        learned: the tuner after this step.
        memory: what is remembered, with the `highest` lr of now.
        bet: that of this step.
        lengths: |u|, |g| and |x|, shape (G,), of parameters that are new if there are some.
        is_new: 1 where there are some, else 0.
        unchanged: which rows stay as they are, shape () or (G,).
        least_ratio: how long the update has to be, in lengths of the weights, to be used.
    """
    update, gradient, weights = lengths
    state, length, follow = learned.state, learned.length, learned.follow
    assert length is not None
    assert follow is not None
    g = bet.measured[..., 2].sqrt()
    pace, longest = update / bet.lr, torch.where(weights > 0, weights, 1.0)
    floor = RELATIVE * longest / pace
    scale = floor / memory.highest
    ratio = pace * memory.highest / longest
    is_usable = (g > 0) & torch.stack([pace, g, weights]).isfinite().all(0)
    seeks = (memory.pace == 0) & is_usable
    is_too_long = (length < 1) & (gradient > length * memory.momentum)  # LONGER times the longest of before
    again = (memory.pace > 0) & is_usable & (is_new > 0) & is_too_long
    begins = (seeks | again) & (pace > 0) & scale.isfinite() & (ratio >= least_ratio) & ~unchanged
    none = torch.zeros_like(g)
    memory = memory._replace(loudest=torch.where(seeks, ratio.clamp_min(torch.finfo(ratio.dtype).tiny), memory.loudest))
    first = Memory(pace, longest, memory.highest, floor, scale, none, g, g, floor, none, none)
    memory = Memory(*(torch.where(begins, a, b) for a, b in zip(first, memory, strict=True)))
    fresh = evenly(scale, like=state)
    state = either(begins, fresh, state)
    again = again & begins
    return Learned(state, memory, torch.where(again, 1.0, length), torch.where(again, 1.0, follow), again)


def evenly(scale: Tensor, like: TunerState) -> TunerState:
    """Return vectors that have seen nothing, with this scale, shape (G,), in equal shares."""
    shares = (scale / like.scales.shape[-1]).unsqueeze(-1).expand_as(like.scales)
    nothing = torch.zeros_like(shares)
    return TunerState(nothing, nothing, nothing, shares)


class Rounding(NamedTuple):
    """What the weights of a tuner can hold."""

    precision: float  # their coarsest spacing at 1
    most_lr: float  # the largest lr that the base may be given

    @classmethod
    def of(cls, groups: Iterable[dict[str, Any]]) -> Rounding:
        """Look at the dtypes of the parameters of some groups."""
        params = (p for group in groups for p in group["params"])
        dtypes = {p.dtype for p in params if p.dtype.is_floating_point or p.is_complex()}
        kinds = [torch.finfo(dtype) for dtype in dtypes or {torch.float32}]
        return cls(max(kind.eps for kind in kinds), min(MOST_LR, *(kind.max / 2**4 for kind in kinds)))

    def least_ratio(self, limit: float) -> float:
        """Return how long the first update has to be, in lengths of the weights, for half of its digits to be there.

        Args:
            limit: what lr times its factor is promised to be at most; what cannot grow has to do as it is.
        """
        return math.sqrt(self.precision) if limit / self.precision <= self.most_lr else 0.0

    def growth(self, ratio: float, limit: float) -> float:
        """Return the power of two by which the base's lr is to be multiplied, such that no update is lost in rounding.

        Args:
            ratio: the length of the first update, in lengths of the weights; 0 if there was none.
            limit: what lr times its factor is promised to be at most.
        """
        bits = math.ceil(-math.log2(max(ratio, self.precision))) if ratio else 0
        if ratio >= self.precision**0.25:
            bits = min(bits, 0)  # it has three quarters of its digits
        factor: float = 2.0 ** max(bits, -math.log2(limit))
        return factor if limit * factor <= self.most_lr else 1.0
