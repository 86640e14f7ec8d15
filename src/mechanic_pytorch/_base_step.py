"""One step of the base optimizer: its closure, the lr that it sees, who skips it, what it must not see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mechanic_pytorch._buckets import PER_PARAMETER, Bucket, Work
from mechanic_pytorch._config import Config
from mechanic_pytorch._torch import can_sync, has_values, reads_found_inf, requires_closure, unwrapped
from mechanic_pytorch.kernels.arguments import Scales


class Skipper(Enum):
    """Who skips a step whose gradient is not finite."""

    HOST = auto()  # reads the flag, and does not call the base
    DEVICE = auto()  # steps, then rolls back where the flag is true: no sync
    BASE = auto()  # reads `found_inf`, and leaves the step out
    NOBODY = auto()


class BaseStep:
    """The base optimizer's step, to be made once.

    Args:
        optimizer: the mechanized optimizer.
        step: the base's own, a function.
        closure: re-evaluates the model and returns the loss, or None. It is evaluated here, at the weights and lrs as
            they are, with autograd on; the base then gets a closure that begins by repeating that answer.
        args: what else the user passes to `step`.
        kwargs: the same, by name.

    Attributes:
        function: the base's `step`, without what torch wraps around it.
        loss: what the base has returned; until it is called, what the closure has.
        closure: the one that the base gets.
        lr_factors: one for each parameter group. The base sees its lr multiplied by it; nobody else does.
        can_sync: whether the host may read a value.
        reads_found_inf: whether the base skips a step where `found_inf` is 1.
        grad_scale: by which the gradients are still multiplied, if a `GradScaler` has left that to the base.
        found_inf: 1 if that scaler has found an overflow, else 0; None without one.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        step: Callable[..., Any],
        closure: Callable[[], Any] | None,
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> None:
        self.loss: Any = None
        self.closure = closure
        self.lr_factors: Sequence[float] = ()
        self._optimizer = optimizer
        # A function, not a method: where torch.compile breaks a graph, it finds a method again by its name, which is
        # that of the mechanized step.
        self.function = unwrapped(step)
        self._args, self._kwargs = args, kwargs
        self._scaled_groups: list[tuple[dict[str, Any], float, Any, Any]] = []
        self._evaluates_again = False
        if closure is not None:
            with torch.enable_grad():
                self.loss = closure()
            self.closure = self._replayed(closure, self.loss)
            self._args = (self.closure, *args)
            self._evaluates_again = requires_closure(self.function)
        self.can_sync = can_sync(optimizer)
        self.reads_found_inf = reads_found_inf(optimizer)
        self.grad_scale: Tensor | None = getattr(optimizer, "grad_scale", None)
        self.found_inf: Tensor | None = getattr(optimizer, "found_inf", None)

    def _replayed(self, closure: Callable[[], Any], loss: Any) -> Callable[[], Any]:
        pending = [loss]

        def replay() -> Any:
            if pending:
                return pending.pop()
            is_scaled = bool(self._scaled_groups)
            if is_scaled:
                self._restore_lr()
            try:
                with torch.enable_grad():
                    return closure()
            finally:
                if is_scaled:
                    self._scale_lr()

        return replay

    # --- Who skips ------------------------------------------------------------------------------------------------

    def skipper(self, work: Work, config: Config) -> Skipper:
        """Return who skips this step, if its gradient is not finite."""
        # Even a base that skips creates state at its first step, and not always with defined values.
        if self.can_be_told and not work.is_new:
            return Skipper.BASE
        if not config.skip_nonfinite or not has_values(self._optimizer):
            return Skipper.NOBODY
        return Skipper.HOST if self.can_sync else Skipper.DEVICE

    def has_bad_gradient(self, work: Work, config: Config, *, like: Tensor) -> Tensor | None:
        """Return whether a gradient is not finite, shape (), for a step that measures nothing; None if nobody asks."""
        if config.skip_nonfinite:
            return work.total(Bucket.nonfinite, like=like, masked=self.masked).isfinite().all().logical_not()
        return None if self.found_inf is None else self.found_inf.to(like.device).reshape(()) > 0

    @property
    def can_be_told(self) -> bool:
        """Whether the base can be handed a `found_inf`: not by all compilers, which set no attributes of optimizers."""
        return self.reads_found_inf and not torch.compiler.is_compiling()

    def measured(self, bucket: Bucket) -> Tensor:
        """Return the sums of a bucket, the gradients being divided by what a `GradScaler` has left in them."""
        return bucket.measure(self.grad_scale)

    def masked(self, dots: Tensor) -> Tensor:
        """Return the sums, or NaN if a `GradScaler` has found an overflow.

        The step is then skipped, by all processes that add up these sums.
        """
        found = self.found_inf
        return dots if found is None else dots.masked_fill(found.to(dots.device).reshape(()) > 0, torch.nan)

    # --- The call -------------------------------------------------------------------------------------------------

    def call(self, work: Work, skip: Tensor, skipper: Skipper, *, tells_base: bool = True) -> None:
        """Step. The base sees lr times `lr_factors`, `skip` as `found_inf`, and no state that is ours alone.

        Args:
            work: what is stepped; where the device skips, its copies of the weights are put back.
            skip: whether the step is to be skipped, shape ().
            skipper: by whom.
            tells_base: whether a base that can is handed `skip`.
        """
        device_skips = skipper is Skipper.DEVICE
        undone = work.rolled_back_where(skip) if device_skips else nullcontext()
        found_inf = self._found_inf(skip) if self.can_be_told and tells_base else nullcontext()
        with undone, hidden_state(self._optimizer.state), found_inf, self.scaled_lr():
            self.loss = self.function(self._optimizer, *self._args, **self._kwargs)

    def rolled_back_on_error(self, work: Work) -> AbstractContextManager[None]:
        """Return a context that puts weights and the base's new state back if its block raises.

        State that the base changes in place is put back only if it evaluates its closure again, which costs a copy.
        """
        params = [p for group in work.groups for p in group["params"]] if self._evaluates_again else None
        return work.rolled_back_on_error(whole_state_of=params)

    @contextmanager
    def scaled_lr(self) -> Iterator[None]:
        """Multiply the lr of each group by its factor in the block, but not for a closure that is called there.

        An lr that is written in the block stays: divided by the factor if the base writes it, as it is from a closure.
        """
        self._scale_lr()
        try:
            yield
        finally:
            self._restore_lr()

    def _scale_lr(self) -> None:
        self._scaled_groups = [
            (group, factor, group["lr"], group["lr"] * factor)
            for group, factor in zip(self._optimizer.param_groups, self.lr_factors, strict=True)
            if group.get("lr") is not None and factor != 1.0
        ]
        for group, _, _, ours in self._scaled_groups:
            group["lr"] = ours

    def _restore_lr(self) -> None:
        for group, factor, theirs, ours in self._scaled_groups:
            group["lr"] = theirs if group["lr"] is ours else group["lr"] / factor  # the base has set it
        self._scaled_groups = []

    @contextmanager
    def _found_inf(self, skip: Tensor) -> Iterator[None]:
        """Expose our `found_inf` to the base, then restore the one of a `GradScaler`."""
        optimizer: Any = self._optimizer  # torch declares no `found_inf`
        theirs = {"found_inf": optimizer.found_inf} if hasattr(optimizer, "found_inf") else {}
        optimizer.found_inf = skip.to(torch.float32)
        try:
            yield
        finally:
            del optimizer.found_inf
            vars(optimizer).update(theirs)


class TwoPasses:
    """The base's own step, then the move; between measuring and moving, a copy of the weights is kept.

    Args:
        base: the base's step.
        work: the buckets.
    """

    def __init__(self, base: BaseStep, work: Work) -> None:
        self._base, self._work = base, work
        work.keep_before()

    def step(self, skip: Tensor, skipper: Skipper) -> None:
        """Let the base step."""
        self._base.call(self._work, skip, skipper)

    def move(self, scales: Scales, skip: Tensor) -> Tensor | None:
        """Rescale what the base has done; return |u|, shape (G,), of a plain step."""
        self._work.move(scales)
        return self._work.update_length(scales)


@contextmanager
def hidden_state(state: dict[Any, Any]) -> Iterator[None]:
    """Hide our tensors from a base that has no state yet for a parameter: to it, non-empty state means "initialised".

    Such a base may begin to fill its state at any later step (one that accumulates gradients).
    """
    ours = {p: s for p, s in state.items() if isinstance(s, dict) and s and s.keys() <= PER_PARAMETER}
    for p in ours:
        del state[p]
    try:
        yield
    except BaseException:
        state.update(ours)
        raise
    for p, kept in ours.items():
        state[p] = {**state.get(p, {}), **kept}
