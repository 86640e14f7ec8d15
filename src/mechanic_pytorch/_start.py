r"""`s_init="auto"`: plain steps of the base, at a scale that is learned from the way the weights have really gone.

Algorithm 1 keeps x = x_ref + S * delta, so that a scale that falls takes the weights back along everything they have
learned, and moves weights whose lr or gradient is 0. Here a step is the base's own, S times as long, and nothing else:

    x = x + S * u

What the base leaves alone stays to the bit. S is learned by the same bets (`tune`), on D = x - x_ref, the way that the
weights have really gone: with delta = D / S. x_ref is stored, not delta, so whatever is done to the weights between two
steps (clamping, projection, averaging, loading) is in D. Six rules replace the constants of Algorithm 1. Of the
schedule they know one thing: whether lr is at its highest so far, or has begun to fall.

**Start.** |u| is the length of the first update and |x| that of the weights then (1 if they are all 0). The first step
already moves the weights by 1e-3 of their length: s_init = 1e-3 * |x| / |u|. s_decay is counted in |u| / (the longest
|x| so far), and eps is 0. Multiplying all updates by a constant then changes nothing: so no base lr matters. Until an
update and a gradient have come that are not zero, the scale is 0. Under a warm-up |u| is rescaled to the largest lr.

**Time.** A step whose lr is the part w of the largest so far counts as the part w of a step: the tuner's new vectors
are old + w * (new - old). At lr 0 nothing changes, and no schedule that ends can drive the scale. While the scale is
searched for, until it has fallen to 3/4 of its largest, w is 1, because the schedule may be over soon. And
an lr that is more than twice the largest before it, as no warm-up is, lowers the scale by what is more.

**Noise.** While lr is at its highest, a loss counts as much as a gain, and noise alone lets no scale grow. Once lr
falls, losses count half (`penalty`): the schedule will take noise out of the weights by itself, so the scale that pays
best at the moment is too small for the end.

**Memory.** After the search x_ref follows the weights: each step takes it nearer by k / (steps since then), where k is
1 while lr is at its highest and 0.3 once it falls. D is mostly the way of the later part of the run; where it began,
and noise of long ago, are forgotten slowly.

**Falls.** A scale that has fallen to a tenth of its largest was wrong, or its bets were about another problem. It goes
on from 2/10 of its largest, or 3/10 once lr falls, with vectors that have seen nothing; that is the new s_init. If
<D, g> there gets ten times as large as when it fell, the weights run away, and it falls again. From the first fall
on half of the largest effective lr of before is a ceiling, which yields slowly: a step against it raises it by the
part 1 / (steps since then). So what did harm once is not bet on again at once.

**Bad batches.** A step is shortened in proportion if the longest gradient that a momentum may still hold, max(|g|,
0.9 * that of before), is more than 3 times as long as the longest of late.

docs/safety.md has what these constants were chosen on. With `per_group`, all of this is said of each parameter group by
itself.

Rounding knows units, too: u is a difference of stored weights, so that of an lr of 1e-8, or of a gradient of 1e-8,
little or nothing is left. So a base, if its updates are in proportion to lr, finds every lr multiplied by one number,
and nobody else does. At first it is such that the largest lr becomes 1. A first update that is shorter than the
weights, by more than half of their digits, is not used: the number grows and the next step tries again. Later it
is changed by powers of two, which round nothing: once, until the first update would be as long as the weights, if
more than a quarter of its digits are lost; and whenever lr grows past what it promised to be. `scale` is given for
the lr that the user sees.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mechanic_pytorch import _state
from mechanic_pytorch._base import can_ask_host, lrs
from mechanic_pytorch._buckets import Bucket
from mechanic_pytorch._control import NOT_IN_PROPORTION, bounded
from mechanic_pytorch._state import LR_FACTOR, LR_LIMIT, UNIT, TunerState
from mechanic_pytorch.distributed import Spread, sum_over_processes

RELATIVE = 1e-3  # by how much of their length the first step moves the parameters
LOWER = 1 - 1e-6  # of the highest lr: what is less has begun to fall, what is more is rounding
PENALTY = 0.5  # what a step that lost counts, against one that gained, once lr falls; before, 1
FOUND = 0.75  # of its largest, to which the scale has to fall for the search to be over
LOST = 0.1  # of its largest: where a scale was wrong
FASTEST = 2.0  # by how much a largest lr of the search may exceed that before it; by more, it is lowered
RUNAWAY = 10.0  # times the loss of the last time, from which on the least scale was wrong, too
REGAINED, REGAINED_FALLING = 0.2, 0.3  # of its largest, where it then goes on
CEILING = 0.5  # of the largest effective lr before a scale was lost: what it does not exceed again at once
FOLLOW, FOLLOW_FALLING = 1.0, 0.3  # how closely x_ref follows: the power of time by which the way is forgotten
LONGER = 3.0  # than the longest gradient of late, from which on a step is shortened
LATE, ADMITTED = 0.99, 2.0  # how fast the longest gradient is forgotten, and by how much one step may raise it
MOST = 2.0**60  # the largest lr that a base is given
MOMENTUM = 0.9  # how much of a gradient the base may hold after a step


class Numbers(NamedTuple):
    """The options of `tune`, as they apply to delta itself."""

    betas: tuple[float, ...]
    s_decay: float | Tensor
    s_init: float | Tensor
    eps: float | Tensor
    penalty: float | Tensor


class Memory(NamedTuple):
    """What is remembered of the run, shape (...) each, all 0 at first; stored side by side."""

    pace: Tensor  # |u| / lr of the first update
    longest: Tensor  # |x|
    highest: Tensor  # lr
    floor: Tensor  # s_init, times the highest lr
    peak: Tensor  # the largest scale since it was last learned anew
    age: Tensor  # 0 while the scale is searched for; then 1 + the steps since, each counted by its lr
    gradient: Tensor  # the longest |g| of late
    momentum: Tensor  # the longest |g| that the base may still hold
    loudest: Tensor  # the largest effective lr since the scale was last learned anew
    ceiling: Tensor  # of the effective lr; 0 if there is none
    loss: Tensor  # <D, g> where the scale was lost last; 0 if it gained there, or never was


def lr_factors(optimizer: Any) -> list[float]:
    """Return the number by which the base's lr of each group is multiplied in a step, 1 without `s_init="auto"`.

    Asks the host until every tuner has its first scale. Then it looks at lrs alone, and not at those that are tensors.
    """
    if optimizer.mechanic_config.s_init == "auto" and can_ask_host(optimizer):
        _state.attach_tuner(optimizer)
        seeks = not optimizer._start_is_known
        rows = _state.read(optimizer, UNIT).reshape(-1, _state.UNIT_SIZE).tolist() if seeks else []
        memories = [Memory(*row) for row in rows]
        if not isinstance(optimizer, NOT_IN_PROPORTION):
            for (home, groups), memory in itertools.zip_longest(_state.tuners(optimizer), memories):
                _choose_factor(home, groups, memory)
        optimizer._start_is_known = all(memory.pace > 0 for memory in memories)
    factors = [float(home.get(LR_FACTOR, 1.0)) for home in _state.homes(optimizer)]
    return _state.for_each_group(optimizer, factors)


def _choose_factor(home: dict[str, Any], groups: Sequence[dict[str, Any]], memory: Any) -> None:
    """Choose by what the base's lr is multiplied, such that no update is lost in rounding, and none overflows."""
    limit = home[LR_LIMIT]
    if memory and memory.highest == 0:  # nothing has been seen
        factor = 1 / (max(lrs(groups, "initial_lr")) or 1.0)
        home[LR_FACTOR] = factor if 0 < factor < math.inf else 1.0
    elif memory and limit < 0:
        precision, most = _rounding(groups)
        if memory.pace:
            ratio, limit = memory.pace * memory.highest / memory.longest, -limit
        else:
            ratio = memory.loudest  # of an update that was too short, 0 if there was none; see `begin`
            home[UNIT][Memory._fields.index("loudest")] = 0.0
        bits = math.ceil(-math.log2(max(ratio, precision))) if ratio else 0
        if ratio >= precision**0.25:
            bits = min(bits, 0)  # it has three quarters of its digits
        factor = 2.0 ** max(bits, -math.log2(abs(limit)))
        if abs(limit) * factor <= most:
            _state.rescale(home, factor)
            limit *= factor
        home[LR_LIMIT] = limit
    if not any(isinstance(group.get("lr"), Tensor) for group in groups):
        excess = max(lrs(groups)) * home[LR_FACTOR] / abs(home[LR_LIMIT])
        if excess > 1 / LOWER:  # lr is larger than it promised to be
            _state.rescale(home, 2.0 ** -math.ceil(math.log2(excess)))


