"""Observe the calls of a function while a script runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Function = Callable[..., Any]


@contextmanager
def wrapped(holder: Any, name: str, around: Callable[[Function], Function]) -> Iterator[None]:
    """Put what `around` makes of an attribute in its place, until the block ends or someone else has replaced it.

    Example:
        >>> class Thing:
        ...     def size(self):
        ...         return 3
        >>> with wrapped(Thing, "size", lambda size: lambda self: 10 * size(self)):
        ...     Thing().size()
        30
        >>> Thing().size()
        3
    """
    original = vars(holder)[name]
    ours = functools.wraps(original)(around(original))
    setattr(holder, name, ours)
    try:
        yield
    finally:
        if vars(holder).get(name) is ours:
            setattr(holder, name, original)
