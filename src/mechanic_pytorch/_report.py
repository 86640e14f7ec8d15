"""What `mechanic run` says at the end: to the terminal, and into a directory."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.optim import Optimizer

from mechanic_pytorch._base import can_ask_host
from mechanic_pytorch._patch import Built, is_torchs
from mechanic_pytorch.telemetry import Series, Snapshot, read, snapshot

CAPACITY = 1000  # points per curve


class Record:
    """The effective lr of one optimizer over its steps, and the loss where a closure returns it. Reads no device."""

    def __init__(self, optimizer: Any) -> None:
        self._rows: Series[tuple[Snapshot, Any]] = Series(CAPACITY)
        self._seen: list[Any] = []
        optimizer.register_step_pre_hook(self._watch)
        optimizer.register_step_post_hook(self._keep)

    def effective_lr(self) -> list[tuple[int, list[float]]]:
        """Return (step, the effective lr of each group)."""
        return [(row.steps, row.effective_lr) for row in read([taken for taken, _ in self._rows.values])]

    def losses(self) -> list[tuple[int, float]]:
        """Return (step, the loss before it), as far as closures returned one."""
        rows = zip(self.effective_lr(), (loss for _, loss in self._rows.values), strict=True)
        return [(step, float(loss)) for (step, _), loss in rows if loss is not None]

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
        if can_ask_host():
            self._rows.add(lambda: (snapshot(optimizer), self._seen[0] if self._seen else None))


def advice(one: Built) -> str | None:
    """Return the sentence that says how to go on without Mechanic, or None if it was never told."""
    learned = [f"{lr:.1e}" for lr in one.learned_lr()]
    if not any(map(float, learned)):
        return None
    values = learned[0] if len(set(learned)) == 1 else f"{', '.join(learned)} in its groups"
    return f"to train without Mechanic, use {one.base.__name__} with lr={values}"


def show(built: Sequence[Built], console: Console | None = None) -> None:
    """Print what was learned, to stderr."""
    console = console or Console(stderr=True)

    def say(line: str) -> None:
        console.print(Text(f"mechanic: {line}"), soft_wrap=True)

    if not any(one.is_mechanized or is_torchs(one.base) for one in built):
        say("no torch.optim optimizer was built in this process")
    mechanized = [one for one in built if one.is_mechanized]
    if mechanized:
        table = Table("optimizer", "steps", "skipped", "group", "lr of the script", "learned peak lr", highlight=False)
        for one in mechanized:
            who = [one.base.__name__, str(one.steps), str(one.skipped_steps)]
            for i, (lr, learned) in enumerate(zip(one.script_lrs, one.learned_lr(), strict=True)):
                table.add_row(*(who if i == 0 else [""] * 3), str(i), f"{lr:.1e}", f"{learned:.1e}")
        console.print(table)
    for one in mechanized:
        say(advice(one) or f"{one.base.__name__} has learned no learning rate in {one.steps} steps")
    for reason in dict.fromkeys(f"{one.base.__name__} was left as it is: {one.reason}" for one in built if one.reason):
        say(reason)


def write(
    directory: Path, built: Sequence[Built], records: Mapping[Built, Record], facts: Mapping[str, Any]
) -> list[str]:
    """Write report.json, effective_lr.png and a TensorBoard log; return what could not be written, and why."""
    optimizers = [_as_json(one, records.get(one)) for one in built]
    versions = {"mechanic_pytorch": version("mechanic-pytorch"), "torch": torch.__version__}
    text = json.dumps(_finite({**facts, "versions": versions, "optimizers": optimizers}), indent=2, allow_nan=False)
    (directory / "report.json").write_text(text + "\n", encoding="utf-8")
    curves = [one for one in optimizers if one["effective_lr"]]
    if not curves:
        return ["no picture: no step was recorded"]
    _draw(directory / "effective_lr.png", curves)
    return _log_for_tensorboard(directory / "tensorboard", curves)


def _as_json(one: Built, record: Record | None) -> dict[str, Any]:
    learned: Sequence[float | None] = one.learned_lr() or [None] * len(one.script_lrs)
    groups = [{"script_lr": a, "learned_lr": b} for a, b in zip(one.script_lrs, learned, strict=True)]
    return {
        "class": f"{one.base.__module__}.{one.base.__qualname__}",
        "mechanized": one.is_mechanized,
        "reason": one.reason,
        "steps": one.steps if one.is_mechanized else None,
        "skipped_steps": one.skipped_steps if one.is_mechanized else None,
        "groups": groups,
        "advice": advice(one),
        "effective_lr": record.effective_lr() if record else [],
        "loss": record.losses() if record else [],
    }


def _finite(value: Any) -> Any:
    """Return the same, with None for inf and nan, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _curves(one: dict[str, Any]) -> dict[str, list[float]]:
    """Return the effective lr of each group, by name; groups that came later have no beginning."""
    widest = max(len(values) for _, values in one["effective_lr"])
    curves = {}
    for i in range(widest):
        name = "effective lr" if widest == 1 else f"effective lr, group {i}"
        curves[name] = [values[i] if i < len(values) else math.nan for _, values in one["effective_lr"]]
    return curves


def _draw(path: Path, optimizers: Sequence[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure  # not pyplot, whose state is the script's

    figure = Figure(figsize=(8, 3.2 * len(optimizers)), layout="constrained")
    for axes, one in zip(figure.subplots(len(optimizers), squeeze=False)[:, 0], optimizers, strict=True):
        steps = [step for step, _ in one["effective_lr"]]
        for name, values in _curves(one).items():
            axes.plot(steps, values, label=name)
        if any(value > 0 for values in _curves(one).values() for value in values):
            axes.set_yscale("log", nonpositive="mask")
        axes.set_title(one["class"].rpartition(".")[2])
        axes.set_xlabel("step")
        axes.set_ylabel("effective lr")
        if len(_curves(one)) > 1:
            axes.legend()
        if one["loss"]:
            other = axes.twinx()
            other.plot(*zip(*one["loss"], strict=True), color="gray", linewidth=0.8)
            other.set_ylabel("loss (gray)")
    figure.savefig(path, dpi=150)


def _log_for_tensorboard(directory: Path, optimizers: Sequence[dict[str, Any]]) -> list[str]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return ["no TensorBoard log: tensorboard is not installed. Remedy: pip install tensorboard"]
    with SummaryWriter(str(directory)) as writer:
        for i, one in enumerate(optimizers):
            who = f"{i} {one['class'].rpartition('.')[2]}"
            for name, values in _curves(one).items():
                for (step, _), value in zip(one["effective_lr"], values, strict=True):
                    writer.add_scalar(f"{who}/{name}", value, step)
            for step, loss in one["loss"]:
                writer.add_scalar(f"{who}/loss", loss, step)
    return []
