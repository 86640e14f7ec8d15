"""What Mechanic does with the usual ingredients of a training loop: the figures of `docs/recipes.md`.

    MECHANIC_DATA=data python -m benchmarks.recipes --fill docs/recipes.md

One small task: a perceptron (784-128-64-10) on Fashion-MNIST, AdamW, batches of 64, 400 steps, cosine, unless a row
says otherwise; for fine-tuning, one that has been trained on MNIST before. Each row is trained by the mechanized base
with `s_init="auto"` at lr 1.0, and by the plain base at the best learning rate of half decades for this very row.

Prints a Markdown table for each topic, or writes them between the marks `<!-- recipes: NAME -->` and `<!-- end -->`.
Losses are means over three seeds of weights and batches, over 5000 examples of the training data.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from statistics import fmean
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.convergence import data
from benchmarks.convergence.methods import finite
from benchmarks.convergence.plan import tuned
from benchmarks.convergence.tasks import EVALUATION, batches, perceptron, trained_on_mnist
from benchmarks.pages import arguments, markdown_table, origin, print_or_fill
from benchmarks.shared import cosine
from mechanic_pytorch import is_mechanized, mechanize

SEEDS, STEPS, BATCH = range(3), 400, 64
CENTRE = {"AdamW": -5, "SGD": -2}  # of the grid, in half decades; from there it goes downhill
pretrained = cache(partial(trained_on_mnist, perceptron))

# From the part of the run that is behind, to a factor of lr.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear to 0": lambda t: 1 - t,
    "cosine to 0": cosine,
}


@dataclass(frozen=True)
class Case:
    """One way to train."""

    name: str = field(compare=False)  # cases that differ in nothing else are trained once
    base: str = "AdamW"
    schedule: str = "cosine to 0"
    warm_up: float = 0.0  # part of the steps
    weight_decay: float = 0.01
    clip: float | None = None
    accumulate: int = 1  # batches for a step
    batch: int = BATCH
    bfloat16: bool = False  # under autocast
    average: float | None = None  # decay of an average of the weights, which is then judged
    tune: str | None = None  # of a pretrained model: all of it, its last layer, or adapters and its last layer

    def factor(self, step: int) -> float:
        """Return by what the schedule multiplies lr."""
        rising = round(self.warm_up * STEPS)
        if step < rising:
            return (step + 1) / rising
        return SCHEDULES[self.schedule]((step - rising) / (STEPS - rising))


TOPICS = {
    "schedule": [Case(name, schedule=name) for name in SCHEDULES],
    "warm up": [Case(f"{100 * part:g} % of the steps", warm_up=part) for part in (0.0, 0.05, 0.2)],
    "weight decay": [Case(f"{decay:g}", weight_decay=decay) for decay in (0.0, 0.01, 0.1, 1.0)],
    "clipping": [
        Case(f"{base}, {f'norm {clip:g}' if clip else 'none'}", base=base, clip=clip)
        for base in ("AdamW", "SGD")
        for clip in (None, 1.0, 0.1)
    ],
    "accumulation": [
        Case("16", batch=16),
        Case("64"),
        Case("4 x 16, accumulated", batch=16, accumulate=4),
        Case("4 x 64, accumulated", accumulate=4),
    ],
    "precision": [Case("float32"), Case("bfloat16 autocast", bfloat16=True)],
    "average": [
        Case(f"{schedule}, {'averaged' if decay else 'last'} weights", schedule=schedule, average=decay)
        for schedule in ("constant", "cosine to 0")
        for decay in (None, 0.98)
    ],
    "fine tuning": [
        Case("from random weights"),
        Case("all weights", tune="all"),
        Case("last layer alone", tune="head"),
        Case("last layer alone, warm-up of 20 %", tune="head", warm_up=0.2),
        Case("adapters of rank 4, and last layer", tune="adapters"),
        Case("the same, warm-up of 20 %", tune="adapters", warm_up=0.2),
    ],
}


class LowRank(nn.Module):
    """Add a product of two thin matrices to a weight, zero at first, as LoRA does."""

    def __init__(self, weight: Tensor, rank: int = 4) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(len(weight), rank))
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the adapted weight."""
        return weight + self.up @ self.down


