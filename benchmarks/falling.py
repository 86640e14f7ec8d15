"""What the plain steps of "auto" cost where the schedule falls gently: the present rule beside the one before it.

    python -m benchmarks.falling --fill docs/safety.md

`convergence/results.jsonl` has the tuned grid, and `ours-auto` by the rule before; `convergence/plain-steps.jsonl` has
`ours-auto` by the present one, made by `python -m benchmarks.convergence run --profile full --methods ours-auto` on a
copy of the former without its lines of `ours-auto`. Tasks that only one of them has are left out.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.convergence.compare import TaskResults, geometric
from benchmarks.convergence.methods import TEACHER
from benchmarks.convergence.results import Results
from benchmarks.convergence.tables import compose, relative
from benchmarks.pages import arguments, markdown_table, print_or_fill

RESULTS = Path(__file__).parent / "convergence" / "results.jsonl"
PRESENT = RESULTS.with_name("plain-steps.jsonl")


def main() -> None:
    """Print the table, or write it into a page."""
    page = arguments(__doc__).parse_args().fill
    before, present = (Results(path).lines() for path in (RESULTS, PRESENT))
    then_by_task = {each.task.name: each for each in compose(before, "full")}
    rows, ratios = [], []
    for task, new in ((each.task, each.lines[TEACHER]) for each in compose(present, "full")):
        old = [x for by_seed in then_by_task[task.name].lines.values() for seed, x in by_seed.items() if seed in new]
        then = TaskResults(task, old)
        now = TaskResults(task, [line for line in old if line["method"] != TEACHER] + [*new.values()])
        ratios.append((then.ratio(TEACHER), now.ratio(TEACHER)))
        rates = (then.tuned_lr, then.rate(TEACHER), now.rate(TEACHER))
        rows.append([task.name, str(len(new)), *(f"{rate:.2g}" for rate in rates), *map(relative, ratios[-1])])
    means = [relative(geometric(column)) for column in zip(*ratios, strict=True)]
    rows.append(["geometric mean", "", "", "", "", *means])
    head = ["task", "seeds", "tuned lr", "learned before", "learned now", "loss / tuned before", "now"]
    print_or_fill(page, "falling", {"table": markdown_table(head, rows)})


if __name__ == "__main__":
    main()
