"""Pictures of the results that there are, complete or not."""

from __future__ import annotations

import math
from statistics import fmean, median
from typing import Any

from matplotlib.figure import Figure

from benchmarks.convergence.compare import TaskResults, apart, over
from benchmarks.convergence.methods import NAMES, TEACHER, finite
from benchmarks.convergence.plan import FLOOR

COLORS = {"ours": "C0", TEACHER: "C1", "0.0.1": "C2"}
COLUMNS = 3  # more would be too small to read on a page
NEAREST, FARTHEST = 0.7, 6.0  # of relative losses; what is beyond becomes a triangle at the edge


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
                axis.axhline(_shown(loss), color=color, label=_name(method), linewidth=1.2)
                if peak:
                    axis.plot([peak], [_shown(loss)], "D", color=color, markersize=5)
        axis.set(xscale="log", yscale="log")
        finite_losses = [v for values in losses for v in values if math.isfinite(v)]
        if finite_losses and max(finite_losses) > 1e3 * min(finite_losses):
            axis.set_ylim(top=min(max(finite_losses), 100 * median(finite_losses)))
    return _finish(figure, axes, "learning rate (diamonds: learned)", "final training loss")


def relative_loss(tables: list[TaskResults]) -> Figure:
    """Draw the loss of every method relative to tuned: a dot for each task, a bar for the geometric mean."""
    rows = [method for method in reversed(NAMES) if over(tables, method)]
    figure = Figure(figsize=(8, 0.42 * len(rows) + 1.3), layout="constrained")
    axis = figure.subplots()
    for height, method in enumerate(rows):
        for part, (tasks, color) in enumerate(zip(apart(tables), ("C0", "C1"), strict=True)):
            where = height + 0.18 - 0.36 * part
            ratios = [ratio for table in tasks if (ratio := table.ratio(method)) is not None]
            inside = [ratio for ratio in ratios if ratio <= FARTHEST]
            axis.plot(inside, [where] * len(inside), "o", color=color, markersize=4, alpha=0.6, markeredgewidth=0)
            axis.plot([FARTHEST] * (len(ratios) - len(inside)), [where] * (len(ratios) - len(inside)), ">", color=color,
                      markersize=5, alpha=0.6, markeredgewidth=0, clip_on=False)  # fmt: skip
            mean = over(tasks, method)
            if mean and mean.mean <= FARTHEST:
                axis.plot([mean.mean] * 2, [where - 0.15, where + 0.15], color=color, linewidth=2.5)
    for title, color in (("networks", "C0"), ("linear problems", "C1")):
        axis.plot([], [], "o", color=color, label=title)
    axis.axvline(1, color="0.3", linewidth=0.8)
    axis.set(
        xscale="log",
        xlim=(NEAREST, FARTHEST),
        yticks=range(len(rows)),
        yticklabels=[NAMES[row].replace("`", "") for row in rows],
    )
    ticks = [0.8, 1, 1.5, 2, 3, 5]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlabel(
        f"final training loss / tuned (dot: a task; bar: geometric mean; triangle: above {FARTHEST:g})", fontsize=9
    )
    axis.tick_params(labelsize=9)
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=8, loc="lower right")
    return figure


def learned_lr(tables: list[TaskResults]) -> Figure:
    """Draw the learned effective learning rate over time, and the tuned one under its schedule."""
    figure, axes = _panels(tables)
    for table, axis in zip(tables, axes, strict=True):
        for method in ("ours", TEACHER):
            for i, line in enumerate(table.lines.get(method, {}).values()):
                points = [(step, lr) for step, lr in line["lr over time"] if lr is not None and lr > 0]
                axis.plot(*zip(*points, strict=True) if points else ((), ()), color=COLORS[method], linewidth=1.2,
                          label=_name(method) if i == 0 else None)  # fmt: skip
                steps = line["steps"]
                if table.tuned_lr and method == TEACHER and i == 0:
                    moments = [round(j * (steps - 1) / 200) for j in range(201)]
                    tuned = [table.tuned_lr * table.task.factor(step, steps) for step in moments]
                    axis.plot(moments, tuned, "--", color="0.3", linewidth=1, label="tuned")
                    axis.set_ylim(1e-4 * table.tuned_lr, 100 * table.tuned_lr)
        axis.set(yscale="log")
        axis.locator_params(axis="x", nbins=4)
    return _finish(figure, axes, "step", "effective learning rate")


def _panels(tables: list[TaskResults]) -> tuple[Figure, list[Any]]:
    columns = min(COLUMNS, math.ceil(math.sqrt(len(tables))))
    rows = math.ceil(len(tables) / columns)
    figure = Figure(figsize=(3.1 * columns + 0.6, 2.5 * rows + 0.6), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(tables) :]:
        axis.remove()
    for table, axis in zip(tables, axes, strict=False):
        axis.set_title(f"{table.task.name} ({table.task.base})", fontsize=11)
        axis.tick_params(which="both", labelsize=9)
    return figure, axes[: len(tables)]


def _finish(figure: Figure, axes: list[Any], x: str, y: str) -> Figure:
    figure.supxlabel(x, fontsize=11)
    figure.supylabel(y, fontsize=11)
    labels: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    if labels:
        figure.legend(labels.values(), labels.keys(), loc="outside upper center", ncols=len(labels), fontsize=10)
    return figure


def _name(method: str) -> str:
    return NAMES.get(method, method).replace("`", "")


def _shown(loss: float) -> float:
    return max(FLOOR, loss) if math.isfinite(loss) else math.nan


ALL = {"loss-by-lr": loss_by_lr, "relative-loss": relative_loss, "learned-lr": learned_lr}
