"""The report: tables of the results that there are, complete or not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, median
from typing import Any

from benchmarks.pages import markdown_table

from .compare import TaskResults, apart, geometric, over, points
from .methods import ABLATION, FIXED, LEARNED, TEACHER, finite
from .plan import FLOOR
from .results import key
from .tasks import PUBLISHED, TASKS

SHOWN = (*FIXED, LEARNED)  # the rows of tables; the grid gives one more, the tuned learning rate
ABOUT = f"""\
Loss is that of the last weights on a fixed part of the training data, in evaluation mode. "tuned" is the plain base
optimizer at the learning rate, of a grid of half decades, whose loss, averaged over seeds, is least; the grid is
extended until that is not its edge. Ratios are of losses averaged over the same seeds, where a loss below {FLOOR:g}
counts as {FLOOR:g}, for separable problems come as close to zero as one likes. A ratio above 1 means worse than tuned,
∞ that a run diverged. Differences of accuracy and of R² are in points, positive if better than tuned; for linear
problems the accuracy is that of training."""


def compose(lines: Sequence[dict[str, Any]], profile: str) -> tuple[str, list[TaskResults]]:
    """Return the report, and the results that it is about: those of the versions and lengths that ran last."""
    lines = [line for line in lines if line["profile"] == profile and line["task"] in TASKS]
    if not lines:
        return f"No results of profile {profile}.", []
    versions = {name: lines[-1][name] for name in ("torch", "package")}
    length = {line["task"]: line["steps"] for line in lines}
    current = [
        line
        for line in lines
        if line["steps"] == length[line["task"]] and all(line[name] == value for name, value in versions.items())
    ]
    done = {key(line): line for line in current if "error" not in line}
    failed = {key(line): line for line in current if "error" in line and key(line) not in done}
    tables = [
        TaskResults(task, own)
        for task in TASKS.values()
        if (own := [line for line in done.values() if line["task"] == task.name])
    ]
    seeds = sorted({line["seed"] for line in done.values()})
    networks, linear = apart(tables)
    summaries = [("all tasks", tables), ("networks", networks), ("linear problems", linear)]
    parts = [
        f"# Convergence, profile {profile}",
        ABOUT,
        f"torch {versions['torch']}, mechanic-pytorch {versions['package']}, Python {lines[-1]['python']}, seeds "
        f"{', '.join(map(str, seeds))}, {len(done)} runs.",
        *notes(tables, profile, seeds, failed.values(), len(lines) - len(current)),
        *[
            f"## {title}\n\n{summary(part)}"
            for title, part in summaries
            if part and (part != tables or title == "all tasks")
        ],
        *ablation(tables),
        *[section(table) for table in tables],
        *published(tables, profile),
    ]
    return "\n\n".join(parts) + "\n", tables


def notes(
    tables: list[TaskResults], profile: str, seeds: list[int], failed: Iterable[dict[str, Any]], old: int
) -> list[str]:
    """Return what is missing, what has failed and what must not be believed, as a list."""
    ran = {table.task.name for table in tables}
    found = [f"not run: {name}" for name, task in TASKS.items() if profile in task.lengths and name not in ran]
    for table in tables:
        name = table.task.name
        lacking = [
            f"{method}{'' if method not in table.lines else f' (seeds {without})'}"
            for method in SHOWN
            if (without := ", ".join(str(seed) for seed in seeds if seed not in table.lines.get(method, {})))
        ]
        lacking += [f"grid point 10^{k / 2:g} (some seeds)" for k in table.unfinished]
        lacking += ["the grid"] * (table.best is None)
        found += [f"{name}: missing {', '.join(lacking)}"] * bool(lacking)
        found += [
            f"{name}: the best learning rate is at the edge of the grid, so tuned may be better yet"
        ] * table.at_edge
        for seed in seeds:
            starts = {by_seed[seed]["start"] for by_seed in table.lines.values() if seed in by_seed}
            if len(starts) > 1:
                found.append(f"{name}, seed {seed}: **methods differ in weights or batches; do not compare them**")
    found += [f"{line['task']}, {line['method']}, seed {line['seed']}: failed, {line['error']}" for line in failed]
    found += [f"{old} results of other versions or lengths are left aside"] * (old > 0)
    return ["Incomplete:\n\n" + "\n".join(f"- {item}" for item in found)] if found else []


def summary(tables: list[TaskResults]) -> str:
    """Return one row for each method, over tasks."""
    rows = []
    for method in SHOWN:
        losses = over(tables, method)
        if losses is None:
            continue
        ratios = [ratio for table in tables if (ratio := table.ratio(method)) is not None]
        changes = [change for table in tables if (change := points(table, method)) is not None]
        test = [table.metric_change(method) for table in tables if table.task.metric == "test loss"]
        tests = [ratio for ratio in test if ratio is not None]
        spreads = [spread for table in tables if (spread := table.spread(method)) is not None]
        rows.append(
            [
                method,
                str(losses.tasks),
                number(losses.mean),
                number(median(ratios)),
                f"{number(losses.worst)} ({losses.where})",
                signed(fmean(changes)) if changes else "",
                signed(min(changes)) if changes else "",
                number(geometric(tests)) if tests else "",
                number(geometric(spreads)) if spreads else "",
            ]
        )
    head = [
        "method", "tasks", "loss / tuned, geometric mean", "median", "worst", "accuracy or R², mean change", "worst",
        "test loss / tuned", "largest / smallest loss of seeds",
    ]  # fmt: skip
    return markdown_table(head, rows) if rows else "No method has results beside a grid."


def constants(tables: Sequence[TaskResults]) -> str:
    """Return losses for other constants of the start: on every other task to choose by, on the rest to confirm."""
    halves, rows = _halves(tables), []
    for method, values in ABLATION.items():
        found = [over(half, method) for half in halves]
        cells = [[str(o.tasks), number(o.mean), f"{number(o.worst)} ({o.where})"] if o else [""] * 3 for o in found]
        rows += [[f"{value:g}" for value in values] + cells[0] + cells[1]] if any(found) else []
    head = ["first scale", "penalty", *["tasks", "loss / tuned, geometric mean", "worst"] * 2]
    return markdown_table(head, rows) if rows else ""


def _halves(tables: Sequence[TaskResults]) -> list[list[TaskResults]]:
    """Return every other task of the list, and the rest, as far as they have all that an ablation runs."""
    names, tables = list(TASKS), [table for table in tables if table.lines.keys() >= ABLATION.keys()]
    return [[table for table in tables if names.index(table.task.name) % 2 == half] for half in (0, 1)]


def ablation(tables: list[TaskResults]) -> list[str]:
    """Return that table with its heading, nothing if there are no such results."""
    first, then = ([table.task.name for table in half] for half in _halves(tables))
    table = constants(tables)
    about = f"First to choose by: {', '.join(first)}. Then to confirm: {', '.join(then)}."
    return [f'## The constants of `s_init="auto"`\n\n{table}\n\n{about}'] if table else []


def section(table: TaskResults) -> str:
    """Return one task's table."""
    task, rows = table.task, []
    steps = next(line["steps"] for by_seed in table.lines.values() for line in by_seed.values())
    names = {table.tuned_method: f"tuned, lr {table.tuned_lr:.2g}"} if table.tuned_method else {}
    names |= {method: method for method in SHOWN if method in table.lines}
    for method, name in names.items():
        losses = [finite(line["loss"]) for line in table.lines[method].values()]
        rows.append(
            [
                name,
                number(table.loss(method)),
                f"{number(min(losses))} to {number(max(losses))}",
                number(table.ratio(method)),
                number(table.metric(method)),
                number(table.rate(method), ".2g"),
                number(table.mean(method, "seconds"), ".1f"),
            ]
        )
    title = f"{task.name}: {task.base}, {steps} steps of {task.batch}"
    head = ["method", "loss", "of seeds", "/ tuned", task.metric, "lr, learned or largest", "seconds"]
    return f"## {title}\n\n{markdown_table(head, rows)}"


