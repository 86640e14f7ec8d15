"""The reference kernel: one tensor at a time, nothing clever. See the package docstring for the contract."""

import torch
from torch import Tensor

from mechanic_pytorch.kernels.arguments import Scales, Tensors


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
    sums = stored[0].new_zeros(5 if plain else 4)
    for i, (x, g, delta) in enumerate(zip(params, grads, stored, strict=True)):
        x, g = x.to(delta.dtype), g.to(delta.dtype)
        if grad_factor is not None:
            g = g * grad_factor
        if plain:
            delta = x - delta if compensations is None else x - delta + compensations[i].to(delta.dtype)
        products = [delta * g, delta * x, g * g, x * x, *([delta * delta] if plain else [])]
        sums += torch.stack([product.sum() for product in products])
    if before is not None:
        torch._foreach_copy_(list(before), list(params))
    return sums


def move(
    params: Tensors,
    before: Tensors,
    stored: Tensors,
    compensations: Tensors | None,
    scales: Scales,
) -> Tensor | None:
    """Rescale the base optimizer's step from `before` to `params`, in place; return |update|^2 if it is plain."""
    squares = stored[0].new_zeros(())
    for i, (x, x_before, ours) in enumerate(zip(params, before, stored, strict=True)):
        start = x_before.to(ours.dtype)
        update = x.to(ours.dtype) - start
        if scales.follow is None:
            step = (scales.new - scales.old) * ours + scales.new * update
            ours += update
        else:
            step = scales.new * update
            squares += (update * update).sum()
            ours += scales.follow * (start - ours)
        if compensations is None:
            x.copy_(start + step)
        else:
            lost = compensations[i].to(ours.dtype)
            # It can be half a spacing of x, which rounds either way, but never more; three quarters of it round back.
            lost = lost.masked_fill((start + 0.75 * lost).to(x.dtype) != x_before, 0.0)
            target = start + lost + step
            x.copy_(target)
            rest = target - x
            # What does not move keeps weight and compensation to the bit: at a tie, rounding again could swap them.
            still = step == 0
            x.copy_(torch.where(still, x_before, x))
            compensations[i].copy_(torch.where(still, lost, rest))
    return None if scales.follow is None else squares
