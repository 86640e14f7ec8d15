"""A small generative adversarial network, with an optimizer for each network, or one for both.

    python -m benchmarks.adversarial --fill docs/limits.md

Eight narrow Gaussians on a circle; generator 8-64-64-2, discriminator 2-64-64-1, batches of 128, 1500 steps of each in
turns, Adam with betas 0.5 and 0.999, a constant lr. A mode counts as found if a sample is within 0.15 of it.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.pages import arguments, markdown_table, origin, print_or_fill
from mechanic_pytorch import mechanize

STEPS, BATCH, SAMPLES = 1500, 128, 2000
NEAR = 0.15
Make = Callable[[Any], torch.optim.Optimizer]
BETAS = (0.5, 0.999)
Adam = torch.optim.Adam
WAYS: dict[str, Make] = {
    "plain Adam, lr 1e-3": lambda params: Adam(params, lr=1e-3, betas=BETAS),
    "plain Adam, lr 3e-3": lambda params: Adam(params, lr=3e-3, betas=BETAS),
    '`s_init="auto"`': lambda params: mechanize(Adam, s_init="auto")(params, lr=1.0, betas=BETAS),
    "`s_init=1e-8`": lambda params: mechanize(Adam, s_init=1e-8)(params, lr=1.0, betas=BETAS),
}


def network(*sizes: int) -> nn.Sequential:
    """Return a perceptron."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers[:-1])


def centres() -> Tensor:
    """Return the eight modes."""
    angles = torch.arange(8) * math.pi / 4
    return torch.stack([angles.cos(), angles.sin()], 1)


def train(make: Make, seed: int, *, together: bool) -> tuple[int, float]:
    """Train; return how many modes were found, and the part of the samples near one."""
    torch.manual_seed(seed)
    generator, discriminator = network(8, 64, 64, 2), network(2, 64, 64, 1)
    networks: Iterable[nn.Module] = (generator, discriminator)
    if together:
        ours = theirs = make([p for each in networks for p in each.parameters()])
    else:
        ours, theirs = (make(each.parameters()) for each in networks)
    modes = centres()
    for _ in range(STEPS):
        real = modes[torch.randint(8, (BATCH,))] + 0.05 * torch.randn(BATCH, 2)
        fake = generator(torch.randn(BATCH, 8))
        theirs.zero_grad()
        (F.softplus(-discriminator(real)).mean() + F.softplus(discriminator(fake.detach())).mean()).backward()
        theirs.step()
        generator.zero_grad()
        F.softplus(-discriminator(fake)).mean().backward()
        if together:
            discriminator.zero_grad()
        ours.step()
    with torch.no_grad():
        distance, mode = torch.cdist(generator(torch.randn(SAMPLES, 8)), modes).min(1)
    near = distance < NEAR
    return len(mode[near].unique()), near.float().mean().item()


def row(way: str, together: bool, seeds: int) -> list[str]:
    """Return a row of the table."""
    modes, parts = zip(*(train(WAYS[way], seed, together=together) for seed in range(seeds)), strict=True)
    return [
        "one for both" if together else "one each",
        way,
        ", ".join(map(str, modes)),
        ", ".join(f"{part:.2f}" for part in parts),
    ]


def main() -> None:
    """Train all."""
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    runs = [(way, together) for together in (False, True) for way in WAYS]
    rows = [row(*run, args.seeds) for run in track(runs, "adversarial")]
    table = markdown_table(["optimizers", "which", "modes found, of 8", "part of the samples near one"], rows)
    print_or_fill(args.fill, "adversarial", {"table": f"{table}\n\n{origin(f'{args.seeds} seeds')}"})


if __name__ == "__main__":
    main()
