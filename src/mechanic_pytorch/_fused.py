"""Bases whose whole rule torch has as one function: SGD, Adam and AdamW with `fused=True`.

A kernel with `step_and_move` makes their step, on the base's own state, and moves in the same pass, so that no copy of
the weights is made. Up to rounding, the result is that of the base's `step` followed by `move`. Which of the two a step
takes depends only on what a checkpoint holds: a resumed run is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from mechanic_pytorch._base_step import BaseStep, Skipper
from mechanic_pytorch._buckets import Work
from mechanic_pytorch._torch import is_capturing, unwrapped
from mechanic_pytorch.distributed import local
from mechanic_pytorch.kernels import SteppingKernel, makes_steps
from mechanic_pytorch.kernels.arguments import Scales
from mechanic_pytorch.kernels.rule import Rule


class OnePass:
    """The base's step and the move in one pass, by the kernels.

    Args:
        work: the buckets.
        rules: for each of them, the kernel that makes the base's step, and the base's rule.
        grad_scale: by which the gradients are still multiplied, or None.
    """

    def __init__(self, work: Work, rules: Sequence[tuple[SteppingKernel, Rule]], grad_scale: Tensor | None) -> None:
        self._work, self._rules, self._grad_scale = work, rules, grad_scale

    def step(self, skip: Tensor, skipper: Skipper) -> None:
        """Do nothing yet."""

    def move(self, scales: Scales, skip: Tensor) -> Tensor | None:
        """Make the base's step and rescale it, for all buckets; where `skip` is true, change nothing.

        Args:
            scales: of shape (G,).
            skip: whether to change nothing, shape ().

        Returns:
            |u| of the base's update, shape (G,), of a plain step.
        """
        for bucket, (kernel, rule) in zip(self._work.buckets, self._rules, strict=True):
            device = bucket.locals[0].device
            found_inf = skip.to(device, torch.float32)
            grad_scale = None if self._grad_scale is None else self._grad_scale.to(device).reshape(())
            if rule.steps:
                torch._foreach_add_(rule.steps, [1 - found_inf] * len(rule.steps))
            bucket.update_squared = kernel.step_and_move(
                rule._replace(options={**rule.options, "grad_scale": grad_scale, "found_inf": found_inf}),
                bucket.locals,
                bucket.grads,
                bucket.stored,
                bucket.compensations or None,
                scales.of_row(bucket.row, like=bucket.stored[0]),
            )
        return self._work.update_length(scales)


def one_pass(optimizer: Optimizer, base: BaseStep, work: Work) -> OnePass | None:
    """Return how to make the base's step and the move in one pass, or None if that cannot be."""
    rules = _rules_of(optimizer, base, work)
    return None if rules is None else OnePass(work, rules, base.grad_scale)


def _rules_of(optimizer: Optimizer, base: BaseStep, work: Work) -> list[tuple[SteppingKernel, Rule]] | None:
    """Return for each bucket the kernel that can make the base's step, and its rule; None if the base has to.

    A rule holds the lr that the base would find.

    The base has to where it is not exactly one of torch's own, was not asked for `fused=True`, is about to create state
    or to report an error, or where the kernel cannot.
    """
    kind: type[Optimizer] = getattr(optimizer, "mechanic_base", type(optimizer))
    make = {SGD: _sgd, Adam: _adam, AdamW: _adam}.get(kind)
    if make is None or not base.reads_found_inf or base.function is not unwrapped(kind.step):
        return None
    if not _is_torchs_own(base.function):
        return None
    if any(bucket.is_new or any(p.is_complex() for p in bucket.params) for bucket in work.buckets):
        return None
    with base.scaled_lr():
        made = [make(kind, bucket.group, [optimizer.state[p] for p in bucket.params]) for bucket in work.buckets]
    rules = []
    for bucket, rule in zip(work.buckets, made, strict=True):
        kernel = bucket.kernel
        if rule is None or not makes_steps(kernel):
            return None
        if not kernel.can_step(bucket.locals, bucket.grads, bucket.stored, *rule.states):
            return None
        if {t.dtype for tensors in (bucket.grads, *rule.states) for t in tensors} != {bucket.locals[0].dtype}:
            return None
        rules.append((kernel, rule))
    return rules


def _is_torchs_own(step: Any) -> bool:
    """Return False if someone has put a `step` of theirs into torch's class."""
    return str(getattr(step, "__globals__", {}).get("__name__")).startswith("torch.optim.")


def _sgd(base: type[Optimizer], group: dict[str, Any], states: Sequence[dict[str, Tensor]]) -> Rule | None:
    names = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")
    options = {**_options(group, names), "is_first_step": False}
    keys = ["momentum_buffer"] if group["momentum"] else []
    if not all(state.get(key) is not None for state in states for key in keys):
        return None
    return Rule(
        torch._fused_sgd_, [[local(state[key]) for state in states] for key in keys], 1 - len(keys), [], options
    )


def _adam(base: type[Optimizer], group: dict[str, Any], states: Sequence[dict[str, Tensor]]) -> Rule | None:
    beta1, beta2 = group["betas"]
    keys = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
    if isinstance(beta1, Tensor) or isinstance(beta2, Tensor) or (is_capturing() and not group["capturable"]):
        return None
    if not all(key in state for state in states for key in keys):
        return None
    names = ("amsgrad", "lr", "weight_decay", "eps", "maximize")
    options = {**_options(group, names), "beta1": beta1, "beta2": beta2}
    function = torch._fused_adamw_ if group.get("decoupled_weight_decay", base is AdamW) else torch._fused_adam_
    columns = [[local(state[key]) for state in states] for key in keys]
    return Rule(function, columns, 3 - len(keys), [state["step"] for state in states], options)


def _options(group: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return a group's options; the only tensor among them, an lr, may have any shape that holds one number."""
    options = {name: group[name] for name in names}
    return {name: value.reshape(()) if isinstance(value, Tensor) else value for name, value in options.items()}
