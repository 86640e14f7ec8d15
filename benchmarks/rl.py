"""rl-baselines3-zoo, its tuned hyperparameters and its own script: as it is, and under `mechanic run`.

    git clone https://github.com/DLR-RM/rl-baselines3-zoo
    python -m venv outside
    echo "import site; site.addsitedir('$PWD/.venv/lib/python3.11/site-packages')" \
        > outside/lib/python3.11/site-packages/project.pth
    outside/bin/pip install --constraint constraints.txt rl_zoo3==2.9.2
    outside/bin/python -m benchmarks.rl --home rl-baselines3-zoo --fill docs/outside.md

Published is what the zoo's benchmark.md says of its trained agents. Here a return is the mean over the ten episodes of
a run's last evaluation. Runs that are in the results already are not made again.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.outside import Row, report
from benchmarks.pages import markdown_table


class Task(NamedTuple):
    """What the zoo has tuned."""

    algorithm: str
    environment: str
    steps: int
    lr: str
    published: str
    optimizers: tuple[str, ...] = ("",)  # what each one trains, in the order in which they are built


TASKS = {
    "PPO, CartPole": Task("ppo", "CartPole-v1", 100_000, "1e-3, linear to 0", "500 ± 0"),
    "A2C, CartPole": Task("a2c", "CartPole-v1", 500_000, "7e-4", "500 ± 0"),
    "DQN, CartPole": Task("dqn", "CartPole-v1", 50_000, "2.3e-3", "500 ± 0"),
    "SAC, Pendulum": Task(
        "sac", "Pendulum-v1", 20_000, "1e-3", "-157 ± 89", ("actor", "critic", "entropy coefficient")
    ),
}
METHODS: dict[str, list[str] | None] = {  # options of `mechanic run`, which is not called for None
    "as it is": None,
    "`mechanic run`": [],
}
EPISODES, EVALUATIONS = 10, 5


def run(home: Path, task: str, method: str, seed: int) -> Row:
    """Train by the zoo's script; return the mean of each evaluation, and the learned lr of each optimizer."""
    algorithm, environment, steps, *_ = TASKS[task]
    options = METHODS[method]
    with tempfile.TemporaryDirectory() as folder:
        script = ["-m", "rl_zoo3.train", "--algo", algorithm, "--env", environment, f"--seed={seed}", "--device=cpu"]
        script += ["--num-threads=1", f"--n-timesteps={steps}", f"--log-folder={folder}/logs", "--verbose=0"]
        script += [f"--eval-freq={steps // EVALUATIONS}", f"--eval-episodes={EPISODES}"]
        mechanic = [] if options is None else ["-m", "mechanic_pytorch", "run", "--report", folder, *options]
        done = subprocess.run(
            [sys.executable, *mechanic, *script],
            cwd=home, capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [*sys.path, str(home)]))},
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        with np.load(next(Path(folder).rglob("evaluations.npz"))) as evaluations:
            returns = evaluations["results"].mean(axis=1).tolist()
        learned = None
        if options is not None:
            written = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
            learned = [max(group["learned_lr"] for group in one["groups"]) for one in written["optimizers"]]
    return {"steps": steps, "returns": returns, "learned lr": learned}


def table(rows: list[Row]) -> str:
    """Return a line for each task and method: returns after the last step, and learned lrs."""
    lines = []
    for (name, task), method in product(TASKS.items(), METHODS):
        mine = [row for row in rows if (row["task"], row["method"]) == (name, method)]
        if not mine:
            continue
        last = [row["returns"][-1] for row in mine]
        spread = f" ± {statistics.stdev(last):.0f}" if len(last) > 1 else ""
        each = ", ".join(f"{mean:.0f}" for mean in last)
        learned = zip(*(row["learned lr"] for row in mine if row["learned lr"]), strict=True)
        spans = [
            f"{what} {min(rates):.0e} to {max(rates):.0e}".strip()
            for what, rates in zip(task.optimizers, learned, strict=False)
        ]
        lr = ", ".join(spans) or task.lr
        lines.append([name, task.published, method, f"{statistics.fmean(last):.0f}{spread}", each, lr])
    return markdown_table(["algorithm, environment", "published", "run", "return", "each seed", "lr"], lines)


def runs(home: Path, seeds: int) -> Iterator[tuple[Row, Callable[[], Row]]]:
    """Yield each run."""
    for method, seed, task in product(METHODS, range(seeds), TASKS):
        yield {"task": task, "method": method, "seed": seed}, partial(run, home, task, method, seed)


if __name__ == "__main__":
    torch.set_num_threads(1)  # as each run has, for what is said of the setting
    report(__doc__, "RL zoo", "DLR-RM/rl-baselines3-zoo", runs, table, seeds=5)
