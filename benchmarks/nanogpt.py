"""nanoGPT's recipe for a CPU, the script as its author wrote it: with its own lr, and under `mechanic run`.

    git clone https://github.com/karpathy/nanoGPT
    python -m benchmarks.nanogpt --home nanoGPT --results benchmarks/outside.jsonl --fill docs/outside.md

Its README gives the command and the validation loss, 1.88, at the lr that its author has chosen. A seed is added to the
one in the script; nothing else is changed. Runs that are in the results already are not made again.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

from benchmarks.convergence import data
from benchmarks.outside import Row, report
from benchmarks.pages import markdown_table

PUBLISHED = 1.88
FLAGS = [
    *("config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=100"),
    *("--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128", "--max_iters=2000"),
    *("--lr_decay_iters=2000", "--dropout=0.0"),
]
METHODS = {"as it is, lr 1e-3": False, "`mechanic run`": True}  # whether it is mechanized
SEEDED = """
import runpy, sys, torch
seed = torch.manual_seed
torch.manual_seed = lambda number: seed(number + {seed})
sys.argv = {argv!r}
if {mechanized}:
    from mechanic_pytorch.__main__ import main
    main()
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def prepare(home: Path) -> None:
    """Make the files of characters by the recipe's own program, from a text that has been checked."""
    folder = home / "data" / "shakespeare_char"
    if not (folder / "train.bin").exists():
        (folder / "input.txt").write_bytes(data.fetch("tinyshakespeare/input.txt").read_bytes())
        # It imports `requests` for a download that is not needed any more.
        code = "import runpy, sys; sys.modules['requests'] = sys; runpy.run_path('prepare.py')"
        subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)


def train(home: Path, flags: list[str], mechanized: bool, seed: int) -> Row:
    """Run the script, and return the last losses and, mechanized, the learned lr."""
    with tempfile.TemporaryDirectory() as folder:
        script = ["train.py", *flags, f"--out_dir={folder}/out"]
        report = ["mechanic", "run", "--report", folder, *script]
        code = SEEDED.format(seed=seed, argv=report if mechanized else script, mechanized=mechanized)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [*sys.path, str(home)]))}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=home, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        evaluations = re.findall(r"step (\d+): train loss ([\d.]+), val loss ([\d.]+)", done.stdout)
        step, train, validation = evaluations[-1]
        learned = None
        if mechanized:
            written = json.loads(next(Path(folder).rglob("report.json")).read_text(encoding="utf-8"))
            learned = max(group["learned_lr"] for group in written["optimizers"][0]["groups"])
    return {"steps": int(step), "train": float(train), "validation": float(validation), "learned lr": learned}


def table(rows: list[Row]) -> str:
    """Return a line for each method."""
    lines = []
    for method in METHODS:
        mine = [row for row in rows if row["method"] == method]
        losses = [row["validation"] for row in mine]
        if losses:
            rates = [row["learned lr"] for row in mine if row["learned lr"]]
            each = ", ".join(f"{loss:.2f}" for loss in losses)
            lines.append([method, f"{statistics.fmean(losses):.2f}", each, f"{max(rates):.0e}" if rates else ""])
    lines.append(["published, as it is, lr 1e-3", f"{PUBLISHED}", "", ""])
    return markdown_table(["nanoGPT on a CPU", "validation loss", "each seed", "learned lr"], lines)


def runs(home: Path, seeds: int) -> Iterator[tuple[Row, Callable[[], Row]]]:
    """Yield each run."""
    prepare(home)
    for seed, method in product(range(seeds), METHODS):
        yield {"method": method, "seed": seed}, partial(train, home, FLAGS, METHODS[method], seed)


if __name__ == "__main__":
    report(__doc__, "nanoGPT", "karpathy/nanoGPT", runs, table, seeds=3)
