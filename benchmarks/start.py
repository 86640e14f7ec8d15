"""Does it start? Training loss by base learning rate and precision, for this package and for version 0.0.1.

AdamW with default options on scikit-learn's handwritten digits, a 64-32-10 network, batches of 64, constant learning
rate, 300 steps; every run from the same weights and batches. 0.0.1 has the same import name, so it is loaded from a
directory of its own:

    pip install --no-deps --target peers mechanic-pytorch==0.0.1
    python benchmarks/start.py --peers peers

Prints a Markdown table, and the machine and versions it was measured on.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from sklearn.datasets import load_digits
from torch.nn import functional as F

from mechanic_pytorch import mechanize

LRS = [10.0**exponent for exponent in range(-8, 7, 2)]
STEPS, BATCH = 300, 64


def load_old(directory: Path) -> Any:
    """Return `mechanize` of version 0.0.1."""
    path = directory / "mechanic_pytorch" / "mechanic.py"
    spec = importlib.util.spec_from_file_location("mechanic_pytorch_0_0_1", path)
    if spec is None or spec.loader is None or not path.exists():
        raise SystemExit(f"start.py: no version 0.0.1 under {directory}; see the first lines of this file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.mechanize


def final_loss(wrap: Any, lr: float, dtype: torch.dtype) -> float:
    """Train once; return the loss over all images."""
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = (images / 16).to(dtype)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)).to(dtype)
    optimizer = wrap(torch.optim.AdamW)(model.parameters(), lr=lr)
    for _ in range(STEPS):
        batch = torch.randint(len(images), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]).float(), labels[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.cross_entropy(model(images).float(), labels))


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=Path(".venv/peers"), help="directory that holds 0.0.1")
    old = load_old(parser.parse_args().peers)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Mechanized.* lost in rounding")  # it is what the table shows
    columns = {
        f"{name}, {str(dtype)[6:]}": (wrap, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for name, wrap in (("0.0.1", old), ("this package", mechanize))
    }
    rows = {lr: [final_loss(wrap, lr, dtype) for wrap, dtype in columns.values()] for lr in track(LRS, transient=True)}
    print(f"| base lr | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for lr, losses in rows.items():
        print(f"| {lr:.0e} | {' | '.join(f'{loss:.3g}' for loss in losses)} |")
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    print(f"\n{versions}, {platform.machine()} CPU, one thread, one seed")


if __name__ == "__main__":
    main()
