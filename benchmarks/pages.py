"""Tables in the documentation: written by programs between marks, so that none is copied by hand.

A mark is a line `<!-- PROGRAM: NAME -->`; what stands between it and the next `<!-- end -->` is replaced.
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch


def arguments(about: str | None) -> argparse.ArgumentParser:
    """Return a parser of a program that can fill a page; `about` is its docstring."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fill", type=Path, metavar="PAGE", help="write the tables between the marks of this page")
    return parser


def between_marks(text: str, program: str, make: Callable[[str], str | None]) -> str:
    """Return a Markdown text in which `make(NAME)` stands between each mark of a program and its end.

    What is there stays where that is None. The marks are `<!-- PROGRAM: NAME -->` and `<!-- end -->`.
    """

    def made(mark: re.Match[str]) -> str:
        new = make(mark["name"])
        return mark[0] if new is None else f"{mark[1]}{new}\n"

    return re.sub(rf"(<!-- {program}: (?P<name>[a-z ]+) -->\n).*?(?=<!-- end -->)", made, text, flags=re.DOTALL)


def print_or_fill(page: Path | None, program: str, made: Mapping[str, str]) -> None:
    """Write what a program has made between its marks of a page; print it if there is no page, or no mark of it."""
    text = "" if page is None else page.read_text(encoding="utf-8")
    if page is None or f"<!-- {program}: " not in text:
        print("\n\n".join(made.values()))
    else:
        page.write_text(between_marks(text, program, made.get), encoding="utf-8")


def command() -> str:
    """Return what was called."""
    return " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])


def setting(device: str = "cpu") -> str:
    """Return with what a program runs: versions, machine, threads."""
    machine = platform.machine() if device == "cpu" else torch.cuda.get_device_name()
    threads = "one thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
    return f"torch {torch.__version__}, Python {platform.python_version()}, {machine}, {threads}"


def origin(about: str) -> str:
    """Return what tables rest on, in small print: the command, what its figures are, versions, machine."""
    return f"<sub>`{command()}`, {about}; {setting()}.</sub>"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table, nothing without rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", f"|---|{'---|' * (len(head) - 1)}", *lines]) if lines else ""