def accuracies(tables: Sequence[TaskResults]) -> str:
    """Return training accuracies beside the published ones."""
    ours = {table.task.published: table for table in tables if table.task.published}
    methods = ["ours", TEACHER, "d-adaptation"]
    rows = []
    for name, figures in PUBLISHED.items():
        table = ours.get(name)
        here = [number(table.metric(m or ""), ".1f") for m in (table.tuned_method, *methods)] if table else ["not run"]
        rows.append([name, *map(str, figures), *here, *[""] * (1 + len(methods) - len(here))])
    head = ["training accuracy, %", "published tuned Adam", "published D-Adapt Adam", "tuned here", *methods]
    return markdown_table(head, rows)


def published(tables: list[TaskResults], profile: str) -> list[str]:
    """Return that table with its heading; the published figures are for 100 epochs, as the full profile is."""
    if profile != "full" or not any(table.task.published for table in tables):
        return []
    about = "Published: Defazio and Mishchenko 2023, means of ten seeds."
    return [f"## Linear problems, as published\n\n{accuracies(tables)}\n\n{about}"]


def number(value: float | None, form: str = ".3g") -> str:
    """Return a number for a table, nothing if there is none."""
    if value is None:
        return ""
    return format(value, form) if math.isfinite(value) else "∞" if value > 0 else "-∞"


def signed(value: float) -> str:
    """Return a difference for a table."""
    return format(value, "+.1f") if math.isfinite(value) else "-∞"
