"""How far a learned lr can be trusted, from how it was learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mechanic_pytorch.telemetry import ReadOut

FEW_STEPS = 100  # in its first dozens of steps the scale climbs from far below, and the average still holds that
DRIFT = 1.5  # one digit of a learned lr can be trusted: from 1 to 2 it is at least this far


@dataclass(frozen=True)
class Confidence:
    """What is known of a learned lr beside its value.

    Attributes:
        steps: how many were made and not skipped.
        trend: "rising" if the learned lr of the whole run is more than `DRIFT` times that of its first half: then a run
            of twice the length would probably end with a larger digit. "falling" is the other way round, else "steady".
            None if only one half of the run was recorded.
        ranges: for each parameter group the smallest and the largest of scale times peak lr in the second half of the
            run. That is the effective lr divided by the schedule. Empty if nothing was recorded.
    """

    steps: int
    trend: Literal["rising", "falling", "steady"] | None
    ranges: list[tuple[float, float]]

    @property
    def is_drifting(self) -> bool:
        """Whether the learned lr was rising or falling."""
        return self.trend in ("rising", "falling")

    @property
    def has_few_steps(self) -> bool:
        """Whether the steps are too few to trust."""
        return self.steps < FEW_STEPS

    def remarks(self) -> list[str]:
        """Return what to say after the lr: nothing if it can be trusted."""
        said = [f"still {self.trend}"] if self.is_drifting else []
        return said + ([f"only {self.steps} step{'s' * (self.steps != 1)}"] if self.has_few_steps else [])


def confidence(rows: Sequence[ReadOut], steps: int) -> Confidence:
    """Say how far the learned lr can be trusted.

    Args:
        rows: what was recorded, the first step first. Those before a `reset` do not count.
        steps: how many were made and not skipped.
    """
    rows = rows[max((i for i in range(1, len(rows)) if rows[i].steps <= rows[i - 1].steps), default=0) :]
    middle = sum(2 * row.steps <= rows[-1].steps for row in rows)
    trend: Literal["rising", "falling", "steady"] | None = None
    if middle > 0:
        pairs = list(zip(rows[middle - 1].learned_lr, rows[-1].learned_lr, strict=False))  # groups may come late
        rises = any(whole > DRIFT * half for half, whole in pairs)
        trend = "rising" if rises else "falling" if any(half > DRIFT * whole for half, whole in pairs) else "steady"
    groups = range(len(rows[-1].effective_lr)) if rows else ()
    return Confidence(steps, trend, [_range(rows, middle, group) for group in groups])


def _range(rows: Sequence[ReadOut], middle: int, group: int) -> tuple[float, float]:
    """Return the smallest and the largest of scale times peak lr, of one parameter group, which may come late."""
    scales = [row.scale[group if len(row.scale) > 1 else 0] for row in rows if group < len(row.effective_lr)]
    lrs = [row.effective_lr[group] for row in rows if group < len(row.effective_lr)]
    peak = max((lr / scale for lr, scale in zip(lrs, scales, strict=True) if scale), default=0.0)
    late = scales[-(len(rows) - middle) :]
    return peak * min(late), peak * max(late)
