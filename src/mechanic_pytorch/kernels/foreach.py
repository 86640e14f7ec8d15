"""The same two functions over whole lists, by `torch._foreach_*`: few launches on a GPU, no compiler needed.

The lists are worked through in chunks, so that the scratch memory does not grow with the model.
"""

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from mechanic_pytorch.kernels.rule import Rule

Tensors: TypeAlias = list[Tensor] | tuple[Tensor, ...]

CHUNK = 2**24  # numbers: enough to fill a GPU, and some arrays of them are little beside a model that is larger


def measure(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    kept: Sequence[Tensor],
    copies: Sequence[Tensor] | None = None,
    compensations: Sequence[Tensor] | None = None,
    plain: bool = False,
) -> Tensor:
    """Return `[<delta, g>, <delta, x>, |g|^2, |x|^2]`, summed over all tensors; shape (4,). Fill `copies`."""
    more = [] if compensations is None or not plain else [compensations]
    sums = [_measure(*lists, plain=plain) for lists in _chunks(params, grads, kept, *more)]
    if copies is not None:
        torch._foreach_copy_(list(copies), list(params))
    return torch.stack(sums).sum(0)


def move(
    params: Sequence[Tensor],
    before: Sequence[Tensor],
    kept: Sequence[Tensor],
    compensations: Sequence[Tensor] | None,
    old_scale: Tensor,
    new_scale: Tensor,
    part: Tensor | None = None,
) -> None:
    """Rescale the base optimizer's step from `before` to `params`, in place."""
    for lists in _chunks(params, before, kept, *([] if compensations is None else [compensations])):
        _move(*lists, old_scale=old_scale, new_scale=new_scale, part=part)


def step_and_move(
    rule: Rule,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    kept: Sequence[Tensor],
    compensations: Sequence[Tensor] | None,
    old_scale: Tensor,
    new_scale: Tensor,
    part: Tensor | None = None,
) -> None:
    """Make the base's step and rescale it, in place."""
    before = [x.clone() for x in params]
    lr = rule.options["lr"]
    if not isinstance(lr, Tensor):  # a number would be compiled in, again for every new one
        rule = rule._replace(options={**rule.options, "lr": torch.full((), lr, dtype=torch.float32)})
    rule.apply(params, grads, rule.states, range(len(params)))
    move(params, before, kept, compensations, old_scale, new_scale, part)


def can_step(*lists: Sequence[Tensor]) -> bool:
    """Return True only for a compiler, which cannot look into the fused steps of torch's own classes."""
    return torch.compiler.is_compiling()


def _chunks(*lists: Sequence[Tensor]) -> Iterator[list[list[Tensor]]]:
    """Yield shorter lists of corresponding tensors, or of slices where a tensor is larger than a chunk."""
    chunk: list[Sequence[Tensor]] = []
    size = 0
    for tensors in zip(*lists, strict=True):
        n = tensors[0].numel()
        pieces: Sequence[Sequence[Tensor]] = [tensors]
        if n > CHUNK and all(t.is_contiguous() for t in tensors):
            slices = [t.view(-1).split(CHUNK) for t in tensors]
            pieces = list(zip(*slices, strict=True))
        for piece in pieces:
            if chunk and size + piece[0].numel() > CHUNK:
                yield [list(column) for column in zip(*chunk, strict=True)]
                chunk, size = [], 0
            chunk.append(piece)
            size += piece[0].numel()
    if chunk:
        yield [list(column) for column in zip(*chunk, strict=True)]


def _measure(
    params: list[Tensor],
    grads: list[Tensor],
    kept: list[Tensor],
    compensations: list[Tensor] | None = None,
    *,
    plain: bool,
) -> Tensor:
    dtype, deltas = kept[0].dtype, kept
    if plain:
        deltas = list(torch._foreach_sub([x.to(dtype) for x in params], kept))
        if compensations is not None:
            torch._foreach_add_(deltas, [compensation.to(dtype) for compensation in compensations])
    products = [
        # Type promotion does the product in the dtype of delta; one tensor at a time bounds the scratch memory.
        torch.stack([(delta * other).sum() for delta, other in zip(deltas, others, strict=True)]).sum()
        for others in (grads, params)
    ]
    squares = [torch.stack(torch._foreach_norm(tensors, 2, dtype=dtype)).square().sum() for tensors in (grads, params)]
    return torch.stack([*products, *squares])


def renew(kept: Tensors, updates: Tensors, starts: Tensors, part: Tensor | None) -> None:
    """Make delta = delta + update; or, of a plain step, x_ref = x_ref + part * (start - x_ref)."""
    if part is not None:
        updates = torch._foreach_sub(starts, kept)
        torch._foreach_mul_(updates, part)
    torch._foreach_add_(kept, updates)


def _move(
    params: list[Tensor],
    before: list[Tensor],
    kept: list[Tensor],
    compensations: list[Tensor] | None = None,
    *,
    old_scale: Tensor,
    new_scale: Tensor,
    part: Tensor | None,
) -> None:
    dtype = kept[0].dtype
    start = [x_before.to(dtype) for x_before in before]
    # Everything large comes first: running out of memory then leaves what is kept as it was.
    update = torch._foreach_sub([x.to(dtype) for x in params], start)
    step = torch._foreach_mul(update, new_scale)
    if part is None:
        torch._foreach_add_(step, torch._foreach_mul(kept, new_scale - old_scale))
    if compensations is None:
        renew(kept, update, start, part)
        torch._foreach_copy_(params, before)
        torch._foreach_add_(params, step)
    else:
        lost = [compensation.to(dtype) for compensation in compensations]
        unrounded = torch._foreach_add(start, lost, alpha=0.75)  # see for_loop
        overwritten = [u.to(x.dtype) != x for u, x in zip(unrounded, before, strict=True)]
        for tensor, mask in zip(lost, overwritten, strict=True):
            tensor.masked_fill_(mask, 0.0)
        renew(kept, update, start, part)
        torch._foreach_add_(start, lost)
        torch._foreach_add_(start, step)
        still = [s == 0 for s in step]  # see for_loop
        torch._foreach_copy_(params, start)
        torch._foreach_sub_(start, [x.to(dtype) for x in params])
        for x, x_before, stays in zip(params, before, still, strict=True):
            x.copy_(torch.where(stays, x_before, x))
        for rest, before_it, stays in zip(start, lost, still, strict=True):
            rest.copy_(torch.where(stays, before_it, rest))
        torch._foreach_copy_(list(compensations), start)
