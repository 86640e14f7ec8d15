"""What if S lagged one step? Then the four sums could be made in the pass that moves the weights: 9 words, not 12.

    python -m benchmarks.lag --fill docs/design-notes.md

A step would move by the scale that the gradients before its own have taught. Both are trained from the same weights on
the same batches of scikit-learn's digits, by a perceptron of three layers; the package is patched in one place.
"""

from __future__ import annotations

import itertools
import unittest.mock
from collections.abc import Callable
from contextlib import nullcontext
from statistics import geometric_mean

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.convergence.methods import finite
from benchmarks.pages import arguments, markdown_table, origin, print_or_fill
from benchmarks.shared import cosine, digits
from mechanic_pytorch import mechanize
from mechanic_pytorch._auto import Learned
from mechanic_pytorch._config import TunerState
from mechanic_pytorch.kernels.arguments import Scales

STEPS, BATCH = 600, 64
BASES = {
    "AdamW": (torch.optim.AdamW, {}),
    "SGD, momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "SGD": (torch.optim.SGD, {}),
    "RMSprop": (torch.optim.RMSprop, {}),
}
SCHEDULES: dict[str, Callable[[int], float]] = {
    "constant": lambda t: 1.0,
    "cosine": lambda t: cosine(t / STEPS),
    "warm-up, then linear": lambda t: min(t / 60, (STEPS - t) / (STEPS - 60)),
}
STARTS = ("auto", 1e-8)


def lagging() -> Callable[[Learned, TunerState], Scales]:
    """Return what takes the place of `Learned.scales`: the scale of the step before, and that of two steps before."""
    before: list[Tensor] = []

    def scales(learned: Learned, old: TunerState) -> Scales:
        now = old.scales.sum(-1)
        earlier = before.pop() if before else torch.zeros_like(now)
        before.append(now)
        if learned.length is None or learned.follow is None:
            return Scales(earlier, now)
        if not now.any():  # the very first step of "auto", whose scale is not learned
            now = learned.state.scales.sum(-1)
        return Scales(learned.length * now, learned.length * now, learned.follow)

    return scales


def train(base: str, schedule: str, s_init: float | str, seed: int, *, lags: bool) -> float:
    """Return the loss on all digits after training, 10 where it is not finite or larger."""
    torch.manual_seed(seed)
    images, labels = digits()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    kind, options = BASES[base]
    optimizer = mechanize(kind, s_init=s_init)(model.parameters(), lr=1.0, **options)  # type: ignore[arg-type]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, SCHEDULES[schedule])
    patch = unittest.mock.patch.object(Learned, "scales", lagging()) if lags else nullcontext()
    with patch:
        for _ in range(STEPS):
            chosen = torch.randint(len(images), (BATCH,))
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            scheduler.step()
    with torch.no_grad():
        loss = float(F.cross_entropy(model(images), labels))
    return min(finite(loss), 10.0)


def main() -> None:
    """Train and print."""
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, every = [], []
    for base, schedule in track([*itertools.product(BASES, SCHEDULES)], transient=True):
        row = [base, schedule]
        for s_init in STARTS:
            runs = [
                tuple(train(base, schedule, s_init, seed, lags=lags) for lags in (False, True))
                for seed in range(options.seeds)
            ]
            now, later = (geometric_mean(losses) for losses in zip(*runs, strict=True))
            row += [f"{now:.2g}", f"{later:.2g}", f"{later / now:.2f}"]
            every.append((s_init, later / now))
        rows.append(row)
    means = [geometric_mean(ratio for each, ratio in every if each == s_init) for s_init in STARTS]
    rows.append(["geometric mean", "", "", "", f"{means[0]:.2f}", "", "", f"{means[1]:.2f}"])
    head = ["base", "schedule", *[f"{s_init}: {what}" for s_init in STARTS for what in ("now", "lagging", "ratio")]]
    made = f"{markdown_table(head, rows)}\n\n{origin(f'mean of {options.seeds} seeds')}"
    print_or_fill(options.fill, "lag", {"table": made})


if __name__ == "__main__":
    main()
