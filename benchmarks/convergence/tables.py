"""The tables of the results that there are, complete or not: printed as a report, or written into the documentation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from statistics import fmean
from typing import Any

from benchmarks.convergence.compare import TaskResults, apart, geometric, over
from benchmarks.convergence.methods import FIXED, LEARNED, NAMES, TEACHER
from benchmarks.convergence.results import key
from benchmarks.convergence.tasks import PUBLISHED, TASKS, Task
from benchmarks.pages import between_marks, markdown_table

PEERS_SHOWN = 5  # beside ours, where there is no room for all
GROUPINGS_SAID = {"head": "body and last layer", "part": "each part", "kind": "matrices, and vectors"}


def current(lines: Iterable[dict[str, Any]], profile: str, known: Mapping[str, Task]) -> list[dict[str, Any]]:
    """Return the results of a profile on known tasks, of the versions and lengths that ran last."""
    lines = [line for line in lines if line["profile"] == profile and line["task"] in known]
    length = {line["task"]: line["steps"] for line in lines}
    versions = itemgetter("torch", "package")
    return [x for x in lines if x["steps"] == length[x["task"]] and versions(x) == versions(lines[-1])]


def compose(lines: Iterable[dict[str, Any]], profile: str, known: Mapping[str, Task] = TASKS) -> list[TaskResults]:
    """Return the current results of a profile, side by side."""
    done = {key(line): line for line in current(lines, profile, known) if "error" not in line}
    by_task = {name: [line for line in done.values() if line["task"] == name] for name in known}
    return [TaskResults(known[name], found) for name, found in by_task.items() if found]


def report(lines: Sequence[dict[str, Any]], profile: str, known: Mapping[str, Task]) -> str:
    """Return what must be known of the results, and all tables, as Markdown."""
    tables = compose(lines, profile, known)
    if not tables:
        return f"No results of profile {profile}."
    made = {name: make(tables) for name, make in TABLES.items() if PROFILES.get(name, profile) == profile}
    parts = [f"## {name}\n\n{text}" for name, text in made.items() if text]
    return "\n\n".join([f"# Convergence, profile {profile}", *notes(lines, profile, known), *parts])


def notes(lines: Sequence[dict[str, Any]], profile: str, known: Mapping[str, Task]) -> list[str]:
    """Return what is missing, what has failed and what must not be believed, as a list."""
    tables, now = compose(lines, profile, known), current(lines, profile, known)
    old = sum(line["profile"] == profile for line in lines) - len(now)
    done = {key(line) for line in now if "error" not in line}
    failed = {key(line): line for line in now if key(line) not in done}
    seeds = sorted({line["seed"] for line in now if "error" not in line})
    ran = {table.task.name for table in tables}
    found = [f"not run: {name}" for name, task in known.items() if profile in task.lengths and name not in ran]
    for table in tables:
        name = table.task.name
        lacking = [
            f"{method}{'' if method not in table.lines else f' (seeds {without})'}"
            for method in (*FIXED, LEARNED)
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
    found += [f"{x['task']}, {x['method']}, seed {x['seed']}: failed, {x['error']}" for x in failed.values()]
    found += [f"{old} results of other versions or lengths are left aside"] * (old > 0)
    return ["Incomplete:\n\n" + "\n".join(f"- {item}" for item in found)] if found else []


def fill(text: str, lines: Sequence[dict[str, Any]], profile: str, known: Mapping[str, Task] = TASKS) -> str:
    """Return a Markdown text with its marked tables renewed.

    Raises:
        ValueError: a mark names no table.
    """

    def table(name: str) -> str:
        if name not in TABLES:
            raise ValueError(f"no table is called {name!r}. Known: {', '.join(TABLES)}")
        return TABLES[name](compose(lines, PROFILES.get(name, profile), known))

    return between_marks(text, "convergence", table)


# --- the tables -----------------------------------------------------------------------------------------------------


def overview(tables: Sequence[TaskResults]) -> str:
    """Return a row for each method: losses relative to tuned on networks, on linear problems and on all."""
    head, rows = compared(NAMES, titled(tables))
    for method, row in zip(NAMES, rows, strict=True):
        changes = [change for table in tables if (change := table.points(method)) is not None]
        row.append(number(fmean(changes), "+.1f") if changes else "")
    return markdown_table(["method", *head, "accuracy or R², points"], rows)


def in_short(tables: Sequence[TaskResults], method: str = TEACHER) -> str:
    """Return how a method fares, a row for each kind of tasks."""
    rows = [[f"{len(part)} {title}", *cells(part, method)] for title, part in titled(tables).items() if part]
    return markdown_table(["final loss / tuned", "mean", "worst"], rows)


def beside_peers(tables: Sequence[TaskResults]) -> str:
    """Return how ours and the best others fare on the networks, the best first."""
    networks, _ = apart(tables)
    others = (method for method in NAMES if method not in (LEARNED, TEACHER))
    known = ((method, found) for method in others if (found := over(networks, method)))
    best = sorted((found.mean, method) for method, found in known if found.tasks == len(networks))[:PEERS_SHOWN]
    ranked = sorted([*best, *((found.mean, TEACHER) for found in [over(networks, TEACHER)] if found)])
    rows = [[NAMES[method], *cells(networks, method)] for _, method in ranked]
    return markdown_table(["final loss / tuned", f"{len(networks)} networks, mean", "worst"], rows)


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
    rows = [
        [
            table.task.name,
            number(table.tuned_lr, ".2g"),
            number(table.rate(TEACHER), ".2g"),
            *(relative(table.ratio(method)) for method in NAMES),
            relative(table.spread(TEACHER)),
        ]
        for table in tables
    ]
    return markdown_table(["task", "tuned lr", "learned lr", *NAMES, f"{TEACHER}: worst seed / best"], rows)


def behind(tables: Sequence[TaskResults]) -> str:
    """Return the tasks on which "auto" is more than two percent worse than tuned, the worst first."""
    ratios = [(ratio, table.task.name) for table in tables if (ratio := table.ratio(TEACHER)) and ratio > 1.02]
    worst = sorted(ratios, key=itemgetter(0), reverse=True)
    return markdown_table(["task", "final loss / tuned"], [[name, relative(ratio)] for ratio, name in worst])


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


def groupings(tables: Sequence[TaskResults]) -> str:
    """Return a row for each network: losses relative to tuned, with one scale and with one for each group."""
    networks = with_part_scales(tables)
    methods = {TEACHER: "one scale"} | {f"{TEACHER}/{name}": title for name, title in GROUPINGS_SAID.items()}
    rows = [[table.task.name, *(relative(table.ratio(method)) for method in methods)] for table in networks]
    found = [over(networks, method) for method in methods]
    rows += [["geometric mean", *(relative(each.mean) if each else "" for each in found)]] * bool(networks)
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
        rows.append([table.task.name, number(table.rate(TEACHER), ".2g"), text_of(learned), apart_by])
    return markdown_table(["learned lr", "one scale", "each part, first to last", "largest / smallest"], rows)


def learned_lrs(table: TaskResults, method: str) -> list[float]:
    """Return the learned lr of each group, the geometric mean over seeds; nothing without results."""
    learned = [line["learned lrs"] for line in table.lines.get(method, {}).values()]
    return [geometric(values) for values in zip(*learned, strict=True)]


def muon(tables: Sequence[TaskResults]) -> str:
    """Return a row for each ratio of the lrs of two kinds of groups: losses relative to the best pair of lrs."""
    losses = [table.loss(table.tuned_method or "") or math.nan for table in tables]
    best = min(losses, default=math.nan)
    rows = []
    for table, loss in zip(tables, losses, strict=True):
        ratio, tuned = table.task.ratio, table.tuned_lr or math.nan
        row = [f"1 : {ratio:g}", relative(loss / best), text_of([tuned, tuned * ratio])]
        for method in (TEACHER, f"{TEACHER}/muon"):
            to_tuned = table.ratio(method)
            row.append("" if to_tuned is None else relative(to_tuned * loss / best))
            row.append(text_of(learned_lrs(table, method)))
        rows.append(row)
    head = ["lr of Muon : lr of AdamW", "tuned", "lrs", "one scale", "learned lrs", "a scale per group", "learned lrs"]
    return markdown_table(head, rows)


def origin(tables: Sequence[TaskResults]) -> str:
    """Return what the tables rest on, as a line of small print."""
    lines = [line for table in tables for by_seed in table.lines.values() for line in by_seed.values()]
    if not lines:
        return ""
    last = {"machine": "x86_64", **lines[-1]}  # of lines that do not say it
    versions = f"torch {last['torch']}, Python {last['python']}, {last['machine']}"
    seeds = ", ".join(map(str, sorted({line["seed"] for line in lines})))
    return (
        f"<sub>{len(lines)} runs, seeds {seeds}; {versions}, one thread a run. "
        "`python -m benchmarks.convergence report --profile full --results benchmarks/convergence/results.jsonl "
        "--output docs/convergence --fill README.md docs/*.md`</sub>"
    )


def text_of(rates: Sequence[float]) -> str:
    """Return learning rates for a table."""
    return ", ".join(number(rate, ".1e") for rate in rates)


def relative(ratio: float | None) -> str:
    """Return a loss relative to another, with two digits behind the point as long as these say something."""
    return number(ratio, ".2f" if ratio is not None and ratio < 10 else ".3g")


def number(value: float | None, form: str) -> str:
    """Return a number for a table, nothing if there is none."""
    if value is None:
        return ""
    return format(value, form) if math.isfinite(value) else "∞" if value > 0 else "-∞"


TABLES: dict[str, Callable[[Sequence[TaskResults]], str]] = {
    "overview": overview,
    "beside peers": beside_peers,
    "base rates": base_rates,
    "tasks": every_task,
    "in short": in_short,
    "learned": partial(in_short, method=LEARNED),
    "behind": behind,
    "accuracies": accuracies,
    "groupings": groupings,
    "part rates": part_rates,
    "muon": muon,
    "origin": origin,
}
PROFILES = {"muon": "groups", "accuracies": "full"}  # of tables that are always made of the same one
