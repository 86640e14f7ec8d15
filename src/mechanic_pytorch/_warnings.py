"""Warnings about runs that cannot learn, each given once, each with its remedy."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch

from mechanic_pytorch import _state
from mechanic_pytorch._base import can_ask_host, lrs
from mechanic_pytorch.distributed import local

if TYPE_CHECKING:
    from mechanic_pytorch._buckets import Bucket

PATIENCE = 15  # steps that a base may take before its first update: SOAP needs one, others ten
# How the classes of bases begin that learn a rate by themselves, or hold the weights at a length of their own.
OWN_RATE = ("dadapt", "prodigy", "dog", "ldog", "dowg", "cocob", "automagic", "schedulefree", "fromage", "nero", "amos")
LOST = 0.9  # the part of an update whose loss is worth a warning
STUCK = 50  # skipped steps in a row
NOTHING_SEEN = (0, 500)  # steps watched, and how many there are to be before the next look at the scale
GROWTH = 10  # times s_init: what a scale exceeds by then that has begun to grow. docs/controlling.md has figures
HELD_BACK = 0.5  # s_decay * scale: the length of the tuner's pull, that of the gradient being 1


def check_that_base_fits(optimizer: Any) -> None:
    """Warn, at a first step, if the base is known for steps that are not in proportion to its lr, or on a manifold."""
    base = optimizer._mechanic_made_from[1]
    names = [kind.__name__.lower().replace("_", "") for kind in base.__mro__]
    if any(name.startswith(OWN_RATE) for name in names):
        _warn(
            optimizer,
            f"{base.__name__} has a rate, a length or an average of its own, which steps at a learned scale upset. "
            f"Remedy: use {base.__name__} as it is, with the lr that its authors advise; or mechanize a base whose "
            "steps are in proportion to its lr, such as AdamW.",
        )
    elif any(getattr(p, "manifold", None) is not None for group in optimizer.param_groups for p in group["params"]):
        _warn(
            optimizer,
            "some parameters belong to a manifold, which a rescaled step leaves. "
            f"Remedy: give them to {base.__name__} as it is, and the others to a mechanized one.",
        )


def check_that_base_moved(optimizer: Any, buckets: list[Bucket]) -> None:
    """Warn if rounding has swallowed the base's first update. Asked until one was due, and then never again."""
    resting = {p for g in optimizer.param_groups if lrs([g]) == [0] for p in g["params"]}
    grads = [g for bucket in buckets for p, g in zip(bucket.owners, bucket.grads, strict=True) if p not in resting]
    active = sum(int(g.count_nonzero()) for g in grads)
    if active == 0:
        return  # nothing to follow, or a warm-up from zero
    moved = sum(bucket.count_moved() for bucket in buckets)
    optimizer._steps_without_move += moved == 0
    if moved == 0 and optimizer._steps_without_move <= PATIENCE:
        return
    optimizer._base_has_moved = True
    if moved < (1 - LOST) * active:
        is_auto = optimizer.mechanic_config.s_init == "auto"
        larger = "" if is_auto else 'pass s_init="auto", or a larger lr, for which the scale makes up; or '
        _warn(
            optimizer,
            f"the base optimizer's update changed only {moved} of {active} weights that have a gradient; the rest of "
            f"it was lost in rounding, and a lost update cannot be rescaled. Got lr={lrs(optimizer.param_groups)}. "
            f"Remedy: {larger}use weights in float32, a base whose updates do not shrink with the gradient (Adam), "
            "and fused=False on a CPU, where torch's fused SGD leaves 16-bit weights where they are.",
        )


def warn_of_new_shapes(optimizer: Any, buckets: list[Bucket]) -> None:
    """Say, once, that a parameter was exchanged for one of another shape: points were added, or pruned."""
    if optimizer._new_shape_was_said or not any(bucket.has_new_shapes for bucket in buckets):
        return
    optimizer._new_shape_was_said = True
    _warn(
        optimizer,
        "a parameter comes with the tuner's tensors of another shape. They begin anew from the weights as they are "
        "now; the scale is kept. Remedy: none is needed where points or rows were added or "
        "pruned; to keep their way, treat the keys 'mechanic_...' of optimizer.state[p] as those of the base.",
    )


