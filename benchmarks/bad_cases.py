"""Where the tuner goes wrong by its nature, and what helps: strong weight decay, and schedule-free bases.

    python -m benchmarks.bad_cases --fill docs/convergence.md

Weight decay: AdamW on a linear regression, 256 x 10, noise 0.1, batches of 32, 2000 steps, cosine. Decay holds the
weights short of the optimum, so stretching them from where they started pays at every step, and stretching is all that
a larger scale does to <delta, g>; but a larger scale makes the decay stronger, too, and so on.

Schedule-free: AdamW's on scikit-learn's handwritten digits, a 64-32-10 network, batches of 64, 1000 steps. The weights
under the gradient are an average of the iterates, which answers to the scale late and little.

Prints two Markdown tables, or writes them between the marks `<!-- bad cases: NAME -->` and `<!-- end -->`: medians over
three seeds of weights and batches, with the smallest and the largest.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import pytorch_optimizer as po
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.convergence.methods import finite
from benchmarks.convergence.plan import tuned
from benchmarks.pages import arguments, markdown_table, origin, print_or_fill
from benchmarks.shared import cosine, digits, network
from mechanic_pytorch import is_mechanized, mechanize

SEEDS = range(3)
DECAYS = (0.0, 0.01, 0.1, 1.0)
OURS: dict[str, dict[str, Any]] = {
    "`s_init=1e-8`": {"s_init": 1e-8},
    '`s_init="auto"`': {"s_init": "auto"},
    '`s_init="auto", s_decay=1.0`': {"s_init": "auto", "s_decay": 1.0},
    '`s_init="auto", s_decay=10.0`': {"s_init": "auto", "s_decay": 10.0},
}
Run = tuple[float, float]  # final loss, learned lr
Make = Callable[[Any], Any]


def train(
    model: nn.Module, data: tuple[Tensor, Tensor], loss: Any, make: Make, steps: int, batch: int, falls: bool
) -> Run:
    """Train once; return the loss over all the data and the learning rate, learned or given."""
    x, y = data
    optimizer = make(model.parameters())
    inner = getattr(optimizer, "optimizer", optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(inner, lambda t: cosine(t / steps) if falls else 1.0)
    getattr(optimizer, "train", lambda: None)()
    for _ in range(steps):
        chosen = torch.randint(len(x), (batch,))
        optimizer.zero_grad()
        loss(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
        schedule.step()
    getattr(optimizer, "eval", lambda: None)()
    rate = inner.learned_lr()[0] if is_mechanized(inner) else float(inner.param_groups[0].get("initial_lr", math.nan))
    with torch.no_grad():
        return float(loss(model(x), y)), rate


def regression(make: Make, seed: int) -> Run:
    """Fit a plane."""
    torch.manual_seed(0)
    x, plane = torch.randn(256, 10), torch.randn(10, 1)
    data = x, x @ plane + 0.1 * torch.randn(256, 1)
    torch.manual_seed(seed)
    return train(nn.Linear(10, 1), data, F.mse_loss, make, steps=2000, batch=32, falls=True)


def reading(make: Make, seed: int) -> Run:
    """Read handwritten digits."""
    torch.manual_seed(seed)
    return train(network(), digits(), F.cross_entropy, make, steps=1000, batch=64, falls=False)


def over_seeds(problem: Callable[[Make, int], Run], make: Make) -> list[Run]:
    """Return a run for each seed."""
    return [problem(make, seed) for seed in SEEDS]


def best(problem: Callable[[Make, int], Run], make: Callable[[Any, float], Any]) -> list[Run]:
    """Return the runs at the learning rate whose median loss is least."""

    def at(lr: float) -> tuple[float, list[Run]]:
        runs = over_seeds(problem, lambda params: make(params, lr))
        return median(finite(run[0]) for run in runs), runs

    (_, runs), _ = tuned(at, centre=-3, reach=4)
    return runs


def row(*names: str, runs: list[Run]) -> list[str]:
    """Return a row of a table."""
    losses, rates = zip(*runs, strict=True)
    spread = f"{median(losses):.3g} ({min(losses):.3g} to {max(losses):.3g})"
    return [*names, spread, f"{median(rates):.2g}"]


def main() -> None:
    """Print both tables, or write them into a page."""
    page = arguments(__doc__).parse_args().fill
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    adamw, rows = torch.optim.AdamW, []
    for decay in track(DECAYS, "weight decay"):
        runs = best(regression, lambda params, lr, decay=decay: adamw(params, lr=lr, weight_decay=decay))
        rows.append(row(f"{decay:g}", "plain, tuned", runs=runs))
        for name, options in OURS.items():
            base = mechanize(adamw, **options)
            runs = over_seeds(regression, lambda p, base=base, decay=decay: base(p, lr=1.0, weight_decay=decay))
            rows.append(row(f"{decay:g}", name, runs=runs))
    made = {"weight decay": markdown_table(["weight decay", "AdamW", "final loss", "learned lr"], rows)}

    free, auto = po.ScheduleFreeAdamW, mechanize(adamw, s_init="auto")
    cases: dict[str, Make] = {
        "mechanized, `s_init=1e-8`": lambda p: mechanize(free, s_init=1e-8)(p, lr=1.0),
        'mechanized, `s_init="auto"`': lambda p: mechanize(free, s_init="auto")(p, lr=1.0),
        '`ScheduleFreeWrapper` around mechanized AdamW, `s_init="auto"`': lambda p: po.ScheduleFreeWrapper(
            auto(p, lr=1.0, betas=(0.0, 0.999))
        ),
    }
    rows = [row("plain, tuned", runs=best(reading, lambda params, lr: free(params, lr=lr)))]
    rows += [row(name, runs=over_seeds(reading, make)) for name, make in track(cases.items(), "schedule-free")]
    made["schedule free"] = markdown_table(["ScheduleFreeAdamW", "final loss in `eval()`", "learned lr"], rows)
    made["origin"] = origin("medians of three seeds with the smallest and the largest")
    print_or_fill(page, "bad cases", made)


if __name__ == "__main__":
    main()
