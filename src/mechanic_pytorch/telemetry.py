"""What the tuner has learned, as numbers: now (`read_out`), and over the steps of a run (`Trace`).

Reading waits for the device, so it is done in one copy. A snapshot packs the tensors of interest into one, on their
device, without a sync; it can be read at once, or kept and read later.

Example:
    >>> import torch
    >>> from mechanic_pytorch import mechanize
    >>> from mechanic_pytorch.telemetry import Trace, read_out
    >>> p = torch.zeros(3, requires_grad=True)
    >>> optimizer = mechanize(torch.optim.SGD)([p], lr=1.0)
    >>> trace = Trace(optimizer)
    >>> for _ in range(3):
    ...     p.grad = torch.ones(3)
    ...     optimizer.step()
    >>> now = read_out(optimizer)
    >>> now.steps, now.effective_lr == optimizer.effective_lr()
    (3, True)
    >>> [row.steps for row in trace.read()], trace.read()[-1] == now
    ([1, 2, 3], True)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from mechanic_pytorch import kernels
from mechanic_pytorch._config import Config
from mechanic_pytorch._torch import can_sync
from mechanic_pytorch._tuner import STEPS, Tuner, entries_of
from mechanic_pytorch.mechanic import Mechanic, is_mechanized

T = TypeVar("T")


@dataclass(frozen=True)
class ReadOut:
    """What an optimizer had learned at one moment.

    There is one tuner, or, with `per_group=True`, one for each parameter group.

    Attributes:
        steps: made since the start or the last `reset`, skipped ones included.
        skipped_steps: how many of them were skipped.
        scale: per tuner.
        effective_lr: per parameter group: its lr at that moment, times its scale.
        learned_lr: per parameter group: for the plain optimizer, see `Mechanic.learned_lr`.
        max_product: m of the paper, per tuner and beta.
        sum_squared_products: v of the paper, in the same order.
        reward: r of the paper, in the same order.
        scales: s of the paper, in the same order.
        kernels: what does the work, per device; "foreach, because ..." where a faster one has failed its check.
    """

    steps: int
    skipped_steps: int
    scale: list[float]
    effective_lr: list[float]
    learned_lr: list[float]
    max_product: list[list[float]]
    sum_squared_products: list[list[float]]
    reward: list[list[float]]
    scales: list[list[float]]
    kernels: dict[str, str]

    def scalars(self, prefix: str = "mechanic/") -> dict[str, float]:
        """Return the numbers worth a curve, by name, as every logger takes them.

        They are effective lr and scale (of several each, with its number) and the skipped steps.

        Args:
            prefix: what all names begin with.

        Example:
            >>> import torch
            >>> from mechanic_pytorch import mechanize
            >>> optimizer = mechanize(torch.optim.SGD)([torch.zeros(3, requires_grad=True)], lr=1.0)
            >>> read_out(optimizer).scalars()
            {'mechanic/effective_lr': 0.0, 'mechanic/scale': 0.0, 'mechanic/skipped_steps': 0.0}
        """
        values = {
            f"{name}/{i}" if len(several) > 1 else name: value
            for name, several in (("effective_lr", self.effective_lr), ("scale", self.scale))
            for i, value in enumerate(several)
        }
        values["skipped_steps"] = float(self.skipped_steps)
        return {prefix + name: value for name, value in values.items()}


def read_out(optimizer: object) -> ReadOut:
    """Return what the optimizer has learned so far. One copy to the host.

    Args:
        optimizer: a mechanized one, or a wrapper of Accelerate, Lightning or DeepSpeed around it.

    Raises:
        TypeError: it is not mechanized.

    Example:
        >>> import torch
        >>> from mechanic_pytorch import mechanize
        >>> optimizer = mechanize(torch.optim.SGD)([torch.zeros(3, requires_grad=True)], lr=1.0)
        >>> read_out(optimizer).scale
        [0.0]
    """
    return read([snapshot(optimizer)])[0]


class Trace:
    """A record of what an optimizer learned, step by step, of bounded length. No step reads from the device for it.

    It holds every step until there are `capacity` of them, then every second one, and so on, always with the first.
    Each is kept as one tensor of some hundred bytes. Steps have the optimizer's own numbers, which its checkpoint
    holds: the trace of a resumed run goes on where that of the run before ended.

    It does not see steps that are compiled, or replayed as a CUDA graph: call `record` after them.

    Args:
        optimizer: a mechanized one, or a wrapper around it.
        capacity: how many steps are kept at most.

    Raises:
        TypeError: the optimizer is not mechanized.
        ValueError: the capacity is less than 1.

    Example:
        >>> import torch
        >>> from mechanic_pytorch import mechanize
        >>> p = torch.zeros(3, requires_grad=True)
        >>> optimizer = mechanize(torch.optim.SGD)([p], lr=1.0)
        >>> trace = Trace(optimizer, capacity=4)
        >>> for _ in range(8):
        ...     p.grad = torch.ones(3)
        ...     optimizer.step()
        >>> [(row.steps, len(row.effective_lr)) for row in trace.read()]
        [(1, 1), (3, 1), (5, 1), (7, 1)]
    """

    def __init__(self, optimizer: object, capacity: int = 1000) -> None:
        self._rows: Thinned[Snapshot] = Thinned(capacity)
        inner = _mechanized(optimizer)
        inner.register_step_post_hook(lambda stepped, *_: self.record(stepped) if can_sync(stepped) else None)

    def record(self, optimizer: object) -> None:
        """Record the present state. Steps call this, unless they are compiled or in a CUDA graph."""
        self._rows.add(lambda: snapshot(optimizer))

    def read(self) -> list[ReadOut]:
        """Return the steps kept, the first one first. One copy to the host."""
        return read(self._rows.values)


class Thinned(Generic[T]):
    """At most `capacity` of the values added: each, then every second one, every fourth, always with the first.

    Args:
        capacity: how many are kept at most.

    Raises:
        ValueError: it is less than 1.

    Example:
        >>> values = Thinned(4)
        >>> for i in range(11):
        ...     values.add(lambda: i)
        >>> values.values
        [0, 4, 8]
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"Thinned: capacity must be at least 1. Got {capacity!r}. Remedy: 1000 suits a plot.")
        self.values: list[T] = []
        self._capacity, self._stride, self._count = capacity, 1, 0

    def add(self, make: Callable[[], T]) -> None:
        """Take in what `make` returns; it is not called if that would not be kept."""
        if self._count % self._stride == 0:
            self.values.append(make())
        self._count += 1
        if len(self.values) > self._capacity:
            del self.values[1::2]
            self._stride *= 2