def warn_if_stuck(optimizer: Any) -> None:
    """Warn if no step has been made for long."""
    optimizer._skips_in_a_row += 1
    if optimizer._skips_in_a_row != STUCK:
        return
    params = [p for group in optimizer.param_groups for p in group["params"]]
    kinds = {
        "a gradient": [p.grad for p in params if p.grad is not None],
        "a weight": params,
        "what is kept of the run": [
            t for p in params for k, t in optimizer.state.get(p, {}).items() if k in _state.SLOTS
        ],
    }
    found = [name for name, tensors in kinds.items() if not all(_is_finite(tensor) for tensor in tensors)]
    if found:
        reason = f"for {' and '.join(found)} is not finite"
        remedy = "look for inf or nan there; once mended, call optimizer.reset()"
    elif getattr(optimizer, "found_inf", None) is not None:
        reason = "for the GradScaler has found an overflow, or another process has"
        remedy = "look for inf or nan in the gradients of all processes"
    else:
        reason = "for a square overflows: all numbers are finite, but the gradients or the weights are as long as 1e19"
        remedy = "scale the data or the loss down, then call optimizer.reset()"
    _warn(optimizer, f"the last {STUCK} steps were skipped, {reason}. Remedy: {remedy}.")


def _is_finite(tensor: Any) -> bool:
    values = local(tensor.detach())
    return bool((values if values.layout is torch.strided else values._values()).isfinite().all())


def watch(optimizer: Any) -> None:
    """Count the steps of this process, and warn if by now a scale should have been learned and is not.

    Of several tuners, those of parameter groups that never had a gradient, or an lr, may wait as long as others learn.
    The host reads the scale after 500 steps, 1000, 2000 and so on, until it has warned; never while a step is recorded.
    """
    if not can_ask_host(optimizer):
        return
    steps, next_look = optimizer._watched[0] + 1, optimizer._watched[1]
    optimizer._watched = steps, next_look
    if steps != next_look:
        return
    config = optimizer.mechanic_config
    scales, is_auto, rates = optimizer.scale.reshape(-1).tolist(), config.s_init == "auto", lrs(optimizer.param_groups)
    optimizer._watched = steps, 0  # never again
    begun = [scale > (0.0 if is_auto else GROWTH * config.s_init) for scale in scales]
    idle = [any(begun) and average == 0 for average in _state.average_lrs(optimizer)]
    decays = [
        0.0 if is_auto or max(lrs(groups, "initial_lr")) >= 1 else config.s_decay * scale
        for scale, (_, groups) in zip(scales, _state.tuners(optimizer), strict=True)
    ]
    if not all(a or b for a, b in zip(begun, idle, strict=True)):
        noise = "" if is_auto else ' If the gradient is mostly noise, pass s_init="auto", or a larger number.'
        _warn(
            optimizer,
            f"training has not started: after {steps} steps the scale is {_said(scales)}, and s_init is "
            f"{config.s_init}. Got lr={rates}. Remedy: make sure that lr is not 0, that the optimizer holds the "
            f"parameters of the model that is trained, and that their gradients are neither None nor 0.{noise}",
        )
    elif max(decays) >= HELD_BACK:
        _warn(
            optimizer,
            f"the scale is held back: after {steps} steps s_decay times the scale is {max(decays):.1f}, so "
            "that the tuner's decay pulls it back about as strongly as the gradient drives it. "
            f"Got lr={rates} and s_decay={config.s_decay}, which is too much for so small an lr. "
            'Remedy: pass s_init="auto", or lr=1.0 or larger.',
        )
    else:
        optimizer._watched = steps, 2 * steps


def _said(scales: list[float]) -> str:
    return f"{scales[0]:.0e}" if len(scales) == 1 else f"{', '.join(f'{s:.0e}' for s in scales)} (per parameter group)"


def _warn(optimizer: Any, message: str) -> None:
    """Warn where the step is called, by whom neither torch nor we are."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in ("mechanic_pytorch", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(f"{type(optimizer).__name__}: {message}", stacklevel=level)
