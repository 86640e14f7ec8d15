r"""What a mechanized step costs beside a plain one: time, operations, host reads, memory.

    pip install --no-deps --target peers mechanic-pytorch==0.0.1
    python -m benchmarks.step_cost --peers peers --json benchmarks/step_cost_cpu.json --fill docs/speed.md \
        --plot docs/step_cost.png

Each method is run in turn with its plain base, on parameters and gradients of the same shapes, in one process; a time
is the median over rounds of the ratio of two neighbours. On a GPU it is how long the device is busy, with all work
queued before it begins; how long the host is, which queues it, has a table of its own. Operations, host reads and
bytes are counted, not measured. Before a time is reported, all kernels are compared with the reference.

Version 0.0.1 has the same import name, so it is loaded from a directory of its own. The other peers are those of the
packages dog-optimizer and pytorch-optimizer; without these, their rows are left out.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.counting import Operations, state_bytes, transient_bytes
from benchmarks.pages import arguments, command, markdown_table, print_or_fill, setting
from benchmarks.start import load_old
from mechanic_pytorch import mechanize
from mechanic_pytorch.kernels import KERNELS, missing_for_triton
from mechanic_pytorch.kernels.arguments import Scales
from mechanic_pytorch.kernels.rule import Rule

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
    "tiny, 0.1M in 6 tensors": [(128, 640), (128,), (128, 128), (128,), (10, 128), (10,)],
    "one tensor of 100M": [(10_000, 10_000)],
}
WIDE = 768
BLOCK = [(WIDE,)] * 2 + [(3 * WIDE, WIDE), (3 * WIDE,), (WIDE, WIDE), (WIDE,)] + [(WIDE,)] * 2
ON_GPU: dict[str, list[tuple[int, ...]]] = {
    "GPT-2, 124M in 148 tensors": [
        (50304, WIDE),
        (1024, WIDE),
        *[shape for _ in range(12) for shape in [*BLOCK, (4 * WIDE, WIDE), (4 * WIDE,), (WIDE, 4 * WIDE), (WIDE,)]],
        *[(WIDE,)] * 2,
    ],
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
    if device == "cpu":
        return [*KERNELS]
    return ["foreach", "for_loop"] if missing_for_triton(torch.device(device)) else ["triton", "foreach", "for_loop"]


class BlackBox(torch.optim.AdamW):
    """AdamW, of which nothing is known: its step is called, and no pass is saved."""


def methods(peers: Path, device: str) -> list[Method]:
    """Return the rows of the table."""

    def plain(base: Any, **options: Any) -> Build:
        return lambda params: base(params, lr=1e-3, **options)

    def ours(base: Any, s_init: Any = 1e-8, **options: Any) -> Build:
        return lambda params: mechanize(base, s_init=s_init)(params, lr=1.0, **options)

    adamw, sgd = torch.optim.AdamW, torch.optim.SGD
    fused, foreach = plain(adamw, fused=True), plain(adamw, foreach=True)
    momentum = plain(sgd, fused=True, momentum=0.9)
    old = load_old(peers)(adamw)
    others = [Method("fused AdamW, mechanized by 0.0.1", lambda params: old(params, lr=1.0, fused=True), fused)]
    try:
        import dog
        import pytorch_optimizer as po
    except ImportError:
        print("The packages dog-optimizer and pytorch-optimizer are not both here: no rows for other tuners.")
    else:
        others += [
            Method("Prodigy", lambda params: po.Prodigy(params, lr=1.0), fused),
            Method("D-Adaptation, Adam", lambda params: po.DAdaptAdam(params, lr=1.0), fused),
            Method("DoG", lambda params: dog.DoG(params, lr=1.0), momentum),
            Method("LDoG", lambda params: dog.LDoG(params, lr=1.0), momentum),
            Method("Schedule-Free AdamW", lambda params: po.ScheduleFreeAdamW(params, lr=1e-3), fused),
            Method("TRAC around fused AdamW", lambda params: po.TRAC(fused(params)), fused),
        ]
    return [
        Method("fused AdamW, mechanized", ours(adamw, fused=True), fused),
        Method("the same, auto", ours(adamw, "auto", fused=True), fused),
        Method("fused AdamW as a black box, mechanized", ours(BlackBox, fused=True), fused),
        Method("the same black box, auto", ours(BlackBox, "auto", fused=True), fused),
        *[Method(f"… kernel {name}", ours(adamw, fused=True), fused, name) for name in kernels(device)],
        Method("AdamW as torch chooses, mechanized", ours(adamw), plain(adamw)),
        Method("foreach AdamW, mechanized", ours(adamw, foreach=True), foreach),
        Method("fused SGD with momentum, mechanized", ours(sgd, fused=True, momentum=0.9), momentum),
        *others,
        Method("foreach AdamW, plain", foreach, fused),
    ]


def parameters(shapes: Iterable[tuple[int, ...]], dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    """Return parameters with gradients."""
    torch.manual_seed(0)
    params = [nn.Parameter((0.02 * torch.randn(shape, device=device)).to(dtype)) for shape in shapes]
    for p in params:
        p.grad = (1e-3 * torch.randn(p.shape, device=device)).to(dtype)
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


def seconds(call: Callable[[], Any], device: str) -> tuple[float, float]:
    """Return how long a call takes: the device, and the host."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        took = time.perf_counter() - start
        return took, took
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize()
    torch.cuda._sleep(60_000_000)  # some 30 ms, in which the host queues all of the call
    events[0].record()
    start = time.perf_counter()
    call()
    took = time.perf_counter() - start
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / 1e3, took


