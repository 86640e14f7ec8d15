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

    def apply_traced(self, params: Tensors, grads: Tensors) -> None:
        """Step whole parameters in operations that a compiler knows; of torch's own functions it has no shapes."""
        options = self.options
        lr, decay, found_inf = options["lr"], options["weight_decay"], options.get("found_inf")
        lr = lr.reshape(()) if isinstance(lr, Tensor) else lr
        for i, (x, grad, *states) in enumerate(zip(params, grads, *self.states, strict=True)):
            dtype = torch.promote_types(x.dtype, torch.float32)
            old, g = x.to(dtype), grad.to(dtype)
            if options.get("grad_scale") is not None:
                g = g / options["grad_scale"]
                grad.copy_(g)
            if options["maximize"]:
                g = -g
            if self.function is torch._fused_adamw_:
                old = old - lr * decay * old
            else:
                g = g + decay * old
            moments = [state.to(dtype) for state in states]
            if self.steps:
                beta1, beta2 = options["beta1"], options["beta2"]
                m = beta1 * moments[0] + (1 - beta1) * g
                v = beta2 * moments[1] + (1 - beta2) * g * g
                moments = [m, v, *[torch.maximum(v, largest) for largest in moments[2:]]]
                step_size = lr / (1 - beta1 ** self.steps[i])
                g = m / ((moments[-1] / (1 - beta2 ** self.steps[i])).sqrt() + options["eps"])
            else:
                step_size = lr
                if moments:
                    moments = [options["momentum"] * moments[0] + (1 - options["dampening"]) * g]
                    g = g + options["momentum"] * moments[0] if options["nesterov"] else moments[0]
            for tensor, new in zip((x, *states), (old - step_size * g, *moments), strict=True):
                rounded = new.to(tensor.dtype)
                tensor.copy_(rounded if found_inf is None else torch.where(found_inf > 0, tensor, rounded))

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
