"""May Mechanic's sum of updates, the float32 "delta", be kept in fewer bits? What training loses when it is rounded.

    MECHANIC_DATA=data python -m benchmarks.delta_precision --fill docs/design-notes.md

After every step each `optimizer.state[p]["mechanic_delta"]` is rounded in place to what the storage could hold; the
package is unchanged. All storages of a seed start from the same weights, see the same batches, and are compared seed by
seed. Training amplifies any difference: "float32 and noise" changes delta by one part in a million per step, and what
is no larger than its changes means nothing. Default options, base lr 1.0, data: scikit-learn's digits (64-128-10
network), and tiny Shakespeare (transformer on characters, 2 layers, width 64). The last table sums random updates, far
more of them, and trains nothing. Needs torchao for the code book, and about a quarter of an hour on one core.

Prints a table for each task, that of sums and a summary, or writes the summary between the marks
`<!-- delta precision: summary -->` and `<!-- end -->`.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from statistics import geometric_mean, mean, stdev
from typing import Any

import torch
from rich.progress import track
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F
from torchao.optim.subclass_8bit import OptimState8bit

from benchmarks.convergence import data
from benchmarks.convergence.tasks import CONTEXT, Transformer
from benchmarks.pages import arguments, markdown_table, origin, print_or_fill
from benchmarks.shared import cosine, digits, network
from mechanic_pytorch import mechanize

BASES = {
    "AdamW": mechanize(torch.optim.AdamW, s_init=1e-8),
    "SGD": partial(mechanize(torch.optim.SGD, s_init=1e-8), momentum=0.9),
}
TASKS = [  # data, base, schedule, steps, batch, seeds; 21 steps are an epoch of the digits
    *[("digits", base, schedule, 630, 64, 8) for base in BASES for schedule in ("constant", "cosine")],
    ("digits", "AdamW", "constant", 6300, 64, 3),
    ("Shakespeare", "AdamW", "cosine", 400, 16, 5),
]
TEXT = TASKS[-1]
SHORT = [task for task in TASKS if task[0] == "digits" and task[3] == 630]
BLOCK, LENGTHS, STREAM = 256, (1_000, 10_000, 100_000), 1024


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


def transformer() -> Transformer:
    """Return a small model of the next character, without a norm before its last layer."""
    model = Transformer()
    model.head = model.head[1]
    return model


def load(name: str) -> list[Tensor]:
    """Return inputs to train and to test on, and the targets of both."""
    if name == "digits":
        images, labels = (part.numpy() for part in digits())
        parts = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
        return [torch.from_numpy(part) for part in parts]
    x, y, x_test, y_test = data.shakespeare(CONTEXT)
    return [x, x_test[::7], y, y_test[::7]]


def train(task: tuple[str, str, str, int, int, int], storage: str, seed: int, parts: list[Tensor]) -> list[float]:
    """Train once; return test accuracy in percent, test loss, learned scale, relative error of delta."""
    name, base, schedule, steps, batch, _ = task
    x, x_test, y, y_test = parts
    torch.manual_seed(seed)
    model = transformer() if name == "Shakespeare" else network(128)
    batches, chance = (torch.Generator().manual_seed(seed + offset) for offset in (0, 1000))
    optimizer = BASES[base](model.parameters(), lr=1.0)
    factor = {"constant": lambda t: 1.0, "cosine": lambda t: cosine(t / steps)}[schedule]
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


Runs = list[list[float]]  # of one storage, a seed each


def change(runs: Runs, exact: Runs, i: int, digits: int) -> str:
    """Return the mean difference from the same seeds in float32, with its standard error."""
    changes = [r[i] - e[i] for r, e in zip(runs, exact, strict=True)]
    return f"{mean(changes):+.{digits}f} ± {stdev(changes) / len(runs) ** 0.5:.{digits}f}"


def scales(runs: Runs, exact: Runs) -> list[float]:
    """Return the learned scales, relative to those of the same seeds in float32."""
    return [r[2] / e[2] for r, e in zip(runs, exact, strict=True)]


def row(runs: Runs, exact: Runs) -> list[str]:
    """Return what the runs came to, beside the same seeds in float32."""
    cells, ratios = [], scales(runs, exact)
    for i, digit in ((0, 2), (1, 4)):
        values = [r[i] for r in runs]
        largest = max((r[i] - e[i] for r, e in zip(runs, exact, strict=True)), key=abs)
        cells += [f"{mean(values):.{digit}f} ± {stdev(values):.{digit}f}", change(runs, exact, i, digit)]
        cells += [f"{largest:+.{digit}f}"]
    cells.append(f"{geometric_mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return [*cells, f"{mean(r[3] for r in runs):.4f}"]


def summary(results: dict[tuple[Any, ...], dict[str, Runs]], long: dict[str, list[float]]) -> str:
    """Return a row for each storage: loss on text, scales on the digits, errors of sums without drift."""
    rows, text = [], results[TEXT]
    for storage, errors in long.items():
        ratios = [ratio for task in SHORT for ratio in scales(results[task][storage], results[task]["float32"])]
        exact = storage == "float32"
        rows.append(
            [
                storage,
                f"{mean(r[1] for r in text[storage]):.3f}" if exact else change(text[storage], text["float32"], 1, 3),
                "1.00" if exact else f"{min(ratios):.2f} to {max(ratios):.2f}",
                " / ".join(f"{error:.2g}" for error in errors[len(LENGTHS) :]),
            ]
        )
    after = " / ".join(f"{length:.0e}" for length in LENGTHS)
    head = [
        "Δ stored in", "loss, tiny Shakespeare, against float32", "learned scale, single runs",
        f"error of a random sum after {after} steps",
    ]  # fmt: skip
    return markdown_table(head, rows)


def sums(storage: str) -> list[float]:
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
    return torch.stack(errors, 1).flatten().tolist()


def main() -> None:
    """Print the tables, or write the summary into a page."""
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, help="at least 2, for every task; default: 8, 3 or 5")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = {name: load(name) for name in ("digits", "Shakespeare")}
    results: dict[tuple[Any, ...], dict[str, Runs]] = {task: {storage: [] for storage in STORAGES} for task in TASKS}
    jobs = [(task, seed) for task in TASKS for seed in range(options.seeds or task[-1])]
    for (task, seed), storage in track([*product(jobs, STORAGES)], transient=True):
        results[task][storage].append(train(task, storage, seed, parts[task[0]]))
    long = {storage: sums(storage) for storage in track(STORAGES, "Sums", transient=True)}

    made = {"about": "On test data. ±: deviation of results, standard error of changes; largest: of either sign."}
    names = ["accuracy, %", "change", "largest", "loss", "change", "largest", "scale / float32", "error of delta"]
    for (name, base, schedule, steps, batch, _), runs in results.items():
        title = f"{name}, {base}, {schedule}, {steps} steps of {batch}, {len(runs['float32'])} seeds"
        rows = [[storage, *row(of, runs["float32"])] for storage, of in runs.items()]
        made[title] = f"### {title}\n\n{markdown_table(['storage', *names], rows)}"
    names = [f"{kind}, {length:,} steps" for kind in ("drift", "no drift") for length in LENGTHS]
    rows = [[storage, *(f"{error:.4f}" for error in errors)] for storage, errors in long.items()]
    made["sums"] = f"### |error| / |sum| of random updates\n\n{markdown_table(['storage', *names], rows)}"
    small = origin("loss ± standard error, learned scale from smallest to largest")
    made["summary"] = f"{summary(results, long)}\n\n{small}"
    print_or_fill(options.fill, "delta precision", made)


if __name__ == "__main__":
    main()
