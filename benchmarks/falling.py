"""What the plain steps of "auto" cost where the schedule falls gently: the present rule beside the one before it.

    for page in README.md docs/{compare,index,safety}.md; do python -m benchmarks.falling --fill $page; done

`convergence/results.jsonl` has the tuned grid, and `ours-auto` by the rule before; `convergence/plain-steps.jsonl` has
`ours-auto` by the present one, made by `python -m benchmarks.convergence run --profile full --methods ours-auto` on a
copy of the former without its lines of `ours-auto`. Tasks that only one of them has are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.convergence.compare import TaskResults, apart, geometric
from benchmarks.convergence.methods import NAMES, TEACHER
from benchmarks.convergence.results import Results
from benchmarks.convergence.tables import cells, compose, relative
from benchmarks.pages import arguments, markdown_table, print_or_fill

RESULTS = Path(__file__).parent / "convergence" / "results.jsonl"
PRESENT = RESULTS.with_name("plain-steps.jsonl")
PEERS = ("prodigy", "schedule-free", "0.0.1", "adamw@1e-3", "ours", "ldog", "d-adaptation")


def main() -> None:
    """Print the tables, or write those that a page has marks for into it."""
    print_or_fill(arguments(__doc__).parse_args().fill, "falling", tables())


def tables() -> dict[str, str]:
    """Return both tables by their names: every task before and now, and the present rule beside its peers."""
    before, present = (Results(path).lines() for path in (RESULTS, PRESENT))
    then_by_task = {each.task.name: each for each in compose(before, "full")}
    pairs = []
    for task, new in ((each.task, each.lines[TEACHER]) for each in compose(present, "full")):
        old = [x for by_seed in then_by_task[task.name].lines.values() for seed, x in by_seed.items() if seed in new]
        now = [line for line in old if line["method"] != TEACHER] + [*new.values()]
        pairs.append((TaskResults(task, old), TaskResults(task, now)))
    networks, _ = apart([now for _, now in pairs])
    return {"table": before_and_now(pairs), "beside peers": beside_peers(networks)}


def before_and_now(pairs: Sequence[tuple[TaskResults, TaskResults]]) -> str:
    """Return a row for each task."""
    rows, ratios = [], []
    for then, now in pairs:
        ratios.append((then.ratio(TEACHER), now.ratio(TEACHER)))
        rates = (then.tuned_lr, then.rate(TEACHER), now.rate(TEACHER))
        seeds = str(len(now.lines[TEACHER]))
        rows.append([then.task.name, seeds, *(f"{rate:.2g}" for rate in rates), *map(relative, ratios[-1])])
    means = [relative(geometric(column)) for column in zip(*ratios, strict=True)]
    rows.append(["geometric mean", "", "", "", "", *means])
    head = ["task", "seeds", "tuned lr", "learned before", "learned now", "loss / tuned before", "now"]
    return markdown_table(head, rows)


def beside_peers(networks: Sequence[TaskResults]) -> str:
    """Return a row for the present rule and one for each peer, on the same networks."""
    rows = [[NAMES[method], *cells(networks, method)] for method in (TEACHER, *PEERS)]
    return markdown_table(["final loss / tuned", f"{len(networks)} networks, mean", "worst"], rows)


if __name__ == "__main__":
    main()
