"""Layers that take part in turns, or begin late, with one optimizer: `s_init="auto"` beside the tuned base.

    python -m benchmarks.turns --fill docs/safety.md
    python -m benchmarks.turns --only remedy --fill docs/limits.md

Digits, a perceptron of three layers (64-64-64-10), or with two heads, batches of 64, lr constant. The loss is that on
all digits, the mean of the seeds. The plain base has the best lr of a grid of half decades.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.convergence.methods import finite
from benchmarks.convergence.plan import tuned
from benchmarks.pages import arguments, markdown_table, origin, print_or_fill
from benchmarks.shared import digits
from mechanic_pytorch import mechanize

BASES: dict[str, tuple[Any, dict[str, Any], int]] = {  # class, options, the middle of its grid
    "SGD, momentum": (torch.optim.SGD, {"momentum": 0.9}, -3),
    "AdamW": (torch.optim.AdamW, {}, -4),
}
Optimizer = torch.optim.Optimizer
Make = Callable[[Sequence[Tensor]], Optimizer]
ALL = (0, 1, 2)


def batches(seed: int, steps: int) -> list[Tensor]:
    """Return the indices of the digits of each step."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(len(digits()[1]), (64,), generator=generator) for _ in range(steps)]


def layers_in_turns(make: Make, seed: int, steps: int, period: int, turns: Sequence[Sequence[int]]) -> float:
    """Train the layers of a turn alone for a period, then those of the next; return the final loss."""
    torch.manual_seed(seed)
    layers = [nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    optimizer, (images, labels) = make(list(model.parameters())), digits()
    for t, i in enumerate(batches(seed, steps)):
        for k, layer in enumerate(layers):
            layer.requires_grad_(k in turns[t // period % len(turns)])
        optimizer.zero_grad()
        F.cross_entropy(model(images[i]), labels[i]).backward()
        optimizer.step()
    return F.cross_entropy(model(images), labels).item()


def two_heads(make: Make, seed: int, steps: int, times: float) -> float:
    """Train two heads on one body in turns, one loss so many times the other; return the sum of the final losses."""
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(64, 32), nn.ReLU())
    heads = [nn.Linear(32, 10), nn.Linear(32, 10)]
    params = [p for module in (body, *heads) for p in module.parameters()]
    optimizer, (images, labels) = make(params), digits()

    def loss(head: int, i: Any = slice(None)) -> Tensor:
        return F.cross_entropy(heads[head](body(images[i])), labels[i] if head == 0 else 9 - labels[i])

    for t, i in enumerate(batches(seed, steps)):
        optimizer.zero_grad()
        (loss(t % 2, i) * (times if t % 2 else 1.0)).backward()
        optimizer.step()
    return (loss(0) + loss(1)).item()


def in_order(steps: int, period: int, *turns: Sequence[int]) -> Callable[[Make, int], float]:
    """Return a run of layers in turns."""
    return partial(layers_in_turns, steps=steps, period=period, turns=turns)


TASKS: dict[str, Callable[[Make, int], float]] = {
    "one layer, 50 steps each, once": in_order(150, 50, [0], [1], [2]),
    "one layer, 150 steps each, once": in_order(450, 150, [0], [1], [2]),
    "the same, from the last layer to the first": in_order(450, 150, [2], [1], [0]),
    "the last layer; from step 150 the second, too; from 300 all": in_order(450, 150, [2], [1, 2], ALL),
    "the first layer; from step 150 the second, too; from 300 all": in_order(450, 150, [0], [0, 1], ALL),
    "one layer, 50 steps each in turn, 600 steps": in_order(600, 50, [0], [1], [2]),
    "one layer, 10 steps each in turn, 600 steps": in_order(600, 10, [0], [1], [2]),
    "one layer, 1 step each in turn, 600 steps": in_order(600, 1, [0], [1], [2]),
    "two heads in turns, one loss a hundred times the other": partial(two_heads, steps=300, times=100.0),
}


def mean_loss(task: Callable[[Make, int], float], make: Make, seeds: int) -> float:
    """Return the mean final loss, infinite if a run diverges."""
    return fmean(finite(task(make, seed)) for seed in range(seeds))


def row(name: str, base: str, seeds: int) -> list[str]:
    """Run a task with one base; return a row of the table."""
    cls, options, middle = BASES[base]
    task = TASKS[name]
    best, lr = tuned(lambda lr: (mean_loss(task, lambda params: cls(params, lr=lr, **options), seeds),), middle, 2)
    ours = mean_loss(task, lambda params: mechanize(cls, s_init="auto")(params, lr=1.0, **options), seeds)
    return [name, base, f"{best[0]:.2g}", f"{lr:.1g}", f"{ours:.2g}"]


def a_scale_each(params: Sequence[Tensor]) -> Optimizer:
    """Return mechanized AdamW with a scale for each layer, that is, for each weight and its bias."""
    groups = [{"params": params[i : i + 2]} for i in range(0, len(params), 2)]
    return mechanize(torch.optim.AdamW, per_group=True)(groups, lr=1.0)


def remedy(name: str, seeds: int) -> list[str]:
    """Run a task of layers in turns with one scale, and with one for each layer; return a row of the table."""
    ways: list[Make] = [lambda params: mechanize(torch.optim.AdamW)(params, lr=1.0), a_scale_each]
    return [name, *(f"{mean_loss(TASKS[name], make, seeds):.2g}" for make in ways)]


def main() -> None:
    """Run all tasks."""
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--only", choices=["table", "remedy"], default="table", help="which of the tables")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if args.only == "remedy":
        rows = [remedy(name, args.seeds) for name in track([n for n in TASKS if "in turn," in n], "turns")]
        head = ["who takes part", "AdamW, one scale", "`per_group=True`, a group for each layer"]
    else:
        runs = list(itertools.product(TASKS, BASES))
        rows = [row(name, base, args.seeds) for name, base in track(runs, "turns")]
        head = ["who takes part", "base", "tuned loss", "its lr", '`s_init="auto"`, lr 1']
    table = markdown_table(head, rows)
    print_or_fill(args.fill, "turns", {args.only: f"{table}\n\n{origin(f'mean of {args.seeds} seeds')}"})


if __name__ == "__main__":
    main()
