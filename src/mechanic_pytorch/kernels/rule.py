"""A base optimizer's rule, for kernels that make its step themselves instead of after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mechanic_pytorch.kernels.arguments import Tensors


class Rule(NamedTuple):
    """What torch's own function needs to step some parameters.

    `function` is elementwise: it may be called with corresponding parts of all tensors, and changes parameters and
    states in place. `states` are lists parallel to the parameters, in the base's own layout; `absent` more could
    follow, for each of which it gets an empty list. `steps` are its step counters, one per parameter, advanced already;
    a rule without counters has none.
    """

    function: Callable[..., None]
    states: Sequence[Tensors]
    absent: int
    steps: list[Tensor]
    options: dict[str, Any]

    def apply(
        self,
        params: Tensors,
        grads: Tensors,
        states: Sequence[Tensors],
        indices: Sequence[int],
    ) -> None:
        """Step parts of the parameters that have these indices, in place."""
        steps = [[self.steps[i] for i in indices]] if self.steps else []
        self.function(params, grads, *states, *[[]] * self.absent, *steps, **self.options)

    def without_decay(self) -> tuple[float | Tensor | None, Rule]:
        """Return the decoupled decay factor, and the rule without decay.

        Where decay enters through the gradient there is none, and the rule is this one.
        """
        lr, weight_decay, found_inf = self.options["lr"], self.options["weight_decay"], self.options.get("found_inf")
        rest = self._replace(options={**self.options, "weight_decay": 0.0})
        if not weight_decay:
            return 0.0, rest
        if self.function is not torch._fused_adamw_:
            return None, self
        lr = lr.double() if isinstance(lr, Tensor) else lr
        return lr * weight_decay * (1.0 if found_inf is None else 1.0 - found_inf.double()), rest
