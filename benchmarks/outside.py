"""Other people's benchmarks: results as lines of JSON, of which a run that is there is not made again."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.pages import arguments, print_or_fill, setting

RESULTS = Path("benchmarks/outside.jsonl")
Row = dict[str, Any]


class Results:
    """The rows of one suite in a file.

    Args:
        path: the file.
        suite: its name.
    """

    def __init__(self, path: Path, suite: str) -> None:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._path, self._suite = path, suite
        self.rows: list[Row] = [row for row in map(json.loads, lines) if row["suite"] == suite]

    def add(self, key: Row, run: Callable[[], Row]) -> None:
        """Make a run, unless there is a row with this key, and write down what it returns."""
        key = {"suite": self._suite, **key}
        if any(key.items() <= row.items() for row in self.rows):
            return
        self.rows.append({**key, **run(), "setting": setting()})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")

    def shown(self, table: Callable[[list[Row]], str]) -> str:
        """Return a table of the rows; below it commits or packages, and machines, in small print."""
        of = [row.get("packages") or f"commit {row['commit']}" for row in self.rows]
        facts = sorted({f"{what}; {row['setting']}" for what, row in zip(of, self.rows, strict=True)})
        return f"{table(self.rows)}\n\n<sub>{'; '.join(facts)}.</sub>"


def report(
    about: str | None,
    suite: str,
    repository: str,
    runs: Callable[[Path, int], Iterable[tuple[Row, Callable[[], Row]]]],
    table: Callable[[list[Row]], str],
    seeds: int,
) -> None:
    """Read the command line, make the runs that are missing, and print the table or write it into a page.

    Args:
        about: the docstring of the program.
        suite: the name of the suite, in lower case that of its mark in the page.
        repository: of which a clone is needed.
        runs: returns for a clone and a number of seeds what tells each run from others, and a function that makes it.
        table: makes the table.
        seeds: how many, if nothing else is said.
    """
    parser = arguments(about)
    parser.add_argument("--home", type=Path, help=f"a clone of {repository}; without it nothing is run")
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    results = Results(options.results, suite)
    if options.home:
        home = options.home.resolve()
        here = {"commit": _commit(home)}
        for key, run in runs(home, options.seeds):
            results.add({**here, **key}, run)
    print_or_fill(options.fill, "outside", {suite.lower(): results.shown(table)})


def _commit(home: Path) -> str:
    """Return the commit of a clone."""
    done = subprocess.run(
        ["git", "rev-parse", "--short=7", "HEAD"], cwd=home, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
