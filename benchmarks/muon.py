"""Muon for matrices and AdamW for the rest, each mechanized: the figures of `docs/recipes.md` on it.

    MECHANIC_DATA=data python -m benchmarks.muon --fill docs/recipes.md

A perceptron (784-128-64-10) on Fashion-MNIST, 400 batches of 64, cosine. torch.optim.Muon has the weights of the hidden
layers, AdamW the last layer and all biases. The plain pair is trained at each pair of half decades around the best one,
so that the best is inside. Losses are means over three seeds of weights and batches, over 5000 training examples.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from statistics import fmean
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.convergence import data
from benchmarks.convergence.methods import finite
from benchmarks.convergence.tasks import EVALUATION, batches, perceptron
from benchmarks.pages import arguments, markdown_table, origin, print_or_fill
from benchmarks.shared import cosine
from mechanic_pytorch import is_mechanized, mechanize

SEEDS, STEPS, BATCH = range(3), 400, 64
CENTRE = -3, -4  # lr of Muon and of AdamW, in half decades, where the search for the best pair begins
Pair = tuple[int, int]
Rates = tuple[float, float]


def pair(model: torch.nn.Sequential, lrs: Rates, wrap: Callable[[Any], Any]) -> list[torch.optim.Optimizer]:
    """Return Muon for the weights of the hidden layers and AdamW for the rest, as `wrap` makes of the classes."""
    layers = [layer for layer in model if isinstance(layer, torch.nn.Linear)]
    matrices = [layer.weight for layer in layers[:-1]]
    rest = [*layers[-1].parameters(), *(layer.bias for layer in layers[:-1])]
    return [wrap(torch.optim.Muon)(matrices, lr=lrs[0]), wrap(torch.optim.AdamW)(rest, lr=lrs[1])]


def train(seed: int, lrs: Rates, wrap: Callable[[Any], Any]) -> tuple[float, list[float]]:
    """Train once; return the loss, and the learned lrs of what is mechanized."""
    x, y, *_ = data.images("fashion-mnist")
    torch.manual_seed(seed)
    model = perceptron()
    optimizers = pair(model, lrs, wrap)
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda t: cosine(t / STEPS)) for each in optimizers]
    for chosen in batches(len(x), BATCH, STEPS, seed):
        model.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        for each in (*optimizers, *schedules):
            each.step()
    seen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:EVALUATION]
    with torch.no_grad():
        loss = float(F.cross_entropy(model(x[seen]), y[seen]))
    return finite(loss), [each.learned_lr()[0] for each in optimizers if is_mechanized(each)]


@cache
def plain(point: Pair) -> float:
    """Return the mean loss of the plain pair."""
    muon, adamw = (10 ** (k / 2) for k in point)
    return fmean(train(seed, (muon, adamw), lambda base: base)[0] for seed in SEEDS)


def best(start: Pair, moves: list[Pair]) -> Pair:
    """Return the point that no move from it makes better: a search downhill."""
    while True:
        nearest = [start, *((start[0] + a, start[1] + b) for a, b in moves)]
        found = min(nearest, key=plain)
        if found == start:
            return start
        start = found


def rows() -> Iterator[list[str]]:
    """Yield the rows of the table."""
    around = [move for move in product((-1, 0, 1), repeat=2) if any(move)]
    top = best(CENTRE, around)

    def row(name: str, point: Pair) -> list[str]:
        lrs = [f"{10 ** (k / 2):.2g}" for k in point]
        return [name, *lrs, f"{plain(point):.3f}", f"{plain(point) / plain(top):.2f}"]

    yield row("plain, both lrs tuned", top)
    for ratio, name in ((0, "1 : 1"), (-4, "1 : 0.01"), (4, "1 : 100")):
        middle = top[0] + (top[1] - top[0] - ratio) // 2
        yield row(f"plain, lrs tuned at a ratio of {name}", best((middle, middle + ratio), [(-1, -1), (1, 1)]))
    for s_init in ("auto", 1e-8):
        runs = [train(seed, (1.0, 1.0), lambda base, s=s_init: mechanize(base, s_init=s)) for seed in SEEDS]
        lrs = [math.exp(fmean(math.log(learned[i]) for _, learned in runs)) for i in range(2)]
        loss = fmean(loss for loss, _ in runs)
        name = f"each mechanized, s_init={s_init}"
        yield [name, *(f"{lr:.2g}" for lr in lrs), f"{loss:.3f}", f"{loss / plain(top):.2f}"]


def main() -> None:
    """Print the table, or write it into a page."""
    options = arguments(__doc__).parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    head = ["Muon and AdamW", "lr of Muon", "lr of AdamW", "loss", "against tuned"]
    made = {"table": markdown_table(head, rows())}
    made["origin"] = origin(f"perceptron, Fashion-MNIST, {STEPS} steps, means over {len(SEEDS)} seeds")
    print_or_fill(options.fill, "muon", made)


if __name__ == "__main__":
    main()
