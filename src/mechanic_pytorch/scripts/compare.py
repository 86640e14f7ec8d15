"""What `mechanic compare` does: a script as it is, mechanized, and plainly at the lr that was learned.

Each is `mechanic run --report` in a process of its own, one after another; the reports are put side by side.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from mechanic_pytorch.scripts.report import PANELS, digit, dump, log_scale, on_stdout, panels, say, table_of
from mechanic_pytorch.scripts.sigterm import before_sigterm

TITLES = {"plain": "as it is", "mechanized": "mechanized", "learned": "learned lr"}
OK, NOT_RUN = "ok", "not run"


@dataclass(frozen=True)
class Comparison:
    """What the command line asks for.

    Attributes:
        command: the script and its arguments, or -m, the name of a module, and its arguments.
        options: of `mechanic run`, for the mechanized runs.
        seeds: each of them makes one run of each kind.
        directory: for everything that is written.
    """

    command: Sequence[str]
    options: Sequence[str]
    seeds: Sequence[int]
    directory: Path

    def directory_of(self, kind: str, seed: int) -> Path:
        """Return where report and output of one run go."""
        return self.directory / kind / str(seed)


@dataclass(frozen=True)
class Trained:
    """One run, when it has ended.

    Attributes:
        kind: a key of `TITLES`.
        seed: with which it began.
        directory: of its report and its output.
        end: "ok", "not run", or how it failed.
        report: what its report.json holds; empty if there is none.
    """

    kind: str
    seed: int
    directory: Path
    end: str
    report: dict[str, Any]

    @property
    def optimizers(self) -> list[dict[str, Any]]:
        """What the report says of optimizers that have made a step."""
        return [one for one in self.report.get("optimizers", ()) if one["steps"]]

    def last_lines(self, name: str, count: int) -> list[str]:
        """Return the last lines of "stdout" or "stderr" that are not empty."""
        try:
            with open(self.directory / f"{name}.txt", encoding="utf-8", errors="replace") as file:
                return list(deque((line.rstrip() for line in file if line.strip()), count))
        except OSError:
            return []

    def as_json(self) -> dict[str, Any]:
        """Return what compare.json holds of it."""
        return {
            "kind": self.kind,
            "seed": self.seed,
            "directory": str(self.directory),
            "end": self.end,
            "seconds": self.report.get("seconds"),
            "optimizers": [
                {"name": one["name"], "lr": lrs_of(one), "steps": one["steps"], "last_loss": last_loss(one)}
                for one in self.optimizers
            ],
            "last_line": next(iter(self.last_lines("stdout", 1)), None),
        }


def compare(job: Comparison, training: Iterable[Trained]) -> int:
    """Let `training` make the runs, then show and write what came of them; return the exit status."""
    runs: list[Trained] = []
    status = 0
    try:
        for number, run in enumerate(training):
            runs.append(run)
            _write(job, runs)  # at once: a SIGTERM may come
            if run.end != OK:
                status = 1
                say(f"run {number + 1}, {_name(job, run)}: {run.end}")
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    _write(job, runs)
    _draw(job.directory / "compare.png", runs)
    _show(job, runs)
    return status


def _write(job: Comparison, runs: Sequence[Trained]) -> None:
    dump(job.directory / "compare.json", {"schema": 1, **_facts(job), "runs": [run.as_json() for run in runs]})


def _facts(job: Comparison) -> dict[str, Any]:
    return {"command": job.command, "options": job.options, "seeds": list(job.seeds)}


def train_all(job: Comparison) -> Iterator[Trained]:
    """Make the runs, and yield each as it ends."""
    for seed in job.seeds:
        yield _train(job, "plain", seed, ["--plain"])
        last = _train(job, "mechanized", seed, job.options)
        yield last
        if last.end == OK:
            yield _train(job, "learned", seed, ["--plain-from", str(last.directory / "report.json")])
        else:
            yield Trained("learned", seed, job.directory_of("learned", seed), NOT_RUN, {})


def _train(job: Comparison, kind: str, seed: int, options: Sequence[str]) -> Trained:
    """Run the script in a process of its own."""
    directory = job.directory_of(kind, seed)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "report.json"
    path.unlink(missing_ok=True)  # of an earlier comparison
    say(f"{TITLES[kind]}, seed {seed}: its output goes to {directory / 'stdout.txt'}")
    arguments = ["run", *options, "--seed", str(seed), "--report", str(directory), *job.command]
    environment = {**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONUNBUFFERED": "1"}
    with (
        open(directory / "stdout.txt", "wb") as out,
        open(directory / "stderr.txt", "wb") as err,
        subprocess.Popen(
            [sys.executable, "-m", "mechanic_pytorch", *arguments], stdout=out, stderr=err, env=environment
        ) as process,
    ):
        try:
            with before_sigterm(process.terminate):
                status = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            raise
    report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return Trained(kind, seed, directory, _in_words(status), report)


def _in_words(status: int) -> str:
    if status < 0:
        return f"failed, {signal.Signals(-status).name}"
    return f"failed, exit status {status}" if status else OK


def lrs_of(one: dict[str, Any]) -> list[float]:
    """Return the lr of each group: the learned one if it was mechanized, else the largest that was used."""
    groups = one["groups"]
    if one["mechanized"]:
        return [group["learned_lr"] for group in groups if group["learned_lr"] is not None]
    rows = [lrs for _, lrs in one["effective_lr"]]
    count = max(map(len, rows), default=0)
    return [max(lrs[i] for lrs in rows if i < len(lrs)) for i in range(count)]


def last_loss(one: dict[str, Any]) -> float | None:
    """Return the mean of the last tenth of the losses that were seen, or None."""
    losses = [math.nan if loss is None else loss for _, loss in one["loss"]]
    return fmean(losses[-math.ceil(len(losses) / 10) :]) if losses else None


def _name(job: Comparison, run: Trained) -> str:
    return TITLES[run.kind] + (f", seed {run.seed}" if len(job.seeds) > 1 else "")


def _show(job: Comparison, runs: Sequence[Trained]) -> None:
    """Print the table, and what stands beside it."""
    console = on_stdout()
    columns = "run", "optimizer", "lr", "steps", "last loss", "seconds", "end"
    table = table_of(console, *columns, words=("optimizer", "lr", "end"))
    for kind, title in TITLES.items():
        of_kind = [run for run in runs if run.kind == kind]
        for row in _rows(of_kind):
            table.add_row(title, *row)
            title = ""
    console.print(table, crop=False)
    for sentence in _sentences(job, runs):
        say(sentence, console)


def _rows(runs: Sequence[Trained]) -> Iterator[list[str]]:
    """Yield the cells of the runs of one kind: one row for each optimizer."""
    done = [run for run in runs if run.end == OK]
    ends = list(dict.fromkeys(run.end for run in runs if run.end != OK))
    end = ", ".join(ends) if not done else f"{len(runs) - len(done)} of {len(runs)}: {', '.join(ends)}" if ends else OK
    seconds = _spread([run.report.get("seconds") for run in done], "{:.0f}")
    of_optimizer = list(zip(*(run.optimizers for run in done), strict=False))
    for same in of_optimizer:
        lrs = sorted(lr for one in same for lr in lrs_of(one))
        ends_of_lr = dict.fromkeys(map(digit if same[0]["mechanized"] else "{:.1e}".format, lrs[:1] + lrs[-1:]))
        losses = _spread(list(map(last_loss, same)), "{:.3g}")
        steps = _spread([one["steps"] for one in same], "{:.0f}")
        yield [same[0]["name"], " to ".join(ends_of_lr), steps, losses, seconds, end]
        seconds = end = ""
    if runs and not of_optimizer:
        yield ["", "", "", "", seconds, end]


def _spread(values: Sequence[float | None], form: str) -> str:
    """Return the mean of the numbers, with the smallest and the largest if they differ."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "not seen"
    low, mean, high = map(form.format, (min(numbers), fmean(numbers), max(numbers)))
    return mean if low == high else f"{mean}\n{low} to {high}"


