"""How close does the tuner come to a tuned learning rate?

    python -m benchmarks.convergence run --profile quick
    python -m benchmarks.convergence report --output convergence

`run` trains every task with every method and seed, in parallel, and appends a line to the results file as each job
finishes. It may be interrupted at any time, even killed, and goes on where it was. `report` prints tables of whatever
there is, draws pictures of it, and renews the marked tables of pages. Data: from the directory $MECHANIC_DATA, or
downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import joblib
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.convergence import data, pictures, plan, tables
from benchmarks.convergence.methods import METHODS, PER_GROUP, Job, execute, matching
from benchmarks.convergence.results import Results, key
from benchmarks.convergence.tasks import PROFILES, TASKS, Task

SEEDS = {"quick": [0], "full": [0, 1, 2], "groups": [0, 1, 2]}


def main(arguments: Sequence[str] | None = None, known: Mapping[str, Task] = TASKS) -> int:
    """Run a command for some of the known tasks; return the exit status."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.convergence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    names = (
        f"methods: {' '.join(METHODS)}\nonly if named: {' '.join(PER_GROUP)}\ntasks: {' '.join(known)}\n"
        "Both may be patterns, such as 'linear-*'."
    )
    formatter = argparse.RawDescriptionHelpFormatter
    runner = commands.add_parser("run", help="train what has no result yet", epilog=names, formatter_class=formatter)
    runner.add_argument("--tasks", nargs="*", metavar="NAME", help="all of the profile if not given")
    runner.add_argument("--methods", nargs="*", metavar="NAME", help="all if not given")
    runner.add_argument("--seeds", nargs="*", type=int, help=f"default: {SEEDS}")
    runner.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at once (%(default)s)")
    runner.add_argument("--threads", type=int, default=1, help="of torch, in each job (%(default)s)")
    runner.add_argument("--backend", default="loky", help="joblib's: loky, ray, dask, sequential … (%(default)s)")
    runner.add_argument("--peers", type=Path, default=Path(".venv/peers"), help="directory that holds 0.0.1")
    reporter = commands.add_parser("report", help="tables and pictures of what there is")
    reporter.add_argument("--output", type=Path, help="directory for the pictures")
    reporter.add_argument(
        "--fill", nargs="*", type=Path, default=[], help="Markdown files whose marked tables are renewed"
    )
    for command in (runner, reporter):
        command.add_argument("--profile", choices=PROFILES, default="quick", help="(%(default)s)")
        command.add_argument("--results", type=Path, default=Path("convergence.jsonl"), help="(%(default)s)")
    options = parser.parse_args(arguments)
    try:
        return run(options, known) if options.command == "run" else report(options, known)
    except (data.DataError, ValueError) as error:
        raise SystemExit(f"convergence: {error}") from error


def chosen(profile: str, patterns: Sequence[str] | None, known: Mapping[str, Task]) -> list[Task]:
    """Return the tasks of a profile that match, without those whose data cannot be had."""
    tasks = [known[name] for name in matching([n for n, t in known.items() if profile in t.lengths], patterns)]
    lacking = [task for task in tasks if not all(map(data.is_available, task.files))]
    if lacking:
        print(f"left out, because their data are not public: {', '.join(t.name for t in lacking)}", file=sys.stderr)
    return [task for task in tasks if task not in lacking]


def run(options: argparse.Namespace, known: Mapping[str, Task]) -> int:
    """Run all jobs that have no result, those that follow from results too; return 1 if any failed."""
    results, profile = Results(options.results), options.profile
    tasks = chosen(profile, options.tasks, known)
    methods = matching((*METHODS, *PER_GROUP), options.methods) if options.methods else METHODS
    seeds = SEEDS[profile] if options.seeds is None else options.seeds
    for task in tasks:
        task.prepare()  # here, so that not all workers download at once
    failed: dict[tuple[Any, ...], str] = {}
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    with bar, backend(options.backend, options.jobs):
        shown, done = bar.add_task("jobs", total=None), 0
        while todo := [
            pair
            for pair in plan.jobs(tasks, methods, seeds, profile, results.finished())
            if key(pair[0].identity) not in failed
        ]:
            bar.update(shown, total=done + len(todo))
            for line in in_parallel(todo, options):
                results.append(line)
                done += 1
                bar.update(shown, completed=done, description=f"{line['task']} {line['method']}")
                if "error" in line:
                    failed[key(line)] = line["error"]
    for (name, method, seed, *_), error in failed.items():
        print(f"failed: {name}, {method}, seed {seed}: {error}", file=sys.stderr)
    print(f"{done} jobs run, {len(failed)} failed; results in {results.path}")
    if failed:
        print("Failed jobs are tried again by the next run.")
    return int(bool(failed))


@contextlib.contextmanager
def backend(name: str, jobs: int) -> Iterator[None]:
    """Let joblib use a backend, also one that has to be registered."""
    if name == "ray":
        from ray.util.joblib import register_ray

        register_ray()
    with joblib.parallel_config(backend=name, n_jobs=jobs):
        yield


def in_parallel(pairs: list[tuple[Job, float | None]], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the lines of jobs as they finish."""
    calls = [joblib.delayed(execute)(job, lr, options.peers.absolute(), options.threads) for job, lr in pairs]
    try:
        parallel = joblib.Parallel(return_as="generator_unordered", batch_size=1)
    except ValueError:  # Ray and multiprocessing return lists only, so results come in small rounds
        size = 2 * joblib.effective_n_jobs(options.jobs)
        with joblib.Parallel(batch_size=1) as parallel:
            for i in range(0, len(calls), size):
                yield from parallel(calls[i : i + size])
    else:
        yield from parallel(calls)


def report(options: argparse.Namespace, known: Mapping[str, Task]) -> int:
    """Print the report; draw pictures, and renew tables of pages, if asked to; return the exit status."""
    lines = Results(options.results).lines()
    print(tables.report(lines, options.profile, known))
    if options.output and (found := tables.compose(lines, options.profile, known)):
        options.output.mkdir(parents=True, exist_ok=True)
        for name, draw in pictures.ALL.items():
            draw(found).savefig(options.output / f"{name}.png", dpi=120)
    for page in options.fill:
        page.write_text(tables.fill(page.read_text(encoding="utf-8"), lines, options.profile, known), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
