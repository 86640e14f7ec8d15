"""Warnings about runs that cannot learn, each given once, each with its remedy."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from mechanic_pytorch import _state
from mechanic_pytorch._base import can_ask_host, lrs
from mechanic_pytorch._buckets import Bucket

PATIENCE = 15  # steps that a base may take before its first update: SOAP needs one, others ten
LOST = 0.9  # the part of an update whose loss is worth a warning
STUCK = 50  # skipped steps in a row
NOTHING_SEEN = (0, 500)  # steps watched, and how many there are to be before the next look at the scale
GROWTH = 10  # times s_init: what a scale exceeds by then that has begun to grow. docs/controlling.md has figures
HELD_BACK = 0.5  # s_decay * scale: the length of the tuner's pull, that of the gradient being 1


def check_that_base_moved(optimizer: Any, buckets: list[Bucket]) -> None:
    """Warn if rounding has swallowed the base's first update. Asked until one was due, and then never again."""
    highest = max(lrs(optimizer.param_groups))
    if highest == 0:
        return  # warm-up from zero
    moved = active = 0
    for bucket in buckets:
        moved += bucket.count_moved()
        active += sum(int(g.count_nonzero()) for g in bucket.grads)
    if active == 0:
        return  # nothing to follow
    optimizer._steps_without_move += moved == 0
    if moved == 0 and optimizer._steps_without_move <= PATIENCE:
        return
    optimizer._base_has_moved = True
    if moved == 0 or (moved < (1 - LOST) * active and highest < 1):
        _warn(
            optimizer,
            f"the base optimizer's update changed only {moved} of {active} weights that have a gradient; the rest of "
            "it was lost in rounding, and a lost update cannot be rescaled. "
            f"Got lr={lrs(optimizer.param_groups)}. Remedy: pass lr=1.0, or larger; Mechanic finds the scale.",
        )


def warn_if_stuck(optimizer: Any) -> None:
    """Warn if no step has been made for long."""
    optimizer._skips_in_a_row += 1
    if optimizer._skips_in_a_row == STUCK:
        _warn(
            optimizer,
            f"the last {STUCK} steps were skipped, for a gradient, a weight or the sum of updates is not finite. "
            "Remedy: look for inf or nan in them; once mended, call optimizer.reset().",
        )


def watch(optimizer: Any) -> None:
    """Count the steps of this process, and warn if by now a scale should have been learned and is not.

    Of several tuners, those of parameter groups that never had a gradient, or an lr, may wait as long as others learn.
    The host reads the scale after 500 steps, 1000, 2000 and so on, until it has warned; never while a step is recorded.
    """
    if not can_ask_host():
        return
    steps, next_look = optimizer._watched[0] + 1, optimizer._watched[1]
    optimizer._watched = steps, next_look
    if steps != next_look:
        return
    config = optimizer.mechanic_config
    scales, is_auto, rates = optimizer.scale.reshape(-1).tolist(), config.s_init == "auto", lrs(optimizer.param_groups)
    optimizer._watched = steps, 0  # never again
    begun = [scale > (0.0 if is_auto else GROWTH * config.s_init) for scale in scales]
    idle = [any(begun) and average == 0 for average in _state.average_lrs(optimizer)]
    decays = [
        0.0 if is_auto or max(lrs(groups, "initial_lr")) >= 1 else config.s_decay * scale
        for scale, (_, groups) in zip(scales, _state.tuners(optimizer), strict=True)
    ]
    if not all(a or b for a, b in zip(begun, idle, strict=True)):
        noise = "" if is_auto else ' If the gradient is mostly noise, pass s_init="auto", or a larger number.'
        _warn(
            optimizer,
            f"training has not started: after {steps} steps the scale is {_said(scales)}, and s_init is "
            f"{config.s_init}. Got lr={rates}. Remedy: make sure that lr is not 0, that the optimizer holds the "
            f"parameters of the model that is trained, and that their gradients are neither None nor 0.{noise}",
        )
    elif max(decays) >= HELD_BACK:
        _warn(
            optimizer,
            f"the scale is held back: after {steps} steps s_decay times the scale is {max(decays):.1f}, so "
            "that the tuner's decay pulls it back about as strongly as the gradient drives it. "
            f"Got lr={rates} and s_decay={config.s_decay}, which is too much for so small an lr. "
            'Remedy: pass s_init="auto", or lr=1.0 or larger.',
        )
    else:
        optimizer._watched = steps, 2 * steps


def _said(scales: list[float]) -> str:
    return f"{scales[0]:.0e}" if len(scales) == 1 else f"{', '.join(f'{s:.0e}' for s in scales)} (per parameter group)"


def _warn(optimizer: Any, message: str) -> None:
    """Warn where the step is called, by whom neither torch nor we are."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in ("mechanic_pytorch", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(f"{type(optimizer).__name__}: {message}", stacklevel=level)
