"""The same functions for CPUs, block by block: what one operation has read is still in the cache for the next.

A block is a slice of a large tensor, or a pack: as many small tensors as fill a block, copied side by side. The base's
own step can run on blocks, too (`step_and_move`): on a copy of a block, which is all that is ever copied.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from mechanic_pytorch.kernels import for_loop
from mechanic_pytorch.kernels.rule import Rule

Part: TypeAlias = tuple[Tensor, ...]  # what a block has of one list: a slice of a tensor, or some small tensors

BLOCK = 2**19  # numbers: some arrays of that size fit a cache, and it hides what a call costs
SMALL = 2**14  # tensors of less are cheaper to copy side by side than to treat one by one


def measure(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    deltas: Sequence[Tensor],
    copies: Sequence[Tensor] | None = None,
) -> Tensor:
    """Return `[<delta, g>, <delta, x>, |g|^2, |x|^2]`, summed over all tensors; shape (4,). Fill `copies`."""
    dtype = deltas[0].dtype
    sums = []
    for _, xs, gs, ds, *copied in _blocks(params, grads, deltas, *([] if copies is None else [copies])):
        x, g, delta = (_line(part).to(dtype) for part in (xs, gs, ds))
        if copied:
            torch._foreach_copy_(copied[0], xs)
        sums += [delta.dot(g), delta.dot(x), g.dot(g), x.dot(x)]
    return torch.stack(sums).view(-1, 4).sum(0) if sums else deltas[0].new_zeros(4)


def move(
    params: Sequence[Tensor],
    before: Sequence[Tensor],
    deltas: Sequence[Tensor],
    compensations: Sequence[Tensor] | None,
    old_scale: Tensor,
    new_scale: Tensor,
) -> None:
    """Rescale the base optimizer's step from `before` to `params`, in place."""
    for _, xs, starts, *ours in _blocks(params, before, deltas, *([] if compensations is None else [compensations])):
        if _is_slice(xs) and compensations is None:
            _move_slice(xs[0] - starts[0], starts[0], ours[0][0], old_scale, new_scale, out=xs[0])
        else:
            _move_pack(_line(xs), _line(starts), xs, *ours, old_scale=old_scale, new_scale=new_scale)


def step_and_move(
    rule: Rule,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    deltas: Sequence[Tensor],
    compensations: Sequence[Tensor] | None,
    old_scale: Tensor,
    new_scale: Tensor,
) -> None:
    """Make the base's step and rescale it, in place."""
    lists = [params, grads, deltas, *([] if compensations is None else [compensations])]
    n, scratch = len(lists), torch.empty(BLOCK, dtype=params[0].dtype)
    for indices, *parts in _blocks(*lists, *rule.states):
        (xs, gs, *ours), states = parts[:n], parts[n:]
        if _is_slice(xs):
            after = scratch[: len(xs[0])].copy_(xs[0])
            pieces: Part = (after,)
            start = xs[0]
        else:
            start = _packed(xs)
            after = start.clone()
            pieces = _unpacked(after, xs)
        rule.apply(pieces, gs, states, indices)
        if _is_slice(xs) and compensations is None:
            _move_slice(after.sub_(start), start, ours[0][0], old_scale, new_scale, out=start)
        else:
            _move_pack(after, start, xs, *ours, old_scale=old_scale, new_scale=new_scale)


def can_step(params: Sequence[Tensor], *others: Sequence[Tensor]) -> bool:
    """Tell whether all tensors of each parameter lie in memory in the same order, as `step_and_move` needs them."""
    if all([t.is_contiguous() for tensors in (params, *others) for t in tensors]):  # noqa: C419  # see _aligned
        return True
    return all(_aligned(tensors) is not None for tensors in zip(params, *others, strict=True))


def _move_slice(
    update: Tensor, start: Tensor, delta: Tensor, old_scale: Tensor, new_scale: Tensor, out: Tensor
) -> None:
    torch.addcmul(start, delta, new_scale - old_scale, out=out)
    out.addcmul_(update, new_scale)
    delta.add_(update)


def _move_pack(
    after: Tensor,
    start: Tensor,
    xs: Part,
    deltas: Part,
    compensations: Part | None = None,
    *,
    old_scale: Tensor,
    new_scale: Tensor,
) -> None:
    delta = _line(deltas)
    if compensations is not None:
        compensation = _line(compensations)
        for_loop.move([after], [start], [delta], [compensation], old_scale, new_scale)
        for line, part in [(after, xs), (delta, deltas), (compensation, compensations)]:
            if line is not part[0]:
                torch._foreach_copy_(part, _unpacked(line, part))
        return
    update = after.sub_(start)
    pieces = _unpacked(update, xs)  # they share its memory
    torch._foreach_add_(deltas, pieces)
    update.mul_(new_scale).addcmul_(delta, new_scale - old_scale).add_(start)
    torch._foreach_copy_(xs, pieces)


def _blocks(*lists: Sequence[Tensor]) -> Iterator[tuple[tuple[Any, ...], ...]]:
    """Yield indices into the lists and, for each list, the corresponding parts of its tensors."""
    pack: list[tuple[Any, ...]] = []
    size = 0
    for i, tensors in enumerate(zip(*lists, strict=True)):
        n = tensors[0].numel()
        aligned = _aligned(tensors)
        if n >= SMALL and aligned is not None:
            lines = [t.view(-1) for t in aligned]
            for start in range(0, n, BLOCK):
                yield (i,), *([(line[start : start + BLOCK],) for line in lines] if n > BLOCK else zip(lines))
        elif n > 0:
            pack.append((i, *(aligned or tensors)))
            size += n
            if size >= BLOCK:
                yield tuple(zip(*pack, strict=True))
                pack, size = [], 0
    if pack:
        yield tuple(zip(*pack, strict=True))


def _aligned(tensors: Sequence[Tensor]) -> Sequence[Tensor] | None:
    """Return contiguous views of tensors that lie in memory in the same order, without gaps; else None."""
    if all([t.is_contiguous() for t in tensors]):  # noqa: C419  # a list is faster than a generator
        return tensors
    order = sorted(range(tensors[0].ndim), key=tensors[0].stride, reverse=True)
    tensors = [t.permute(order) for t in tensors]
    return tensors if all(t.is_contiguous() for t in tensors) else None


def _is_slice(part: Part) -> bool:
    return len(part) == 1 and part[0].ndim == 1 and part[0].is_contiguous()


def _line(part: Part) -> Tensor:
    return part[0] if _is_slice(part) else _packed(part)


def _packed(part: Part) -> Tensor:
    """Return copies of tensors, side by side."""
    line: Tensor = _flatten_dense_tensors(part)  # type: ignore[no-untyped-call]
    return line.clone() if len(part) == 1 else line  # of one tensor, torch returns a view


def _unpacked(line: Tensor, part: Part) -> Part:
    """Return the places in a line where `_packed` put each tensor, in its shape."""
    return _unflatten_dense_tensors(line, part)  # type: ignore[no-any-return,no-untyped-call]
