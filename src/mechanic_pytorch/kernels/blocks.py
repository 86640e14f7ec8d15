"""The same functions for CPUs, block by block: what one operation has read is still in the cache for the next.

A block is a slice of a large tensor, or a pack: some small tensors, copied side by side. The base's own step can run on
blocks, too (`step_and_move`), where it makes the update of a block in a buffer of that size.
"""

from collections.abc import Iterator
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from mechanic_pytorch.kernels import for_loop, foreach
from mechanic_pytorch.kernels.arguments import Scales, Tensors
from mechanic_pytorch.kernels.rule import Rule

Part: TypeAlias = Tensor | tuple[Tensor, ...]  # what a block has of one list: a slice, or the tensors of a pack

BLOCK = 2**19  # numbers: some arrays of that size fit a cache, and it hides what a call costs
ALIGN = 2**6  # a cut at multiples of this many numbers leaves it to the same instructions what becomes of each
SMALL = 2**13  # tensors of less are cheaper to copy side by side than to treat one by one
SMALL_STEP = 2**16  # the same where copies of the weights alone are made, which are needed anyway
PACK = 2**17  # until there are so many numbers: the memory of larger copies goes back to the system, again and again


def measure(
    params: Tensors,
    grads: Tensors,
    stored: Tensors,
    before: Tensors | None = None,
    compensations: Tensors | None = None,
    plain: bool = False,
    grad_factor: Tensor | None = None,
) -> Tensor:
    """Return `[<delta, g>, <delta, x>, |g|^2, |x|^2]`, if plain also `|delta|^2`, over all tensors. Fill `before`."""
    dtype = stored[0].dtype
    converts = any([t.dtype != dtype for tensors in (params, grads) for t in tensors])  # noqa: C419  # see are_contiguous
    sums = []
    more = [lists for lists in (before, compensations if plain else None) if lists is not None]
    for _, xs, gs, ks, *others in _blocks(params, grads, stored, *more, small=SMALL):
        x, g, delta = _line(xs), _line(gs), _line(ks)
        if before is not None:
            _copy(others[0], xs)
        if converts:
            x, g = x.to(dtype), g.to(dtype)
        if grad_factor is not None:
            g = g * grad_factor
        if plain:
            delta = x - delta
            if compensations is not None:
                delta += _line(others[-1])
        sums += [delta.dot(g), delta.dot(x), g.dot(g), x.dot(x), *([delta.dot(delta)] if plain else [])]
    width = 5 if plain else 4
    return torch.stack(sums).view(-1, width).sum(0) if sums else stored[0].new_zeros(width)


def move(
    params: Tensors,
    before: Tensors,
    stored: Tensors,
    compensations: Tensors | None,
    scales: Scales,
) -> Tensor | None:
    """Rescale the base optimizer's step from `before` to `params`, in place; return |update|^2 if it is plain."""
    lists = [params, before, stored, *([] if compensations is None else [compensations])]
    squares = []
    for _, xs, starts, *ours in _blocks(*lists, small=SMALL):
        if isinstance(xs, Tensor) and compensations is None:
            squares.append(_move_slice(xs - starts, starts, ours[0], scales, out=xs))
        else:
            squares.append(_move_pack(_line(xs), _line(starts), xs, *ours, scales=scales))
    return foreach.added(squares, scales, like=stored)


def step_and_move(
    rule: Rule,
    params: Tensors,
    grads: Tensors,
    stored: Tensors,
    compensations: Tensors | None,
    scales: Scales,
) -> Tensor | None:
    """Make the base's step and rescale it, in place; return |update|^2 if it is plain."""
    lists = [params, grads, stored, *([] if compensations is None else [compensations])]
    n, scratch = len(lists), torch.empty(BLOCK, dtype=params[0].dtype)
    shrink, rest = rule.without_decay()
    squares: list[Tensor | None] = []
    for indices, *parts in _blocks(*lists, *rule.states, small=SMALL_STEP if compensations is None else SMALL):
        (xs, gs, *ours), states = parts[:n], [_tensors(part) for part in parts[n:]]
        if compensations is not None:
            start = _line(xs)
            after = start.clone()
            rule.apply(_unpacked(after, _tensors(xs)), _tensors(gs), states, indices)
            squares.append(_move_pack(after, start, xs, *ours, scales=scales))
            continue
        factor = 1.0 if shrink is None else -shrink
        line = torch.mul(xs, factor, out=scratch[: len(xs)]) if isinstance(xs, Tensor) else _packed(xs).mul_(factor)
        xs, gs, ks = _tensors(xs), _tensors(gs), _tensors(ours[0])
        updates = _unpacked(line, xs)
        rest.apply(updates, gs, states, indices)
        if shrink is None:
            torch._foreach_sub_(updates, xs)
        if scales.follow is None:
            _sgd(xs, updates, ks, lr=scales.old - scales.new)
            _sgd(xs, updates, (), lr=-scales.old)
        else:
            squares.append(line.dot(line))
            _renew(ks, updates, xs, scales.follow)
            _sgd(xs, updates, (), lr=-scales.new)
    return foreach.added(squares, scales, like=stored)


def can_step(params: Tensors, *others: Tensors) -> bool:
    """Return True if all tensors of each parameter lie in memory in the same order, as `step_and_move` needs them."""
    if are_contiguous(params, *others):
        return True
    return all(contiguous_views(tensors) is not None for tensors in zip(params, *others, strict=True))


