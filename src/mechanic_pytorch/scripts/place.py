"""Where in a script an optimizer is built, by which a reader knows one Adam from another."""

from __future__ import annotations

import keyword
import linecache
import os
import re
import sys
from dataclasses import dataclass
from types import FrameType

import torch

_ASSIGNED = re.compile(r"\s*([A-Za-z_][\w.]*(?:\[[^\]]+\])?)\s*(?::[^=]+)?=(?!=)")
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_RUN = os.path.join(_PACKAGE, "scripts", "run.py")  # who calls that is no part of the script
_TORCH = os.path.dirname(torch.__file__)
_STDLIB = os.path.dirname(os.__file__)


@dataclass(frozen=True)
class Place:
    """A line of code, and the name that it gives to the optimizer.

    Attributes:
        path: of the file; empty if there is none.
        line: its number.
        variable: what the optimizer is assigned to, such as "optimizerD" or "self.optimizer", or empty.
    """

    path: str = ""
    line: int = 0
    variable: str = ""

    def __str__(self) -> str:
        return f"{os.path.basename(self.path)}:{self.line}" if self.path else ""


def place_of(optimizer: object) -> Place:
    """Return the line that builds this optimizer, which is being built now.

    It is the innermost one that is of no library, or, where a library builds the optimizer, of that library.
    """
    frame: FrameType | None = sys._getframe(1)
    found: FrameType | None = None
    while frame is not None and (path := frame.f_code.co_filename) != _RUN:
        if not (_is_in(path, _PACKAGE) or _is_in(path, _TORCH) or _constructs(frame, optimizer)):
            found = found or frame
            if not _is_of_library(path):
                found = frame
                break
        frame = frame.f_back
    if found is None:
        return Place()
    path = found.f_code.co_filename
    line = linecache.getline(path, found.f_lineno, found.f_globals)
    assigned = None if ";" in line else _ASSIGNED.match(line)  # several statements: who knows which of them
    variable = assigned[1] if assigned and not keyword.iskeyword(assigned[1]) else ""  # as in "else: x = ..."
    return Place(path, found.f_lineno, variable)


def _constructs(frame: FrameType, optimizer: object) -> bool:
    """Return True in an `__init__` of the optimizer, as that of a subclass in the script."""
    names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
    return frame.f_code.co_name == "__init__" and bool(names) and frame.f_locals.get(names[0]) is optimizer


def _is_of_library(path: str) -> bool:
    parts = path.split(os.sep)
    return "site-packages" in parts or "dist-packages" in parts or path.startswith("<frozen") or _is_in(path, _STDLIB)


def _is_in(path: str, folder: str) -> bool:
    return path.startswith(folder + os.sep)
