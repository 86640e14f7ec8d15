"""The two functions that touch big tensors, in interchangeable versions.

A kernel is a module with two functions over parallel lists of plain, dense, real tensors. All tensors of one call
share a device, and their parameters a dtype; `deltas` are float32 (float64 for float64 parameters). Kernels know
nothing of parameter groups, optimizer state, sharding or the tuner.

`measure(params, grads, deltas, copies)` returns the four sums of which the tuner is made, as one tensor of shape (4,)
in the dtype of the deltas: `[<delta, g>, <delta, x>, |g|^2, |x|^2]`. The sums are additive over any partition of the
tensors, so they may be added over buckets, devices and shards. `copies` is None, or tensors like `params` that it
fills with their values on the way: what `move` wants as `before`.

`move(params, before, deltas, compensations, old_scale, new_scale, keep)` is called after the base optimizer has turned
`before` into `params`. It changes these in place, and nothing else:

    update = params - before
    params = before + (keep * new_scale - old_scale) * delta + new_scale * update
    delta  = keep * delta + update

which is `before + new_scale * delta_new - old_scale * delta_old` with less cancellation. The three numbers are tensors
of shape (); `keep` may be None, which is 1 and costs nothing. `compensations` is None, or,
for parameters of less than 32 bits, one tensor per parameter that holds what rounding took from it (Kahan): it is
added back before the move and renewed after it. A compensation that could not come from rounding its parameter
belongs to a value that somebody has since overwritten, and counts as zero.

A kernel may also have `step_and_move(rule, params, grads, deltas, compensations, old_scale, new_scale, keep)`, which
makes the step of a base whose rule it is given (`rule.py`) and moves in the same pass, and `can_step(params, *others)`,
which tells whether it can for these tensors. The result is that of the base's step and then `move`, but for rounding.

`for_loop` is the reference. Every other kernel must equal it; `tests/test_kernels.py` says how closely.
"""

import functools
import importlib.util
import os
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mechanic_pytorch.kernels import blocks, for_loop, foreach

__all__ = ["KERNELS", "Kernel", "missing_for_triton", "select"]


class Kernel(Protocol):
    """What a kernel module offers."""

    def measure(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        deltas: Sequence[Tensor],
        copies: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Return the four sums, and fill the copies."""
        ...

    def move(
        self,
        params: Sequence[Tensor],
        before: Sequence[Tensor],
        deltas: Sequence[Tensor],
        compensations: Sequence[Tensor] | None,
        old_scale: Tensor,
        new_scale: Tensor,
        keep: Tensor | None = None,
    ) -> None:
        """Rescale the base's step, in place."""
        ...


# And "triton", which is imported when it is first used.
KERNELS: dict[str, Kernel] = {"blocks": blocks, "foreach": foreach, "for_loop": for_loop}


def select(device: torch.device) -> Kernel:
    """Return the fastest kernel for a device, or the one that the environment variable `MECHANIC_KERNEL` names.

    Raises:
        ValueError: `MECHANIC_KERNEL` names no kernel, or one that cannot run there.
    """
    name, names = os.environ.get("MECHANIC_KERNEL"), sorted({*KERNELS, "triton"})
    if name is None:
        if torch.compiler.is_compiling():
            name = "foreach"
        elif device.type == "cpu":
            name = "blocks"
        else:
            name = "foreach" if missing_for_triton(device) else "triton"
    elif name not in names:
        raise ValueError(
            f"mechanic_pytorch: MECHANIC_KERNEL must be one of {names}. Got {name!r}. "
            "Remedy: unset it to let the package choose."
        )
    elif name == "triton" and (missing := missing_for_triton(device)):
        raise ValueError(
            f"mechanic_pytorch: MECHANIC_KERNEL='triton' needs {missing}. Got parameters on {device}. "
            "Remedy: unset it to let the package choose."
        )
    if name not in KERNELS:
        KERNELS[name] = importlib.import_module(f"{__name__}.{name}")
    return KERNELS[name]


@functools.cache
def missing_for_triton(device: torch.device) -> str:
    """Return what is missing to run Triton on a device; nothing, if it runs."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton"
    if device.type == "cpu":
        return "" if os.environ.get("TRITON_INTERPRET") == "1" else "a GPU, or TRITON_INTERPRET=1"
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 8:
        return "an NVIDIA GPU of compute capability 8.0 or more, or an AMD GPU"
    return ""
