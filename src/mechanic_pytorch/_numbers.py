"""Arithmetic on the few numbers of a tuner: tensors, or on a CPU numbers and arrays of numpy.

An operation on a tensor of one number takes microseconds, on a number of numpy a tenth of one, and the rules of
`_auto.py` are hundreds of them at each step. So on a CPU they work on what `quick` returns. Elsewhere, while a compiler
records the step, and where numpy is not installed, they work on tensors. What both have in common, such as operators,
is written as it is; this file has the rest. A NaN stays one in all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from importlib import import_module
from typing import Any, ParamSpec, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

numpy: Any = None  # torch does without it, or without a version that it was not built for
with suppress(ImportError, RuntimeError):
    torch.empty(0).numpy()
    numpy = import_module("numpy")

Numbers: TypeAlias = Tensor  # or what `quick` returns, which only this file has to tell apart
T = TypeVar("T")
P = ParamSpec("P")
ONE = (numpy.float64, numpy.bool_) if numpy else ()


def quick(numbers: T) -> T:
    """Return what is quicker than a tensor on a CPU: an array, which shares its memory; or numbers, if G is 1.

    Args:
        numbers: a tensor whose first dimension is G, if it has one; a named tuple of such tensors; or anything else,
            which is returned as it is.
    """
    if not _is_quicker():
        return numbers
    if hasattr(numbers, "_make"):
        return cast("T", numbers._make(map(quick, cast("tuple[Any, ...]", numbers))))
    there: Any = numbers
    if type(there) is not Tensor or there.device.type != "cpu":  # a `FakeTensor` is of another class
        return numbers
    array = there.numpy()
    return cast("T", array[0] if array.ndim and len(array) == 1 else array[()])


def tensors(numbers: T, rows: int) -> T:
    """Return tensors again, for `rows` tuners; anything else as it is."""
    if not _is_quicker():
        return numbers
    if hasattr(numbers, "_make"):
        return cast("T", numbers._make(tensors(each, rows) for each in cast("tuple[Any, ...]", numbers)))
    if not isinstance(numbers, (numpy.ndarray, *ONE)):
        return numbers
    array = numpy.asarray(numbers)
    return cast("T", torch.from_numpy(array[None] if rows == 1 else array))


def _is_quicker() -> bool:
    """Return whether there is something that is quicker than tensors."""
    return numpy is not None and not torch.compiler.is_compiling()


def unwarned(function: Callable[P, T]) -> Callable[P, T]:
    """Return the same function without numpy's warnings of 0/0 and overflow, which torch does not give either."""
    if numpy is None:
        return function
    silent = numpy.errstate(all="ignore")(function)

    @wraps(function)
    def chosen(*args: P.args, **kwargs: P.kwargs) -> T:
        return function(*args, **kwargs) if torch.compiler.is_compiling() else silent(*args, **kwargs)

    return chosen


def where(condition: Numbers, numbers: Any, other: Any) -> Numbers:
    """Return `numbers` where the condition holds, and `other` elsewhere; either may be a plain number."""
    if isinstance(condition, ONE):
        return _plain(numbers if condition else other)
    which: Any = torch.where if isinstance(condition, Tensor) else numpy.where
    return cast("Numbers", which(condition, numbers, other))


def maximum(numbers: Numbers, other: Any) -> Numbers:
    """Return the larger ones; `other` may be a plain number."""
    if isinstance(numbers, ONE):
        return _plain(numbers if numbers > other or numbers != numbers else other)
    if not isinstance(numbers, Tensor):
        return cast("Numbers", numpy.maximum(numbers, other))
    return torch.maximum(numbers, other) if isinstance(other, Tensor) else numbers.clamp_min(other)


def minimum(numbers: Numbers, other: Any) -> Numbers:
    """Return the smaller ones; `other` may be a plain number."""
    if isinstance(numbers, ONE):
        return _plain(numbers if numbers < other or numbers != numbers else other)
    if not isinstance(numbers, Tensor):
        return cast("Numbers", numpy.minimum(numbers, other))
    return torch.minimum(numbers, other) if isinstance(other, Tensor) else numbers.clamp_max(other)


def _plain(number: Any) -> Numbers:
    """Return a number of numpy, which divides by 0, for one of Python; anything else as it is."""
    return cast("Numbers", numpy.float64(number) if type(number) is float else number)


def sqrt(numbers: Numbers) -> Numbers:
    """Return square roots."""
    return numbers.sqrt() if isinstance(numbers, Tensor) else numpy.sqrt(numbers)


def lerp(start: Numbers, end: Numbers, weight: Numbers) -> Numbers:
    """Return start + weight * (end - start): the end itself, to the bit, where the weight is 1."""
    if isinstance(start, Tensor):
        return torch.lerp(start, end, weight)
    way, is_near = end - start, weight < 0.5
    if isinstance(is_near, ONE):
        return start + weight * way if is_near else end - (1 - weight) * way
    return where(is_near, start + weight * way, end - (1 - weight) * way)


def column(numbers: Numbers) -> Numbers:
    """Return what goes with vectors of n numbers, shape (G, n): numbers of shape (G, 1)."""
    return numbers if isinstance(numbers, ONE) else numbers[..., None]


def columns(numbers: Numbers) -> Sequence[Numbers]:
    """Return the numbers in the last dimension of one or two, one by one."""
    return numbers.unbind(-1) if isinstance(numbers, Tensor) else [*numbers.T]


def stack(numbers: Sequence[Numbers]) -> Numbers:
    """Return numbers of shape () or (G,) side by side, in a new last dimension."""
    if isinstance(numbers[0], Tensor):
        return torch.stack([*numbers], -1)
    return cast("Numbers", numpy.array(numbers).T)


def all_finite(vectors: Sequence[Numbers]) -> Numbers:
    """Return whether all numbers are finite, shape ()."""
    if isinstance(vectors[0], Tensor):
        # A list: torch 2.11 compiles no stack of a tuple that `_replace` has made.
        return torch.stack([*vectors]).isfinite().all()
    return cast("Numbers", numpy.isfinite(vectors).all())


def zeros_like(numbers: Numbers) -> Numbers:
    """Return zeros."""
    return torch.zeros_like(numbers) if isinstance(numbers, Tensor) else numpy.zeros_like(numbers)


def constants(values: Sequence[float], like: Numbers) -> Numbers:
    """Return plain numbers in the dtype of others, shape (n,)."""
    if not isinstance(like, Tensor):
        return cast("Numbers", numpy.array(values))
    # Made on the device: a copy from the host would block a GPU.
    return torch.stack(torch._foreach_mul(like.new_ones(len(values)).unbind(), values))


def tiny(like: Numbers) -> float:
    """Return the smallest normal number of a dtype."""
    return torch.finfo(like.dtype if isinstance(like, Tensor) else torch.float64).tiny


def epsilon(like: Numbers) -> float:
    """Return the spacing of a dtype's numbers at 1."""
    return torch.finfo(like.dtype if isinstance(like, Tensor) else torch.float64).eps
