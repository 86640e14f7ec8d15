"""The processes that a script starts by `multiprocessing`, and what becomes of optimizers that are built there."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

from mechanic_pytorch.scripts.wrapping import Function, wrapped


@dataclass(frozen=True)
class Child:
    """A process.

    Attributes:
        name: as `multiprocessing` calls it.
        target: the function that it runs.
        start_method: "fork", "spawn" or "forkserver".
    """

    name: str
    target: str
    start_method: str

    @property
    def loads_data(self) -> bool:
        """Whether it is a worker of a `DataLoader`, in which nothing is trained."""
        return self.target.startswith("torch.utils.data.")

    @property
    def is_covered(self) -> bool:
        """Whether optimizers that are built there are mechanized, as they are here: a fork has all that is here."""
        return self.start_method == "fork"


class Children:
    """All that were started inside `watching`."""

    def __init__(self) -> None:
        self.started: list[Child] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """List every process that this one starts in the block."""
        with wrapped(BaseProcess, "start", self._start):
            yield

    def _start(self, original: Function) -> Function:
        def start(process: Any) -> None:
            child = _child(process)  # before it starts, because then it forgets its target
            original(process)
            self.started.append(child)

        return start

    def as_json(self) -> list[dict[str, Any]]:
        """Return what the report holds."""
        return [{**vars(each), "covered": each.is_covered, "loads_data": each.loads_data} for each in self.started]

    def sentences(self) -> list[str]:
        """Say which processes were not covered, or are not in the report. Workers of a `DataLoader` are not news."""
        said = []
        for is_covered, how, then in (
            (False, "spawned", "optimizers built there stay plain. Remedy: torchrun -m mechanic_pytorch run"),
            (True, "forked", "optimizers built there are mechanized, too, but are not in this report"),
        ):
            targets = Counter(
                each.target for each in self.started if each.is_covered == is_covered and not each.loads_data
            )
            named = ", ".join(f"{target} ({count})" if count > 1 else target for target, count in targets.items())
            if targets:
                count = sum(targets.values())
                processes = f"{count} process{'es' * (count > 1)}"
                said.append(f"the script has {how} {processes}, {named}: {then}")
        return said


def _child(process: Any) -> Child:
    target, args = getattr(process, "_target", None), getattr(process, "_args", ())
    if getattr(target, "__module__", "") == "torch.multiprocessing.spawn" and args:
        target = args[0]  # which `torch.multiprocessing.spawn` calls by a function of its own
    target = target or type(process)
    name = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)}".removeprefix("__main__.")
    method = getattr(process, "_start_method", None) or multiprocessing.get_start_method()
    return Child(process.name, name, method)
