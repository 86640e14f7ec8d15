"""Train on real digits at base learning rates from 1e-8 to 1e6: plain AdamW, and AdamW mechanized.

The data are scikit-learn's handwritten digits, 1,797 images of 8 x 8 pixels which come with it; nothing is downloaded.
Every run starts from the same weights and sees the same batches in the same order, under the same cosine schedule; only
the optimizer and its base learning rate differ. Prints one table and draws one picture:

    python examples/demo.py --output demo.png --epochs 30
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from mechanic_pytorch import is_mechanized, mechanize

matplotlib.use("Agg")  # works without a display
from matplotlib import pyplot as plt

BASE_LRS = (1e-8, 1e-6, 1e-4, 1e-2, 1e0, 1e2, 1e4, 1e6)
BATCH_SIZE = 64
CHANCE = 10.0  # percent: ten digits, about equally frequent
CLOSE = 2.0  # points of test accuracy that count as close to the best
SEED = 0


@dataclass(frozen=True)
class Digits:
    """The images, split once into a part to train on and a part to test on."""

    train_x: Tensor
    test_x: Tensor
    train_y: Tensor
    test_y: Tensor

    @property
    def steps_per_epoch(self) -> int:
        """How many full batches one pass over the training images makes."""
        return len(self.train_x) // BATCH_SIZE


@dataclass(frozen=True)
class Run:
    """What one training run came to."""

    base_lr: float
    learned_lr: float  # base_lr, for the plain optimizer
    accuracy: float  # percent, on the test images
    finite: bool  # whether the loss was finite at every step


def load_data() -> Digits:
    """Return the digits with pixels between 0 and 1, a quarter of them for the test."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16.0, labels, test_size=0.25, stratify=labels, random_state=SEED)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in parts)
    return Digits(train_x.float(), test_x.float(), train_y.long(), test_y.long())


def train(
    Base: type[torch.optim.Optimizer], base_lr: float, data: Digits, epochs: int, advance: Callable[[], object]
) -> Run:
    """Train one network from the same start as every other and measure it on the test images.

    Args:
        Base: an optimizer class, plain or mechanized.
        base_lr: the learning rate at the top of the cosine.
        data: the images.
        epochs: how many passes over the training images.
        advance: called after every epoch.

    Returns:
        The outcome. A run whose loss stops being finite goes on to its end like any other.
    """
    torch.manual_seed(SEED)  # the same weights
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    shuffle = torch.Generator().manual_seed(SEED)  # the same batches
    optimizer = Base(model.parameters(), lr=base_lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * data.steps_per_epoch)
    finite = True
    for _ in range(epochs):
        order = torch.randperm(len(data.train_x), generator=shuffle)
        for batch in order.split(BATCH_SIZE)[: data.steps_per_epoch]:
            loss = F.cross_entropy(model(data.train_x[batch]), data.train_y[batch])
            finite = finite and bool(loss.isfinite())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        advance()
    learned_lr = optimizer.learned_lr()[0] if is_mechanized(optimizer) else base_lr
    return Run(base_lr, learned_lr, accuracy_on_test(model, data), finite)


@torch.no_grad()
def accuracy_on_test(model: nn.Module, data: Digits) -> float:
    """Return the percentage of test images that the model names correctly."""
    return 100.0 * float((model(data.test_x).argmax(dim=1) == data.test_y).float().mean())


def train_all(data: Digits, epochs: int, console: Console) -> tuple[list[Run], list[Run]]:
    """Train at every base learning rate under one progress bar; return the plain and the mechanized runs."""
    contestants = {
        "plain AdamW": torch.optim.AdamW,
        "mechanized AdamW": mechanize(torch.optim.AdamW),
    }
    runs: dict[str, list[Run]] = {name: [] for name in contestants}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(contestants) * len(BASE_LRS) * epochs)
        for base_lr in BASE_LRS:
            for name, base in contestants.items():
                progress.update(task, description=f"{name}, base lr {base_lr:.0e}")
                runs[name].append(train(base, base_lr, data, epochs, lambda: progress.advance(task)))
        progress.update(task, description=f"epochs of all {len(contestants) * len(BASE_LRS)} runs")
    plain, mechanized = runs.values()
    return plain, mechanized