def start(case: Case) -> nn.Sequential:
    """Return the model of a case, with gradients for what is trained."""
    model = perceptron()
    if case.tune is None:
        return model
    *body, head = (layer for layer in model if isinstance(layer, nn.Linear))
    fresh = {name: weight.clone() for name, weight in head.state_dict().items()}
    model.load_state_dict(pretrained())
    head.load_state_dict(fresh)
    for layer in body:
        layer.requires_grad_(case.tune == "all")
        if case.tune == "adapters":
            parametrize.register_parametrization(layer, "weight", LowRank(layer.weight))
    return model


def train(case: Case, seed: int, make: Callable[[Any], torch.optim.Optimizer]) -> tuple[float, float, float]:
    """Train once; return the training loss, the test accuracy in %, and the learned lr (NaN if none was learned)."""
    x, y, x_test, y_test = data.images("fashion-mnist")
    torch.manual_seed(seed)
    model = start(case)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, case.factor)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(case.average)) if case.average else None
    order = iter(batches(len(x), case.batch, STEPS * case.accumulate, seed))
    for _ in range(STEPS):
        optimizer.zero_grad()
        for _ in range(case.accumulate):
            chosen = next(order)
            with torch.autocast("cpu", torch.bfloat16, enabled=case.bfloat16):
                loss = F.cross_entropy(model(x[chosen]), y[chosen])
            (loss / case.accumulate).backward()
        if case.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), case.clip)
        optimizer.step()
        schedule.step()
        if average is not None:
            average.update_parameters(model)
    judged = model if average is None else average
    seen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:EVALUATION]
    with torch.no_grad():
        final = float(F.cross_entropy(judged(x[seen]), y[seen]))
        accuracy = 100 * float((judged(x_test).argmax(1) == y_test).float().mean())
    return final, accuracy, optimizer.learned_lr()[0] if is_mechanized(optimizer) else math.nan


@cache
def at(case: Case, lr: float | None) -> tuple[float, list[tuple[float, float, float]]]:
    """Return the mean loss, and a run for each seed: mechanized, or plain at a learning rate."""
    base: Any = getattr(torch.optim, case.base)
    options: dict[str, Any] = {"momentum": 0.9} if case.base == "SGD" else {"weight_decay": case.weight_decay}

    def make(params: Any) -> torch.optim.Optimizer:
        if lr is None:
            return mechanize(base, s_init="auto")(params, lr=1.0, **options)
        return base(params, lr=lr, **options)

    runs = [train(case, seed, make) for seed in SEEDS]
    return finite(fmean(run[0] for run in runs)), runs


def row(case: Case) -> list[str]:
    """Return a row of a table."""
    _, ours = at(case, None)
    (plain_loss, plain), lr = tuned(partial(at, case), CENTRE[case.base], reach=1)
    losses = [run[0] for run in ours]
    learned = math.exp(fmean(math.log(run[2]) for run in ours))
    points = fmean(run[1] for run in ours) - fmean(run[1] for run in plain)
    return [
        case.name,
        f"{fmean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})",
        f"{learned:.2g}",
        f"{plain_loss:.3f}",
        f"{lr:.2g}",
        f"{fmean(run[1] for run in ours):.1f} ({points:+.1f})",
    ]


def main() -> None:
    """Print the tables, or write them into a page."""
    parser = arguments(__doc__)
    parser.add_argument("--topics", nargs="+", choices=TOPICS, default=list(TOPICS), metavar="TOPIC")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    head = "loss, mechanized", "learned lr", "loss, plain tuned", "its lr", "accuracy, % (against tuned)"
    made = {}
    for topic in options.topics:
        title = "batch" if topic == "accumulation" else topic.replace("warm up", "warm-up").replace("fine t", "fine-t")
        made[topic] = markdown_table([title, *head], [row(case) for case in track(TOPICS[topic], topic)])
    made["origin"] = origin(
        f"perceptron, Fashion-MNIST, {STEPS} steps, means over {len(SEEDS)} seeds (smallest to largest)"
    )
    print_or_fill(options.fill, "recipes", made)


if __name__ == "__main__":
    main()
