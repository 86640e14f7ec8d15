"""The reference kernel: one tensor at a time, nothing clever. See the package docstring for the contract."""

from collections.abc import Sequence

import torch
from torch import Tensor


def measure(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    deltas: Sequence[Tensor],
    copies: Sequence[Tensor] | None = None,
) -> Tensor:
    """Return `[<delta, g>, <delta, x>, |g|^2, |x|^2]`, summed over all tensors; shape (4,). Fill `copies`."""
    sums = deltas[0].new_zeros(4)
    for x, g, delta in zip(params, grads, deltas, strict=True):
        x, g = x.to(delta.dtype), g.to(delta.dtype)
        sums += torch.stack([(delta * g).sum(), (delta * x).sum(), (g * g).sum(), (x * x).sum()])
    if copies is not None:
        torch._foreach_copy_(list(copies), list(params))
    return sums


def move(
    params: Sequence[Tensor],
    before: Sequence[Tensor],
    deltas: Sequence[Tensor],
    compensations: Sequence[Tensor] | None,
    old_scale: Tensor,
    new_scale: Tensor,
    keep: Tensor | None = None,
) -> None:
    """Rescale the base optimizer's step from `before` to `params`, in place."""
    change = change_of_factor(old_scale, new_scale, keep)
    for i, (x, x_before, delta) in enumerate(zip(params, before, deltas, strict=True)):
        start = x_before.to(delta.dtype)
        update = x.to(delta.dtype) - start
        step = change * delta + new_scale * update
        if keep is not None:
            delta *= keep
        delta += update
        if compensations is None:
            x.copy_(start + step)
        else:
            lost = compensations[i].to(delta.dtype)
            # It can be half a spacing of x, which rounds either way, but never more; three quarters of it round back.
            lost = lost.masked_fill((start + 0.75 * lost).to(x.dtype) != x_before, 0.0)
            target = start + lost + step
            x.copy_(target)
            rest = target - x
            # What does not move keeps weight and compensation to the bit: at a tie, rounding again could swap them.
            still = step == 0
            x.copy_(torch.where(still, x_before, x))
            compensations[i].copy_(torch.where(still, lost, rest))


def change_of_factor(old_scale: Tensor, new_scale: Tensor, keep: Tensor | None) -> Tensor:
    """Return by how much the factor of the old delta in the parameters changes: keep * new_scale - old_scale."""
    return (new_scale if keep is None else keep * new_scale) - old_scale