def _sgd(xs: tuple[Tensor, ...], updates: tuple[Tensor, ...], deltas: tuple[Tensor, ...], lr: Tensor) -> None:
    """Make delta += update and x -= lr * delta in one pass over all; without deltas, x -= lr * update."""
    options = {"weight_decay": 0.0, "dampening": 0.0, "nesterov": False, "maximize": False, "is_first_step": False}
    torch._fused_sgd_(xs, updates, deltas, lr=lr, momentum=1.0 if deltas else 0.0, **options)  # type: ignore[call-overload]


def _move_slice(update: Tensor, start: Tensor, stored: Tensor, scales: Scales, out: Tensor) -> Tensor | None:
    if scales.follow is None:
        torch.addcmul(start, stored, scales.new - scales.old, out=out)
        out.addcmul_(update, scales.new)
    else:
        torch.addcmul(start, update, scales.new, out=out)
    _renew((stored,), (update,), (start,), scales.follow)
    return None if scales.follow is None else update.dot(update)


def _renew(
    stored: tuple[Tensor, ...], updates: tuple[Tensor, ...], starts: tuple[Tensor, ...], follow: Tensor | None
) -> None:
    """Do what `foreach.renew` does; of a single one in one pass."""
    if follow is not None and len(stored) == 1:
        stored[0].lerp_(starts[0], follow)
    else:
        foreach.renew(stored, updates, starts, follow)


def _move_pack(
    after: Tensor,
    start: Tensor,
    xs: Part,
    stored: Part,
    compensations: Part | None = None,
    *,
    scales: Scales,
) -> Tensor | None:
    line_stored = _line(stored)
    if compensations is not None:
        compensation = _line(compensations)
        squares = for_loop.move([after], [start], [line_stored], [compensation], scales)
        for line, to in [(after, xs), (line_stored, stored), (compensation, compensations)]:
            if line is not to:
                _copy(to, line if isinstance(to, Tensor) else _unpacked(line, to))
        return squares
    xs, stored = cast("tuple[Tensor, ...]", xs), cast("tuple[Tensor, ...]", stored)
    update = after.sub_(start)
    squares = None if scales.follow is None else update.dot(update)
    pieces = _unpacked(update, xs)  # they share its memory
    _renew(stored, pieces, _unpacked(start, xs), scales.follow)
    update.mul_(scales.new)
    if scales.follow is None:
        update.addcmul_(line_stored, scales.new - scales.old)
    update.add_(start)
    torch._foreach_copy_(xs, pieces)
    return squares


def _blocks(*lists: Tensors, small: int) -> Iterator[tuple[Any, ...]]:
    """Yield indices into the lists and, for each list, the corresponding part of its tensors; packs of `small` ones."""
    pack: list[tuple[Any, ...]] = []
    size = 0
    is_plain = are_contiguous(*lists)
    for i, tensors in enumerate(zip(*lists, strict=True)):
        n = tensors[0].numel()
        views = tensors if is_plain else contiguous_views(tensors)
        if n >= small and views is not None:
            lines = [t.view(-1) for t in views]
            if n > BLOCK:
                length = -(-n // -(-n // BLOCK) // ALIGN) * ALIGN
                cuts = tuple(range(length, n, length))
                slices = [line.tensor_split(cuts) for line in lines]
                yield from zip([(i,)] * len(slices[0]), *slices, strict=True)
            else:
                yield (i,), *lines
        elif n > 0:
            pack.append((i, *(views or tensors)))
            size += n
            if size >= PACK:
                yield tuple(zip(*pack, strict=True))
                pack, size = [], 0
    if pack:
        yield tuple(zip(*pack, strict=True))


def are_contiguous(*lists: Tensors) -> bool:
    """Return True if all tensors of all lists are contiguous."""
    return all([t.is_contiguous() for tensors in lists for t in tensors])  # noqa: C419  # faster than a generator


def contiguous_views(tensors: Tensors) -> Tensors | None:
    """Return contiguous views of tensors that lie in memory in the same order, without gaps; else None."""
    if are_contiguous(tensors):
        return tensors
    order = sorted(range(tensors[0].ndim), key=tensors[0].stride, reverse=True)
    tensors = [t.permute(order) for t in tensors]
    return tensors if all(t.is_contiguous() for t in tensors) else None


def _tensors(part: Part) -> tuple[Tensor, ...]:
    return (part,) if isinstance(part, Tensor) else part


def _copy(to: Part, part: Part) -> None:
    if isinstance(to, Tensor):
        to.copy_(cast("Tensor", part))
    else:
        torch._foreach_copy_(to, cast("tuple[Tensor, ...]", part))


def _line(part: Part) -> Tensor:
    """Return a slice as it is, or copies of a pack's tensors, side by side."""
    return part if isinstance(part, Tensor) else _packed(part)


def _packed(tensors: tuple[Tensor, ...]) -> Tensor:
    line: Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    return line.clone() if len(tensors) == 1 else line  # of one tensor, torch returns a view


def _unpacked(line: Tensor, tensors: Tensors) -> tuple[Tensor, ...]:
    """Return the places in a line where `_packed` put each tensor, in its shape."""
    return _unflatten_dense_tensors(line, tensors)  # type: ignore[no-any-return,no-untyped-call]
