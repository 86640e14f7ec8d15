"""The same two functions over whole lists, by `torch._foreach_*`: few launches on a GPU, no compiler needed.

The lists are worked through in chunks, so that the scratch memory does not grow with the model.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mechanic_pytorch.kernels.arguments import Scales, Tensors
from mechanic_pytorch.kernels.rule import Rule

CHUNK = 2**24  # numbers: enough to fill a GPU, and some arrays of them are little beside a model that is larger


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
    more = [] if compensations is None or not plain else [compensations]
    sums = [_measure(*lists, plain=plain, grad_factor=grad_factor) for lists in _chunks(params, grads, stored, *more)]
    if before is not None:
        torch._foreach_copy_(list(before), list(params))
    return torch.stack(sums).sum(0)


def move(
    params: Tensors,
    before: Tensors,
    stored: Tensors,
    compensations: Tensors | None,
    scales: Scales,
) -> Tensor | None:
    """Rescale the base optimizer's step from `before` to `params`, in place; return |update|^2 if it is plain."""
    lists = [params, before, stored, *([] if compensations is None else [compensations])]
    return added([_move(*chunk, scales=scales) for chunk in _chunks(*lists)], scales, like=stored)


def step_and_move(
    rule: Rule,
    params: Tensors,
    grads: Tensors,
    stored: Tensors,
    compensations: Tensors | None,
    scales: Scales,
) -> Tensor | None:
    """Make the base's step and rescale it, in place; return |update|^2 if it is plain."""
    before = [x.clone() for x in params]
    if not torch.compiler.is_compiling():
        rule.apply(params, grads, rule.states, range(len(params)))
    else:
        lr = rule.options["lr"]
        if not isinstance(lr, Tensor):  # a backend that takes numbers compiles it once, and not again for each new one
            lr = torch.full((), lr, dtype=torch.float64)
        rule._replace(options={**rule.options, "lr": lr}).apply_traced(params, grads)
    return move(params, before, stored, compensations, scales)


def added(squares: Sequence[Tensor | None], scales: Scales, like: Tensors) -> Tensor | None:
    """Return the sum of squares, shape (), in the dtype of `like`, if a step by these scales is plain; else None."""
    if scales.follow is None:
        return None
    return torch.stack([like[0].new_zeros(()), *[each for each in squares if each is not None]]).sum()


def can_step(*lists: Tensors) -> bool:
    """Return True only for a compiler, which cannot look into the fused steps of torch's own classes."""
    return torch.compiler.is_compiling()


def _chunks(*lists: Tensors) -> Iterator[list[list[Tensor]]]:
    """Yield shorter lists of corresponding tensors, or of slices where a tensor is larger than a chunk."""
    chunk: list[Tensors] = []
    size = 0
    for tensors in zip(*lists, strict=True):
        n = tensors[0].numel()
        pieces: Sequence[Tensors] = [tensors]
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
    stored: list[Tensor],
    compensations: list[Tensor] | None = None,
    *,
    plain: bool,
    grad_factor: Tensor | None,
) -> Tensor:
    dtype, deltas = stored[0].dtype, stored
    if grad_factor is not None:
        grads = list(torch._foreach_mul([g.to(dtype) for g in grads], grad_factor))
    if plain:
        deltas = list(torch._foreach_sub([x.to(dtype) for x in params], stored))
        if compensations is not None:
            torch._foreach_add_(deltas, [compensation.to(dtype) for compensation in compensations])
    products = [
        # Type promotion does the product in the dtype of delta; one tensor at a time bounds the scratch memory.
        torch.stack([(delta * other).sum() for delta, other in zip(deltas, others, strict=True)]).sum()
        for others in (grads, params)
    ]
    measured = [grads, params, *([deltas] if plain else [])]
    return torch.stack([*products, *[_squares(tensors, dtype) for tensors in measured]])


def _squares(tensors: Tensors, dtype: torch.dtype) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=dtype)).square().sum()


def renew(stored: Tensors, updates: Tensors, starts: Tensors, follow: Tensor | None) -> None:
    """Make delta = delta + update; or, of a plain step, x_ref = x_ref + follow * (start - x_ref)."""
    if follow is not None:
        updates = torch._foreach_sub(starts, stored)
        torch._foreach_mul_(updates, follow)
    torch._foreach_add_(stored, updates)


def _move(
    params: list[Tensor],
    before: list[Tensor],
    stored: list[Tensor],
    compensations: list[Tensor] | None = None,
    *,
    scales: Scales,
) -> Tensor | None:
    dtype = stored[0].dtype
    start = [x_before.to(dtype) for x_before in before]
    # Everything large comes first: running out of memory then leaves what is stored as it was.
    update = torch._foreach_sub([x.to(dtype) for x in params], start)
    step = torch._foreach_mul(update, scales.new)
    squares = None if scales.follow is None else _squares(update, dtype)
    if scales.follow is None:
        torch._foreach_add_(step, torch._foreach_mul(stored, scales.new - scales.old))
    if compensations is None:
        renew(stored, update, start, scales.follow)
        torch._foreach_copy_(params, before)
        torch._foreach_add_(params, step)
    else:
        lost = [compensation.to(dtype) for compensation in compensations]
        unrounded = torch._foreach_add(start, lost, alpha=0.75)  # see for_loop
        overwritten = [u.to(x.dtype) != x for u, x in zip(unrounded, before, strict=True)]
        for tensor, mask in zip(lost, overwritten, strict=True):
            tensor.masked_fill_(mask, 0.0)
        renew(stored, update, start, scales.follow)
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
    return squares
