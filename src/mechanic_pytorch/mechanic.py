r"""Mechanic: any `torch.optim.Optimizer`, with the scale of its learning rate learned while it runs.

The algorithm is Algorithm 1 of Cutkosky, Defazio and Mehta, "Mechanic: A Learning Rate Tuner", NeurIPS 2023,
arXiv 2306.00144. Symbols: x parameters, g gradient, u the update of the base optimizer (which would go to x + u),
x_ref the parameters at the first step, delta the sum of all updates so far, n the number of betas. The vectors m, v, r,
s have n entries and start at 0. One step:

    h     = <delta, g + s_decay * sum(s) * |g| * x / |x|>        measure: everything at x, before the base moves
    m     = max(beta * m, |h|)                                   tune
    v     = beta^2 * v + h^2
    r     = max(0, beta * r - s * h)
    s     = ((s_init / n) * m + r) / (sqrt(v) + eps)
    delta = delta + u                                            base step, then move
    x     = x_ref + sum(s) * delta

Big tensors are touched twice: four inner products before the base step (`measure`), one affine move after it (`move`),
both in `kernels`. Between them stands a recurrence on vectors of six numbers, `tune`, with which this file begins. With
a number for s_init, x_ref is not stored: a step adds sum(s_new) * delta_new - sum(s_old) * delta_old, which keeps what
users do to their weights between steps. With s_init="auto", the default, a step is x = x + sum(s) * u instead, and the
bets are on the displacement of the weights: delta = (x - x_ref) / sum(s), with x_ref stored (`_auto.py`). The file
`docs/deviations.md` lists where this differs from other implementations, and why.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, ClassVar, Literal, TypeGuard

import torch
from torch import Tensor
from torch.optim import Optimizer

from mechanic_pytorch._base_step import BaseStep, Skipper, TwoPasses, hidden_state
from mechanic_pytorch._buckets import PER_PARAMETER, Work, gather
from mechanic_pytorch._checkpoint import check_group, checked
from mechanic_pytorch._config import Config, TuneParams, TunerState
from mechanic_pytorch._fused import one_pass
from mechanic_pytorch._numbers import Numbers, column, columns, constants, maximum, sqrt, tiny, unwarned, where
from mechanic_pytorch._torch import NOT_IN_PROPORTION, uncompiled
from mechanic_pytorch._tuner import Tuner, is_ours
from mechanic_pytorch._watch import Watch, text_of

__all__ = ["Mechanic", "is_mechanized"]


@unwarned
def tune(state: TunerState, dots: Numbers, params: TuneParams) -> TunerState:
    """Return the tuner's next state: in Algorithm 1, what becomes of h, m, v, r, W and s. Pure.

    Args:
        state: the vectors m, v, r, s, shape (G, n): a row for each of G tuners.
        dots: `[<delta, g>, <delta, x>, |g|^2, |x|^2]`, shape (G, 4), before the base's step.
        params: betas, s_decay, s_init, eps, loss_weight.

    Returns:
        The next state, in the dtype and on the device of the old one, which is not changed.

    Example:
        >>> import torch
        >>> params = Config(betas=(0.9, 0.99), s_init=1e-8).tune_params
        >>> state = tune(TunerState(*torch.zeros(4, 1, 2)), torch.tensor([[-3.0, 0.0, 1.0, 1.0]]), params)
        >>> state.max_product.tolist(), f"{state.scales.sum():.0e}"
        ([[3.0, 3.0]], '1e-08')

    Source: arXiv 2306.00144, Algorithm 1.
    """
    m, v, r, s = state
    delta_g, delta_x, g_squared, x_squared = map(column, columns(dots))  # (G, 1), as h
    beta = constants(params.betas, like=s)
    x_norm = maximum(sqrt(x_squared), tiny(s) ** 0.5)  # <delta, x> is 0 where x is

    h = delta_g + params.s_decay * column(s.sum(-1)) * sqrt(g_squared) * (delta_x / x_norm)
    m = maximum(beta * m, abs(h))
    v = beta * beta * v + h * h
    reward = -s * h
    r = maximum(beta * r + maximum(reward, params.loss_weight * reward), 0.0)
    wealth = params.s_init / len(params.betas) * m + r
    s = where(wealth == 0, 0.0, wealth / (sqrt(v) + params.eps))
    return TunerState(m, v, r, s)


def is_mechanized(opt: object) -> TypeGuard[Mechanic]:
    """Return True if an optimizer was built by a class that `mechanize` returned.

    Example:
        >>> import torch
        >>> from mechanic_pytorch import is_mechanized, mechanize
        >>> params = [torch.zeros(3, requires_grad=True)]
        >>> is_mechanized(mechanize(torch.optim.SGD)(params, lr=1.0)), is_mechanized(torch.optim.SGD(params, lr=1.0))
        (True, False)
    """
    return isinstance(opt, Mechanic)


class Mechanic(Optimizer):
    """What all mechanized optimizers share. Made by `mechanize`, not by hand.

    Example:
        >>> import torch
        >>> from mechanic_pytorch import Mechanic, mechanize
        >>> optimizer = mechanize(torch.optim.SGD)([torch.zeros(3, requires_grad=True)], lr=1.0)
        >>> isinstance(optimizer, Mechanic), isinstance(optimizer, torch.optim.SGD)
        (True, True)
    """

    mechanic_config: ClassVar[Config]
    mechanic_base: ClassVar[type[Optimizer]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Take one step of the base optimizer, rescaled.

        Args:
            closure: re-evaluates the model, with autograd on, and returns the loss. Its first evaluation happens before
                the base sees it, at the same weights; the base evaluates it as often as without Mechanic.
            *args: passed on to the base.
            **kwargs: passed on to the base.

        Returns:
            What the base returns, usually the loss that the closure returned, else None.

        On an exception, the parameters and the tuner are restored, and the base's new state is removed; or, once all
        weights have moved, the step is finished first. What the base has changed in place, such as momentum, is
        restored only for a base that requires a closure. With a number for s_init, an interrupt (Ctrl-C) while weights
        are moved may leave some of their sums of updates one step ahead. With torch's SGD, Adam and AdamW and
        `fused=True` no copy is made: an interrupt in the middle of a step may leave some weights stepped and others
        not, as with the plain ones.
        """
        base = BaseStep(self, self._step_of_base(), closure, args, kwargs)  # evaluates the closure, at x
        work = gather(self.param_groups, self.state, self.mechanic_config, maximize=getattr(self, "maximize", False))
        tuner = self.mechanic_tuner
        if work.is_empty:
            self._mechanic_watch.check_scale(tuner, can_sync=base.can_sync)
            return base.loss
        base.lr_factors = tuner.lr_factors(can_sync=base.can_sync)
        if torch.compiler.is_compiling() and (work.is_new or tuner.seeks):  # it creates state
            return uncompiled(Mechanic.step)(self, base.closure, *args, **kwargs)
        if tuner.is_frozen:
            return self._frozen_step(base, work, tuner)
        old = tuner.read()
        self._mechanic_watch.before_step(tuner, old, work)

        # Measure: everything at x, before the base moves.
        fused = None if tuner.seeks else one_pass(self, base, work)
        advance = fused or TwoPasses(base, work)
        dots = work.total(base.measured, like=old.scales, masked=base.masked)

        # Tune.
        bet = tuner.bet(old, dots, base.lr_factors)
        learned, skip, unchanged = tuner.settle(bet, tune(bet.state, bet.dots, bet.params))
        skipper = base.skipper(work, self.mechanic_config)
        if skipper is Skipper.HOST and skip.item():
            return self._skip_step(base, tuner)

        # Base step and move.
        with base.rolled_back_on_error(work):
            advance.step(skip, skipper)
            if tuner.seeks or work.is_new:  # the first scale, or the search begins again
                learned = tuner.first_scale(learned, work, bet, base, unchanged)
            scale = learned.state.scales.sum(-1)
            update = advance.move(learned.scales(old), skip)
        work.commit(partial(tuner.recorded, scale, bet.lr, skip, unchanged, learned, update), learned.restarted)
        self._mechanic_watch.after_step(tuner, work, skip, can_sync=base.can_sync)
        return base.loss

    def _frozen_step(self, base: BaseStep, work: Work, tuner: Tuner) -> Any:
        """Make the base's own step at lr times the frozen scale: nothing is measured, nothing is moved."""
        config, scale = self.mechanic_config, tuner.read().scales.sum(-1)
        is_bad = base.has_bad_gradient(work, config, like=scale)
        skip = scale.new_zeros((), dtype=torch.bool) if is_bad is None else is_bad
        skipper = base.skipper(work, config)
        if skipper is Skipper.HOST and skip.item():
            return self._skip_step(base, tuner)
        lr = tuner.largest_lr(base.lr_factors, like=scale)
        base.lr_factors = [a * b for a, b in zip(base.lr_factors, tuner.frozen_scales(), strict=True)]
        base.call(work, skip, skipper, tells_base=is_bad is not None)
        work.commit(partial(tuner.recorded, scale, lr, skip, unchanged=skip))
        self._mechanic_watch.after_frozen_step(tuner, work)
        return base.loss

    def _skip_step(self, base: BaseStep, tuner: Tuner) -> Any:
        """Leave everything as it is, but count."""
        tuner.count_skipped()
        self._mechanic_watch.after_skip(tuner, self, can_sync=base.can_sync)
        return base.loss

    @classmethod
    def _step_of_base(cls) -> Callable[..., Any]:
        """Return what `super().step` is, as a function: no compiler looks into `super`."""
        order: tuple[Any, ...] = cls.__mro__
        step: Callable[..., Any] = order[order.index(Mechanic) + 1].step
        return step

    @cached_property
    def _mechanic_tuner(self) -> Tuner:
        return Tuner(self.mechanic_config, is_proportional=not issubclass(self.mechanic_base, NOT_IN_PROPORTION))

    @cached_property
    def _mechanic_watch(self) -> Watch:
        return Watch(type(self).__name__, self.mechanic_base, self.mechanic_config)

    @property
    def mechanic_tuner(self) -> Tuner:
        """The tuner's numbers, as the parameter groups hold them now."""
        return self._give_rows()

    def _give_rows(self) -> Tuner:
        """Give every parameter group the row of the tuner that it is to hold, and return the tuner."""
        return self._mechanic_tuner.at(self.param_groups, is_new=not self.state)

    @property
    def scale(self) -> Tensor:
        """The learned scale, sum(s), 0 at first: a 0-d tensor, or, with `per_group`, one of shape (number of groups,).

        It is on the parameters' device, once a step was made.
        """
        scale = self.mechanic_tuner.scale
        return scale if self.mechanic_config.per_group else scale[0]

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped because a gradient was not finite. Syncs."""
        return self.mechanic_tuner.skipped_steps

    def effective_lr(self) -> list[float]:
        """Return, for each parameter group, its current lr times its learned scale. Syncs.

        This is the learning rate at which the plain base optimizer would now make steps of the same size. A base
        without lr counts as lr 1.

        Example:
            >>> import torch
            >>> from mechanic_pytorch import mechanize
            >>> optimizer = mechanize(torch.optim.SGD)([torch.zeros(3, requires_grad=True)], lr=1.0)
            >>> optimizer.effective_lr()
            [0.0]
        """
        return self.mechanic_tuner.effective_lr()

    def learned_lr(self) -> list[float]:
        """Return, for each parameter group, the lr to give to the plain base optimizer, for a run like this one.

        At this lr, the same schedule has the same sum of learning rates over the steps so far: max(lr) * sum(scale *
        lr) / sum(lr), which is max(lr) times the average of the scale, weighted by the schedule. The lrs of groups that
        share a scale are in proportion to their "initial_lr", which schedulers set, or else to their lr. Syncs.

        Example:
            >>> import torch
            >>> from mechanic_pytorch import mechanize
            >>> optimizer = mechanize(torch.optim.SGD)([torch.zeros(3, requires_grad=True)], lr=1.0)
            >>> optimizer.learned_lr()
            [0.0]
        """
        return self.mechanic_tuner.learned_lr()

    def reset(self) -> None:
        """Forget what was learned, and start again from the current weights: for another task.

        With s_init="auto" a change of the data alone needs no reset: the next step starts from the weights as they are.
        The base's own state, such as momentum, stays. The counts of steps and of skipped steps begin again, too.
        """
        for state in self.state.values():
            for key in PER_PARAMETER:
                state.pop(key, None)
        self.mechanic_tuner.clear()
        self._mechanic_watch.restart()

    def freeze_scale(self) -> None:
        """Stop adapting: from now on a step is a plain one of the base, at lr times the present scale, at its cost.

        The counts, `learned_lr()` and `skip_nonfinite` keep working; the latter costs a pass over the gradients and a
        sync (and a sum over the processes, if they share the tuner). Schedules and changes of lr keep working, and only
        lr moves the effective lr: `max_lr` does not. A step that raises is not undone. Checkpoints hold the frozen
        scale; `reset()` unfreezes. All processes must freeze at the same step. Syncs.

        Raises:
            ValueError: no scale has been learned yet; a parameter group has no lr; the updates of the base are not in
                proportion to it (Rprop, Adafactor, ASGD, LBFGS).

        Example:
            >>> import torch
            >>> from mechanic_pytorch import mechanize
            >>> p = torch.ones(3, requires_grad=True)
            >>> optimizer = mechanize(torch.optim.SGD)([p], lr=1.0)
            >>> for t in range(30):
            ...     p.grad = p.detach().clone()
            ...     optimizer.step()
            ...     if t == 19:
            ...         optimizer.freeze_scale()
            ...         frozen = optimizer.effective_lr()
            >>> optimizer.effective_lr() == frozen
            True
        """
        self.mechanic_tuner.freeze(type(self).__name__, self.mechanic_base.__name__)

    def unfreeze_scale(self) -> None:
        """Learn the scale again, from the tuner's state when it was frozen. No weight jumps."""
        self.mechanic_tuner.unfreeze()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as `torch.optim.Optimizer.add_param_group` does.

        With `per_group`, it starts with a tuner that has seen nothing.

        Raises:
            ValueError: the group asks for `differentiable=True`, or for several iterations a step without a line search
                (LBFGS); it holds a `DTensor` of partial sums; or with `per_group`, the scales are frozen.
            TypeError: weights are of a class that cannot be copied and subtracted, such as 8-bit ones.
        """
        who = type(self).__name__
        if self.param_groups:
            self.mechanic_tuner.check_can_grow(who)
        if any(is_ours(key) for key in param_group):  # taken over from another optimizer
            param_group = {key: value for key, value in param_group.items() if not is_ours(key)}
        super().add_param_group(param_group)
        try:
            check_group(who, self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise
        self._give_rows()

    def state_dict(self) -> dict[str, Any]:
        """Return a checkpoint, as `torch.optim.Optimizer.state_dict` does."""
        self._give_rows()  # groups may have changed since the last step
        return super().state_dict()

    def load_state_dict(
        self, state_dict: dict[str, Any], *args: Any, tuner: Literal["saved", "fresh"] = "saved", **kwargs: Any
    ) -> None:
        """Load a checkpoint, as `torch.optim.Optimizer.load_state_dict` does.

        A checkpoint of the plain base loads too: the tuner then starts again. It brings the plain learning rate; set
        each group's "lr" back to 1.0 afterwards. Further arguments are passed on to the base.

        Args:
            state_dict: the checkpoint.
            *args: passed on to the base.
            tuner: "fresh" keeps all of a checkpoint except the tuner, which starts again: for other options than those
                it was saved with.
            **kwargs: passed on to the base.

        Raises:
            ValueError: this is no checkpoint of an optimizer; or it does not fit: its tuner has another number of
                betas, another kind of s_init or another `per_group`, or it holds impossible numbers. Nothing is
                changed.

        Example:
            >>> import torch
            >>> from mechanic_pytorch import mechanize
            >>> params = [torch.zeros(3, requires_grad=True)]
            >>> saved = mechanize(torch.optim.SGD, s_init=1e-8)(params, lr=1.0).state_dict()
            >>> mechanize(torch.optim.SGD)(params, lr=1.0).load_state_dict(saved, tuner="fresh")
        """
        with checked(self, self.mechanic_config, state_dict, tuner) as fitting:
            super().load_state_dict(fitting, *args, **kwargs)
        vars(self).pop("_mechanic_tuner", None)  # it has seen other groups
        self._give_rows()
        self._mechanic_watch.forget_step()

    def __repr__(self) -> str:
        """Show the options, and of each group the base's settings and the effective lr. Syncs."""
        return text_of(self, self.mechanic_tuner)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or a checkpoint, without showing the base what it has not written."""
        with hidden_state(state["state"]):
            super().__setstate__(state)
