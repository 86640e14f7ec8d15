"""Two warnings about runs that cannot learn, each given once, each with its remedy."""

from __future__ import annotations

import warnings
from typing import Any

from mechanic_pytorch._base import lrs
from mechanic_pytorch._buckets import Bucket

PATIENCE = 15  # steps that a base may take before its first update: SOAP needs one, others ten
LOST = 0.9  # the part of an update whose loss is worth a warning
STUCK = 50  # skipped steps in a row


def check_that_base_moved(optimizer: Any, buckets: list[Bucket]) -> None:
    """Warn if rounding has swallowed the base's first update. Asked until one was due, and then never again."""
    highest = max(lrs(optimizer))
    if highest == 0:
        return  # warm-up from zero
    moved = active = 0
    for bucket in buckets:
        moved += sum(int(delta.count_nonzero()) for delta in bucket.deltas)
        active += sum(int(g.count_nonzero()) for g in bucket.grads)
    if active == 0:
        return  # nothing to follow
    optimizer._steps_without_move += moved == 0
    if moved == 0 and optimizer._steps_without_move <= PATIENCE:
        return
    optimizer._base_has_moved = True
    if moved == 0 or (moved < (1 - LOST) * active and highest < 1):
        warnings.warn(
            f"{type(optimizer).__name__}: the base optimizer's update changed only {moved} of {active} weights that "
            "have a gradient; the rest of it was lost in rounding, and a lost update cannot be rescaled. "
            f"Got lr={lrs(optimizer)}. Remedy: pass lr=1.0, or larger; Mechanic finds the scale.",
            stacklevel=6,
        )


def warn_if_stuck(optimizer: Any) -> None:
    """Warn if no step has been made for long."""
    optimizer._skips_in_a_row += 1
    if optimizer._skips_in_a_row == STUCK:
        warnings.warn(
            f"{type(optimizer).__name__}: the last {STUCK} steps were skipped, for a gradient, a weight or the sum of "
            "updates is not finite. Remedy: look for inf or nan in them; once mended, call optimizer.reset().",
            stacklevel=6,
        )
