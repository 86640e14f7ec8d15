"""What the plain steps of "auto" cost where the schedule falls gently: the present rule beside the one before it.

    python -m benchmarks.falling --fill docs/safety.md

`convergence/results.jsonl` has the tuned grid, and `ours-auto` by the rule before; `convergence/plain-steps.jsonl` has
`ours-auto` by the present one, made by `python -m benchmarks.convergence run --profile full --methods ours-auto` on a
copy of the former without its lines of `ours-auto`. Tasks that only one of them has are left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.convergence.compare import TaskResults, geometric
from benchmarks.convergence.fill import relative
from benchmarks.convergence.methods import TEACHER
from benchmarks.convergence.tasks import TASKS
from benchmarks.pages import markdown_table, print_or_fill

RESULTS = Path(__file__).parent / "convergence" / "results.jsonl"
PRESENT = RESULTS.with_name("plain-steps.jsonl")


def main() -> None:
    """Print the table, or write it into a page."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--fill", type=Path, metavar="PAGE", help="write the table between the marks of this page")
    options = arguments.parse_args()
    before, present = ([json.loads(line) for line in path.read_text().splitlines()] for path in (RESULTS, PRESENT))
    rows, ratios = [], []
    for name, task in TASKS.items():
        old = [line for line in before if line["task"] == name and "error" not in line]
        new = [line for line in present if line["task"] == name and "error" not in line]
        if not new:
            continue
        seeds = {line["seed"] for line in new}
        old = [line for line in old if line["seed"] in seeds]
        then = TaskResults(task, old)
        now = TaskResults(task, [line for line in old if line["method"] != TEACHER] + new)
        ratios.append((then.ratio(TEACHER), now.ratio(TEACHER)))
        rates = (then.tuned_lr, then.rate(TEACHER), now.rate(TEACHER))
        rows.append([name, str(len(seeds)), *(f"{rate:.2g}" for rate in rates), *map(relative, ratios[-1])])
    means = [relative(geometric(column)) for column in zip(*ratios, strict=True)]
    rows.append(["geometric mean", "", "", "", "", *means])
    head = ["task", "seeds", "tuned lr", "learned before", "learned now", "loss / tuned before", "now"]
    print_or_fill(options.fill, "falling", {"table": markdown_table(head, rows)})


if __name__ == "__main__":
    main()
