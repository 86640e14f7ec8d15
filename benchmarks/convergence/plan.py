"""Which learning rates are tried, and which jobs are still to be run, given what is known."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, TypeVar

from benchmarks.convergence.methods import (
    CENTRE,
    FIXED,
    FURTHEST,
    GRID,
    LEARNED,
    PER_GROUP,
    REACH,
    TEACHER,
    Job,
    finite,
    grid_name,
)
from benchmarks.convergence.results import key
from benchmarks.convergence.tasks import Task

FLOOR = 1e-4  # a loss below counts as this: separable problems come as close to zero as the learning rate is large

Finished = Mapping[tuple[Any, ...], dict[str, Any]]
Result = TypeVar("Result", bound=tuple[Any, ...])


def best_point(losses: Mapping[int, float], centre: int) -> int:
    """Return the point of least loss; of equal ones the nearest to the centre, and the smallest if all diverge."""
    if all(loss == float("inf") for loss in losses.values()):
        return min(losses)
    return min(losses, key=lambda k: (max(losses[k], FLOOR), abs(k - centre), k))


def grid(centre: int, reach: int, losses: Mapping[int, float | None]) -> list[int]:
    """Return the points of a grid, in half decades, one more than known on the side where the best one is the last.

    Args:
        centre: its middle, to begin with.
        reach: how many points it has on either side of that, to begin with.
        losses: of the points that are known; None, or nothing, where some seed has no result yet.
    """
    points = set(range(centre - reach, centre + reach + 1))
    while all(losses.get(k) is not None for k in points):
        best = best_point({k: finite(losses[k]) for k in points}, centre)
        beyond = best - 1 if best == min(points) else best + 1 if best == max(points) else None
        if beyond is None or abs(beyond) > FURTHEST:
            break
        points.add(beyond)
    return sorted(points)


def tuned(run: Callable[[float], Result], centre: int, reach: int) -> tuple[Result, float]:
    """Return the result that begins with the least loss, and its lr: of a grid whose best point is inside.

    Raises:
        RuntimeError: there is none.
    """
    made: dict[int, Result] = {}

    def losses() -> dict[int, float]:
        return {k: finite(result[0]) for k, result in made.items()}

    while todo := set(grid(centre, reach, losses())) - made.keys():
        made |= {k: run(10 ** (k / 2)) for k in sorted(todo)}
    best = best_point(losses(), centre)
    if best in (min(made), max(made)):
        raise RuntimeError("no best learning rate was found")
    return made[best], 10 ** (best / 2)


def seed_average(lines: Sequence[dict[str, Any] | None], name: str = "loss") -> float | None:
    """Return the mean over seeds, infinite if one diverged, None if one is missing."""
    return None if not lines or None in lines else fmean(finite(line[name]) for line in lines if line is not None)


def jobs(
    tasks: Iterable[Task], methods: Collection[str], seeds: Sequence[int], profile: str, finished: Finished
) -> list[tuple[Job, float | None]]:
    """Return every job that can be run now and has no result, with its learning rate if it is a learned one.

    Results make new jobs: the grid grows until its best point has neighbours on both sides, and the plain base is run
    at the learning rate that was learned.
    """
    wanted: list[tuple[Job, float | None]] = []
    for task in tasks:

        def result(method: str, seed: int, task: Task = task) -> dict[str, Any] | None:
            return finished.get(tuple(Job(task, method, seed, profile).identity.values()))

        if GRID in methods:
            losses = {
                k: seed_average([result(grid_name(k), seed) for seed in seeds]) for k in range(-FURTHEST, FURTHEST + 1)
            }
            points = grid(CENTRE[task.base], REACH[profile], losses)
            wanted += [(Job(task, grid_name(k), s, profile), None) for k in points for s in seeds]
        wanted += [
            (Job(task, method, s, profile), None) for method in (*FIXED, *PER_GROUP) if method in methods for s in seeds
        ]
        if LEARNED in methods:
            for seed in seeds:
                teacher = result(TEACHER, seed)
                if teacher and 0 < finite(teacher["learned lr"]) < float("inf"):
                    wanted.append((Job(task, LEARNED, seed, profile), teacher["learned lr"]))
    return [(job, lr) for job, lr in wanted if key(job.identity) not in finished]
