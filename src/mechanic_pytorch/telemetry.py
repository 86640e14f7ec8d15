"""What a run did, step by step, kept on the device and looked at afterwards.

Example:
    >>> import torch
    >>> from mechanic_pytorch import mechanize
    >>> from mechanic_pytorch.telemetry import Trace
    >>> p = torch.zeros(3, requires_grad=True)
    >>> optimizer = mechanize(torch.optim.SGD)([p], lr=1.0)
    >>> trace = Trace(optimizer)
    >>> for _ in range(3):
    ...     p.grad = torch.ones(3)
    ...     optimizer.step()
    >>> [step for step, effective_lr in trace.read()]
    [1, 2, 3]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mechanic_pytorch.mechanic import Mechanic


class Trace:
    """A bounded record of the effective lr over steps. No step reads from the device for it.

    It holds every step until there are `capacity` of them, then every second one, and so on. Steps of a compiled
    `optimizer.step` are not recorded.
    """

    def __init__(self, optimizer: Mechanic, capacity: int = 1000) -> None:
        self._capacity = capacity
        self._stride, self._steps = 1, 0
        self._rows: list[tuple[int, Tensor, list[Any]]] = []
        optimizer.register_step_post_hook(self._record)

    def read(self) -> list[tuple[int, list[float]]]:
        """Return (step, the effective lr of each parameter group), from the first step recorded to the last."""
        return [(step, [float(lr) * float(scale) for lr in lrs]) for step, scale, lrs in self._rows]

    def _record(self, optimizer: Any, args: object, kwargs: object) -> None:
        if torch.compiler.is_compiling():
            return
        self._steps += 1
        if self._steps % self._stride:
            return
        lrs = [group.get("lr") for group in optimizer.param_groups]
        values = [1.0 if lr is None else lr.clone() if isinstance(lr, Tensor) else lr for lr in lrs]
        self._rows.append((self._steps, optimizer.scale.clone(), values))
        if len(self._rows) > self._capacity:
            self._stride *= 2
            self._rows = [row for row in self._rows if row[0] % self._stride == 0]