def make_table(plain: list[Run], mechanized: list[Run], epochs: int) -> Table:
    """Return the one table: a row for each base learning rate."""
    table = Table(title=f"Handwritten digits after {epochs} epochs: accuracy on test images")
    for header in ("base lr", "plain AdamW", "mechanized", "learned lr"):
        table.add_column(header, justify="right")
    for p, m in zip(plain, mechanized, strict=True):
        table.add_row(f"{p.base_lr:.0e}", percent(p), percent(m), f"{m.learned_lr:.1e}")
    return table


def make_notes(plain: list[Run], mechanized: list[Run], data: Digits) -> list[str]:
    """Return what the results say, good and bad."""
    best = max(plain, key=lambda run: run.accuracy)
    good_plain, good = ([run for run in runs if run.accuracy >= best.accuracy - CLOSE] for runs in (plain, mechanized))
    return [
        "Learned lr: with this lr and the same schedule, the steps of plain AdamW would sum to the same.",
        f"The best plain AdamW has {percent(best)}, at base lr {best.base_lr:.0e}. Within {CLOSE:.0f} points of it: "
        f"plain AdamW at {base_lrs(good_plain)}; mechanized AdamW at {base_lrs(good)}.",
        f"One seed and one split of the data; one test image is {100 / len(data.test_y):.1f} points.",
    ]


def percent(run: Run) -> str:
    """Return the accuracy of a run in words."""
    return f"{run.accuracy:.1f} %" + ("" if run.finite else " (loss not finite)")


def base_lrs(runs: list[Run]) -> str:
    """Return the base learning rates of some runs in words."""
    return f"{', '.join(f'{run.base_lr:.0e}' for run in runs) or 'none'} ({len(runs)} of {len(BASE_LRS)})"


def draw(plain: list[Run], mechanized: list[Run], path: Path) -> None:
    """Draw accuracy against base learning rate; line style and marker tell the curves apart without colour."""
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    orange, green = "#D55E00", "#009E73"  # from the palette of Okabe and Ito
    styles = (
        (mechanized, "mechanized AdamW", {"color": green, "linestyle": "-", "linewidth": 4, "marker": "^"}),
        (plain, "plain AdamW", {"color": orange, "linestyle": "--", "marker": "s", "markerfacecolor": "none"}),
    )
    for runs, label, style in styles:
        points = [r.base_lr for r in runs], [r.accuracy for r in runs]
        axes.plot(*points, label=label, **{"linewidth": 2, "markersize": 9, **style})
    broken = [run for run in (*plain, *mechanized) if not run.finite]
    if broken:
        points = [r.base_lr for r in broken], [r.accuracy for r in broken]
        axes.plot(*points, "kx", markersize=9, label="loss not finite")
    axes.axhline(CHANCE, color="0.3", linestyle=":", label=f"chance level ({CHANCE:.0f} %)")
    axes.set(xscale="log", xticks=BASE_LRS, ylim=(0, 105), xlabel="base learning rate", ylabel="test accuracy (%)")
    axes.set_title("Handwritten digits: test accuracy at the learning rate you happened to choose")
    axes.grid(alpha=0.3)
    axes.legend(loc="center right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="where the picture goes")
    parser.add_argument("--epochs", type=int, default=30, help="passes over the training images, for each run")
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)

    torch.set_num_threads(1)  # a network this small is slower on more
    console = Console(highlight=False)
    data = load_data()
    runs = train_all(data, args.epochs, console)
    console.print(make_table(*runs, args.epochs))
    for note in make_notes(*runs, data):
        console.print(f"- {note}")
    draw(*runs, args.output)
    console.print(f"Picture: {args.output.resolve()}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
