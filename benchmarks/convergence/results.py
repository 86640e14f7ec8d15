"""The results file: one JSON object a line, appended as jobs finish, readable after any interruption."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

IDENTITY = ("task", "method", "seed", "profile", "steps", "torch", "package")


def key(line: dict[str, Any]) -> tuple[Any, ...]:
    """Return what identifies the job of a line."""
    return tuple(line.get(name) for name in IDENTITY)


class Results:
    """Lines in a file, written by one process.

    A line that an interruption has torn is left where it is and ignored; the next one begins on a line of its own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: dict[str, Any]) -> None:
        """Write a line, and return when the disk has it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            if file.tell() and file.seek(-1, os.SEEK_END) is not None and file.read(1) != b"\n":
                file.write(b"\n")
            file.write(json.dumps(_plain(line), allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def lines(self) -> list[dict[str, Any]]:
        """Return all whole lines, in order."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        found = []
        for text in content.split(b"\n"):
            try:
                line = json.loads(text)
            except ValueError:  # torn, or empty
                continue
            if isinstance(line, dict) and set(IDENTITY) <= set(line):
                found.append(line)
        return found

    def finished(self) -> dict[tuple[Any, ...], dict[str, Any]]:
        """Return the last result of each job that has one; jobs that failed have none."""
        return {key(line): line for line in self.lines() if "error" not in line}


def _plain(value: Any) -> Any:
    """Return a value that JSON knows; numbers that are not finite become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
