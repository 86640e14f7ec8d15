"""Tables and pictures of the results that there are, complete or not."""

from __future__ import annotations

import argparse
import math
import platform
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, geometric_mean, median
from typing import Any

from matplotlib.figure import Figure

from .methods import ABLATION, CENTRE, FIXED, LEARNED, TEACHER, finite, grid_name, grid_point
from .plan import FLOOR, best_point
from .results import Results, key
from .tasks import PUBLISHED, TASKS, Task

SHOWN = (*FIXED, LEARNED)  # the rows of tables; the grid gives one more, the tuned learning rate
COLORS = {"ours": "C0", TEACHER: "C1", "0.0.1": "C2"}
ABOUT = f"""\
Loss is that of the last weights on a fixed part of the training data, in evaluation mode. "tuned" is the plain base
optimizer at the learning rate, of a grid of half decades, whose loss, averaged over seeds, is least; the grid is
extended until that is not its edge. Ratios are of losses averaged over the same seeds, where a loss below {FLOOR:g}
counts as {FLOOR:g}, for separable problems come as close to zero as one likes. A ratio above 1 means worse than tuned,
∞ that a run diverged. Differences of accuracy and of R² are in points, positive if better than tuned; for linear
problems the accuracy is that of training."""


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

    def metric_change(self, method: str) -> float | None:
        """Return a method's metric relative to the tuned one: a ratio of test losses, a difference of all others."""
        divide = self.task.metric == "test loss"
        return self._compare(method, self._metric, lambda a, b: a / b if divide else a - b)

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


def main(options: argparse.Namespace) -> int:
    """Print the report, and write it with its pictures into a directory if one is given; return the exit status."""
    lines = Results(options.results).lines()
    text, tables = compose(lines, options.profile)
    print(text)
    if options.output and tables:
        options.output.mkdir(parents=True, exist_ok=True)
        pictures = {"loss-by-lr": loss_by_lr, "relative-loss": relative_loss, "learned-lr": learned_lr}
        for name, draw in pictures.items():
            draw(tables).savefig(options.output / f"{name}.png", dpi=120)
        links = "\n".join(f"![{name}]({name}.png)\n" for name in pictures)
        (options.output / "report.md").write_text(f"{text}\n## Pictures\n\n{links}", encoding="utf-8")
    return 0


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
    summaries = [
        ("all tasks", tables),
        ("networks", [table for table in tables if not table.task.epochs]),
        ("linear problems", [table for table in tables if table.task.epochs]),
    ]
    parts = [
        f"# Convergence, profile {profile}",
        ABOUT,
        f"torch {versions['torch']}, mechanic-pytorch {versions['package']}, Python {platform.python_version()}, seeds "
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
        ratios = {table.task.name: ratio for table in tables if (ratio := table.ratio(method)) is not None}
        if not ratios:
            continue
        worst = max(ratios, key=lambda name: ratios[name])
        changes = {
            divide: {
                table.task.name: change
                for table in tables
                if (table.task.metric == "test loss") is divide and (change := table.metric_change(method)) is not None
            }
            for divide in (False, True)
        }
        spreads = [spread for table in tables if (spread := table.spread(method)) is not None]
        rows.append(
            [
                method,
                str(len(ratios)),
                _number(_geometric(ratios.values())),
                _number(median(ratios.values())),
                f"{_number(ratios[worst])} ({worst})",
                _signed(fmean(changes[False].values())) if changes[False] else "",
                _signed(min(changes[False].values())) if changes[False] else "",
                _number(_geometric(changes[True].values())) if changes[True] else "",
                _number(_geometric(spreads)) if spreads else "",
            ]
        )
    head = [
        "method", "tasks", "loss / tuned, geometric mean", "median", "worst", "accuracy or R², mean change", "worst",
        "test loss / tuned", "largest / smallest loss of seeds",
    ]  # fmt: skip
    return _table(head, rows) if rows else "No method has results beside a grid."


def ablation(tables: list[TaskResults]) -> list[str]:
    """Return losses for other constants of the start: on half of the tasks to choose by, on the rest to confirm."""
    names = list(TASKS)
    halves = [[table for table in tables if names.index(table.task.name) % 2 == half] for half in (0, 1)]
    rows = []
    for method, constants in ABLATION.items():
        row = [f"{constant:g}" for constant in constants]
        for half in halves:
            ratios = {table.task.name: ratio for table in half if (ratio := table.ratio(method)) is not None}
            worst = max(ratios, key=lambda name: ratios[name], default="")
            row += [str(len(ratios)), _number(_geometric(ratios.values())) if ratios else ""]
            row += [f"{_number(ratios[worst])} ({worst})" if ratios else ""]
        rows += [row] if row[2] != "0" or row[5] != "0" else []
    head = ["first scale / c", "penalty", *["tasks", "loss / tuned, geometric mean", "worst"] * 2]
    about = f"First to choose by: {', '.join(names[::2])}. Then to confirm: {', '.join(names[1::2])}."
    return [f'## The constants of `s_init="auto"`\n\n{_table(head, rows)}\n\n{about}'] if rows else []


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
                _number(table.loss(method)),
                f"{_number(min(losses))} to {_number(max(losses))}",
                _number(table.ratio(method)),
                _number(table.metric(method)),
                _number(table.rate(method), ".2g"),
                _number(table.mean(method, "seconds"), ".1f"),
            ]
        )
    title = f"{task.name}: {task.base}, {steps} steps of {task.batch}"
    head = ["method", "loss", "of seeds", "/ tuned", task.metric, "lr, learned or largest", "seconds"]
    return f"## {title}\n\n{_table(head, rows)}"


