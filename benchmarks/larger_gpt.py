"""nanoGPT's script with 3.2M weights for 5000 steps: on a grid of learning rates, and under `mechanic run`.

    git clone https://github.com/karpathy/nanoGPT
    python -m benchmarks.larger_gpt --home nanoGPT --fill docs/outside.md

The recipe for a CPU (benchmarks/nanogpt.py), twice as wide and for 2.5 times as many steps. The script's schedule ends
at min_lr, a tenth of lr at each point of the grid. Of every run the last validation loss counts. It is of 100 batches,
the same in all runs of a seed. Runs that are in the results already are not made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean

from benchmarks.convergence.methods import finite
from benchmarks.nanogpt import FLAGS, prepare, train
from benchmarks.outside import Row, report
from benchmarks.pages import markdown_table

STEPS = 5000
SIZE = ["--n_embd=256", f"--max_iters={STEPS}", f"--lr_decay_iters={STEPS}", "--eval_interval=1000", "--eval_iters=100"]
GRID = [1e-3, 3e-3, 3e-4, 1e-2, 1e-4]  # the one of the recipe first


def run(home: Path, lr: float | None, seed: int) -> Row:
    """Train at this lr, or mechanized at that of the recipe if there is none."""
    rates = [] if lr is None else [f"--learning_rate={lr}", f"--min_lr={lr / 10:.0e}"]
    return train(home, [*FLAGS, *SIZE, *rates], lr is None, seed)


def table(rows: list[Row]) -> str:
    """Return a line for ours and for each lr; the best lr of the grid is bold."""
    rates = sorted({row["lr"] for row in rows}, key=lambda lr: lr or 0.0)
    made = {lr: [row for row in rows if row["lr"] == lr] for lr in rates}
    losses = {lr: fmean(finite(row["validation"]) for row in some) for lr, some in made.items()}
    best = min((lr for lr in rates if lr is not None), key=losses.__getitem__, default=None)
    lines = []
    for lr, some in made.items():
        name = "`mechanic run`" if lr is None else f"as it is, lr {lr:.0e}"
        learned = [row["learned lr"] for row in some if row["learned lr"] is not None]
        lines.append(
            [
                f"**{name}**" if lr == best and lr is not None else name,
                f"{losses[lr]:.3f}",
                f"{fmean(finite(row['train']) for row in some):.3f}",
                f"{fmean(learned):.1e}" if learned else "",
            ]
        )
    return markdown_table(
        [f"GPT of 3.2M weights, {STEPS} steps", "validation loss", "training loss", "learned lr"], lines
    )


def runs(home: Path, seeds: int) -> Iterator[tuple[Row, Callable[[], Row]]]:
    """Yield each run, ours and the lr of the recipe first."""
    prepare(home)
    for seed, lr in product(range(seeds), [None, *GRID]):
        yield {"lr": lr, "seed": seed}, partial(run, home, lr, seed)


if __name__ == "__main__":
    report(__doc__, "larger GPT", "karpathy/nanoGPT", runs, table, seeds=1)