def cost(method: Method, shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str, rounds: int) -> dict[str, Any]:
    """Return one row."""
    base_params, params = (parameters(shapes, dtype, device) for _ in range(2))
    base, optimizer = method.plain(base_params), method.build(params)
    weights = sum(p.numel() for p in params)
    for module in (base, optimizer):
        getattr(module, "train", lambda: None)()  # Schedule-Free wants to be told
    with forced(method.kernel):
        for _ in range(4):  # state is created, and ours looks whether the base moves
            base.step()
            optimizer.step()
        ours, theirs = zip(
            *[(seconds(optimizer.step, device), seconds(base.step, device)) for _ in range(rounds)], strict=True
        )
        with Operations() as operations:
            optimizer.step()
        return {
            "method": method.name,
            "time": statistics.median(mine[0] / other[0] for mine, other in zip(ours, theirs, strict=True)),
            "plain, ms": 1e3 * statistics.median(other[0] for other in theirs),
            "host, ms": 1e3 * statistics.median(mine[1] for mine in ours),
            "plain host, ms": 1e3 * statistics.median(other[1] for other in theirs),
            "operations": sum(operations.count.values()),
            "host reads": operations.host_reads,
            "kept bytes per weight": state_bytes(optimizer) / weights,
            "transient bytes per weight": transient_bytes(optimizer.step, device) / weights,
        }


def bandwidth(device: str, rounds: int) -> dict[str, float]:
    """Return how fast memory moves, in GB/s, on 100M weights: in a copy, in fused AdamW, in our kernels."""
    (p,) = parameters([(10_000, 10_000)], torch.float32, device)
    x, g = p.detach(), p.grad
    y, m, v = torch.empty_like(x), torch.zeros_like(x), torch.ones_like(x)
    base = torch.optim.AdamW([p], lr=1e-3, fused=True)
    base.step()
    calls: dict[str, tuple[int, Callable[[], Any]]] = {  # words moved per weight
        "a copy": (2, lambda: y.copy_(x)),
        "fused AdamW": (7, base.step),
    }
    if not missing_for_triton(torch.device(device)):
        from mechanic_pytorch.kernels import triton

        one = torch.ones((), device=device)
        scales = Scales(one, one)
        options = {"amsgrad": False, "maximize": False, "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
        options |= {"weight_decay": 0.01, "grad_scale": None, "found_inf": torch.zeros_like(one)}
        rule = Rule(torch._fused_adamw_, [[m], [v]], 1, [one], options)
        calls |= {
            "measure": (3, lambda: triton.measure([x], [g], [y])),
            "measure, with a copy": (4, lambda: triton.measure([x], [g], [y], [m])),
            "move": (5, lambda: triton.move([x], [m], [y], None, scales)),
            "AdamW and move in one pass": (9, lambda: triton.step_and_move(rule, [x], [g], [y], None, scales)),
        }
    speeds = {}
    for name, (words, call) in calls.items():
        for _ in range(3):
            call()
        took = statistics.median(seconds(call, device)[0] for _ in range(2 * rounds))
        speeds[name] = words * x.nbytes / took / 1e9
    return speeds


class GPT(nn.Module):
    """A language model, by default a small one of 3.4M weights."""

    def __init__(
        self, characters: int = 96, width: int = 256, layers: int = 4, batch: tuple[int, int] = (8, 128)
    ) -> None:
        super().__init__()
        self.shape = batch[0], batch[1] + 1
        self.embedding = nn.Embedding(characters, width)
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, characters)

    def loss(self) -> Tensor:
        """Return the loss on some batch."""
        text = torch.randint(self.embedding.num_embeddings, self.shape, device=self.head.weight.device)
        mask = nn.Transformer.generate_square_subsequent_mask(self.shape[1] - 1, device=text.device)
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


