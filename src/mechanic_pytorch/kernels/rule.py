"""A base optimizer's rule, for kernels that make its step themselves instead of after it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Rule(NamedTuple):
    """What torch's own function needs to step some parameters.

    `function` is elementwise: it may be called with corresponding parts of all tensors, and changes parameters and
    states in place. `states` are lists parallel to the parameters, in the base's own layout; `absent` more could
    follow, for each of which it gets an empty list. `steps` are its step counters, one per parameter, advanced already;
    a rule without counters has none.
    """

    function: Callable[..., None]
    states: Sequence[Sequence[Tensor]]
    absent: int
    steps: list[Tensor]
    options: dict[str, Any]

    def apply(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[Sequence[Tensor]],
        indices: Sequence[int],
    ) -> None:
        """Step parts of the parameters that have these indices, in place."""
        steps = [[self.steps[i] for i in indices]] if self.steps else []
        self.function(params, grads, *states, *[[]] * self.absent, *steps, **self.options)
