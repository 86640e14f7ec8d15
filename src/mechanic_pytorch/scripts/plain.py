"""A script without Mechanic: as it is, or, by `--plain-from report.json`, with the lrs that a run has learned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from mechanic_pytorch.scripts.patch import Built, Patch
from mechanic_pytorch.scripts.report import why_no_advice


class PlainPatch(Patch):
    """Mechanize nothing."""

    def __init__(self) -> None:
        super().__init__(None, (), (), {})

    def reason_against(self, cls: type[Optimizer]) -> str | None:
        """Leave all plain."""
        return super().reason_against(cls) or "the script runs without Mechanic"


class LearnedPatch(PlainPatch):
    """Mechanize nothing, and give the optimizers that a script builds the learned lrs of a report, in order.

    The k-th optimizer built gets what the k-th of the report has learned, as the lr of its groups. Groups that come
    later keep their ratios to the others.

    Args:
        path: of a report.json.
        say: prints a line.

    Raises:
        ValueError: it is no such report, or nothing was learned in it.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        super().__init__()
        self._path, self._say = path, say
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            self._learned: list[tuple[str, list[float]]] = [
                (one["class"], [float(group["learned_lr"] or 0) for group in one["groups"]])
                for one in report["optimizers"]
            ]
            self._is_per_group = bool(report["options"]["per_group"])
            obstacle = why_no_advice(str(report["outcome"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"--plain-from must be the report.json of a run. Got {path}, {type(error).__name__}: {error}. "
                "Remedy: mechanic run --report DIR writes one."
            ) from None
        if not any(any(lrs) for _, lrs in self._learned):
            raise ValueError(
                f"--plain-from needs a report with a learned lr. Got {path}, where there is none. "
                "Remedy: repeat that run with more steps."
            )
        if obstacle:
            say(f"the lr of {path} may be far off, because {obstacle} in that run")

    def add(self, optimizer: Optimizer, one: Built) -> None:
        """Set its lr.

        Raises:
            SystemExit: it is not the one of the report.
        """
        super().add(optimizer, one)
        number = len(self.built) - 1
        name, lrs = self._learned[number] if number < len(self._learned) else ("none", [])
        if name != (got := f"{one.base.__module__}.{one.base.__qualname__}"):
            self._refuse(f"optimizer {number + 1} must be the one of the report, {name}. Got {got}", one)
        if not any(lrs) or one.is_mechanized:
            return
        groups: list[dict[str, Any]] = optimizer.param_groups
        if len(lrs) < len(groups) or not any(one.script_lrs):
            rule = f"{name} must have an lr > 0 and at most {len(lrs)} groups, as in the report"
            self._refuse(f"{rule}. Got {len(groups)} with lr {', '.join(map(str, one.script_lrs))}", one)
        one.rescale(optimizer, max(lrs[: len(groups)]))
        if self._is_per_group:
            for group, lr in zip(groups, lrs, strict=False):
                group["lr"] = group["lr"] * (lr / float(group["lr"])) if group["lr"] else lr
        given = dict.fromkeys(f"{float(group['lr']):.2g}" for group in groups)
        self._say(f"{one.described()} stays plain, with lr={', '.join(given)}")

    def unused(self) -> list[str]:
        """Return the classes of the optimizers of the report that the script did not build, if they have learned."""
        return [name for name, lrs in self._learned[len(self.built) :] if any(lrs)]

    def _refuse(self, what: str, one: Built) -> None:
        where = f" at {one.place}" if one.place.path else ""
        raise SystemExit(
            f"mechanic: --plain-from {self._path}: {what}{where}. "
            "Remedy: run the same script with the same arguments, or set the lr by hand."
        )
