"""What kernels take beside tensors."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from torch import Tensor

Tensors: TypeAlias = list[Tensor] | tuple[Tensor, ...]  # one for each parameter


class Scales(NamedTuple):
    """By what a step is rescaled: tensors of shape (), or of shape (G,), a row for each tuner.

    `follow` is given for a plain step: by what part of its way to the weights x_ref follows them. Without it, what is
    stored is delta.
    """

    old: Tensor
    new: Tensor
    follow: Tensor | None = None

    def of_row(self, row: int, like: Tensor) -> Scales:
        """Return those of one tuner, shape (), in the dtype and on the device of `like`."""
        follow = None if self.follow is None else self.follow[row].to(like)
        return Scales(self.old[row].to(like), self.new[row].to(like), follow)
