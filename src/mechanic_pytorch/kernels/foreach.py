"""The same two functions over whole lists, by `torch._foreach_*`: few launches on a GPU, no compiler needed."""

from collections.abc import Sequence

import torch
from torch import Tensor


def measure(params: Sequence[Tensor], grads: Sequence[Tensor], deltas: Sequence[Tensor]) -> Tensor:
    """Return `[<delta, g>, <delta, x>, |g|^2, |x|^2]`, summed over all tensors; shape (4,)."""
    dtype = deltas[0].dtype
    products = [
        # Type promotion does the product in the dtype of delta; one tensor at a time bounds the scratch memory.
        torch.stack([(delta * other).sum() for delta, other in zip(deltas, others, strict=True)]).sum()
        for others in (grads, params)
    ]
    squares = [
        torch.stack(torch._foreach_norm(list(tensors), 2, dtype=dtype)).square().sum() for tensors in (grads, params)
    ]
    return torch.stack([*products, *squares])


def move(
    params: Sequence[Tensor],
    before: Sequence[Tensor],
    deltas: Sequence[Tensor],
    compensations: Sequence[Tensor] | None,
    old_scale: Tensor,
    new_scale: Tensor,
) -> None:
    """Rescale the base optimizer's step from `before` to `params`, in place."""
    params, before, deltas = list(params), list(before), list(deltas)
    dtype = deltas[0].dtype
    start = [x_before.to(dtype) for x_before in before]
    # Everything that allocates comes first: running out of memory then leaves the deltas as they were.
    update = torch._foreach_sub([x.to(dtype) for x in params], start)
    step = torch._foreach_mul(deltas, new_scale - old_scale)
    if compensations is None:
        torch._foreach_add_(deltas, update)
        torch._foreach_mul_(update, new_scale)
        torch._foreach_add_(step, update)
        torch._foreach_copy_(params, before)
        torch._foreach_add_(params, step)
    else:
        lost = [compensation.to(dtype) for compensation in compensations]
        unrounded = torch._foreach_add(start, lost, alpha=0.75)  # see for_loop
        overwritten = [u.to(x.dtype) != x for u, x in zip(unrounded, before, strict=True)]
        for tensor, mask in zip(lost, overwritten, strict=True):
            tensor.masked_fill_(mask, 0.0)
        torch._foreach_add_(start, lost)
        torch._foreach_add_(deltas, update)
        torch._foreach_mul_(update, new_scale)
        torch._foreach_add_(step, update)
        torch._foreach_add_(start, step)
        still = [s == 0 for s in step]  # see for_loop
        torch._foreach_copy_(params, start)
        torch._foreach_sub_(start, [x.to(dtype) for x in params])
        for x, x_before, stays in zip(params, before, still, strict=True):
            x.copy_(torch.where(stays, x_before, x))
        for rest, kept, stays in zip(start, lost, still, strict=True):
            rest.copy_(torch.where(stays, kept, rest))
        torch._foreach_copy_(list(compensations), start)
