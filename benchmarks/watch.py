"""What tells a run that goes wrong from one that does not: the numbers behind the warnings.

    python -m benchmarks.watch --fill docs/design-notes.md

The start: the scale after 500 steps, relative to s_init, and times s_decay, for base learning rates that are too small,
and for gradients that are mostly noise. The end: by how much the scale grows over the second half and over the last
tenth of a cosine schedule of 1500 steps, for runs that end well, and for those that strong weight decay drags along.

One seed, scikit-learn's handwritten digits and a linear regression. Prints two Markdown tables, or writes them between
the marks `<!-- watch: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.pages import arguments, markdown_table, origin, print_or_fill
from benchmarks.shared import cosine, digits, network
from mechanic_pytorch import mechanize

START, END = 500, 1500
ADAMW, SGD = torch.optim.AdamW, torch.optim.SGD
Loss = Callable[[nn.Module], Tensor]


def reading(size: int = 64, noise: float = 0.0) -> Loss:
    """Return the loss on a batch of digits, of whose labels a part is replaced at random."""
    images, labels = digits()

    def loss(model: nn.Module) -> Tensor:
        i = torch.randint(len(labels), (size,))
        y = torch.where(torch.rand(size) < noise, torch.randint(10, (size,)), labels[i])
        return F.cross_entropy(model(images[i]), y)

    return loss


def regression() -> Loss:
    """Return the loss of a linear regression, 256 x 10 with noise 0.1, on a batch of 32."""
    x, plane = torch.randn(256, 10), torch.randn(10, 1)
    y = x @ plane + 0.1 * torch.randn(256, 1)

    def loss(model: nn.Module) -> Tensor:
        i = torch.randint(256, (32,))
        return F.mse_loss(model(x[i]), y[i])

    return loss


def scales(
    make: Callable[[], nn.Module],
    loss: Loss,
    base: Any,
    steps: int,
    lr: float = 1.0,
    s_init: Any = 1e-8,
    **options: Any,
) -> tuple[list[float], float]:
    """Train under a cosine schedule, or for 500 steps at a constant lr; return all scales, and the mean last loss."""
    model = make()
    optimizer = mechanize(base, s_init=s_init)(model.parameters(), lr=lr, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: cosine(t / steps) if steps == END else 1.0)
    seen, losses = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        schedule.step()
        seen.append(float(optimizer.scale))
        losses.append(float(value))
    return seen, sum(losses[-50:]) / 50


def main() -> None:
    """Print both tables, or write them into a page."""
    page = arguments(__doc__).parse_args().fill
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    noisy = {"1 image a batch": (1, 0.0), "4 a batch, 90 % of labels random": (4, 0.9), "1, 80 % random": (1, 0.8)}
    starts: list[tuple[str, Loss, float]] = [("digits", reading(), lr) for lr in (1.0, 1e-2, 1e-4, 1e-6, 1e-8)]
    starts += [(name, reading(*how), 1.0) for name, how in noisy.items()]
    rows = []
    for name, loss, lr in track(starts, "start", transient=True):
        for base in (ADAMW, SGD):
            torch.manual_seed(0)
            seen, last = scales(network, loss, base, START, lr)
            figures = f"{seen[-1] / 1e-8:.0e}", f"{0.01 * seen[-1]:.2g}", f"{last:.2g}"
            rows.append([name, base.__name__, f"{lr:.0e}", *figures])
    made = {"starts": markdown_table(["problem", "base", "lr", "scale / s_init", "s_decay * scale", "loss"], rows)}

    linear, plane = partial(nn.Linear, 64, 10), partial(nn.Linear, 10, 1)
    torch.manual_seed(0)
    line, images = regression(), reading()
    ends: list[tuple[str, Any, Loss, Any, dict[str, Any]]] = [
        ("digits, network", network, images, ADAMW, {}),
        ("digits, network", network, images, SGD, {}),
        ("digits, linear", linear, images, ADAMW, {}),
        ("digits, network, weight_decay=0.1", network, images, ADAMW, {"weight_decay": 0.1}),
        ("digits, network, weight_decay=1", network, images, ADAMW, {"weight_decay": 1.0}),
        ("regression", plane, line, ADAMW, {}),
        ("regression, weight_decay=0.1", plane, line, ADAMW, {"weight_decay": 0.1}),
        ("regression, weight_decay=1", plane, line, ADAMW, {"weight_decay": 1.0}),
    ]
    rows = []
    for name, make, loss, base, options in track(ends, "end", transient=True):
        for s_init in (1e-8, "auto"):
            torch.manual_seed(1)
            seen, last = scales(make, loss, base, END, s_init=s_init, **options)
            figures = (seen[-1] / seen[END // 2], seen[-1] / seen[END * 9 // 10], last)
            rows.append([name, base.__name__, str(s_init), *(f"{figure:.2g}" for figure in figures)])
    made["ends"] = markdown_table(["problem", "base", "s_init", "second half", "last tenth", "loss"], rows)
    made["origin"] = origin("one seed")
    print_or_fill(page, "watch", made)


if __name__ == "__main__":
    main()
