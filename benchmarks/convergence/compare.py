"""The results of a task side by side, and a method over tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from statistics import fmean, geometric_mean
from typing import Any, NamedTuple

from benchmarks.convergence.methods import CENTRE, finite, grid_name, grid_point
from benchmarks.convergence.plan import FLOOR, best_point
from benchmarks.convergence.tasks import Task


class TaskResults:
    """The lines of one task, all of the same length and versions."""

    def __init__(self, task: Task, lines: Iterable[dict[str, Any]]) -> None:
        self.task = task
        self.lines: dict[str, dict[int, dict[str, Any]]] = {}
        for line in lines:
            self.lines.setdefault(line["method"], {})[line["seed"]] = line
        grid = {k: by_seed for method, by_seed in self.lines.items() if (k := grid_point(method)) is not None}
        seeds = {seed for by_seed in grid.values() for seed in by_seed}
        self.unfinished = sorted(k for k, by_seed in grid.items() if set(by_seed) != seeds)
        self.grid = {k: by_seed for k, by_seed in sorted(grid.items()) if set(by_seed) == seeds}
        losses = {k: fmean(self._losses(by_seed)) for k, by_seed in self.grid.items()}
        self.best = best_point(losses, CENTRE[task.base]) if losses else None

    @property
    def tuned_lr(self) -> float | None:
        """The best learning rate of the grid."""
        return None if self.best is None else 10.0 ** (self.best / 2)

    @property
    def at_edge(self) -> bool:
        """Whether the best point is the first or the last one: a better one may lie beyond."""
        return self.best is not None and self.best in (min(self.grid), max(self.grid))

    @property
    def tuned_method(self) -> str | None:
        """The name of the best point of the grid."""
        return None if self.best is None else grid_name(self.best)

    def tuned(self) -> dict[int, dict[str, Any]]:
        """Return the lines of the best point by seed, none if there is no grid."""
        return {} if self.best is None else self.grid[self.best]

    def loss(self, method: str) -> float | None:
        """Return a method's loss, averaged over its seeds."""
        return fmean(self._losses(self.lines[method])) if method in self.lines else None

    def ratio(self, method: str) -> float | None:
        """Return a method's loss relative to the tuned one, over the seeds that both have."""
        return self._compare(method, lambda lines: max(FLOOR, fmean(self._losses(lines))), lambda a, b: a / b)

    def metric(self, method: str) -> float | None:
        """Return a method's metric, averaged over its seeds."""
        return self._metric(self.lines[method]) if method in self.lines else None

    def points(self, method: str) -> float | None:
        """Return by how many points accuracy or R² is above that of tuned; None where the metric is a loss."""
        if self.task.metric == "test loss":
            return None
        return self._compare(method, self._metric, lambda a, b: a - b)

    def spread(self, method: str) -> float | None:
        """Return the largest loss of a seed over the smallest, None if there is only one seed."""
        losses = [max(FLOOR, loss) for loss in self._losses(self.lines.get(method, {}))]
        return max(losses) / min(losses) if len(losses) > 1 and math.isfinite(min(losses)) else None

    def mean(self, method: str, name: str) -> float | None:
        """Return the mean over seeds of any number of a line."""
        values = [line.get(name) for line in self.lines.get(method, {}).values()]
        return fmean(values) if values and None not in values else None

    def rate(self, method: str) -> float | None:
        """Return the learning rate that a method has learned; the largest effective one if it does not say."""
        learned = self.mean(method, "learned lr")
        return self.mean(method, "peak lr") if learned is None else learned

    def _compare(self, method: str, average: Any, combine: Callable[[float, float], float]) -> float | None:
        ours, tuned = self.lines.get(method, {}), self.tuned()
        seeds = sorted(ours.keys() & tuned.keys())
        if not seeds:
            return None
        a, b = average({s: ours[s] for s in seeds}), average({s: tuned[s] for s in seeds})
        return combine(a, b) if math.isfinite(b) else None

    def _losses(self, lines: dict[int, dict[str, Any]]) -> list[float]:
        return [finite(line["loss"]) for line in lines.values()]

    def _metric(self, lines: dict[int, dict[str, Any]]) -> float:
        bad = math.inf if self.task.metric == "test loss" else -math.inf
        return fmean(bad if line["metric"] is None else line["metric"] for line in lines.values())


class Over(NamedTuple):
    """A method over tasks: loss relative to tuned, the geometric mean and the worst."""

    tasks: int
    mean: float
    worst: float
    where: str


def over(tables: Iterable[TaskResults], method: str) -> Over | None:
    """Return how a method fares over the tasks that it has results for, None if it has none."""
    ratios = {table.task.name: ratio for table in tables if (ratio := table.ratio(method)) is not None}
    if not ratios:
        return None
    where = max(ratios, key=lambda name: ratios[name])
    return Over(len(ratios), geometric(ratios.values()), ratios[where], where)


def geometric(values: Collection[float]) -> float:
    """Return the geometric mean, infinite if one of the values is."""
    return geometric_mean(values) if all(map(math.isfinite, values)) else math.inf


def apart(tables: Sequence[TaskResults]) -> tuple[list[TaskResults], list[TaskResults]]:
    """Return those of networks, and those of linear problems."""
    return [t for t in tables if not t.task.epochs], [t for t in tables if t.task.epochs]
