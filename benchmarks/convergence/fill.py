"""The tables and figures that this program writes into the documentation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.pages import between_marks, markdown_table

from .compare import TaskResults, apart, geometric, over, points
from .methods import FIXED, LEARNED, NAMES, TEACHER
from .report import accuracies, compose, constants, number, signed

GROUPINGS_SAID = {
    "head": "body and last layer",
    "part": "each part",
    "kind": "matrices, and vectors",
}


def fill(text: str, tables: Sequence[TaskResults], lines: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown text with its marked tables made anew.

    Raises:
        ValueError: a mark names no table.
    """

    def table(name: str) -> str:
        if name not in TABLES:
            raise ValueError(f"no table is called {name!r}. Known: {', '.join(TABLES)}")
        return TABLES[name](compose(lines, PROFILES[name])[1] if name in PROFILES else tables)

    return between_marks(text, "convergence", table)


def overview(tables: Sequence[TaskResults]) -> str:
    """Return a row for each method: losses relative to tuned on networks, on linear problems and on all."""
    head, rows = compared(NAMES, titled(tables))
    for method, row in zip(NAMES, rows, strict=True):
        changes = [change for table in tables if (change := points(table, method)) is not None]
        row.append(signed(fmean(changes)) if changes else "")
    return markdown_table(["method", *head, "accuracy or R², points"], rows)


def titled(tables: Sequence[TaskResults]) -> dict[str, list[TaskResults]]:
    """Return those of networks and those of linear problems, under what they are called."""
    return dict(zip(("networks", "linear problems"), apart(tables), strict=True))


def compared(
    methods: Mapping[str, str], parts: Mapping[str, Sequence[TaskResults]]
) -> tuple[list[str], list[list[str]]]:
    """Return two columns for each part, and a row for each method, which begins with its name."""
    head = [text for title, part in parts.items() for text in (f"{len(part)} {title}, mean", "worst")]
    rows = [[name, *(cell for part in parts.values() for cell in cells(part, m))] for m, name in methods.items()]
    return head, rows


def cells(tables: Sequence[TaskResults], method: str) -> list[str]:
    """Return the geometric mean of loss / tuned over tasks, with their number if it is not all, and the worst."""
    found = over(tables, method)
    if found is None:
        return ["", ""]
    missing = f" (of {found.tasks})" if found.tasks < len(tables) else ""
    return [f"{relative(found.mean)}{missing}", f"{relative(found.worst)} ({found.where.removeprefix('linear-')})"]


def relative(ratio: float | None) -> str:
    """Return a loss relative to another, with two digits behind the point as long as these say something."""
    return number(ratio, ".2f" if ratio is not None and ratio < 10 else ".3g")


def base_rates(tables: Sequence[TaskResults]) -> str:
    """Return how the networks fare at other base learning rates."""
    networks, _ = apart(tables)
    ours = [method for method in FIXED if method.startswith("ours") and "@" in method]
    rates = sorted({1.0, *(float(method.partition("@")[2]) for method in ours)})
    rows = []
    for family in ("ours", TEACHER):
        methods = [family if rate == 1 else f"{family}@{rate:.0e}" for rate in rates]
        rows.append([NAMES[family], *(cells(networks, method)[0] for method in methods)])
    return markdown_table(["base lr", *("1" if rate == 1 else f"{rate:.0e}" for rate in rates)], rows)


def every_task(tables: Sequence[TaskResults]) -> str:
    """Return a row for each task: the tuned learning rate, the learned one, and losses relative to tuned."""
    rows = []
    for table in tables:
        rows.append(
            [
                table.task.name,
                number(table.tuned_lr, ".2g"),
                number(table.rate(TEACHER), ".2g"),
                *(relative(table.ratio(method)) for method in NAMES),
                relative(table.spread(TEACHER)),
            ]
        )
    head = ["task", "tuned lr", "learned lr", *NAMES, f"{TEACHER}: worst seed / best"]
    return markdown_table(head, rows)


def groupings(tables: Sequence[TaskResults]) -> str:
    """Return a row for each network: losses relative to tuned, with one scale and with one for each group."""
    networks = with_part_scales(tables)
    methods = {TEACHER: "one scale"} | {f"{TEACHER}/{name}": title for name, title in GROUPINGS_SAID.items()}
    rows = [[table.task.name, *(relative(table.ratio(method)) for method in methods)] for table in networks]
    found = [over(networks, method) for method in methods]
    rows.append(["geometric mean", *(relative(each.mean) if each else "" for each in found)])
    return markdown_table(["loss / tuned", *methods.values()], rows)


def with_part_scales(tables: Sequence[TaskResults]) -> list[TaskResults]:
    """Return those of networks that have also been trained with a scale for each part."""
    return [table for table in apart(tables)[0] if f"{TEACHER}/part" in table.lines]