def published(tables: list[TaskResults], profile: str) -> list[str]:
    """Return training accuracies beside the published ones."""
    ours = {table.task.published: table for table in tables if table.task.published}
    if profile != "full" or not ours:
        return []  # the published figures are for 100 epochs
    methods = ["ours", TEACHER, "d-adaptation"]
    rows = []
    for name, figures in PUBLISHED.items():
        table = ours.get(name)
        here = [_number(table.metric(m or ""), ".1f") for m in (table.tuned_method, *methods)] if table else ["not run"]
        rows.append([name, *map(str, figures), *here, *[""] * (1 + len(methods) - len(here))])
    head = ["training accuracy, %", "published tuned Adam", "published D-Adapt Adam", "tuned here", *methods]
    about = "Published: Defazio and Mishchenko 2023, means of ten seeds."
    return [f"## Linear problems, as published\n\n{_table(head, rows)}\n\n{about}"]


def loss_by_lr(tables: list[TaskResults]) -> Figure:
    """Draw the loss of the grid against the learning rate, and of ours as lines across."""
    figure, axes = _panels(tables)
    for table, axis in zip(tables, axes, strict=True):
        rates = [10.0 ** (k / 2) for k in table.grid]
        losses = [[_shown(finite(line["loss"])) for line in by_seed.values()] for by_seed in table.grid.values()]
        if rates:
            axis.plot(rates, [fmean(values) for values in losses], "o-", color="0.3", markersize=3, label="plain")
            axis.fill_between(rates, [min(v) for v in losses], [max(v) for v in losses], color="0.3", alpha=0.2, lw=0)
        for method, color in COLORS.items():
            loss, peak = table.loss(method), table.rate(method)
            if loss is not None and math.isfinite(loss):
                axis.axhline(_shown(loss), color=color, label=method, linewidth=1.2)
                if peak:
                    axis.plot([peak], [_shown(loss)], "D", color=color, markersize=5)
        axis.set(xscale="log", yscale="log")
        finite_losses = [v for values in losses for v in values if math.isfinite(v)]
        if finite_losses and max(finite_losses) > 1e3 * min(finite_losses):
            axis.set_ylim(top=min(max(finite_losses), 100 * median(finite_losses)))
    return _finish(figure, axes, "learning rate (diamonds: learned)", "final training loss")


