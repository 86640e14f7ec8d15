"""LightBench's tasks by its own loop: how many random draws of lr and betas until AdamW solves a task, and until ours.

    git clone https://github.com/HomebrewML/LightBench
    python -m venv outside
    echo "import site; site.addsitedir('$PWD/.venv/lib/python3.11/site-packages')" \
        > outside/lib/python3.11/site-packages/project.pth
    outside/bin/pip install --constraint constraints.txt heavyball==3.2.1 optuna==5.0.0 typer==0.17.4
    outside/bin/python -m benchmarks.lightbench --home LightBench --fill docs/outside.md

Tasks with its "easy" setting, by its own loop: a run ends when the task is solved, when the loss diverges, or after
1024 steps, and after 20 runs a task counts as not solved. Both optimizers get the same draws. The lr is one of them,
which makes no difference to the mechanized one. Beside them each optimizer has one run in which nothing is drawn. Runs
that are in the results already are not made again.

The clone stays as it is. While it is imported, "cuda" is read as "cpu", and its sampler, which it downloads and which
learns from earlier draws, gives way to a random one.
"""

from __future__ import annotations

import importlib
import sys
import types
import unittest.mock
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.machinery import FileFinder, SourceFileLoader
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from benchmarks.outside import Row, report
from benchmarks.pages import markdown_table
from mechanic_pytorch import mechanize

STEPS = 1024  # LightBench makes steps in groups of 256, and leaves out the rest
ATTEMPTS = 20
LEFT_OUT = {
    "memory_constrained",  # asks how much memory of a CUDA device is in use
    *("plasticity_summod", "plasticity_weighted_summod"),  # begin at 3585 steps
    *("quadratic_quantization_aware_training", "quadratic_quantized_gradient"),  # their own "easy" setting is an error
    *("xor_digit", "xor_digit_rnn", "xor_sequence", "xor_sequence_rnn", "xor_spot", "xor_spot_rnn"),  # too slow here
}
Auto = mechanize(torch.optim.AdamW)


def plain_defaults(params: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
    """Return AdamW at lr 1e-3; a function of weights alone gets nothing that was drawn."""
    return torch.optim.AdamW(params, weight_decay=0.0)


def auto_defaults(params: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
    """Return the mechanized AdamW at lr 1."""
    return Auto(params, weight_decay=0.0)


METHODS: dict[str, tuple[Callable[..., torch.optim.Optimizer], int]] = {  # and how many runs a task gets
    "AdamW, lr and betas drawn": (torch.optim.AdamW, ATTEMPTS),
    "mechanized, betas drawn": (Auto, ATTEMPTS),
    "AdamW, nothing drawn, lr 1e-3": (plain_defaults, 1),
    "mechanized, nothing drawn": (auto_defaults, 1),
}


class OnCpu(SourceFileLoader):
    """Reads a module that was written for CUDA."""

    def get_code(self, fullname: str) -> types.CodeType:
        """Return the code with another device."""
        source = Path(self.path).read_text(encoding="utf-8").replace('"cuda"', '"cpu"').replace(".cuda()", "")
        return compile(source, self.path, "exec", dont_inherit=True)


def lightbench(home: Path) -> Any:
    """Import LightBench's module that runs a task."""
    folder = str(home / "lightbench")
    if folder not in sys.path_importer_cache:
        import optuna  # type: ignore[import-not-found]

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler = types.SimpleNamespace(AutoSampler=lambda seed, search_space: optuna.samplers.RandomSampler(seed))
        sys.modules["heavyball.helpers"] = sampler  # type: ignore[assignment]
        sys.path_importer_cache[folder] = FileFinder(folder, (OnCpu, [".py"]))
        sys.path.insert(0, str(home))
    return importlib.import_module("lightbench.run_all_benchmarks")


def run(home: Path, task: str, method: str, seed: int) -> Row:
    """Try until the task is solved; return whether it was, and how many runs it took."""
    optimizer, attempts = METHODS[method]
    bench = lightbench(home)
    with unittest.mock.patch.object(torch.cuda, "synchronize"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = bench.run_benchmark(task, optimizer, STEPS, "float32", attempts, seed, "easy")
    if result["error"]:
        raise SystemExit(result["error"])
    return {"solved": result["success"], "attempts": result["attempts"]}


def table(rows: list[Row]) -> str:
    """Return a line for each method: over the tasks, how many it solved, and in how many runs."""
    lines = []
    for method, (_, budget) in METHODS.items():
        mine = [row for row in rows if row["method"] == method]
        if mine:
            attempts = [row["attempts"] if row["solved"] else budget for row in mine]
            counts = [f"{median(attempts):.0f}", f"{fmean(attempts):.1f}"] if budget > 1 else ["", ""]
            lines.append([method, f"{sum(row['solved'] for row in mine)} of {len(mine)}", f"{budget}", *counts])
    head = ["LightBench, easy", "tasks solved", "runs at most", "runs until solved, median", "mean"]
    return markdown_table(head, lines)


def tasks(home: Path) -> list[str]:
    """Return the names of the tasks that are run."""
    sources = sorted((home / "lightbench").glob("*.py"))
    return [path.stem for path in sources if '"easy": {' in path.read_text("utf-8") and path.stem not in LEFT_OUT]


def runs(home: Path, seeds: int) -> Iterator[tuple[Row, Callable[[], Row]]]:
    """Yield what is tried on each task."""
    for seed, task, method in product(range(seeds), tasks(home), METHODS):
        yield {"task": task, "method": method, "seed": seed}, partial(run, home, task, method, seed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    report(__doc__, "LightBench", "HomebrewML/LightBench", runs, table, seeds=1)
