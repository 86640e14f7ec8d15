"""DeepOBS by its own runner: beside published baselines, each the best of 36 learning rates.

    git clone https://github.com/govorunov/deepobs
    MECHANIC_DATA=data python -m benchmarks.deepobs --home deepobs --fill docs/outside.md

Baselines: fsschneider/DeepOBS_Baselines, the mean of ten seeds after the last step. Here the plain optimizers run at
the lr that was found best there, and the mechanized ones at lr 1; lr is constant. quadratic_deep runs at full length
and the others for fewer epochs, so what is published of them only frames them. Logistic regression and the perceptron
have no baseline: the plain optimizers run at the lr of the network with two convolutions, which has the same data. Runs
that are in the results are not made again.
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
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.convergence import data
from benchmarks.outside import Row, report
from benchmarks.pages import markdown_table
from mechanic_pytorch import mechanize


class Problem(NamedTuple):
    """A problem of DeepOBS, and what is published of it for each base: the result, and its lr."""

    batch: int
    epochs: int  # here
    of_epochs: int  # there
    seeds: int  # at most
    metric: str
    published: dict[str, tuple[str, float]]


SGD, MOMENTUM, ADAM = "SGD", "SGD, momentum 0.99", "Adam"
LOSS, ACCURACY = "test loss", "test accuracy, %"
CONVOLUTIONS = {SGD: ("92.27 ± 0.17", 0.158), MOMENTUM: ("92.14 ± 0.20", 0.0025), ADAM: ("92.34 ± 0.28", 2.5e-4)}
UNKNOWN = {base: ("", lr) for base, (_, lr) in CONVOLUTIONS.items()}
PROBLEMS = {
    "quadratic_deep": Problem(
        128, 100, 100, 5, LOSS,
        {SGD: ("87.40 ± 0.16", 0.0158), MOMENTUM: ("87.05 ± 0.02", 0.0025), ADAM: ("87.11 ± 0.02", 0.0398)},
    ),
    "fmnist_logreg": Problem(128, 5, 0, 3, ACCURACY, UNKNOWN),
    "fmnist_mlp": Problem(128, 5, 0, 2, ACCURACY, UNKNOWN),
    "fmnist_2c2d": Problem(128, 2, 100, 1, ACCURACY, CONVOLUTIONS),
    "mnist_vae": Problem(
        64, 1, 50, 1, LOSS, {SGD: ("38.46 ± 11.8", 0.0040), MOMENTUM: ("52.93", 2.5e-5), ADAM: ("27.83 ± 0.09", 1.6e-4)}
    ),
    "fmnist_vae": Problem(
        64, 1, 100, 1, LOSS,
        {SGD: ("23.80 ± 0.23", 0.0040), MOMENTUM: ("59.2 ± 17", 1e-5), ADAM: ("23.07 ± 0.09", 1.6e-4)},
    ),
}  # fmt: skip
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, float]]] = {
    SGD: (torch.optim.SGD, {}),
    MOMENTUM: (torch.optim.SGD, {"momentum": 0.99}),
    ADAM: (torch.optim.Adam, {}),
}
METHODS = ["plain", "auto"]


def without_workers(*args: Any, **kwargs: Any) -> Any:
    """Return a loader that starts no processes, which take most of the time of problems as small as these."""
    return DataLoader(*args, **{**kwargs, "num_workers": 0})


def of_torchvision() -> dict[str, types.ModuleType]:
    """Return what DeepOBS takes from torchvision, and no more: images between 0 and 1, and their classes."""

    def split(folder: str, root: str, *, train: bool, **_: Any) -> TensorDataset:
        x, y, x_test, y_test = data.images(folder)
        images, classes = (x, y) if train else (x_test, y_test)
        return TensorDataset(images / 255, classes)

    names = ("torchvision", "torchvision.transforms", "torchvision.datasets")
    whole, transforms, datasets = made = [types.ModuleType(name) for name in names]
    vars(transforms).update(Compose=lambda parts: None, ToTensor=lambda: None)
    vars(datasets).update(MNIST=partial(split, "mnist"), FashionMNIST=partial(split, "fashion-mnist"))
    vars(whole).update(transforms=transforms, datasets=datasets)
    return dict(zip(names, made, strict=True))


def run(home: Path, problem: str, base: str, method: str, seed: int) -> Row:
    """Train by DeepOBS's runner, and return the last test loss, the accuracy and the learned lr."""
    if str(home) not in sys.path:
        sys.path.insert(0, str(home))
        sys.modules.update(of_torchvision())
    from deepobs.pytorch.datasets import dataset  # type: ignore[import-not-found]
    from deepobs.pytorch.runners import StandardRunner  # type: ignore[import-not-found]

    kind, options = BASES[base]
    built: list[Any] = []

    class Kept(kind if method == "plain" else mechanize(kind, s_init=method)):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            built.append(self)

    spec = [{"name": name, "type": float, "default": value} for name, value in options.items()]
    what = PROBLEMS[problem]
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = sys.argv[:1]  # the runner reads what is left of the command line
        no_workers = unittest.mock.patch.object(dataset, "DataLoader", without_workers)
        with no_workers, contextlib.redirect_stdout(io.StringIO()):
            StandardRunner(Kept, spec).run(
                testproblem=problem, batch_size=what.batch, num_epochs=what.epochs, random_seed=seed, output_dir=folder,
                learning_rate=what.published[base][1] if method == "plain" else 1.0, **options,
            )  # fmt: skip
        written = json.loads(next(Path(folder).rglob("*.json")).read_text(encoding="utf-8"))
    found: Row = {"epochs": what.epochs, LOSS: written["test_losses"][-1]}
    if "test_accuracies" in written:
        found[ACCURACY] = 100 * written["test_accuracies"][-1]
    return {**found, "learned lr": None if method == "plain" else built[-1].learned_lr()[0]}


def table(rows: list[Row]) -> str:
    """Return a line for each problem and base."""

    def cell(problem: str, base: str, method: str) -> str:
        which = (problem, base, method)
        found = [row[PROBLEMS[problem].metric] for row in rows if (row["problem"], row["base"], row["method"]) == which]
        spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
        return f"{statistics.fmean(found):.2f}{spread}" if found else ""

    lines = []
    for problem, what in PROBLEMS.items():
        for base, (published, rate) in what.published.items():
            mine = [row for row in rows if (row["problem"], row["base"]) == (problem, base)]
            if not mine:
                continue
            rates = [row["learned lr"] for row in mine if row["learned lr"]]
            span = " to ".join(dict.fromkeys(f"{lr:.1g}" for lr in (min(rates), max(rates)))) if rates else ""
            there = f"{published}, {what.of_epochs} epochs" if published else ""
            here = f"{problem}, {what.metric}, {what.epochs} epochs"
            plain, auto = (cell(problem, base, method) for method in METHODS)
            lines.append([here, base, there, f"{rate:g}", plain, auto, span])
    head = ["problem", "base", "published, tuned", "lr of the plain base", "plain, here", "auto, lr 1", "learned lr"]
    return markdown_table(head, lines)


def runs(home: Path, seeds: int) -> Iterator[tuple[Row, Callable[[], Row]]]:
    """Yield each run."""
    for problem, what in PROBLEMS.items():
        for seed, base, method in product(range(42, 42 + min(seeds, what.seeds)), BASES, METHODS):
            key: Row = {"problem": problem, "base": base, "method": method, "seed": seed}
            yield key, partial(run, home, problem, base, method, seed)


if __name__ == "__main__":
    report(__doc__, "DeepOBS", "govorunov/deepobs", runs, table, seeds=5)