def relative_loss(tables: list[TaskResults]) -> Figure:
    """Draw the loss of every method relative to tuned: a dot for each task, a bar for the geometric mean."""
    rows = {
        method: [ratio for table in tables if (ratio := table.ratio(method)) is not None]
        for method in reversed(SHOWN)
        if any(table.ratio(method) is not None for table in tables)
    }
    figure = Figure(figsize=(8, 0.34 * len(rows) + 1.2), layout="constrained")
    axis = figure.subplots()
    highest = max([ratio for ratios in rows.values() for ratio in ratios if math.isfinite(ratio)], default=1.0)
    for height, (method, ratios) in enumerate(rows.items()):
        color = COLORS.get(method.partition("@")[0], "0.4")
        inside = [ratio for ratio in ratios if math.isfinite(ratio)]
        heights = [height + 0.5 * (i + 0.5) / len(inside) - 0.25 for i in range(len(inside))]
        axis.plot(sorted(inside), heights, "o", color=color, markersize=4, alpha=0.6, markeredgewidth=0)
        axis.plot(
            [1.5 * highest] * (len(ratios) - len(inside)), [height] * (len(ratios) - len(inside)), "x", color=color
        )
        if inside:
            axis.plot([geometric_mean(inside)] * 2, [height - 0.36, height + 0.36], color=color, linewidth=2)
    axis.axvline(1, color="0.3", linewidth=0.8)
    axis.set(xscale="log", yticks=range(len(rows)), yticklabels=list(rows))
    axis.set_xlabel("final training loss / tuned (dot: task, bar: geometric mean, cross: diverged)", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(axis="x", alpha=0.3)
    return figure


def learned_lr(tables: list[TaskResults]) -> Figure:
    """Draw the learned effective learning rate over time, and the tuned one under its schedule."""
    figure, axes = _panels(tables)
    for table, axis in zip(tables, axes, strict=True):
        for method in ("ours", TEACHER):
            for i, line in enumerate(table.lines.get(method, {}).values()):
                points = [(step, lr) for step, lr in line["lr over time"] if lr is not None and lr > 0]
                axis.plot(*zip(*points, strict=True) if points else ((), ()), color=COLORS[method], linewidth=1.2,
                          label=method if i == 0 else None)  # fmt: skip
                steps = line["steps"]
                if table.tuned_lr and method == TEACHER and i == 0:
                    moments = [round(j * (steps - 1) / 200) for j in range(201)]
                    tuned = [table.tuned_lr * table.task.factor(step, steps) for step in moments]
                    axis.plot(moments, tuned, "--", color="0.3", linewidth=1, label="tuned")
                    axis.set_ylim(1e-4 * table.tuned_lr, 100 * table.tuned_lr)
        axis.set(yscale="log")
    return _finish(figure, axes, "step", "effective learning rate")


def _panels(tables: list[TaskResults]) -> tuple[Figure, list[Any]]:
    columns = min(5, math.ceil(math.sqrt(len(tables))))
    rows = math.ceil(len(tables) / columns)
    figure = Figure(figsize=(3.1 * columns + 0.6, 2.5 * rows + 0.6), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(tables) :]:
        axis.remove()
    for table, axis in zip(tables, axes, strict=False):
        axis.set_title(f"{table.task.name} ({table.task.base})", fontsize=9)
        axis.tick_params(which="both", labelsize=7)
    return figure, axes[: len(tables)]


def _finish(figure: Figure, axes: list[Any], x: str, y: str) -> Figure:
    figure.supxlabel(x, fontsize=9)
    figure.supylabel(y, fontsize=9)
    labels: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    if labels:
        figure.legend(labels.values(), labels.keys(), loc="outside upper center", ncols=len(labels), fontsize=8)
    return figure


def _shown(loss: float) -> float:
    return max(FLOOR, loss) if math.isfinite(loss) else math.nan


def _geometric(values: Iterable[float]) -> float:
    values = list(values)
    return geometric_mean(values) if all(map(math.isfinite, values)) else math.inf


def _number(value: float | None, form: str = ".3g") -> str:
    if value is None:
        return ""
    return format(value, form) if math.isfinite(value) else "∞" if value > 0 else "-∞"


def _signed(value: float) -> str:
    return format(value, "+.1f") if math.isfinite(value) else "-∞"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|---|{'---|' * (len(head) - 1)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])
