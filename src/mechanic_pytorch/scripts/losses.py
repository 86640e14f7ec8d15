"""The loss of someone else's training loop, which does not tell it to its optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mechanic_pytorch._torch import has_memory, in_backward, is_capturing, uncompiled
from mechanic_pytorch.scripts.wrapping import Function, wrapped


class Losses:
    """What `backward()` was called on: the sum over the calls since the last step of any optimizer.

    The step goes down along the gradient of this sum. So it is the loss also where gradients are accumulated, or where
    a loss has two parts with a `backward()` each. It stays on its device, and nothing waits for it.

    What a `GradScaler` has scaled counts as it was before. Not seen: a tensor of several numbers; a `backward()` that
    is given a gradient, or is called by another one; one in a CUDA graph; `autograd.grad`.

    Example:
        >>> losses = Losses()
        >>> x = torch.tensor(2.0, requires_grad=True)
        >>> with losses.watching():
        ...     for _ in range(2):
        ...         (x.square() / 2).backward()
        >>> float(losses.at_step())
        4.0
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._is_of_last_step = False

    def at_step(self) -> Tensor | None:
        """Return the loss of a step that is being made, or None. Several optimizers may step after one `backward()`."""
        self._is_of_last_step = True
        return self._sum

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See every `backward()` in the block."""
        with (
            wrapped(torch.autograd, "backward", self._backward),  # which Tensor.backward calls
            wrapped(torch.amp.GradScaler, "scale", _scale),
        ):
            yield

    def _backward(self, original: Function) -> Function:
        def backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> Any:
            if not (is_capturing() or in_backward()) and grad_tensors is None:
                for tensor in tensors if isinstance(tensors, list | tuple) else (tensors,):
                    self._see(tensor)
            return original(tensors, grad_tensors, *args, **kwargs)

        return uncompiled(backward)

    def _see(self, tensor: Any) -> None:
        if not isinstance(tensor, Tensor) or hasattr(tensor, "to_local") or not has_memory(tensor):
            return
        loss = getattr(tensor, "_mechanic_unscaled", tensor).detach()
        if loss.numel() != 1:
            return
        if self._is_of_last_step:
            self._sum, self._is_of_last_step = None, False
        loss = loss.reshape(()).to(torch.float32, copy=True)
        self._sum = loss if self._sum is None else self._sum + loss.to(self._sum.device)


def _scale(original: Function) -> Function:
    def scale(scaler: Any, outputs: Any) -> Any:
        scaled = original(scaler, outputs)
        if isinstance(outputs, Tensor) and scaled is not outputs:
            scaled._mechanic_unscaled = outputs.detach()
        return scaled

    return scale