def _sentences(job: Comparison, runs: Sequence[Trained]) -> Iterator[str]:
    """Yield what the table does not say."""
    yield from dict.fromkeys(
        one["advice"] for run in runs if run.kind == "mechanized" for one in run.optimizers if one["advice"]
    )
    for run in runs:
        if run.end == OK:
            count = 1 if any(one["loss"] for one in run.optimizers) else 3
            if lines := run.last_lines("stdout", count):
                yield f"{_name(job, run)}, printed last: {' / '.join(lines)}"
        elif run.end == NOT_RUN:
            yield f"{_name(job, run)}: not run, because the mechanized run failed"
        else:
            why = "".join(f": {line}" for line in run.last_lines("stderr", 1))
            yield f"{_name(job, run)}: {run.end}{why} ({run.directory / 'stderr.txt'})"
    yield f"table, picture and reports in {job.directory}"


def _draw(path: Path, runs: Sequence[Trained]) -> None:
    """Draw loss and lr over the steps, a row for each optimizer, a color for each kind of run."""
    path.unlink(missing_ok=True)
    names = max(([one["name"] for one in run.optimizers] for run in runs), key=len, default=[])[:PANELS]
    if not names:
        return
    figure, rows = panels(len(names), 2)
    for i, (name, axes) in enumerate(zip(names, rows, strict=True)):
        for kind, ones in _by_kind(runs, i).items():
            color, label = f"C{list(TITLES).index(kind)}", TITLES[kind]
            for one in ones:
                steps = [step for step, _ in one["effective_lr"]]
                curves: tuple[list[Any], ...] = (
                    _running_mean(one["loss"]),
                    [max(lrs) for _, lrs in one["effective_lr"]],
                )
                axes[0].plot([step for step, _ in one["loss"]], curves[0], color=color, label=label, linewidth=1)
                axes[1].plot(steps, curves[1], color=color, label=label, linewidth=1)
                label = "_nolegend_"  # of other seeds
        for side, what in zip(axes, ("loss (running mean)", "effective lr, largest group"), strict=True):
            side.set(title=name, xlabel="step", ylabel=what)
            log_scale(side)
        if not axes[0].dataLim.width:
            axes[0].text(0.5, 0.5, "no loss was seen", ha="center", transform=axes[0].transAxes)
        axes[1].legend()
    figure.savefig(path, dpi=150)


def _by_kind(runs: Sequence[Trained], number: int) -> dict[str, list[dict[str, Any]]]:
    """Return what is known of the optimizer of this number, of every run that has it."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        for one in run.optimizers[number : number + 1]:
            found.setdefault(run.kind, []).append(one)
    return found


def _running_mean(points: Sequence[tuple[int, float | None]]) -> list[float]:
    """Return the mean of each loss and those just before it, a fiftieth of all."""
    losses = [math.nan if loss is None else loss for _, loss in points]
    width = max(1, len(losses) // 50)
    return [fmean(losses[max(0, i + 1 - width) : i + 1]) for i in range(len(losses))]
