"""The figures of the demo, as a table of the documentation: any base lr, plain and mechanized.

    python -m benchmarks.demo --fill docs/recipes.md

What is trained, `examples/demo.py` says. It stands alone, so that `make demo` needs nothing of `benchmarks`.
"""

from __future__ import annotations

import torch
from rich.console import Console

from benchmarks.pages import arguments, markdown_table, origin, print_or_fill
from examples.demo import load_data, percent, train_all

EPOCHS = 30
HEAD = ("base lr", "plain AdamW", "mechanized", "its learned lr")


def main() -> None:
    """Train and print, or fill."""
    page = arguments(__doc__).parse_args().fill
    torch.set_num_threads(1)
    data = load_data()
    rows = [
        [f"{p.base_lr:.0e}", percent(p), percent(m), f"{m.learned_lr:.1e}"]
        for p, m in zip(*train_all(data, EPOCHS, Console(stderr=True)), strict=True)
    ]
    about = f"accuracy on {len(data.test_y)} test images of handwritten digits after {EPOCHS} epochs, one seed"
    print_or_fill(page, "demo", {"table": f"{markdown_table(HEAD, rows)}\n\n{origin(about)}"})


if __name__ == "__main__":
    main()
