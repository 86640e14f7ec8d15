"""Does it start? Training loss by base learning rate and precision, for this package and for version 0.0.1.

AdamW with `s_init=1e-8` on scikit-learn's handwritten digits, a 64-32-10 network, batches of 64, constant learning
rate, 300 steps; every run from the same weights and batches. 0.0.1 has the same import name, so it is loaded from a
directory of its own:

    pip install --no-deps --target peers mechanic-pytorch==0.0.1
    python -m benchmarks.start --peers peers --fill docs/numerics.md

Prints a Markdown table, or writes it between the marks `<!-- start: table -->` and `<!-- end -->`.
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch.nn import functional as F

from benchmarks.pages import arguments, markdown_table, origin, print_or_fill
from benchmarks.shared import digits, network
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
    images, labels = digits()
    images = images.to(dtype)
    torch.manual_seed(0)
    model = network().to(dtype)
    optimizer = wrap(torch.optim.AdamW)(model.parameters(), lr=lr)
    for _ in range(STEPS):
        batch = torch.randint(len(images), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]).float(), labels[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.cross_entropy(model(images).float(), labels))


def main() -> None:
    """Print the table, or write it into a page."""
    parser = arguments(__doc__)
    parser.add_argument("--peers", type=Path, default=Path(".venv/peers"), help="directory that holds 0.0.1")
    options = parser.parse_args()
    old = load_old(options.peers)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Mechanized.* lost in rounding")  # it is what the table shows
    columns = {
        f"{name}, {str(dtype)[6:]}": (wrap, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for name, wrap in (("0.0.1", old), ("this package", partial(mechanize, s_init=1e-8)))
    }
    rows = [
        [f"{lr:.0e}", *(f"{final_loss(wrap, lr, dtype):.3g}" for wrap, dtype in columns.values())]
        for lr in track(LRS, transient=True)
    ]
    made = {"table": f"{markdown_table(['base lr', *columns], rows)}\n\n{origin('one seed')}"}
    print_or_fill(options.fill, "start", made)


if __name__ == "__main__":
    main()