def part_rates(tables: Sequence[TaskResults]) -> str:
    """Return a row for each network: the learned lr, that of each part, and by how much these differ."""
    rows = []
    for table in with_part_scales(tables):
        learned = learned_lrs(table, f"{TEACHER}/part")
        apart_by = number(max(learned) / min(learned), ".2g")
        rows.append([table.task.name, number(table.rate(TEACHER), ".2g"), said(learned), apart_by])
    return markdown_table(["learned lr", "one scale", "each part, first to last", "largest / smallest"], rows)


def learned_lrs(table: TaskResults, method: str) -> list[float]:
    """Return the learned lr of each group, the geometric mean over seeds; nothing without results."""
    learned = [line["learned lrs"] for line in table.lines.get(method, {}).values()]
    return [geometric(values) for values in zip(*learned, strict=True)]


def said(rates: Sequence[float]) -> str:
    """Return learning rates for a table."""
    return ", ".join(number(rate, ".1e") for rate in rates)


def muon(tables: Sequence[TaskResults]) -> str:
    """Return a row for each ratio of the lrs of two kinds of groups: losses relative to the best pair of lrs."""
    losses = [table.loss(table.tuned_method or "") or math.nan for table in tables]
    best = min(losses, default=math.nan)
    rows = []
    for table, loss in zip(tables, losses, strict=True):
        ratio, tuned = table.task.ratio, table.tuned_lr or math.nan
        row = [f"1 : {ratio:g}", relative(loss / best)]
        row.append(said([tuned, tuned * ratio]))
        for method in (TEACHER, f"{TEACHER}/muon"):
            to_tuned = table.ratio(method)
            row.append("" if to_tuned is None else relative(to_tuned * loss / best))
            row.append(said(learned_lrs(table, method)))
        rows.append(row)
    head = ["lr of Muon : lr of AdamW", "tuned", "lrs", "one scale", "learned lrs", "a scale per group", "learned lrs"]
    return markdown_table(head, rows)


def in_short(tables: Sequence[TaskResults]) -> str:
    """Return how "auto" fares, as a sentence."""
    return f"Final training loss, divided by that of the best learning rate of a grid: {_said_of(tables, TEACHER)}."


def learned(tables: Sequence[TaskResults]) -> str:
    """Return how the plain base fares at the learned lr, as a sentence."""
    return (
        'The plain base at `learned_lr()` of an `s_init="auto"` run, its final loss divided by that of the best lr of\n'
        f"a grid: {_said_of(tables, LEARNED)}."
    )


def _said_of(tables: Sequence[TaskResults], method: str) -> str:
    parts = {title: (len(part), *cells(part, method)) for title, part in titled(tables).items()}
    return "; ".join(
        f"{mean} in the mean of {n} {title}, at worst {worst}" for title, (n, mean, worst) in parts.items() if mean
    )


def behind(tables: Sequence[TaskResults]) -> str:
    """Return the tasks on which "auto" is more than two percent worse than tuned, the worst first, as a sentence."""
    ratios = {
        table.task.name: ratio for table in tables if (ratio := table.ratio(TEACHER)) is not None and ratio > 1.02
    }
    worst = sorted(ratios, key=lambda name: -ratios[name])
    return f"More than 2 % worse than tuned: {', '.join(f'{name} {relative(ratios[name])}' for name in worst)}."


def origin(tables: Sequence[TaskResults]) -> str:
    """Return what the tables rest on, as a line of small print."""
    every = [line for table in tables for by_seed in table.lines.values() for line in by_seed.values()]
    if not every:
        return ""
    last = every[-1]
    seeds: dict[tuple[int, ...], list[str]] = {}
    for table in tables:
        seeds.setdefault(tuple(sorted(table.lines.get(TEACHER, {}))), []).append(table.task.name)
    usual = max(seeds, key=lambda key: len(seeds[key]))
    others = [f"{', '.join(names)}: {_seeds(key)}" for key, names in seeds.items() if key != usual]
    which = "; ".join([_seeds(usual), *others])
    return (
        f"<sub>{len(every)} runs, {which}; torch {last['torch']}, Python {last['python']}, x86-64, one thread a run. "
        "`python -m benchmarks.convergence report --profile full --results benchmarks/convergence/results.jsonl "
        "--output docs/convergence --fill README.md docs/*.md`</sub>"
    )


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) != 1 else ''} {', '.join(map(str, seeds))}" if seeds else "no seed"


TABLES: dict[str, Callable[[Sequence[TaskResults]], str]] = {
    "overview": overview,
    "base rates": base_rates,
    "tasks": every_task,
    "in short": in_short,
    "learned": learned,
    "behind": behind,
    "constants": constants,
    "accuracies": accuracies,
    "origin": origin,
    "groupings": groupings,
    "part rates": part_rates,
    "muon": muon,
}
PROFILES = {"muon": "groups"}  # of tables that are always made of the same one