class _Place(NamedTuple):
    """What stands for a tensor in a snapshot's groups."""

    dtype: torch.dtype
    shape: torch.Size


class Snapshot(NamedTuple):
    """What a read-out is made of, still on the device."""

    config: Config
    groups: list[dict[str, Any]]
    kernels: dict[str, str]
    packed: Tensor  # the bytes of all tensors that the groups hold, in order, on the tuner's device


def snapshot(optimizer: object) -> Snapshot:
    """Return the present state of a mechanized optimizer, or of one in a wrapper, without a sync.

    Raises:
        TypeError: it is not mechanized.
    """
    inner = _mechanized(optimizer)
    held = inner.mechanic_tuner.groups
    device = held[0][STEPS].device
    groups: list[dict[str, Any]] = []
    parts = []
    for group in held:
        groups.append({"params": []})
        for key, value in entries_of(group).items():
            if isinstance(value, Tensor):
                # Bytes, because the counters are integers, and not every device has the float type that holds them.
                parts.append(value.detach().to(device).reshape(-1).view(torch.uint8))
                value = _Place(value.dtype, value.shape)
            groups[-1][key] = value
    devices = {p.device: None for group in held for p in group["params"]}
    in_use = {str(device): kernels.in_use(device) for device in devices}
    return Snapshot(inner.mechanic_config, groups, in_use, torch.cat(parts))


def read(snapshots: Sequence[Snapshot]) -> list[ReadOut]:
    """Return what snapshots hold. One copy to the host."""
    if not snapshots:
        return []
    device = snapshots[-1].packed.device  # others may have been taken before the first step, or before a move
    packed = torch.cat([each.packed.to(device) for each in snapshots]).cpu()
    sizes = [each.packed.numel() for each in snapshots]
    return [_read_one(each, part) for each, part in zip(snapshots, torch.split(packed, sizes), strict=True)]


def _read_one(taken: Snapshot, packed: Tensor) -> ReadOut:
    groups: list[dict[str, Any]] = []
    at = 0
    for group in taken.groups:
        groups.append({})
        for key, value in group.items():
            if isinstance(value, _Place):
                start, at = at, at + value.shape.numel() * value.dtype.itemsize
                value = packed[start:at].clone().view(value.dtype).reshape(value.shape)
            groups[-1][key] = value
    tuner = Tuner(taken.config).at(groups)
    return ReadOut(
        steps=tuner.steps,
        skipped_steps=tuner.skipped_steps,
        scale=tuner.scale.tolist(),
        effective_lr=tuner.effective_lr(),
        learned_lr=tuner.learned_lr(),
        **{name: rows.tolist() for name, rows in tuner.state._asdict().items()},
        kernels=taken.kernels,
    )


def unwrap(optimizer: object) -> Mechanic | None:
    """Return the mechanized optimizer, which may be this one or inside wrappers around it, or None."""
    while not (optimizer is None or is_mechanized(optimizer)):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def _mechanized(optimizer: object) -> Mechanic:
    found = unwrap(optimizer)
    if found is None:
        raise TypeError(
            f"telemetry: the optimizer must be mechanized. Got {type(optimizer).__name__}. Remedy: build it with "
            "mechanize, as in mechanize(torch.optim.AdamW)(model.parameters(), lr=1.0)."
        )
    return found
