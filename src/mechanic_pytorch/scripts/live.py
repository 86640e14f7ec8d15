"""One line on a terminal, below what a script prints, that says what is learned while the script runs."""

from __future__ import annotations

import builtins
import functools
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import RLock

from rich.cells import cell_len, set_cell_size

_STYLE = re.compile(r"\x1b\[[0-9;]*m")  # colors, which move nothing
_MOVES = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # after which nobody knows where the cursor is


class LiveLine:
    """A line below the cursor, redrawn after everything that the script writes to the terminal.

    It sees what Python writes to stdout and stderr. A script that moves the cursor, other than back to the
    start of a line, ends it: two cannot draw on one screen.

    Args:
        seconds: how often the text is asked for.
        text: what it says now, or "" if there is nothing to say. May wait for the device.
    """

    def __init__(self, seconds: float, text: Callable[[], str]) -> None:
        self._seconds, self._text = seconds, text
        self._due = time.monotonic() + seconds
        self._now = ""  # what it says
        self._tail = ""  # what stands on the line of the cursor, left of it
        self._is_drawn = self._is_open = False
        self._streams: list[io.TextIOWrapper] = []
        self._write: Callable[[str], int] = sys.stderr.write
        self._process, self._lock = os.getpid(), RLock()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Draw in this block, if stderr is a terminal."""
        both = sys.stderr, sys.stdout
        self._streams = [each for each in both if isinstance(each, io.TextIOWrapper) and each.isatty()]
        self._is_open = sys.stderr in self._streams and os.environ.get("TERM", "dumb") != "dumb"
        self._write, ask = sys.stderr.write, builtins.input
        if self._is_open:
            for stream in self._streams:
                vars(stream)["write"] = self._around(stream.write)
            builtins.input = self._before(ask)
        try:
            yield
        finally:
            self.close()
            for stream in self._streams:
                vars(stream).pop("write", None)
            builtins.input = ask

    def tick(self) -> None:
        """Ask for the text and draw it, if it is time."""
        if self._is_here() and time.monotonic() >= self._due:
            self._due = time.monotonic() + self._seconds
            now = self._text()
            with self._lock:
                self._erase()
                self._now = now
                self._draw()

    def _is_here(self) -> bool:
        """Return False when it is closed, and in a process that the script has forked."""
        return self._is_open and os.getpid() == self._process

    def _around(self, write: Callable[[str], int]) -> Callable[[str], int]:
        def around(text: str) -> int:
            if not self._is_here():
                return write(text)
            with self._lock:
                self._erase()
                count = write(text)
                if _MOVES.search(_STYLE.sub("", text)):
                    self.close()
                else:
                    self._tail = re.split(r"[\n\r]", self._tail + text)[-1]
                    self._draw()
            return count

        return around

    def _before(self, ask: Callable[..., str]) -> Callable[..., str]:
        @functools.wraps(ask)
        def around(*prompt: object) -> str:
            if self._is_here():
                with self._lock:
                    self._erase()
                    self._tail = ""  # where the answer ends
            return ask(*prompt)

        return around

    def _draw(self) -> None:
        """Write it below the line of the cursor, and what is left of the cursor once more, so as to come back."""
        with suppress(OSError, ValueError):  # the terminal has gone
            width = os.get_terminal_size(self._streams[0].fileno()).columns or 80
            if self._is_open and self._now and cell_len(_STYLE.sub("", self._tail).expandtabs()) < width:
                for stream in self._streams:
                    stream.flush()  # else what waits there would be written twice
                line = self._now if cell_len(self._now) < width else set_cell_size(self._now, width - 2) + "…"
                self._is_drawn = True
                self._put(f"\n{line}\x1b[K\x1b[A\r{self._tail}")

    def _erase(self) -> None:
        if self._is_drawn:
            self._is_drawn = False
            with suppress(OSError, ValueError):
                self._put("\x1b[B\x1b[2K\x1b[A")

    def _put(self, text: str) -> None:
        self._write(text)
        self._streams[0].flush()

    def close(self) -> None:
        """Erase it, and draw it no more."""
        with self._lock:
            self._erase()
            self._is_open = False
