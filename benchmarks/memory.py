"""What an optimizer keeps for each weight, and what a step holds at its peak: counted, not measured.

    python -m benchmarks.memory --fill docs/speed.md

Bytes beside weights and gradients, for a model of 16 equal tensors. The peers are those of the packages dog-optimizer
and pytorch-optimizer, and version 0.0.1 if `--peers` names a directory that holds it.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import dog
import pytorch_optimizer as po
import torch

from benchmarks.counting import state_bytes, transient_bytes
from benchmarks.pages import arguments, markdown_table, origin, print_or_fill
from benchmarks.start import load_old
from benchmarks.step_cost import parameters
from mechanic_pytorch import mechanize

SHAPES = [(512, 1024)] * 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {}),
    "SGD, momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "SGD, momentum, fused": (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    "AdamW, for-loop": (torch.optim.AdamW, {"foreach": False}),
    "AdamW, foreach": (torch.optim.AdamW, {"foreach": True}),
    "AdamW, fused": (torch.optim.AdamW, {"fused": True}),
    "Adafactor": (torch.optim.Adafactor, {}),
    "Lion": (po.Lion, {}),
}
NO_CELL = ("SGD, momentum, fused", "bfloat16")  # torch 2.13's own kernel moves hardly any such weight on a CPU
PEERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Prodigy": (po.Prodigy, {"lr": 1.0}),
    "D-Adaptation, Adam": (po.DAdaptAdam, {"lr": 1.0}),
    "DoG": (dog.DoG, {"lr": 1.0}),
    "LDoG": (dog.LDoG, {"lr": 1.0}),
    "Schedule-Free AdamW": (po.ScheduleFreeAdamW, {}),
}


def counted(kind: Any, options: dict[str, Any], dtype: torch.dtype) -> tuple[float, float]:
    """Return the bytes per weight that an optimizer keeps, and those that it holds at the peak of a step."""
    params = parameters(SHAPES, dtype, "cpu")
    optimizer = kind(params, **{"lr": 1e-3, **options})
    getattr(optimizer, "train", lambda: None)()  # Schedule-Free wants to be told
    for _ in range(3):
        optimizer.step()
    weights = sum(p.numel() for p in params)
    kept = state_bytes(optimizer)
    return kept / weights, (kept + transient_bytes(optimizer.step)) / weights


def table(peers: Path) -> str:
    """Return a line for each base, plain and mechanized, and for each peer."""

    def cells(name: str, kind: Any, options: dict[str, Any]) -> list[str]:
        known = [dtype for key, dtype in DTYPES.items() if (name, key) != NO_CELL]
        made = [counted(kind, options, dtype) for dtype in known]
        return [f"{kept:.1f} / {peak:.1f}" for kept, peak in made] + [""] * (len(DTYPES) - len(known))

    rows = []
    for name, (base, options) in BASES.items():
        plain = cells(name, base, options)
        ours = cells(name, mechanize(base, s_init="auto"), {**options, "lr": 1.0})
        rows.append([name, plain[0], ours[0], plain[1], ours[1]])
    old = load_old(peers)
    others = {"AdamW, mechanized by 0.0.1": (old(torch.optim.AdamW), {"lr": 1.0}), **PEERS}
    for name, (kind, options) in others.items():
        alone = cells(name, kind, options)
        rows.append([name, alone[0], "", alone[1], ""])
    head = ["bytes per weight, kept / at the peak", *[f"{d}, {how}" for d in DTYPES for how in ("plain", "mechanized")]]
    return markdown_table(head, rows)


def main() -> None:
    """Count and print."""
    parser = arguments(__doc__)
    parser.add_argument("--peers", type=Path, default=Path(".venv/peers"), help="directory that holds 0.0.1")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="pytorch_optimizer")
    warnings.filterwarnings("ignore", "Mechanized.* lost in rounding")
    print_or_fill(options.fill, "memory", {"table": f"{table(options.peers)}\n\n{origin('counted')}"})


if __name__ == "__main__":
    main()
