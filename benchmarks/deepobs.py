"""DeepOBS's quadratic_deep at full length, by its own runner: beside published baselines, tuned over 36 rates.

    git clone https://github.com/govorunov/deepobs
    python -m benchmarks.deepobs --home deepobs --results benchmarks/outside.jsonl --fill docs/outside.md

Baselines: fsschneider/DeepOBS_Baselines, the final test loss of ten seeds. Here the plain optimizers run at the lr that
was found best there, and the mechanized ones at lr 1; lr is constant. Runs that are in the results are not made again.
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import sys
import tempfile
import types
import unittest.mock
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.outside import Row, report
from benchmarks.pages import markdown_table
from mechanic_pytorch import mechanize

PUBLISHED = {
    "SGD": ("87.40 ± 0.16", 0.0158),
    "SGD, momentum 0.99": ("87.05 ± 0.02", 0.0025),
    "Adam": ("87.11 ± 0.02", 0.0398),
}
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, float]]] = {
    "SGD": (torch.optim.SGD, {}),
    "SGD, momentum 0.99": (torch.optim.SGD, {"momentum": 0.99}),
    "Adam": (torch.optim.Adam, {}),
}
METHODS = ["plain", "auto"]


def without_workers(*args: Any, **kwargs: Any) -> Any:
    """Return a loader that starts no processes, which take most of the time of a problem as small as this."""
    return DataLoader(*args, **{**kwargs, "num_workers": 0})


def run(home: Path, base: str, method: str, seed: int) -> Row:
    """Train by DeepOBS's runner, and return the last test loss and the learned lr."""
    if str(home) not in sys.path:
        sys.path.insert(0, str(home))
        for name in ("torchvision", "torchvision.transforms"):  # imported for problems that are not run here
            sys.modules.setdefault(name, types.ModuleType(name))
        sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]  # type: ignore[attr-defined]
    from deepobs.pytorch.datasets import dataset  # type: ignore[import-not-found]
    from deepobs.pytorch.runners import StandardRunner  # type: ignore[import-not-found]

    kind, options = BASES[base]
    built: list[Any] = []

    class Kept(kind if method == "plain" else mechanize(kind, s_init=method)):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            built.append(self)

    spec = [{"name": name, "type": float, "default": value} for name, value in options.items()]
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = sys.argv[:1]  # the runner reads what is left of the command line
        no_workers = unittest.mock.patch.object(dataset, "DataLoader", without_workers)
        with no_workers, contextlib.redirect_stdout(io.StringIO()):
            StandardRunner(Kept, spec).run(
                testproblem="quadratic_deep", batch_size=128, num_epochs=100, random_seed=seed, output_dir=folder,
                learning_rate=PUBLISHED[base][1] if method == "plain" else 1.0, **options,
            )  # fmt: skip
        written = json.loads(next(Path(folder).rglob("*.json")).read_text(encoding="utf-8"))
    learned = None if method == "plain" else built[-1].learned_lr()[0]
    return {"test loss": written["test_losses"][-1], "learned lr": learned}


def table(rows: list[Row]) -> str:
    """Return a line for each base."""

    def cell(base: str, method: str) -> str:
        losses = [row["test loss"] for row in rows if (row["base"], row["method"]) == (base, method)]
        if len(losses) < 2:
            return ""
        return f"{statistics.fmean(losses):.2f} ± {statistics.stdev(losses):.2f}"

    lines = []
    for base, (published, lr) in PUBLISHED.items():
        learned = [row["learned lr"] for row in rows if row["base"] == base and row["learned lr"]]
        span = f"{min(learned):.1g} to {max(learned):.1g}" if learned else ""
        lines.append([base, published, f"{lr}", cell(base, "plain"), cell(base, "auto"), span])
    head = [
        "quadratic_deep, test loss",
        "published, tuned",
        "its lr",
        "plain at that lr, here",
        "auto, lr 1",
        "learned lr",
    ]
    return markdown_table(head, lines)


def runs(home: Path, seeds: int) -> Iterator[tuple[Row, Callable[[], Row]]]:
    """Yield each run."""
    for seed, base, method in product(range(42, 42 + seeds), BASES, METHODS):
        yield {"base": base, "method": method, "seed": seed}, partial(run, home, base, method, seed)


if __name__ == "__main__":
    report(__doc__, "DeepOBS", "govorunov/deepobs", runs, table, seeds=5)
