"""The pictures of `docs/how-it-works.md`: what the tuner does in one run, step by step.

    python -m benchmarks.pictures --fill docs/how-it-works.md

scikit-learn's handwritten digits, a 64-32-10 network, AdamW, batches of 64, 600 steps, cosine after a warm-up of a
twentieth, one seed. The tuned learning rate is the one of half decades whose final loss is least.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch.nn import functional as F

from benchmarks.convergence.plan import tuned
from benchmarks.pages import arguments, origin, print_or_fill
from benchmarks.shared import cosine, digits, network
from mechanic_pytorch import mechanize
from mechanic_pytorch.telemetry import ReadOut, Trace

STEPS, RISING = 600, 30
OUTPUT = Path(__file__).parents[1] / "docs" / "how-it-works"


def factor(step: int) -> float:
    """Return by what the schedule multiplies lr."""
    if step < RISING:
        return (step + 1) / RISING
    return cosine((step - RISING) / (STEPS - RISING))


def train(base: Any, lr: float) -> tuple[float, list[ReadOut]]:
    """Train once; return the final loss and, of a mechanized base, what it had learned after each step."""
    images, labels = digits()
    torch.manual_seed(0)
    model = network()
    optimizer = base(model.parameters(), lr=lr)
    trace = Trace(optimizer) if base is not torch.optim.AdamW else None
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for _ in range(STEPS):
        chosen = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float(F.cross_entropy(model(images), labels)), trace.read() if trace else []


def panels(height: float, rows: int = 1) -> tuple[Figure, Any]:
    """Return a figure that can be read on a phone, and its axes, one above the other."""
    figure = Figure(figsize=(5.6, height), dpi=130, layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True)
    for axis in [axes] if rows == 1 else axes:
        axis.grid(alpha=0.3)
    return figure, axes


def learning_rates(runs: dict[str, list[ReadOut]], best: float) -> Figure:
    """Draw the effective learning rate over the steps, and the tuned one under its schedule."""
    figure, axis = panels(3.6)
    for name, rows in runs.items():
        points = [(row.steps, row.effective_lr[0]) for row in rows if row.effective_lr[0] > 0]
        axis.plot(*zip(*points, strict=True), label=name)
    planned = [best * factor(step) for step in range(STEPS)]
    axis.plot(range(1, STEPS + 1), planned, "--", color="0.4", label="tuned by a grid")
    axis.set(xscale="log", yscale="log", ylim=(1e-10, 1), xlabel="step", ylabel="lr * scale")
    axis.legend(loc="lower right")
    return figure


def copies(rows: list[ReadOut], betas: tuple[float, ...]) -> Figure:
    """Draw the scale of each copy of the tuner, one on top of the other, and the reward of each."""
    figure, (above, below) = panels(5.4, rows=2)
    steps = [row.steps for row in rows]
    names = [f"β = {beta:g}" for beta in betas]
    above.stackplot(steps, list(zip(*(row.scales[0] for row in rows), strict=True)), labels=names)
    above.set(ylabel="scale s of each copy, stacked")
    above.legend(fontsize=8, loc="upper left")
    for name, rewards in zip(names, zip(*(row.reward[0] for row in rows), strict=True), strict=True):
        below.plot(steps, rewards, label=name)
    below.set(xlabel="step", ylabel="reward r of each copy", xlim=(0, STEPS))
    return figure


def main() -> None:
    """Draw both, and write how into the page."""
    page = arguments(__doc__).parse_args().fill
    torch.set_num_threads(1)
    adamw = torch.optim.AdamW
    auto, number = mechanize(adamw), mechanize(adamw, s_init=1e-8)
    _, best = tuned(lambda lr: train(adamw, lr), centre=-4, reach=4)
    runs = {'s_init="auto"': train(auto, 1.0)[1], "s_init=1e-8": train(number, 1.0)[1]}
    OUTPUT.mkdir(exist_ok=True)
    figures = {
        "learning-rates": learning_rates(runs, best),
        "copies": copies(runs["s_init=1e-8"], number.mechanic_config.betas),
    }
    for name, figure in figures.items():
        file = OUTPUT / f"{name}.png"
        figure.savefig(file)
        Image.open(file).quantize(64).save(file, optimize=True)  # a third of the bytes
    about = "handwritten digits of scikit-learn, AdamW, 600 steps, cosine after a warm-up, one seed"
    print_or_fill(page, "pictures", {"origin": origin(about)})


if __name__ == "__main__":
    main()
