"""May Mechanic's sum of updates, the float32 "delta", be kept in fewer bits? What training loses when it is rounded.

    MECHANIC_DATA=data python benchmarks/delta_precision.py

After every step each `optimizer.state[p]["mechanic_delta"]` is rounded in place to what the storage could hold; the
package is unchanged. All storages of a seed start from the same weights, see the same batches, and are compared seed by
seed. Training amplifies any difference: "float32 and noise" changes delta by one part in a million per step, and what
is no larger than its changes means nothing. Default options, base lr 1.0, data: scikit-learn's digits (64-128-10
network), and tiny Shakespeare, from `$MECHANIC_DATA/tinyshakespeare/input.txt` or downloaded (transformer on
characters, 2 layers, width 64). The last table sums random updates, far more of them, and trains nothing. Needs torchao
for the code book, and about a quarter of an hour on one core.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import time
from functools import partial
from pathlib import Path
from statistics import geometric_mean, mean, stdev
from typing import Any

import pooch
import torch
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torchao.optim.subclass_8bit import OptimState8bit

from mechanic_pytorch import mechanize

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
BASES = {"AdamW": mechanize(torch.optim.AdamW), "SGD": partial(mechanize(torch.optim.SGD), momentum=0.9)}
TASKS = [  # data, base, schedule, steps, batch, seeds; 21 steps are an epoch of the digits
    *[("digits", base, schedule, 630, 64, 8) for base in BASES for schedule in ("constant", "cosine")],
    ("digits", "AdamW", "constant", 6300, 64, 3),
    ("Shakespeare", "AdamW", "cosine", 400, 16, 5),
]
BLOCK, CONTEXT, WIDTH, LENGTHS, STREAM = 256, 64, 64, (1_000, 10_000, 100_000), 1024


def bfloat16(x: Tensor, generator: torch.Generator, stochastic: bool) -> Tensor:
    """Return x rounded to bfloat16, to nearest or up or down by chance so that the mean is x."""
    if not stochastic:
        return x.bfloat16().float()
    noise = torch.randint(1 << 16, x.shape, dtype=torch.int32, generator=generator)
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)


def linear8(x: Tensor, generator: torch.Generator, stochastic: bool) -> Tensor:
    """Return x as blocks of integers from -127 to 127, times a float32 number each."""
    blocks = F.pad(x.flatten(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    unit = blocks.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    shift = torch.rand(blocks.shape, generator=generator) if stochastic else 0.5
    return ((blocks / unit + shift).floor().clamp(-127, 127) * unit).flatten()[: x.numel()].view_as(x)


def dynamic8(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return x as torchao's 8-bit optimizers store it: to the nearest of 256 unevenly spaced multiples of a maximum."""
    padded = F.pad(x.flatten(), (0, -x.numel() % BLOCK))
    return OptimState8bit.zeros(padded.shape, True, BLOCK).copy_(padded).dequantize()[: x.numel()].view_as(x)


STORAGES: dict[str, Any] = {
    "float32": lambda x, generator: x,
    "float32 and noise": lambda x, generator: x * (1 + 1e-6 * torch.randn(x.shape, generator=generator)),
    "bfloat16, nearest": partial(bfloat16, stochastic=False),
    "bfloat16, stochastic": partial(bfloat16, stochastic=True),
    "8 bits linear, nearest": partial(linear8, stochastic=False),
    "8 bits linear, stochastic": partial(linear8, stochastic=True),
    "8 bits code book, nearest": dynamic8,
}


