r"""`s_init="auto"`: a start that knows no units, a search by plain steps, and bets whose losses count half.

Three options are numbers with a unit. `s_init` is a scale, so it is compared with x / delta; `eps` is compared with h,
which is an update times a gradient; `s_decay` weighs x / delta against 1. Multiply all updates of the base by a
constant, which is what another base lr does, and the numbers mean something else.

Let u be the base's first update, g the gradient where it is seen first, |x_1| the length of the parameters there and
|x| the longest that they have been so far, where less than 1 counts as 1. The run is that of Algorithm 1 with

    s_init = 1e-3 * |x_1| / |u|,    s_decay = s_decay * |u| / |x|,    eps = eps * |g| * |u|

so that at first an update moves the parameters by 1e-3 of their length, and decay weighs the scale against the one at
which it would move them by their whole length. Multiplying all updates by a constant then changes nothing, up to
rounding. Decay goes by the longest |x|, for the first may say nothing: a classifier that starts at zero ends far from
there, and taking its length for 1 all the way makes the learned scale up to four times smaller. Under a warm-up the
first updates are small because lr is: |u| is that of the first update, rescaled to the largest lr so far.

Rounding knows units, too: u is a difference of stored weights, so that of an lr of 1e-8 little or nothing is left. A
step therefore runs with every lr multiplied by one number, chosen before the first update such that the largest base lr
becomes 1, and `scale` is given for the lr that the user sees. That is the run at lr 1, up to the last bit of the lr:
runs at other base lrs do not even round differently.

x, g and u are those of all parameters together, in all processes. Until an update and a gradient have come that are not
zero, there is no |u|, and no scale. With `per_group`, all of this is said of each parameter group by itself.

The second difference from Algorithm 1 is how the scale is searched. It begins far too small and grows by a part of
itself in each step, while the weights hardly move: the updates of that time are made at almost the same weights, are
much alike, and weigh in the sum as much as any later one. A larger scale, which stretches all of the sum, is then too
large for them long before it is for the next update. (A warm-up hides this, for it makes early updates small.) So at
first an update weighs what its scale could do: with S_k the largest scale up to step k, delta = sum_k (S_k / S_t) *
u_k. That is to multiply delta by S_{t-1} / S_t before u_t is added; and while the scale rises, the weights then move by
S_t * u_t alone: plain steps at a rising learning rate, as in a learning-rate range test. Once the scale has fallen to
three quarters of its largest, the search is over, and the sum is Algorithm 1's from there on. The tuner itself is
Algorithm 1's throughout: the base that it scales has updates of growing weight at first. A parameter without a gradient
in a step keeps its part of delta.

The third difference is the penalty. A step adds -s * h to a reward: what the loss gained, or lost, by the scale having
been s. Noise in the gradient makes a large scale lose now, though a schedule that decays will take that noise out of
the weights by itself later on; so the scale that pays best at each moment is too small for the end. A step that lost
therefore counts half. How far this can go: the scale settles where gains are half of losses, which for normally
distributed h is where its mean is 0.28 of its standard deviation instead of 0. h is one number, so that is the noise of
the gradient in one direction. docs/convergence.md has the measurements from which the numbers were chosen: 1e-3, one
half and three quarters.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mechanic_pytorch import _state
from mechanic_pytorch._base import can_ask_host, largest_lr, lr_times, lrs
from mechanic_pytorch._buckets import Bucket
from mechanic_pytorch._state import DELTA, LR_FACTOR, UNIT
from mechanic_pytorch.distributed import Spread, sum_over_processes

RELATIVE = 1e-3  # by how much of their length the first update moves the parameters
FALL = 0.75  # of its largest, to which the scale has to fall for the search to be over
PENALTY = 0.5  # what a step that lost counts, against one that gained


class Numbers(NamedTuple):
    """The options of `tune`, as they apply to delta itself."""

    betas: tuple[float, ...]
    s_decay: float | Tensor
    s_init: float | Tensor
    eps: float | Tensor
    penalty: float


def at_lr_one(step: Callable[..., Any]) -> Callable[..., Any]:
    """Let a step find every lr multiplied by one number."""

    @functools.wraps(step)
    def run(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        with lr_times(optimizer, lr_factors(optimizer)):
            return step(optimizer, *args, **kwargs)

    return run


def lr_factors(optimizer: Any) -> list[float]:
    """Return the number by which the lr of each group is multiplied in a step, 1 without `s_init="auto"`."""
    if optimizer.mechanic_config.s_init == "auto" and not optimizer._start_is_known and can_ask_host():
        for home, groups in _state.tuners(optimizer):
            if not any(DELTA in optimizer.state.get(p, {}) for group in groups for p in group["params"]):
                highest = max(lrs(groups, "initial_lr"))
                factor = 1 / highest if highest else 1.0
                home[LR_FACTOR] = factor if 0 < factor < math.inf else 1.0
    factors = [float(home.get(LR_FACTOR, 1.0)) for home in _state.homes(optimizer)]
    return _state.for_each_group(optimizer, factors)


def begin(optimizer: Any, buckets: Sequence[Bucket], spreads: Sequence[Spread], dots: Tensor) -> tuple[Tensor, Numbers]:
    """Return what is to be remembered of the start, if this step is made, and the options for it."""
    delta_squared = None
    if not optimizer._start_is_known:
        parts = {spread: torch.zeros_like(dots) for spread in [(), *spreads]}
        for bucket in buckets:
            part = bucket.kernel.measure(bucket.deltas, bucket.deltas, bucket.deltas)
            parts[bucket.spread][bucket.tuner].add_(part.to(dots))
        delta_squared = sum_over_processes(parts, spreads)[..., 0]
    unit = next_unit(_state.read(optimizer, UNIT), dots, delta_squared, largest_lr(optimizer, dots))
    if not optimizer._start_is_known and can_ask_host():
        optimizer._start_is_known = bool((unit[..., 0] > 0).all())
    config = optimizer.mechanic_config
    return unit, relative(config.betas, config.s_decay, config.eps, unit)


def search(unit: Tensor | None, old: Tensor, new: Tensor) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """Return what is remembered of the start, after this step, and the numbers by which a kernel moves.

    Args:
        unit: as `begin` returns it, shape (..., 6); None without `s_init="auto"`.
        old: the scale of the last step, shape (...).
        new: that of this step.
    """
    if unit is None:
        return None, (old, new)
    largest = unit[..., 5]
    keep = torch.where(new > largest, largest / new, 1.0)
    largest = torch.where(new < FALL * largest, math.inf, torch.maximum(largest, new))
    return torch.cat([unit[..., :5], largest.unsqueeze(-1)], -1), (old, new, keep)


def next_unit(unit: Tensor, dots: Tensor, delta_squared: Tensor | None, lr: float | Tensor) -> Tensor:
    """Return what is remembered, shape (..., 6): `[|u| / lr, |g|, |x_1|, |x|, lr, S]`; zeros while unknown.

    Args:
        unit: that of the last step; its lr is the one by which delta came about, S the largest scale while it is
            searched, infinite from then on.
        dots: the four sums, shape (..., 4).
        delta_squared: |delta|^2, shape (...), as long as |u| may be unknown; None afterwards.
        lr: the largest of this step's.
    """
    first, longest, highest, scale = unit[..., :3], unit[..., 3], unit[..., 4], unit[..., 5]
    x = dots[..., 3].sqrt().clamp_min(1.0)
    if delta_squared is not None:
        found = torch.stack([delta_squared.sqrt() / highest, dots[..., 2].sqrt(), x], -1)
        begins = (first[..., 0] == 0) & (found > 0).all(-1) & found.isfinite().all(-1)
        first = torch.where(begins.unsqueeze(-1), found, first)
    return torch.cat([first, torch.stack([torch.maximum(longest, x), highest.clamp_min(lr), scale], -1)], -1)


def relative(betas: tuple[float, ...], s_decay: float, eps: float, unit: Tensor) -> Numbers:
    """Return the options that apply to delta itself, shape (..., 1) each."""
    pace, g, start, longest, highest, _ = unit.unsqueeze(-1).unbind(-2)
    u = torch.where(pace > 0, pace * highest, 1.0)
    return Numbers(betas, s_decay * u / longest, RELATIVE * start / u, eps * g * u, PENALTY)