def _rounding(groups: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Return the coarsest spacing at 1 of these groups' weights, and the largest lr that a base may be given."""
    dtypes = {p.dtype for group in groups for p in group["params"] if p.dtype.is_floating_point or p.is_complex()}
    kinds = [torch.finfo(dtype) for dtype in dtypes or {torch.float32}]
    return max(kind.eps for kind in kinds), min(MOST, *(kind.max / 2**4 for kind in kinds))


def read(optimizer: Any) -> Memory:
    """Return what is remembered: a number for each tuner."""
    return Memory(*_state.read(optimizer, UNIT).unbind(-1))


def together(memory: Memory | None) -> Tensor | None:
    """Return it as it is stored, shape (..., 11)."""
    return None if memory is None else torch.stack(memory, -1)


def learn(
    optimizer: Any, old: TunerState, dots: Tensor, lr: float | Tensor, tune: Callable[..., TunerState]
) -> tuple[TunerState, Memory | None, Tensor | None, Tensor | None]:
    """Return the tuner after this step; with "auto" also what is remembered, how long a step is, how far x_ref goes.

    Args:
        optimizer: the optimizer.
        old: its vectors.
        dots: the four sums, before the base's step.
        lr: the largest of this step's.
        tune: Algorithm 1.
    """
    config, limit = optimizer.mechanic_config, scale_limit(optimizer, lr)
    if config.s_init != "auto":
        return bounded(tune(old, dots, config), limit), None, None, None
    old, memory, sums, numbers, length = bet(old, read(optimizer), dots, lr, config.betas, config.s_decay)
    new, memory, part = settle(old, bounded(tune(old, sums, numbers), limit), memory, lr, dots[..., 0])
    return bounded(new, limit), memory, length, part


def scales(
    old: TunerState, new: TunerState, length: Tensor | None, part: Tensor | None
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Return the numbers by which a kernel moves; a plain step, which has a length, takes x_ref a part of the way."""
    scale = new.scales.sum(-1)
    if length is None or part is None:
        return old.scales.sum(-1), scale
    return length * scale, length * scale, part


def scale_limit(optimizer: Any, lr: float | Tensor) -> Tensor | None:
    """Return what `max_lr` bounds the scale by, None if it does not."""
    max_lr = optimizer.mechanic_config.max_lr
    return None if max_lr is None else max_lr / _state.highest_lr(optimizer, lr)


def begin(
    optimizer: Any,
    buckets: Sequence[Bucket],
    before: Sequence[Sequence[Tensor]],
    spreads: Sequence[Spread],
    state: TunerState,
    memory: Memory,
    dots: Tensor,
    lr: float | Tensor,
) -> tuple[TunerState, Memory]:
    """Return the tuner with its first scale, if the step that the base has just made was the first with an update.

    Args:
        optimizer: the optimizer.
        buckets: the parameters.
        before: copies of these, from before the base's step.
        spreads: how they are spread over processes.
        state: the vectors, shape (..., n).
        memory: what is remembered, with the `highest` lr of now.
        dots: the four sums, shape (..., 4), before the base's step.
        lr: the largest of this step's.
    """
    parts: dict[Spread, Tensor] = {spread: torch.zeros_like(dots) for spread in [(), *spreads]}
    for bucket, starts in zip(buckets, before, strict=True):
        wide = bucket.kept[0].dtype
        u = [x.to(wide) - start.to(wide) for x, start in zip(bucket.params, starts, strict=True)]
        parts[bucket.spread][bucket.tuner].add_(bucket.kernel.measure(u, u, u).to(dots))
    u_norm = sum_over_processes(parts, spreads)[..., 0].sqrt()
    g, x = dots[..., 2].sqrt(), dots[..., 3].sqrt()
    pace, length = u_norm / lr, torch.where(x > 0, x, 1.0)
    floor = RELATIVE * length / pace
    scale = floor / memory.highest
    ratio = pace * memory.highest / length
    seeks = (memory.pace == 0) & (g > 0) & torch.stack([pace, g, x]).isfinite().all(0)
    begins = seeks & (pace > 0) & scale.isfinite() & (ratio >= _least_ratio(optimizer, like=ratio))
    none = torch.zeros_like(g)
    memory = memory._replace(loudest=torch.where(seeks, ratio.clamp_min(torch.finfo(ratio.dtype).tiny), memory.loudest))
    first = Memory(pace, length, memory.highest, floor, scale, none, g, g, none, none, none)
    memory = Memory(*(torch.where(begins, a, b) for a, b in zip(first, memory, strict=True)))
    share = (scale / state.scales.shape[-1]).unsqueeze(-1)
    state = state._replace(scales=torch.where(begins.unsqueeze(-1), share, state.scales))
    return bounded(state, scale_limit(optimizer, lr)), memory


def _least_ratio(optimizer: Any, like: Tensor) -> Tensor:
    """Return how long the first update has to be, in lengths of the weights, for half of its digits to be there."""
    least, can_grow = [], can_ask_host(optimizer) and not isinstance(optimizer, NOT_IN_PROPORTION)
    for home, groups in _state.tuners(optimizer):
        precision, most = _rounding(groups)
        least.append(math.sqrt(precision) if can_grow and abs(home[LR_LIMIT]) / precision <= most else 0.0)
    return like.new_tensor(least).reshape(like.shape)


def falls(memory: Memory, lr: float | Tensor) -> Tensor:
    """Tell whether lr has begun to fall, `highest` being that of now; shape (...)."""
    return lr < LOWER * memory.highest


def bet(
    state: TunerState, memory: Memory, dots: Tensor, lr: float | Tensor, betas: tuple[float, ...], s_decay: float
) -> tuple[TunerState, Memory, Tensor, Numbers, Tensor]:
    """Return what `tune` needs: vectors and memory of now, the four sums of D / S, the options, how long a step is.

    Args:
        state: the vectors, shape (..., n).
        memory: that of the last step.
        dots: the four sums of D, shape (..., 4).
        lr: the largest of this step's.
        betas: of the options.
        s_decay: of the options.
    """
    is_jump = (memory.age == 0) & (memory.pace > 0) & (lr > FASTEST * memory.highest)
    jump = torch.where(is_jump, FASTEST * memory.highest / lr, 1.0)
    state = state._replace(reward=jump.unsqueeze(-1) * state.reward, scales=jump.unsqueeze(-1) * state.scales)
    scale, g, x = state.scales.sum(-1), dots[..., 2].sqrt(), dots[..., 3].sqrt()
    is_known = (memory.pace > 0) & (scale > 0)
    held = torch.maximum(g, MOMENTUM * memory.momentum)
    shortened = torch.where(is_known & (held > 0), LONGER * memory.gradient / held, 1.0).clamp_max(1.0)
    gradient = torch.maximum(LATE * memory.gradient, torch.minimum(g, ADMITTED * memory.gradient))
    highest, longest = memory.highest.clamp_min(lr), torch.maximum(memory.longest, x)
    memory = memory._replace(
        highest=highest, longest=longest, gradient=gradient, momentum=held, peak=jump * memory.peak
    )
    by = torch.where(is_known, shortened / scale, 0.0)
    sums = dots * torch.stack([by, by, torch.ones_like(by), torch.ones_like(by)], -1)
    decay = torch.where(is_known, s_decay * memory.pace * highest / longest, 0.0)
    s_init = torch.where(is_known, memory.floor / highest, 0.0)
    penalty = torch.where(falls(memory, lr), PENALTY, 1.0).to(decay)
    options = Numbers(betas, decay.unsqueeze(-1), s_init.unsqueeze(-1), 0.0, penalty.unsqueeze(-1))
    return state, memory, sums, options, shortened


def settle(
    old: TunerState, new: TunerState, memory: Memory, lr: float | Tensor, loss: Tensor
) -> tuple[TunerState, Memory, Tensor]:
    """Return the tuner after a step, what is remembered, and by what part of D x_ref follows the weights.

    Args:
        old: the vectors before this step, shape (..., n).
        new: what `tune` has made of them.
        memory: as `bet` returns it.
        lr: the largest of this step's.
        loss: <D, g>, shape (...).
    """
    tiny = torch.finfo(memory.highest.dtype).tiny
    time = (lr / memory.highest.clamp_min(tiny)).clamp_max(1.0)
    time = torch.where(memory.age > 0, time, (time > 0).to(time))
    new = new._replace(scales=torch.where(new.sum_squared_products == 0, old.scales, new.scales))
    new = TunerState(*(torch.lerp(a, b, time.unsqueeze(-1)) for a, b in zip(old, new, strict=True)))
    scale = new.scales.sum(-1)

    is_over = (memory.ceiling > 0) & (lr * scale > memory.ceiling)
    ceiling = torch.where(is_over, memory.ceiling * (1 + time / memory.age.clamp_min(1.0)), memory.ceiling)
    factor = torch.where(is_over, ceiling / (lr * scale), 1.0).clamp_max(1.0)
    new = new._replace(reward=factor.unsqueeze(-1) * new.reward, scales=factor.unsqueeze(-1) * new.scales)
    scale = factor * scale
    loudest = torch.maximum(memory.loudest, lr * scale)

    is_least = scale * memory.highest * LOWER <= memory.floor
    runs_away = is_least & (memory.loss > 0) & (loss > RUNAWAY * memory.loss)
    is_lost = (scale < LOST * memory.peak) | runs_away
    is_found = (memory.age > 0) | (scale < FOUND * memory.peak)
    falling = falls(memory, lr).to(scale)
    regained = memory.peak * (REGAINED + falling * (REGAINED_FALLING - REGAINED))
    shares = (regained / new.scales.shape[-1]).unsqueeze(-1).expand_as(new.scales)
    nothing = torch.zeros_like(shares)
    fresh = TunerState(nothing, nothing, nothing, shares)
    new = TunerState(*(torch.where(is_lost.unsqueeze(-1), a, b) for a, b in zip(fresh, new, strict=True)))
    lower = CEILING * loudest
    lower = torch.where(ceiling > 0, torch.minimum(ceiling, lower), lower)

    age = torch.where(is_lost, 1.0, memory.age.clamp_min(1.0)) + time
    power = FOLLOW + falling * (FOLLOW_FALLING - FOLLOW)
    follow = torch.where(is_lost | ~is_found, 0.0, power * time / (age + power + 7))
    memory = memory._replace(
        floor=torch.where(is_lost, regained * memory.highest, memory.floor),
        peak=torch.where(is_lost, regained, torch.maximum(memory.peak, scale)),
        age=torch.where(is_found, age, 0.0),
        loudest=torch.where(is_lost, 0.0, loudest),
        ceiling=torch.where(is_lost, lower, ceiling),
        loss=torch.where(is_lost, loss.clamp_min(0.0), memory.loss),
    )
    return new, memory, follow
