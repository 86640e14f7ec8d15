r"""`s_init="auto"`, the default: plain steps of the base, at a scale learned from the displacement of the weights.

A step is the base's own, S times as long, and nothing else:

    x = x + S * u

S is learned by the bets of Algorithm 1 (`tune`) on D = x - x_ref, the displacement of the weights, with delta = D / S.
x_ref is stored, not delta, so D contains whatever is done to the weights between two steps. This file has what happens
before `tune` (`bet`) and after it (`settle`): nine rules that replace the constants of Algorithm 1. They are pure
functions of numbers, one for each tuner. docs/safety.md gives the reasons, and docs/design-notes.md says on which tasks
the constants were chosen.

**Start** (`first_scale`). |u| is the length of the first update and |x| that of the weights then, 1 if they are all 0.
The first step already moves the weights by `RELATIVE` of their length: s_init = RELATIVE * |x| / |u|. s_decay is
counted in |u| / (the longest |x| so far), and eps is 0. Multiplying all updates by a constant then changes nothing, so
the base lr does not matter. The scale stays 0 until the first nonzero update and gradient. Under a warm-up |u| is
rescaled to the largest lr.

**Time** (`settle`). A step whose lr is the part w of the largest since the search counts as the part w of a step: the
new vectors are old + w * (new - old). At lr 0 nothing changes. During the search, until the scale has fallen to `FOUND`
of its largest, w is 1, because the schedule may be over soon.

**Schedule** (`of_schedule`). The search finds the largest effective lr that wins, whatever the schedule does meanwhile:
as long as bets win, the scale makes up for an lr that falls. Nor does a schedule raise the effective lr above its
largest value before: the scale is lowered instead. Only a warm-up may raise it, by a factor of at most `FASTEST` in a
step, which an lr that is set by hand from 1e-8 to 1 would exceed.

**Noise** (`bet`). While lr rests at its highest, a loss counts as much as a gain, so noise alone lets no scale grow. A
schedule that moves lr, up in a warm-up or down from its highest, takes noise out of the weights at its end. The scale
that pays best at the moment is then too small, so losses count half. But noise alone would grow by that, so it holds
only below `NEAR` times the floor, or while bets win by more than noise would. With c = -cos(D, g), of which `LATE` is
kept at each step, they do if

    sum c > `SURELY` * sqrt(sum c^2)

**Floor** (`settle`). Before it goes too far, the search has gone a distance R = max |D|. From then on a step is at
least R / (`SHARE` * sqrt(`REST` + n)) long, where n is the number of steps at a resting lr. A step at the part w of the
highest lr counts as w^`RESTING` of one, because a schedule that falls shortens steps by itself. So the scale is at
least

    S = R / (`SHARE` * sqrt(`REST` + n)) / |u|

and that is the new s_init. |u| is an average over the last `RECENT` steps, but at least 1 / `SHORTEST` of the longest
so far, because updates that are short for a while may be long again; updates of 0 do not count. This is the rule of
DoG (Ivgi, Hinder and Carmon, 2023, arXiv 2302.12022), with the R of a search in place of the distance so far, and
updates in place of gradients.

Bets continue, from empty vectors. If they raise the scale above `FARTHER` times its floor, this is a search again. It
began where the scale was last below `NEAR` times the floor, and lasts until the scale has fallen to `FOUND` of its
largest. R is the farthest |D| of all searches. As D also holds what was gone before, n grows as far as it takes for the
new floor to be at most 1 / `NEAR` of that largest scale.

**Memory** (`settle`). After a search x_ref follows the weights: each step moves it by about the part
k / (steps since then) of its distance to them, where k is `FOLLOW`. After a later search, these steps count from
`RECENT`.

**Bad batches** (`bet`). A step is shortened in proportion if the longest gradient that a momentum may still hold,
max(|g|, `MOMENTUM` * that of before), is more than `LONGER` times as long as the longest of late.

**Newcomers** (`first_scale`). Parameters that take part for the first time, as layers in turns or unfrozen ones do, are
another problem, for which the scale of the others may be far too large. If a step would be shortened as a bad batch
because of their gradient, everything begins again as at the start, from |u| and |x| of the newcomers: the step is not
shortened, and x_ref is x. Sharded runs do without this rule, because their processes may disagree on what is new.

**Rounding** (`Rounding`). u is a difference of stored weights, of which a tiny lr or gradient leaves little. So a base
whose updates are in proportion to lr sees every lr multiplied by one number, which nobody else sees. At first that
number makes the largest lr 1. A first update that is shorter than the weights by more than half of their digits is not
used: the number grows, and the next step tries again. But if the very first update is 0, the base may not have made
one, so the number stays as it is once. Later the number changes by powers of two, which round nothing: once, until the
first update would be as long as the weights, if more than a quarter of its digits are lost; and whenever lr grows
above the bound that was promised.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mechanic_pytorch._config import TuneParams, TunerState
from mechanic_pytorch._numbers import (
    column,
    columns,
    epsilon,
    lerp,
    maximum,
    minimum,
    quick,
    sqrt,
    stack,
    tiny,
    where,
    zeros_like,
)
from mechanic_pytorch.kernels.arguments import Scales

RELATIVE = 1e-3  # by how much of their length the first step moves the parameters
LOWER = 1 - 1e-6  # of the highest lr, or of the largest scale: what is more is rounding
LOSS_WEIGHT_MOVING = 0.5  # what a step that lost counts, against one that gained, while lr moves; else 1
FOUND = 0.75  # of its largest, to which the scale has to fall for a search to be over
LEAST_LR = 1e-6  # of the highest: for an lr that falls further no scale makes up
FASTEST = 2.0  # by how much a schedule may raise the largest effective lr in a step
SHARE, REST = 3.0, 40.0  # a step is at least this part of the farthest way: 1 / (SHARE * sqrt(REST + steps at rest))
RESTING = 8  # the power of lr, as a part of the highest, as which a step at rest counts
NEAR = 2.0  # times the floor: up to there noise cannot have carried the scale far
SURELY = 2.0  # standard deviations, by which bets have to win if noise is not to be the reason
FARTHER = 4.0  # times the floor, to which the scale has to rise for its fall to be the end of a search
RECENT = 10.0  # steps, over which the length of the base's updates is averaged, once there are so many
FOLLOW = 0.3  # how closely x_ref follows: the power of time by which the way is forgotten
LONGER = 3.0  # than the longest gradient of late, from which on a step is shortened
LATE = 0.99  # how fast what is of late is forgotten
ADMITTED = 2.0  # by how much one step may raise the longest gradient, or the longest update
SHORTEST = 10.0  # of the longest update so far: how much less |u| is taken for at least
NOTHING_LOST = 1.0  # the length of an update, in lengths of the weights, that calls for no larger lr
MOST_LR = 2.0**60  # the largest lr that a base is given
MOMENTUM = 0.9  # how much of a gradient the base may hold after a step


class Memory(NamedTuple):
    """What is remembered of the run, shape (G,) each, all 0 at first; stored side by side."""

    pace: Tensor  # |u| / lr of the first update
    longest: Tensor  # |x|
    highest: Tensor  # lr; after the search, since its end
    floor: Tensor  # s_init: during the search that of the start, then what the scale is at least
    peak: Tensor  # the largest scale since a search began: at the start, or where it was last near its floor
    age: Tensor  # 0 during the first search; then 1, or RECENT after a later one, + the steps since, counted by lr
    gradient: Tensor  # the longest |g| of late
    momentum: Tensor  # the longest |g| that the base may still hold
    loudest: Tensor  # the largest effective lr of the search
    farthest: Tensor  # |D| since then
    reach: Tensor  # the farthest |D| of all searches; 0 during the first
    speed: Tensor  # |u| / lr of late
    rest: Tensor  # steps at a resting lr since the first
    stride: Tensor  # the longest |u| / lr
    path: Tensor  # the sum of all steps' lengths since `farthest` began
    won: Tensor  # the sum of -cos(D, g) of late, where it is positive
    lost: Tensor  # and of cos(D, g)
    noise: Tensor  # the sum of its square


# Which power of lr each field is in proportion to.
MEMORY_POWERS = (0, 0, 1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


class Bet(NamedTuple):
    """What `tune` takes, and what stands beside it; in its last lines what "auto" knows by then, else None."""

    old: TunerState  # the vectors of the last step
    state: TunerState  # and as `tune` takes them
    dots: Tensor  # the four sums of delta, shape (G, 4)
    params: TuneParams
    measured: Tensor  # the sums as they were measured
    lr: float | Tensor  # the largest of this step's; a number, or shape (G,)
    memory: Memory | None = None
    length: Tensor | None = None  # of the coming step, 1 unless it is shortened, shape (G,)


class Learned(NamedTuple):
    """The tuner after a step; with "auto", also what makes the step a plain one."""

    state: TunerState
    memory: Memory | None = None
    length: Tensor | None = None  # of the step, shape (G,)
    follow: Tensor | None = None  # by what part of D x_ref follows the weights, shape (G,)
    time: Tensor | None = None  # as what part of a step it counts, shape (G,)
    restarted: Tensor | None = None  # whether newcomers have made it begin again, shape (G,), if they may have

    def unchanged_where(self, rows: Tensor, old: TunerState) -> Learned:
        """Return the old vectors in these rows, shape () or (G,), and an x_ref that rests."""
        state = either(rows, old, self.state)
        follow = None if self.follow is None else where(rows, 0.0, self.follow)
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
    margin = 1 - (state.scales.shape[-1] + 8) * epsilon(state.scales)
    factor = minimum(margin * limit / state.scales.sum(-1), 1.0)
    return state._replace(scales=state.scales * column(factor))


def moves(memory: Memory, lr: float | Tensor) -> Tensor:
    """Return whether lr is higher than ever, or below its highest, `memory` being that of before; shape (G,)."""
    return (lr > memory.highest) | (lr < LOWER * memory.highest)


def either(rows: Tensor, state: TunerState, other: TunerState) -> TunerState:
    """Return the vectors of `state` in these rows, shape () or (G,), and those of `other` elsewhere."""
    condition = column(rows)
    return TunerState(*(where(condition, a, b) for a, b in zip(state, other, strict=True)))


def times(factor: Tensor, state: TunerState) -> TunerState:
    """Return vectors as if all gains had been larger by a factor, shape (G,), and with them the scale."""
    by = column(factor)
    return state._replace(reward=by * state.reward, scales=by * state.scales)


def in_units(factor: Tensor, state: TunerState) -> TunerState:
    """Return vectors as if all scales so far had been larger by a factor, shape (G,), and all else the same."""
    by = column(factor)
    m, v, reward, scales = state
    return TunerState(m / by, v / (by * by), reward, by * scales)


def of_schedule(memory: Memory, scale: Tensor, loss: Tensor, lr: float | Tensor) -> Tensor:
    """Return by what the scale of a search is to be multiplied because of what the schedule does, shape (G,).

    Args:
        memory: that of the last step.
        scale: that of the last step.
        loss: <D, g>.
        lr: the largest of this step's.
    """
    now = maximum(LEAST_LR * memory.highest, lr) * scale
    wins = (loss < 0) & (scale >= LOWER * memory.peak)
    least = where(wins, memory.loudest, 0.0)
    most = where(lr > memory.highest, FASTEST * memory.loudest, memory.loudest)
    return where((memory.age == 0) & (lr * scale > 0), minimum(maximum(now, least), most) / now, 1.0)


def floor(memory: Memory) -> Tensor:
    """Return the least scale after a search, shape (G,)."""
    update = maximum(memory.speed, memory.stride / SHORTEST) * memory.highest
    return memory.reach / (SHARE * sqrt(REST + memory.rest) * maximum(update, tiny(update)))


def bet(
    old: TunerState, memory: Memory, dots: Tensor, lr: float | Tensor, betas: tuple[float, ...], s_decay: float
) -> Bet:
    """Return what `tune` needs: vectors and memory of now, the four sums of D / S, the numbers, how long a step is.

    Args:
        old: the vectors of the last step, shape (G, n).
        memory: that of the last step.
        dots: `[<D, g>, <D, x>, |g|^2, |x|^2, |D|^2]`, shape (G, 5).
        lr: the largest of this step's.
        betas: of the options.
        s_decay: of the options.
    """
    delta_g, delta_x, g_squared, x_squared, way_squared = columns(dots)
    change = of_schedule(memory, old.scales.sum(-1), delta_g, lr)
    state = times(change, old)
    scale = state.scales.sum(-1)
    g, x, way = sqrt(g_squared), sqrt(x_squared), sqrt(way_squared)
    is_known = scale > 0
    held = maximum(g, MOMENTUM * memory.momentum)
    shortened = minimum(where(is_known & (held > 0), LONGER * memory.gradient / held, 1.0), 1.0)
    gradient = maximum(LATE * memory.gradient, minimum(g, ADMITTED * memory.gradient))
    cosine = delta_g / maximum(way * g, tiny(g))
    won = LATE * memory.won - minimum(cosine, 0.0)
    lost = LATE * memory.lost + maximum(cosine, 0.0)
    noise = LATE**2 * memory.noise + cosine * cosine
    is_moving = moves(memory, lr)
    highest, longest = maximum(memory.highest, lr), maximum(memory.longest, x)
    farthest = maximum(memory.farthest, minimum(way, memory.path))  # edits are no way that was gone
    start = where(memory.highest > 0, memory.floor * memory.highest / highest, 0.0)
    memory = memory._replace(
        highest=highest,
        longest=longest,
        gradient=gradient,
        momentum=held,
        farthest=farthest,
        floor=where(memory.age > 0, memory.floor, start),
        peak=change * memory.peak,
        won=won,
        lost=lost,
        noise=noise,
    )
    by = where(is_known, shortened / scale, 0.0)
    sums = stack([by * delta_g, by * delta_x, g_squared, x_squared])
    decay = where(is_known, s_decay * memory.pace * highest / longest, 0.0)
    s_init = where(is_known, memory.floor, 0.0)
    is_signal = (scale < NEAR * memory.floor) | (won - lost > SURELY * sqrt(noise))
    loss_weight = where(is_moving & is_signal, LOSS_WEIGHT_MOVING, 1.0)
    params = TuneParams(betas, column(decay), column(s_init), 0.0, column(loss_weight))
    return Bet(old, state, sums, params, dots, lr, memory, shortened)


def settle(bet: Bet, new: TunerState, memory: Memory) -> Learned:
    """Return the tuner after a step, what is remembered, and by what part of D x_ref follows the weights.

    Args:
        bet: what `tune` was given.
        new: what `tune` has made of it.
        memory: that of the bet.
    """
    old, lr = bet.state, bet.lr
    time = minimum(lr / maximum(memory.highest, tiny(memory.highest)), 1.0)
    was_found = memory.age > 0
    rest = where(was_found, memory.rest + time**RESTING, 0.0)
    time = where(was_found | (time == 0), time, 1.0)
    new = new._replace(scales=where(new.sum_squared_products == 0, old.scales, new.scales))
    weight = column(time)
    new = TunerState(*(lerp(a, b, weight) for a, b in zip(old, new, strict=True)))

    # The floor of now, and the scale in proportion to it.
    memory = memory._replace(rest=rest)
    least = where(was_found, floor(memory), memory.floor)
    change = where(was_found, least / memory.floor, 1.0)
    new, peak = in_units(change, new), change * memory.peak
    scale = new.scales.sum(-1)
    raised = where(was_found, maximum(least / scale, 1.0), 1.0)
    new, scale = new._replace(scales=column(raised) * new.scales), raised * scale

    # The end of a search.
    is_over = (scale < FOUND * peak) & (memory.farthest > 0) & (~was_found | (peak > FARTHER * least))
    highest = where(is_over & ~was_found, lr, memory.highest)
    reach = where(is_over, maximum(memory.reach, memory.farthest), memory.reach)
    rest = where(is_over, rest * (memory.reach / reach) ** 2, rest)
    memory = memory._replace(highest=highest, reach=reach, rest=rest)
    least = where(is_over, floor(memory), least)
    excess = where(is_over & was_found, maximum(NEAR * least / peak, 1.0), 1.0)
    memory, least = memory._replace(rest=(REST + memory.rest) * excess**2 - REST), least / excess
    scale = where(is_over, least, scale)
    new = either(is_over, evenly(scale, like=new), new)
    age = where(is_over, where(was_found, RECENT, 1.0), memory.age + where(was_found, time, 0.0))
    begins = is_over | (was_found & (scale <= NEAR * least))
    memory = memory._replace(
        floor=least,
        peak=where(begins, scale, maximum(peak, scale)),
        age=age,
        loudest=maximum(memory.loudest, lr * scale),
        farthest=where(begins, 0.0, memory.farthest),
        path=where(begins, 0.0, memory.path),
    )
    follow = where(age > 0, FOLLOW * time / (age + FOLLOW + 7), 0.0)
    return Learned(new, memory, bet.length, follow, time)


def moved(learned: Learned, scale: Tensor, update: Tensor, lr: float | Tensor) -> Memory:
    """Return what is remembered once a step is made.

    Args:
        learned: of this step.
        scale: of this step, shape (G,).
        update: |u|, shape (G,).
        lr: the largest of this step's.
    """
    memory, length, time = quick(learned.memory), quick(learned.length), quick(learned.time)
    assert memory is not None
    assert length is not None
    assert time is not None
    counts = (memory.speed > 0) & (time > 0) & (update > 0)
    here = minimum(length * update / lr, ADMITTED * memory.stride)
    weight = time / minimum(maximum(memory.age, 1.0), RECENT)
    speed = sqrt(lerp(memory.speed**2, here**2, weight))
    stride = maximum(memory.stride, here)
    return memory._replace(
        speed=where(counts, speed, memory.speed),
        stride=where(counts, stride, memory.stride),
        path=memory.path + scale * length * update,
    )


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
    g = sqrt(bet.measured[..., 2])
    pace, longest = update / bet.lr, where(weights > 0, weights, 1.0)
    least = RELATIVE * longest / pace
    scale = least / memory.highest
    ratio = pace * memory.highest / longest
    is_usable = (g > 0) & (g < math.inf) & (pace < math.inf) & (weights < math.inf)
    seeks = (memory.pace == 0) & is_usable
    is_too_long = (length < 1) & (gradient > length * memory.momentum)  # LONGER times the longest of before
    again = (memory.pace > 0) & is_usable & (is_new > 0) & is_too_long
    begins = (seeks | again) & (pace > 0) & (scale < math.inf) & (ratio >= least_ratio) & ~unchanged
    none = zeros_like(g)
    # An update lost in rounding calls for a larger lr. But the first of 0 may be one that the base has not made.
    lost = where((ratio == 0) & (memory.loudest == 0), NOTHING_LOST, maximum(ratio, tiny(ratio)))
    memory = memory._replace(loudest=where(seeks, lost, memory.loudest))
    first = Memory(*[none] * len(memory))._replace(
        pace=pace,
        longest=longest,
        highest=memory.highest,
        floor=scale,
        peak=scale,
        gradient=g,
        momentum=g,
        loudest=least,
        speed=pace,
        stride=pace,
    )
    memory = Memory(*(where(begins, a, b) for a, b in zip(first, memory, strict=True)))
    fresh = evenly(scale, like=state)
    state = either(begins, fresh, state)
    again = again & begins
    return learned._replace(
        state=state,
        memory=memory,
        length=where(again, 1.0, length),
        follow=where(again, 1.0, follow),
        restarted=again,
    )


def evenly(scale: Tensor, like: TunerState) -> TunerState:
    """Return vectors that have seen nothing, with this scale, shape (G,), in equal shares."""
    nothing = zeros_like(like.scales)
    return TunerState(nothing, nothing, nothing, column(scale / like.scales.shape[-1]) + nothing)


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