MODELS: dict[str, Callable[[], Any]] = {"GPT of 3.4M": GPT, "CNN of 0.3M": CNN}
MODELS_ON_GPU: dict[str, Callable[[], Any]] = {"GPT of 163M, bf16 autocast": lambda: GPT(50304, WIDE, 12, (8, 1024))}


def training_ratio(model: Callable[[], Any], s_init: float | str, device: str, rounds: int) -> float:
    """Return how much longer a whole training step takes when fused AdamW is mechanized."""
    steps = []
    for cls, lr in ((torch.optim.AdamW, 1e-3), (mechanize(torch.optim.AdamW, s_init=s_init), 1.0)):
        torch.manual_seed(0)
        network = model().to(device)
        optimizer = cls(network.parameters(), lr=lr, fused=True)

        def step(network: Any = network, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
                loss = network.loss()
            loss.backward()
            optimizer.step()

        steps.append(step)

    def whole(step: Callable[[], None]) -> float:
        start = time.perf_counter()
        step()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(4):
        steps[0](), steps[1]()
    if device != "cpu":
        torch.cuda.synchronize()
    return statistics.median(whole(steps[1]) / whole(steps[0]) for _ in range(rounds))


def plot(tables: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw the times, one panel for each shape."""
    figure = Figure(figsize=(8, 0.25 * sum(map(len, tables.values())) + 0.9 * len(tables)), layout="constrained")
    heights = [len(rows) for rows in tables.values()]
    axes = figure.subplots(len(tables), squeeze=False, height_ratios=heights)[:, 0]
    for (title, rows), axis in zip(tables.items(), axes, strict=True):
        names = [row["method"] for row in rows][::-1]
        times = [row.get("time", 0.0) for row in rows][::-1]
        axis.barh(
            names,
            times,
            color=["C0" if ("mechanized" in n and "0.0.1" not in n) or "auto" in n else "0.7" for n in names],
        )
        labels = [f"{row['time']:.1f}" if "time" in row else "fails" for row in rows][::-1]
        axis.bar_label(axis.containers[0], labels, padding=3, fontsize=10)
        axis.axvline(1, color="0.3", linewidth=0.8)
        axis.set_title(title, fontsize=11, loc="right", fontweight="bold")
        axis.tick_params(labelsize=10)
        axis.margins(x=0.1, y=0.02)
        axis.set_xlabel("time of a step / plain base", fontsize=10)
    figure.savefig(path, dpi=130)


def large(figures: Mapping[str, Any]) -> list[str]:
    """Return the tables in which the time of a step says something: on a GPU, those of large models."""
    small = ("ResNet", "LoRA", "tiny") if figures["gpu"] else ()
    return [title for title in figures["tables"] if not title.startswith(small)]


def text(figures: Mapping[str, Any]) -> str:
    """Return what was measured, as Markdown."""
    on_gpu, tables = figures["gpu"], figures["tables"]
    names = [row["method"] for row in next(iter(tables.values())) if not row["method"].startswith("…")]
    if on_gpu:
        names = [name for name in names if name != "foreach AdamW, mechanized"]  # what torch chooses there

    def table(column: str, form: str, titles: Iterable[str], about: str) -> str:
        columns = [{row["method"]: row for row in tables[title]} for title in titles]
        rows = [
            [name, *(format(rows[name][column], form) if column in rows[name] else "fails" for rows in columns)]
            for name in names
        ]
        plain = [format(tables[title][0][about], ".2f") for title in titles]
        return markdown_table(["", *titles], [*rows, ["plain fused AdamW, ms", *plain]])

    single = [title for title in tables if "float32" in title]
    parts = []
    if on_gpu:
        parts += [
            "Time that the device is busy with a step, as a ratio to the plain base; of small models that is next to "
            "nothing:",
            table("time", ".1f", large(figures), "plain, ms"),
            "Time that the host is busy with a step, in ms; what reads from the device waits here for some 10 ms of "
            "other work:",
            table("host, ms", ".1f", single, "plain host, ms"),
        ]
        parts += [
            "Bytes per weight that come and go in a step:",
            table("transient bytes per weight", ".1f", large(figures)[-2:], "plain, ms").rpartition("\n")[0],
        ]
    else:
        parts += ["Time of a step, as a ratio to the plain base:", table("time", ".1f", tables, "plain, ms")]
        parts += ["What can be counted:", counts(tables)]
    speeds = figures["GB/s"]
    rows = [[name, f"{speed:.0f}", f"{speed / speeds['a copy']:.0%}"] for name, speed in speeds.items()]
    parts.append(markdown_table(["100M weights in float32", "GB/s", "of a copy"], rows))
    whole = "; ".join(f"{name}: {ratio:.2f}" for name, ratio in figures["training"].items())
    parts.append(f"A whole training step, as a ratio to the one with plain fused AdamW: {whole}.")
    parts.append(f"<sub>`{figures['command']}`; {figures['machine']}; medians of {figures['rounds']} rounds.</sub>")
    return "\n\n".join(parts)


def counts(tables: Mapping[str, list[dict[str, Any]]]) -> str:
    """Return what can be counted of fused AdamW, mechanized by this package and by version 0.0.1."""
    names = ["operations", "host reads", "kept bytes per weight", "transient bytes per weight"]
    rows = [
        [title, row["method"], *(f"{row[name]:.3g}" for name in names)]
        for title, rows in tables.items()
        for row in rows
        if row["method"] in ("fused AdamW, mechanized", "fused AdamW, mechanized by 0.0.1") and "time" in row
    ]
    return markdown_table(["", "method", *names], rows)


def measured(peers: Path, device: str, beginnings: list[str], dtypes: list[str], rounds: int) -> dict[str, Any]:
    """Check the kernels and return all figures."""
    on_gpu = device != "cpu"
    check_kernels(device)
    jobs = [
        (f"{shape}, {dtype}", method, sizes, DTYPES[dtype])
        for shape, sizes in ((SHAPES | ON_GPU) if on_gpu else SHAPES).items()
        if shape.startswith(tuple(beginnings))
        for dtype in dtypes
        for method in methods(peers, device)
    ]
    tables: dict[str, list[dict[str, Any]]] = {}
    for title, method, shapes, dtype in track(jobs, transient=True, console=Console(stderr=True)):
        try:
            row = cost(method, shapes, dtype, device, rounds)
        except RuntimeError as error:
            if "mechanized" in method.name and "0.0.1" not in method.name:
                raise
            row = {"method": method.name, "fails": str(error).splitlines()[0]}
        tables.setdefault(title, []).append(row)
    training = {
        f"{name}, {'auto' if s_init == 'auto' else 'a number'}": training_ratio(model, s_init, device, 3 * rounds)
        for name, model in (MODELS_ON_GPU if on_gpu else MODELS).items()
        for s_init in (1e-8, "auto")
    }
    return {
        "gpu": on_gpu,
        "machine": setting(device),
        "rounds": rounds,
        "command": command(),
        "tables": tables,
        "training": training,
        "GB/s": bandwidth(device, rounds),
    }


def main() -> None:
    """Check, measure, print."""
    parser = arguments(__doc__)
    parser.add_argument("--peers", type=Path, default=Path(".venv/peers"), help="directory that holds 0.0.1")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="*", default=[""], help="beginnings of names: GPT ResNet LoRA tiny one")
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--plot", type=Path, help="draw the times there")
    parser.add_argument(
        "--measured", type=Path, help="report the figures of a --json of before, perhaps from elsewhere"
    )
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="pytorch_optimizer")
    warnings.filterwarnings("ignore", "Mechanized.* lost in rounding")

    if options.measured:
        figures = json.loads(options.measured.read_text(encoding="utf-8"))
    else:
        figures = measured(options.peers, options.device, options.shapes, options.dtypes, options.rounds)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    if options.plot:
        plot({title: rows for title, rows in figures["tables"].items() if title in large(figures)}, options.plot)
    print_or_fill(options.fill, "step cost", {"gpu" if figures["gpu"] else "cpu": text(figures)})


if __name__ == "__main__":
    main()
