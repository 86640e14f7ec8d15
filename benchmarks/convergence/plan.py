"""Which jobs are still to be run, given what is known: pure functions of tasks, methods, seeds and results."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from .methods import CENTRE, FIXED, FURTHEST, GRID, IF_NAMED, LEARNED, REACH, TEACHER, Job, finite, grid_name
from .results import key
from .tasks import Task

FLOOR = 1e-4  # a loss below counts as this: separable problems come as close to zero as the learning rate is large

Finished = Mapping[tuple[Any, ...], dict[str, Any]]


def best_point(losses: Mapping[int, float], centre: int) -> int:
    """Return the point of least loss; of equal ones the nearest to the centre, and the smallest if all diverge."""
    if all(loss == float("inf") for loss in losses.values()):
        return min(losses)
    return min(losses, key=lambda k: (max(losses[k], FLOOR), abs(k - centre), k))


def grid(task: Task, profile: str, losses: Mapping[int, float | None]) -> list[int]:
    """Return the points of a grid, one more than known on the side where the best one is the last.

    Args:
        task: the task.
        profile: how far the grid reaches to begin with.
        losses: of the points that are known; None, or nothing, where some seed has no result yet.
    """
    centre = CENTRE[task.base]
    points = set(range(centre - REACH[profile], centre + REACH[profile] + 1))
    while all(losses.get(k) is not None for k in points):
        best = best_point({k: finite(losses[k]) for k in points}, centre)
        beyond = best - 1 if best == min(points) else best + 1 if best == max(points) else None
        if beyond is None or abs(beyond) > FURTHEST:
            break
        points.add(beyond)
    return sorted(points)


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
            wanted += [(Job(task, grid_name(k), s, profile), None) for k in grid(task, profile, losses) for s in seeds]
        wanted += [
            (Job(task, method, s, profile), None) for method in (*FIXED, *IF_NAMED) if method in methods for s in seeds
        ]
        if LEARNED in methods:
            for seed in seeds:
                teacher = result(TEACHER, seed)
                if teacher and 0 < finite(teacher["learned lr"]) < float("inf"):
                    wanted.append((Job(task, LEARNED, seed, profile), teacher["learned lr"]))
    return [(job, lr) for job, lr in wanted if key(job.identity) not in finished]
