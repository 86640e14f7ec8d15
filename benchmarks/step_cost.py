"""What a mechanized step costs beside a plain one: time, operations, host reads, memory.

    pip install --no-deps --target peers mechanic-pytorch==0.0.1
    python benchmarks/step_cost.py --peers peers --json cost.json --plot cost.png

Each method is run in turn with its plain base, on parameters and gradients of the same shapes, in one process; a time
is the median over rounds of the ratio of two neighbours. Operations, host reads and bytes are counted, not measured.
Before a time is reported, all kernels are compared with the reference.

Version 0.0.1 has the same import name, so it is loaded from a directory of its own. The other peers are those of the
packages dog-optimizer and pytorch-optimizer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dog
import pytorch_optimizer as po
import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from counting import Operations, state_bytes, transient_bytes
from mechanic_pytorch import mechanize
from mechanic_pytorch.kernels import KERNELS, missing_for_triton
from start import load_old

WIDTH, LAYERS = 512, 12
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "GPT, 42M in 50 tensors": [
        (8192, WIDTH),
        (1024, WIDTH),
        *[shape for _ in range(LAYERS) for shape in [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH)]],
        *[(WIDTH, 4 * WIDTH)] * LAYERS,
    ],
    "ResNet for CIFAR, 0.47M in 98 small tensors": [
        (16, 3, 3, 3),
        (16,),
        (16,),
        *[shape for _ in range(10) for shape in [(16, 16, 3, 3), (16,), (16,)]],
        *[shape for _ in range(10) for shape in [(32, 32, 3, 3), (32,), (32,)]],
        *[shape for _ in range(10) for shape in [(64, 64, 3, 3), (64,), (64,)]],
        *[(32, 16, 1, 1), (64, 32, 1, 1), (10, 64), (64,), (10,)],
    ],
    "LoRA, 1.8M in 300 tiny tensors": [(8, 768), (768, 8)] * 150,
    "one tensor of 100M": [(10_000, 10_000)],
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass
class Method:
    """An optimizer to measure, and the plain one that it is measured against."""

    name: str
    build: Build
    plain: Build
    kernel: str | None = None


def kernels(device: str) -> list[str]:
    """Return the names of the kernels that run on a device."""
    return [*KERNELS] if missing_for_triton(torch.device(device)) else sorted({*KERNELS, "triton"})


def methods(peers: Path, device: str) -> list[Method]:
    """Return the rows of the table."""

    def plain(base: Any, **options: Any) -> Build:
        return lambda params: base(params, lr=1e-3, **options)

    def ours(base: Any, **options: Any) -> Build:
        return lambda params: mechanize(base)(params, lr=1.0, **options)

    adamw, sgd = torch.optim.AdamW, torch.optim.SGD
    fused, foreach, momentum = (
        plain(adamw, fused=True),
        plain(adamw, foreach=True),
        plain(sgd, fused=True, momentum=0.9),
    )
    old = load_old(peers)
    return [
        Method("fused AdamW, mechanized", ours(adamw, fused=True), fused),
        *[Method(f"… kernel {name}", ours(adamw, fused=True), fused, name) for name in kernels(device)],
        Method("foreach AdamW, mechanized", ours(adamw, foreach=True), foreach),
        Method("fused SGD with momentum, mechanized", ours(sgd, fused=True, momentum=0.9), momentum),
        Method("fused AdamW, mechanized by 0.0.1", lambda params: old(adamw)(params, lr=1.0, fused=True), fused),
        Method("Prodigy", lambda params: po.Prodigy(params, lr=1.0), fused),
        Method("D-Adaptation, Adam", lambda params: po.DAdaptAdam(params, lr=1.0), fused),
        Method("DoG", lambda params: dog.DoG(params, lr=1.0), momentum),
        Method("LDoG", lambda params: dog.LDoG(params, lr=1.0), momentum),
        Method("Schedule-Free AdamW", lambda params: po.ScheduleFreeAdamW(params, lr=1e-3), fused),
        Method("TRAC around fused AdamW", lambda params: po.TRAC(fused(params)), fused),
        Method("foreach AdamW, plain", foreach, fused),
    ]


def parameters(shapes: Iterable[tuple[int, ...]], dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    """Return parameters with gradients."""
    torch.manual_seed(0)
    params = [nn.Parameter((0.02 * torch.randn(shape)).to(device, dtype)) for shape in shapes]
    for p in params:
        p.grad = (1e-3 * torch.randn(p.shape)).to(device, dtype)
    return params


@contextmanager
def forced(kernel: str | None) -> Any:
    """Let the package use this kernel, or choose one if None."""
    before = os.environ.pop("MECHANIC_KERNEL", None)
    if kernel is not None:
        os.environ["MECHANIC_KERNEL"] = kernel
    try:
        yield
    finally:
        os.environ.pop("MECHANIC_KERNEL", None)
        if before is not None:
            os.environ["MECHANIC_KERNEL"] = before


def check_kernels(device: str) -> None:
    """Train with each kernel and compare the weights with those of the reference."""
    shapes = [(300, 1000), (64, 64, 3, 3), (64,), (7,)]
    for dtype in DTYPES.values():
        weights = {}
        for kernel in kernels(device):
            params = parameters(shapes, dtype, device)
            optimizer = mechanize(torch.optim.AdamW, s_init=1e-3)(params, lr=1.0, fused=True)
            with forced(kernel):
                for _ in range(10):
                    optimizer.step()
            weights[kernel] = params
        for kernel, params in weights.items():
            for p, q in zip(params, weights["for_loop"], strict=True):
                torch.testing.assert_close(p, q, msg=lambda text, kernel=kernel: f"kernel {kernel}: {text}")


def seconds(call: Callable[[], Any], device: str) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def cost(method: Method, shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str, rounds: int) -> dict[str, Any]:
    """Return one row."""
    base_params, params = (parameters(shapes, dtype, device) for _ in range(2))
    base, optimizer = method.plain(base_params), method.build(params)
    weights = sum(p.numel() for p in params)
    for module in (base, optimizer):
        getattr(module, "train", lambda: None)()  # Schedule-Free wants to be told
    with forced(method.kernel):
        for _ in range(3):  # state is created, and ours looks whether the base moves
            base.step()
            optimizer.step()
        ratios = [seconds(optimizer.step, device) / seconds(base.step, device) for _ in range(rounds)]
        with Operations() as operations:
            optimizer.step()
        return {
            "method": method.name,
            "time": statistics.median(ratios),
            "operations": sum(operations.count.values()),
            "host reads": operations.host_reads,
            "kept bytes per weight": state_bytes(optimizer) / weights,
            "transient bytes per weight": transient_bytes(optimizer.step, device) / weights,
        }


def bandwidth(device: str, rounds: int) -> dict[str, float]:
    """Return how fast memory moves, in GB/s: in a copy, and in a step of fused AdamW, which moves 7 words a weight."""
    (p,) = parameters([(10_000, 10_000)], torch.float32, device)
    x, y = torch.empty_like(p), torch.empty_like(p)
    base = torch.optim.AdamW([p], lr=1e-3, fused=True)
    base.step()
    calls = {"a copy": (2, lambda: x.copy_(y)), "fused AdamW": (7, base.step)}
    return {
        name: words * p.nbytes / statistics.median(seconds(call, device) for _ in range(rounds)) / 1e9
        for name, (words, call) in calls.items()
    }


class GPT(nn.Module):
    """A small language model of 3.4M weights."""

    def __init__(self, characters: int = 96, width: int = 256, layers: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, characters)

    def loss(self) -> Tensor:
        """Return the loss on some batch of 8 texts of 128 characters."""
        text = torch.randint(96, (8, 129), device=self.head.weight.device)
        mask = nn.Transformer.generate_square_subsequent_mask(128, device=text.device)
        logits = self.head(self.layers(self.embedding(text[:, :-1]), mask, is_causal=True))
        return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


class CNN(nn.Module):
    """A small convolutional network of 0.3M weights."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 32, 64, 128]
        blocks = [
            [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
            for a, b in itertools.pairwise(widths)
        ]
        self.layers = nn.Sequential(*[layer for block in blocks for layer in block], nn.Flatten())
        self.head = nn.Linear(128 * 16, 100)

    def loss(self) -> Tensor:
        """Return the loss on some batch of 64 images."""
        device = self.head.weight.device
        images, labels = torch.randn(64, 3, 32, 32, device=device), torch.randint(100, (64,), device=device)
        return F.cross_entropy(self.head(self.layers(images)), labels)


def training_ratio(model: type[GPT | CNN], device: str, rounds: int) -> float:
    """Return how much longer a whole training step takes when fused AdamW is mechanized."""
    steps = []
    for cls, lr in ((torch.optim.AdamW, 1e-3), (mechanize(torch.optim.AdamW), 1.0)):
        torch.manual_seed(0)
        network = model().to(device)
        optimizer = cls(network.parameters(), lr=lr, fused=True)

        def step(network: Any = network, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            network.loss().backward()
            optimizer.step()

        steps.append(step)
    for _ in range(3):
        steps[0](), steps[1]()
    return statistics.median(seconds(steps[1], device) / seconds(steps[0], device) for _ in range(rounds))


def plot(tables: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw the times, one panel for each shape."""
    figure = Figure(figsize=(11, 2.6 * ((len(tables) + 1) // 2) + 0.6), layout="constrained")
    axes = list(figure.subplots((len(tables) + 1) // 2, 2, squeeze=False).flat)
    for (title, rows), axis in zip(tables.items(), axes, strict=False):
        names = [row["method"].partition(" (fails")[0] for row in rows][::-1]
        times = [row.get("time", 0.0) for row in rows][::-1]
        axis.barh(names, times, color=["C0" if "mechanized" in n and "0.0.1" not in n else "0.7" for n in names])
        labels = [f"{row['time']:.1f}" if "time" in row else "fails" for row in rows][::-1]
        axis.bar_label(axis.containers[0], labels, padding=2, fontsize=7)
        axis.axvline(1, color="0.3", linewidth=0.8)
        axis.set_title(title, fontsize=8, loc="right")
        axis.tick_params(labelsize=7)
        axis.margins(x=0.12)
        axis.set_xlabel("time of a step / plain base", fontsize=8)
    for axis in axes[len(tables) :]:
        axis.remove()
    figure.savefig(path, dpi=100)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table."""
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", f"|---|{'---|' * (len(names) - 1)}"]
    for row in rows:
        values = [row.get(name, "") for name in names]
        cells = [f"{value:.2f}" if isinstance(value, float) else str(value) for value in values]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine(device: str) -> str:
    """Return what the figures were measured on."""
    name = torch.cuda.get_device_name() if device != "cpu" else f"{platform.machine()} CPU"
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=Path(".venv/peers"), help="directory that holds 0.0.1")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), help="beginnings of names: GPT ResNet LoRA one")
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--plot", type=Path, help="draw the times there")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="pytorch_optimizer")
    warnings.filterwarnings("ignore", "Mechanized.* lost in rounding")

    check_kernels(arguments.device)
    jobs = [
        (f"{shape}, {dtype}", method, SHAPES[shape], DTYPES[dtype])
        for shape in SHAPES
        if shape.startswith(tuple(arguments.shapes))
        for dtype in arguments.dtypes
        for method in methods(arguments.peers, arguments.device)
    ]
    tables: dict[str, list[dict[str, Any]]] = {}
    for title, method, shapes, dtype in track(jobs, transient=True):
        try:
            row = cost(method, shapes, dtype, arguments.device, arguments.rounds)
        except RuntimeError as error:
            if "mechanized" in method.name and "0.0.1" not in method.name:
                raise
            row = {"method": f"{method.name} (fails: {str(error).splitlines()[0]})"}
        tables.setdefault(title, []).append(row)
    training = {
        model.__name__: training_ratio(model, arguments.device, 3 * arguments.rounds)  # type: ignore[arg-type]
        for model in (GPT, CNN)
    }

    for title, rows in tables.items():
        print(f"\n### {title}\n\n{markdown(rows)}")
    print("\nWhole training step, mechanized / plain fused AdamW:", end=" ")
    print(", ".join(f"{name} {ratio:.2f}" for name, ratio in training.items()))
    speeds = bandwidth(arguments.device, arguments.rounds)
    print("\nMemory moves at", ", ".join(f"{speed:.0f} GB/s in {name}" for name, speed in speeds.items()))
    print(f"\n{machine(arguments.device)}; median of {arguments.rounds} rounds")
    if arguments.json:
        figures = {"machine": machine(arguments.device), "tables": tables, "training": training, "GB/s": speeds}
        arguments.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    if arguments.plot:
        plot(tables, arguments.plot)


if __name__ == "__main__":
    main()