class Transformer(nn.Module):
    """A small model of the next of 65 characters."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(65, WIDTH), nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(WIDTH, 65)

    def forward(self, text: Tensor) -> Tensor:
        """Return logits, shape (batch, characters, time)."""
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        return self.head(self.layers(self.token(text) + self.position, mask, is_causal=True)).transpose(1, 2)


def load(name: str) -> list[Tensor]:
    """Return inputs to train and to test on, and the targets of both."""
    if name == "digits":
        images, labels = load_digits(return_X_y=True)
        parts = train_test_split(images.astype("float32") / 16, labels, test_size=0.25, stratify=labels, random_state=0)
        return [torch.from_numpy(part) for part in parts]
    folder = Path(os.environ.get("MECHANIC_DATA") or pooch.os_cache("mechanic-pytorch"), "tinyshakespeare")
    text = Path(pooch.retrieve(URL, SHA256, "input.txt", folder, progressbar=True)).read_text(encoding="utf-8")
    characters = sorted(set(text))
    data = torch.tensor([characters.index(c) for c in text])
    x, y = (part[: len(part) // CONTEXT * CONTEXT].view(-1, CONTEXT) for part in (data[:-1], data[1:]))
    cut = len(x) * 9 // 10
    return [x[:cut], x[cut::7], y[:cut], y[cut::7]]


def train(task: tuple[str, str, str, int, int, int], storage: str, seed: int, data: list[Tensor]) -> list[float]:
    """Train once; return test accuracy in percent, test loss, learned scale, relative error of delta."""
    name, base, schedule, steps, batch, _ = task
    x, x_test, y, y_test = data
    torch.manual_seed(seed)
    model = Transformer() if name == "Shakespeare" else nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    batches, chance = (torch.Generator().manual_seed(seed + offset) for offset in (0, 1000))
    optimizer = BASES[base](model.parameters(), lr=1.0)
    factor = {"constant": lambda t: 1.0, "cosine": lambda t: (1 + math.cos(math.pi * t / steps)) / 2}[schedule]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    errors = {p: torch.zeros_like(p, requires_grad=False) for p in model.parameters()}

    def store(*_: Any) -> None:
        for p, error in errors.items():
            delta = optimizer.state[p]["mechanic_delta"]
            rounded = STORAGES[storage](delta, chance)
            error += rounded - delta
            delta.copy_(rounded)

    optimizer.register_step_post_hook(store)
    order: list[Tensor] = []
    for _ in range(steps):
        order = order or list(torch.randperm(len(x), generator=batches).split(batch)[: len(x) // batch])
        chosen = order.pop()
        model.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        logits = model(x_test)
    accuracy, loss = 100 * (logits.argmax(1) == y_test).float().mean(), F.cross_entropy(logits, y_test)
    error = torch.cat([error.flatten() for error in errors.values()])
    delta = torch.cat([optimizer.state[p]["mechanic_delta"].flatten() for p in errors])
    return [float(value) for value in (accuracy, loss, optimizer.scale, error.norm() / (delta - error).norm())]


def row(runs: list[list[float]], exact: list[list[float]]) -> list[str]:
    """Return what the runs came to, beside the same seeds in float32."""
    cells, n = [], len(runs)
    for i, digit in ((0, 2), (1, 4)):
        values, changes = [r[i] for r in runs], [r[i] - e[i] for r, e in zip(runs, exact, strict=True)]
        for of, form, spread in ((values, "", stdev(values)), (changes, "+", stdev(changes) / n**0.5)):
            cells.append(f"{mean(of):{form}.{digit}f} ± {spread:.{digit}f}")
        cells.append(f"{max(changes, key=abs):+.{digit}f}")
    ratios = [r[2] / e[2] for r, e in zip(runs, exact, strict=True)]
    cells.append(f"{geometric_mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return [*cells, f"{mean(r[3] for r in runs):.4f}"]


def sums(storage: str) -> list[str]:
    """Sum random updates of deviation 1, with and without a mean of each weight's own; return the relative errors."""
    generator, chance = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    drift = torch.tensor([[0.1], [0.0]]) * torch.randn(2, STREAM, generator=generator)
    kept, exact, errors = torch.zeros(2, STREAM), torch.zeros(2, STREAM, dtype=torch.float64), []
    for step in range(1, LENGTHS[-1] + 1):
        update = drift + torch.randn(2, STREAM, generator=generator)
        exact += update
        kept = STORAGES[storage](kept + update, chance)
        if step in LENGTHS:
            errors.append((kept - exact).norm(dim=1) / exact.norm(dim=1))
    return [f"{error:.4f}" for error in torch.stack(errors, 1).flatten().tolist()]


def show(title: str, names: list[str], rows: dict[str, list[str]]) -> None:
    """Print a Markdown table."""
    print(f"\n### {title}\n\n| storage | {' | '.join(names)} |\n|{'---|' * (1 + len(names))}")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    """Run everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, help="at least 2, for every task; default: 8, 3 or 5")
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    data = {name: load(name) for name in ("digits", "Shakespeare")}
    results: dict[tuple[Any, ...], dict[str, Any]] = {task: {storage: [] for storage in STORAGES} for task in TASKS}
    jobs = [(task, storage, seed) for task in TASKS for seed in range(seeds or task[-1]) for storage in STORAGES]
    for task, storage, seed in track(jobs, transient=True):
        results[task][storage].append(train(task, storage, seed, data[task[0]]))
    long = {storage: sums(storage) for storage in track(STORAGES, "Sums", transient=True)}

    names = ["accuracy, %", "change", "largest", "loss", "change", "largest", "scale / float32", "error of delta"]
    for (name, base, schedule, steps, batch, _), runs in results.items():
        title = f"{name}, {base}, {schedule}, {steps} steps of {batch}, {len(runs['float32'])} seeds"
        show(title, names, {storage: row(of, runs["float32"]) for storage, of in runs.items()})
    names = [f"{kind}, {length:,} steps" for kind in ("drift", "no drift") for length in LENGTHS]
    show(f"|error| / |sum| of random updates, {STREAM} weights", names, long)
    print("\nOn test data. ±: deviation of results, standard error of changes; largest: of either sign.")
    print(f"{time.process_time():.0f} CPU seconds, one thread, torch {torch.__version__}, {platform.machine()} CPU")


if __name__ == "__main__":
    main()
