"""What `mechanic run` says at the end: to the terminal, and into a directory."""

from __future__ import annotations

import functools
import json
import math
import platform
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median_low
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.optim import Optimizer

from mechanic_pytorch._torch import can_sync, lrs
from mechanic_pytorch._watch import said
from mechanic_pytorch.mechanic import Mechanic
from mechanic_pytorch.scripts.confidence import Confidence, confidence
from mechanic_pytorch.scripts.losses import Losses
from mechanic_pytorch.scripts.patch import Built, is_torchs
from mechanic_pytorch.telemetry import ReadOut, Thinned, read, snapshot

CAPACITY = 1000  # points per curve
ROUGH = 100  # where no curve is asked for, but how far the learned lr can be trusted
PANELS = 20  # optimizers in the picture
NARROWEST = 40  # what the table needs; a terminal that is narrower breaks its lines
LISTED = 4  # of optimizers that are alike, one for each tensor: more are told as one
COLORS = 10  # curves that the default colors tell apart


class Record:
    """What one optimizer does over its steps: the lr, what it learns, and the loss. No step reads the device.

    The loss is the one that a closure returns, else what the training loop called `backward()` on.
    """

    def __init__(self, optimizer: Optimizer, capacity: int, losses: Losses | None = None) -> None:
        self.steps = 0  # that were seen: those of a compiled step are not
        self._rows: Thinned[tuple[Any, Any]] = Thinned(capacity)
        self._take: Callable[[Any], Any] = snapshot if isinstance(optimizer, Mechanic) else self._take_plain
        self._read: Callable[[list[Any]], list[ReadOut]] = read if isinstance(optimizer, Mechanic) else _read_plain
        self._losses = losses
        self._seen: list[Any] = []
        optimizer.register_step_pre_hook(self._watch)
        optimizer.register_step_post_hook(self._keep)

    def read(self) -> tuple[list[ReadOut], list[tuple[int, float]]]:
        """Return what was learned after each step kept, and (step, the loss before it), where one was seen."""
        rows = self._read([taken for taken, _ in self._rows.values])
        losses = [loss for _, loss in self._rows.values]
        return rows, [(row.steps, float(x)) for row, x in zip(rows, losses, strict=True) if x is not None]

    def _watch(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self._seen.clear()
        if torch.compiler.is_compiling():
            return None
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._watched(kwargs["closure"])}
        if len(args) > 1 and callable(args[1]):  # args[0] is the optimizer
            return (args[0], self._watched(args[1]), *args[2:]), kwargs
        return None

    def _watched(self, closure: Any) -> Any:
        @functools.wraps(closure)
        def watched(*args: Any, **kwargs: Any) -> Any:
            loss = closure(*args, **kwargs)
            if not self._seen and (isinstance(loss, float) or (isinstance(loss, Tensor) and loss.numel() == 1)):
                self._seen.append(loss.detach().clone() if isinstance(loss, Tensor) else loss)
            return loss

        return watched

    def _keep(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.steps += 1
        loss = self._losses.at_step() if self._losses else None
        if can_sync(optimizer):
            self._rows.add(lambda: (self._take(optimizer), self._seen[0] if self._seen else loss))

    def _take_plain(self, optimizer: Optimizer) -> tuple[int, list[dict[str, Any]]]:
        values = [group.get("lr") for group in optimizer.param_groups]
        return self.steps, [{"lr": lr.clone() if isinstance(lr, Tensor) else lr} for lr in values]


def _read_plain(taken: list[tuple[int, list[dict[str, Any]]]]) -> list[ReadOut]:
    """Return the same of a plain optimizer, which has an lr, and learns nothing."""
    return [ReadOut(steps, 0, [], lrs(groups), [], [], [], [], [], {}) for steps, groups in taken]


def names(built: Sequence[Built]) -> dict[Built, str]:
    """Return what to call each of them: its class, and where there are several of that class, what tells them apart.

    That is the variable of the script, as in "Adam optimizerD", else the line that builds it, else a number.
    """
    called = {}
    for name, which in _alike(one.base.__name__ for one in built).items():
        same = [built[i] for i in which]
        variables, lines = [one.place.variable for one in same], [str(one.place) for one in same]
        marks = next((m for m in (variables, lines) if all(m) and len({*m}) == len(m)), range(1, len(same) + 1))
        called.update({one: f"{name} {mark}" if len(same) > 1 else name for one, mark in zip(same, marks, strict=True)})
    return {one: called[one] for one in built}


def why_no_advice(outcome: str) -> str | None:
    """Return why a run that has ended like this gives no advice, or None if it does."""
    if outcome == "finished":
        return None
    if outcome == "running":
        return "the script has not ended"
    return f"the script ended with {outcome.splitlines()[0]}"


def advice(one: Built, name: str, trust: Confidence) -> str:
    """Return the sentence that says how to go on without Mechanic, of an optimizer that has learned an lr."""
    learned = one.learned_lr()
    rates = [digit(lr) for lr in learned]
    for i, ends in enumerate(trust.ranges[: len(rates)]):
        low, high = map(digit, ends)
        rates[i] += f" ({low} to {high})" if low != high else ""
    by_value = _alike(rates)
    if len(by_value) == 1:
        values = f"lr={rates[0]}"
    elif len(by_value) <= 4:
        values = ", ".join(f"lr={rate} in {_groups(which)}" for rate, which in by_value.items())
    else:
        values = f"lr={digit(min(learned))} to {digit(max(learned))}, by group as listed"
    of_which = "" if name == one.base.__name__ else f" for {name}"
    return _how_to_go_on(one, values + of_which, *trust.remarks())


def _how_to_go_on(one: Built, values: str, *remarks: str) -> str:
    return "; ".join([f"to train without Mechanic, use {one.base.__name__} with {values}", *remarks])


def digit(lr: float) -> str:
    """Return a learned lr as it is known, to one digit."""
    return f"{lr:.0e}"


def show(
    built: Sequence[Built],
    records: Mapping[Built, Record],
    outcome: str = "finished",
    console: Console | None = None,
) -> None:
    """Print what was learned, to stderr."""
    console = console or Console(stderr=True)
    tell = functools.partial(say, console=console)
    if console.is_terminal:
        console.print()  # the line there may hold half a progress bar, or ^C
    called = names(built)
    if not any(one.is_mechanized or is_torchs(one.base) for one in built):
        tell("no torch.optim optimizer was built in this process")
    mechanized = [one for one in built if one.is_mechanized]
    families = _families(mechanized)
    if mechanized:
        columns = "optimizer", "steps", "skipped", "group", "script's lr", "learned peak lr"
        table = table_of(console, *columns, words=("optimizer", "group"))
        for same in families:
            if len(same) > 1:
                table.add_row(*_row_of_many(same, called))
                continue
            one = same[0]
            who = [called[one], str(one.steps), str(one.skipped_steps)]
            rows = [(f"{a:.1e}", digit(b)) for a, b in zip(one.script_lrs, one.learned_lr(), strict=False)]
            for values, which in _alike(rows).items():
                table.add_row(*who, _ranges(which), *values)
                who = [""] * 3
        console.print(table, crop=False)
    obstacle = why_no_advice(outcome)
    if obstacle and any(any(one.learned_lr()) for one in mechanized):
        tell(f"no lr is advised, because {obstacle}")
    for same in families:
        one = same[0]
        if not any(one.learned_lr()):
            have = "has" if len(same) == 1 else "have"
            tell(f"{_called(same, called)} {have} learned no learning rate: {_why_nothing(one)}")
        elif obstacle is None and len(same) == 1:
            tell(advice(one, called[one], trust_in(one, records.get(one))))
        elif obstacle is None:
            tell(_advice_for_many(same, called, [trust_in(each, records.get(each)) for each in same]))
    for reason in dict.fromkeys(f"{one.base.__name__} was left as it is: {one.reason}" for one in built if one.reason):
        tell(reason)
    for warning in sorted(said):
        tell(warning)


def _families(mechanized: Sequence[Built]) -> list[list[Built]]:
    """Return the optimizers, those together that are to be told as one, because there are many of a kind."""
    kinds = [one.kind and (one.kind, any(one.learned_lr()) or _why_nothing(one)) for one in mechanized]
    many = {kind for kind, count in Counter(kinds).items() if kind is not None and count > LISTED}
    keys = [kind if kind in many else i for i, kind in enumerate(kinds)]
    return [[mechanized[i] for i in which] for which in _alike(keys).values()]


def _called(same: Sequence[Built], called: Mapping[Built, str]) -> str:
    return called[same[0]] + (f" and {len(same) - 1} like it" if len(same) > 1 else "")


def _row_of_many(same: Sequence[Built], called: Mapping[Built, str]) -> list[str]:
    """Return the row of optimizers of one tensor each: how many, and from where to where they go."""
    numbers = [[one.steps for one in same], [one.skipped_steps for one in same]]
    script, learned = ([lr for one in same for lr in of(one)] for of in (lambda x: x.script_lrs, Built.learned_lr))
    counts = (_from_to(values, str) for values in numbers)
    return [_called(same, called), *counts, "0", _from_to(script, "{:.1e}".format), _from_to(learned, digit)]


def _advice_for_many(same: Sequence[Built], called: Mapping[Built, str], trust: Sequence[Confidence]) -> str:
    """Return the sentence that says how to go on without Mechanic, of optimizers of one tensor each."""
    learned = [lr for one in same for lr in one.learned_lr()]
    ends = _from_to(learned, digit)
    if " to " in ends:
        ends += f", one for each (half of them at {digit(median_low(learned))} or less),"
    trends = Counter(one.trend for one in trust if one.is_drifting)
    remarks = [f"{count} of {len(same)} still {trend}" for trend, count in trends.items()]
    few = [one.steps for one in trust if one.has_few_steps]
    remarks += [f"only {_from_to(few, str)} step{'s' * (max(few) != 1)}"] if few else []
    return _how_to_go_on(same[0], f"lr={ends} for {_called(same, called)}", "--report DIR lists each", *remarks)


def _from_to(values: Sequence[Any], form: Callable[[Any], str]) -> str:
    """Return the smallest and the largest, or what both are."""
    return " to ".join(dict.fromkeys(map(form, (min(values), max(values)))))


def say(line: str, console: Console | None = None) -> None:
    """Print a line to stderr; a terminal gets it wrapped between words, a file as it is."""
    console = console or Console(stderr=True)
    console.print(Text(f"mechanic: {line}"), soft_wrap=not console.is_terminal)


def on_stdout() -> Console:
    """Return the console of a command whose result is what it shows."""
    return Console()


def table_of(console: Console, *columns: str, words: Sequence[str]) -> Table:
    """Return a table with these columns, in which words wrap, and numbers never."""
    table = Table(highlight=False, padding=(0, int(console.width >= 80)))
    table.width = NARROWEST if console.width < NARROWEST else None
    for name in columns:
        header = name if console.width >= 80 else name.replace(" ", "\n", 1)
        table.add_column(header, overflow="fold", no_wrap=name not in words)
    return table


def trust_in(one: Built, record: Record | None) -> Confidence:
    """Return how far what this optimizer has learned can be trusted."""
    return confidence(record.read()[0] if record else [], one.steps - one.skipped_steps)


def _why_nothing(one: Built) -> str:
    if one.steps == 0:
        return "its step() was never called, or no parameter had a gradient"
    if one.steps == one.skipped_steps:
        return "every step was skipped, because a gradient was inf or nan"
    return f"nothing has moved in {one.steps} steps"


def _alike(values: Iterable[Hashable]) -> dict[Any, list[int]]:
    """Return the numbers of the groups that have each value."""
    found: dict[Any, list[int]] = {}
    for i, value in enumerate(values):
        found.setdefault(value, []).append(i)
    return found


def _ranges(numbers: Sequence[int]) -> str:
    """Return "0-2, 5" for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for i in numbers:
        if runs and runs[-1][-1] == i - 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _groups(numbers: Sequence[int]) -> str:
    return f"group{'s' if len(numbers) > 1 else ''} {_ranges(numbers)}"


def write(
    directory: Path,
    built: Sequence[Built],
    records: Mapping[Built, Record],
    facts: Mapping[str, Any],
    *,
    max_panels: int = PANELS,
) -> list[str]:
    """Write report.json, effective_lr.png and a TensorBoard log, in the place of earlier ones.

    Args:
        directory: where they are written.
        built: the optimizers.
        records: what they did.
        facts: what else the report holds.
        max_panels: how many optimizers the picture shows at most.

    Returns:
        What could not be written, and why.
    """
    picture, log = directory / "effective_lr.png", directory / "tensorboard"
    for old in (picture, *log.glob("events.out.tfevents.*")):
        old.unlink(missing_ok=True)
    optimizers = write_json(directory, built, records, facts)
    recorded = [one for one in optimizers if one["effective_lr"]]
    if not recorded:
        return [f"no picture: {_why_no_picture(built)}"]
    _draw(picture, recorded[:max_panels])
    problems = _log_for_tensorboard(log, recorded)
    if len(recorded) > max_panels:
        problems.append(f"the picture shows the first {max_panels} optimizers of {len(recorded)}; report.json has all")
    return problems


def _why_no_picture(built: Sequence[Built]) -> str:
    if any(one.steps for one in built):
        return "no step was recorded, as those of a compiled optimizer.step are not"
    return "no step was made" if any(one.is_mechanized for one in built) else "no optimizer was mechanized"


def write_json(
    directory: Path, built: Sequence[Built], records: Mapping[Built, Record], facts: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Write report.json, in the place of an earlier one, whole or not at all; return what it holds of optimizers."""
    has_advice = why_no_advice(str(facts.get("outcome", "finished"))) is None
    optimizers = [_as_json(one, name, records.get(one), has_advice) for one, name in names(built).items()]
    versions = {"mechanic_pytorch": version("mechanic-pytorch"), "torch": torch.__version__}
    versions["python"] = platform.python_version()
    dump(directory / "report.json", {**facts, "versions": versions, "optimizers": optimizers})
    return optimizers


def dump(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all; inf and nan become null."""
    new = path.with_name(f".{path.name}")
    new.write_text(json.dumps(_finite(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    new.replace(path)


def _as_json(one: Built, name: str, record: Record | None, has_advice: bool) -> dict[str, Any]:
    rows, losses = record.read() if record else ([], [])
    trust = confidence(rows if one.is_mechanized else [], one.steps - one.skipped_steps)
    learned: Sequence[float | None] = one.learned_lr() or [None] * len(one.script_lrs)
    pairs = zip(one.script_lrs, learned, strict=False)  # groups may have gone
    groups = [
        {"script_lr": a, "learned_lr": b, "range": trust.ranges[i] if i < len(trust.ranges) else None}
        for i, (a, b) in enumerate(pairs)
    ]
    return {
        "name": name,
        "class": f"{one.base.__module__}.{one.base.__qualname__}",
        "built_at": f"{one.place.path}:{one.place.line}",
        "variable": one.place.variable,
        "mechanized": one.is_mechanized,
        "reason": one.reason,
        "steps": one.steps if one.is_mechanized else record and (record.steps or None),
        "skipped_steps": one.skipped_steps if one.is_mechanized else None,
        "groups": groups,
        "trend": trust.trend,
        "has_few_steps": trust.has_few_steps if one.is_mechanized else None,
        "advice": advice(one, name, trust) if has_advice and any(one.learned_lr()) else None,
        "effective_lr": [(row.steps, row.effective_lr) for row in rows],
        "loss": losses,
    }


def _finite(value: Any) -> Any:
    """Return the same, with None for inf and nan, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _curves(one: dict[str, Any]) -> dict[str, tuple[tuple[int, float], ...]]:
    """Return the effective lr over steps, by name; one curve for all groups that have the same."""
    rows = one["effective_lr"]
    of_groups = (
        tuple((step, values[i]) for step, values in rows if i < len(values))  # a group may come later
        for i in range(max(len(values) for _, values in rows))
    )
    curves = _alike(of_groups)
    if len(curves) == 1:
        return {"effective lr": next(iter(curves))}
    return {f"effective lr, {_groups(which)}": curve for curve, which in curves.items()}


def panels(rows: int, columns: int) -> tuple[Any, Any]:
    """Return a figure of matplotlib, and its axes, row by row."""
    from matplotlib.figure import Figure  # not pyplot, whose state is the script's

    figure = Figure(figsize=(4 + 4 * columns, 3.2 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def log_scale(axes: Any) -> None:
    """Make the vertical scale logarithmic, if a curve has something to show there."""
    if any(value > 0 for line in axes.lines for value in line.get_ydata()):
        axes.set_yscale("log", nonpositive="mask")


def _draw(path: Path, optimizers: Sequence[dict[str, Any]]) -> None:
    from matplotlib import colormaps

    figure, rows = panels(len(optimizers), 1)
    for (axes,), one in zip(rows, optimizers, strict=True):
        curves = _curves(one)
        last = len(curves) - 1
        for i, (name, curve) in enumerate(curves.items()):
            many = last >= COLORS  # then the colors run from the first to the last, which alone are named
            color = colormaps["viridis"](i / last) if many else f"C{i}"
            axes.plot(*zip(*curve, strict=True), color=color, label=None if many and 0 < i < last else name)
        peaks = {(group["script_lr"], group["learned_lr"]) for group in one["groups"]}
        if len(peaks) == 1:  # more would hide the curves
            for lr, style, name in zip(*peaks, (":", "--"), ("script's lr", "learned peak lr"), strict=True):
                if lr:
                    axes.axhline(lr, color="black", linewidth=0.8, linestyle=style, label=f"{name}, {digit(lr)}")
        log_scale(axes)
        axes.grid(alpha=0.3)
        axes.set_title(one["name"])
        axes.set_xlabel("step")
        axes.set_ylabel("effective lr")
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend()
        if one["loss"]:
            other = axes.twinx()
            other.plot(*zip(*one["loss"], strict=True), color="gray", linewidth=0.8)
            other.set_ylabel("loss (gray)")
            axes.set_zorder(other.get_zorder() + 1)  # which leaves the legend readable
            axes.patch.set_visible(False)
    figure.savefig(path, dpi=150)


def _log_for_tensorboard(directory: Path, optimizers: Sequence[dict[str, Any]]) -> list[str]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return ["no TensorBoard log: tensorboard is not installed. Remedy: pip install tensorboard"]
    with SummaryWriter(str(directory)) as writer:
        for one in optimizers:
            curves = {**_curves(one), "loss": one["loss"]}
            for name, curve in curves.items():
                for step, value in curve:
                    writer.add_scalar(f"{one['name']}/{name}", value, step)
    return []
