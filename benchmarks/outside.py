"""Results of other people's benchmarks, as lines of JSON: a run that is there is not made again."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.pages import setting

RESULTS = Path("benchmarks/outside.jsonl")


class Results:
    """The rows of one suite in a file.

    Args:
        path: the file.
        suite: its name.
    """

    def __init__(self, path: Path, suite: str) -> None:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._path, self._suite = path, suite
        self.rows: list[dict[str, Any]] = [row for row in map(json.loads, lines) if row["suite"] == suite]

    def add(self, key: dict[str, Any], run: Callable[[], dict[str, Any]]) -> None:
        """Make a run, unless there is a row with this key, and write down what it returns."""
        key = {"suite": self._suite, **key}
        if any(key.items() <= row.items() for row in self.rows):
            return
        self.rows.append({**key, **run(), "setting": setting()})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")

    def origin(self) -> str:
        """Return commits and machines, in small print."""
        facts = sorted({f"commit {row['commit']}; {row['setting']}" for row in self.rows})
        return f"<sub>{'; '.join(facts)}.</sub>"


def commit(home: Path) -> str:
    """Return the commit of a clone."""
    done = subprocess.run(
        ["git", "rev-parse", "--short=7", "HEAD"], cwd=home, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
