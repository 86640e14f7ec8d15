r"""Mechanic: any `torch.optim.Optimizer`, with the scale of its learning rate learned while it runs.

The algorithm is Algorithm 1 of Cutkosky, Defazio and Mehta, "Mechanic: A Learning Rate Tuner", NeurIPS 2023,
arXiv 2306.00144. Symbols: x parameters, g gradient, u the update of the base optimizer (which would go to x + u),
x_ref the parameters at the first step, delta the sum of all updates so far, n the number of betas. The vectors m, v, r,
s have n entries and start at 0. One step:

    h     = <delta, g + s_decay * sum(s) * |g| * x / |x|>        measure: everything at x, before the base moves
    m     = max(beta * m, |h|)                                   tune
    v     = beta^2 * v + h^2
    r     = max(0, beta * r + max(-s * h, penalty * -s * h))        penalty = 1
    s     = ((s_init / n) * m + r) / (sqrt(v) + eps)
    delta = delta + u                                            base step, then move
    x     = x_ref + sum(s) * delta

Big tensors are touched twice: four inner products before the base step (`measure`), one affine move after it (`move`),
both in `kernels`. Between them stands a recurrence on vectors of six numbers, `tune`, at the end of this file. x_ref is
never stored: a step adds sum(s_new) * delta_new - sum(s_old) * delta_old, which keeps what users do to their weights
between steps. With s_init="auto" a step is x = x + sum(s) * u instead, and what is bet on is the way that the weights
have gone: delta = (x - x_ref) / sum(s), with x_ref stored (`_start.py`). The file `docs/deviations.md` lists where this
differs from other implementations, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeGuard

import torch
from torch import Tensor
from torch.optim import Optimizer

from mechanic_pytorch import _base, _buckets, _control, _fused, _start, _state, _steps, _warnings
from mechanic_pytorch._classes import class_for
from mechanic_pytorch._config import Config, LogFunc
from mechanic_pytorch._start import Numbers
from mechanic_pytorch._state import TunerState
from mechanic_pytorch.distributed import check_agreement, check_parts, sum_over_processes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Mechanic", "is_mechanized", "mechanize"]


def mechanize(
    Base: type[Optimizer],
    s_decay: float = 0.01,
    betas: Sequence[float] = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999),
    s_init: float | Literal["auto"] = 1e-8,
    eps: float = 1e-8,
    store_delta: bool = False,
    log_func: LogFunc | None = None,
    log_every: int = 0,
    *,
    skip_nonfinite: bool = True,
    process_group: ProcessGroup | None = None,
    max_lr: float | None = None,
    per_group: bool = False,
) -> type[Any]:
    """Return a class like `Base` whose learning-rate scale is learned.

    The result is a subclass of `Base` and of `Mechanic` and takes the arguments of `Base`. With lr=1.0 it needs no
    tuning; schedules, ratios between group learning rates and weight decay keep their meaning, and everything is
    multiplied by the learned scale. The same arguments give the same class.

    Args:
        Base: an optimizer class, not an instance.
        s_decay: lambda in the paper, a weight decay inside the tuner. Helps on small data; 0.0 is fine on large. It
            weighs in proportion to the learned scale, so it suits lr near 1 and holds a much smaller lr back.
        betas: discount factors of the tuner, one copy of the tuner each; unrelated to Adam's betas.
        s_init: initial scale, > 0: an underestimate of the right one, relative to the base's updates. Too small
            costs a few steps, too large may diverge. "auto" starts relative to the first update, so that every base
            lr gives the same run, and makes plain steps of the base, x + scale * u: a scale that falls takes nothing
            back, and weights whose lr is 0 rest. docs/safety.md has its rules.
        eps: added to sqrt(v), in units of h (update times gradient).
        store_delta: accepted for compatibility. The sum of updates is always kept exactly, which takes the one slot
            that False promises and is as accurate as the two of True.
        log_func: called with `{"iter_count": t, "s": scale}`, a list of scales with `per_group`; None logs through
            `logging.getLogger("mechanic_pytorch")` at level INFO.
        log_every: log every this many steps; 0 never does.
        skip_nonfinite: leave everything as it was at a step whose gradient is not finite. This costs one host read
            per step, or none with a base that takes `found_inf` (`fused=True`). False spares it: the base then does
            what it always does with such a gradient; the tuner's vectors are protected either way.
        process_group: the group whose processes hold the other parts of plain tensors that are parts of larger ones, or
            other parameters of the same model: FSDP1, `ZeroRedundancyOptimizer`, pipeline stages. A `DTensor` (FSDP2,
            tensor parallelism) knows its own. None: plain tensors are whole, and equal everywhere (DDP).
        max_lr: bound of the effective lr, > 0: the scale never exceeds max_lr / (the largest lr so far, of all groups).
            None: no bound.
        per_group: learn one scale for each parameter group, from that group's gradient, weights and updates alone: for
            groups whose updates have unlike units, or that start far apart. The ratio between their lrs then says
            nothing. docs/per-group.md says when it helps. False: one scale for all.

    Returns:
        The class `Mechanized<Base>`. Type checkers see `Any`, for there is no type that says "`Base` and `Mechanic`".

    Raises:
        TypeError: `Base` is no optimizer class or is mechanized already; an option is of the wrong kind.
        ValueError: an option breaks its rule.

    Example:
        >>> import torch
        >>> from mechanic_pytorch import mechanize
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = mechanize(torch.optim.AdamW)(model.parameters(), lr=1.0)
        >>> model(torch.ones(8, 4)).square().mean().backward()
        >>> optimizer.step()

    Source: arXiv 2306.00144, Algorithm 1.
    """
    if not (isinstance(Base, type) and issubclass(Base, Optimizer) and Base is not Optimizer):
        got = f"an instance of {type(Base).__name__}" if isinstance(Base, Optimizer) else repr(Base)
        raise TypeError(
            f"mechanize: Base must be a subclass of torch.optim.Optimizer. Got {got}. "
            "Remedy: pass the class and call the result: mechanize(torch.optim.AdamW)(model.parameters(), lr=1.0)."
        )
    if issubclass(Base, Mechanic):
        raise TypeError(
            f"mechanize: Base must not be mechanized already. Got {Base.__name__}. Remedy: use it as it is, or "
            "mechanize the plain class with the options you want."
        )
    config = Config(
        s_decay,
        betas,  # type: ignore[arg-type]
        s_init,
        eps,
        store_delta,
        log_func,
        log_every,
        skip_nonfinite,
        process_group,
        max_lr,
        per_group,
    )
    return class_for(Mechanic, Base, config)


def is_mechanized(opt: object) -> TypeGuard[Mechanic]:
    """Tell whether an optimizer was built by a class that `mechanize` returned.

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
    found_inf: Tensor  # there only while a GradScaler, or our own step, tells the base whether to skip
    _base_has_moved = False
    _start_is_known = False
    _homes: Sequence[dict[str, Any]] = ()  # the parameter groups that held a tuner last
    _steps_without_move = 0
    _skips_in_a_row = 0
    _watched = _warnings.NOTHING_SEEN
    _log_count: int | None = None
    _options_compared = False
    _new_shape_was_said = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Take one step of the base optimizer, rescaled.

        Args:
            closure: re-evaluates the model, with autograd on, and returns the loss. Its first evaluation happens before
                the base sees it, at the same weights; the base evaluates it as often as it would by itself.
            *args: passed on to the base.
            **kwargs: passed on to the base.

        Returns:
            What the base returns, usually the loss that the closure returned, else None.

        If anything raises, the parameters and the tuner's vectors are put back as they were, and what the base has
        added to the state at a first step is taken out again. What it has changed in place, such as momentum, is put
        back only for a base that requires a closure. Of torch's SGD, Adam and AdamW with `fused=True` no copy is made
        on a CPU: there an interrupt (Ctrl-C) in the middle of a step may find some weights stepped and others not, as
        with the plain ones.
        """
        lr_times = _base.LrTimes(self)
        loss, replay = _base.first_evaluation(closure, lr_times) if closure is not None else (None, None)
        config = self.mechanic_config
        buckets, spreads = _buckets.collect(self)
        if not buckets and not any(spreads):
            _warnings.watch(self)
            return loss
        lr_times.factors = _start.lr_factors(self)
        seeks = config.s_init == "auto" and not self._start_is_known  # its first scale
        begins = seeks or any(bucket.is_new for bucket in buckets)
        if torch.compiler.is_compiling() and begins:
            return _base.uncompiled(Mechanic.step)(self, replay, *args, **kwargs)  # it creates state
        inputs = args if closure is None else (replay, *args)
        base_step = partial(_base.unwrapped_step(self, Mechanic), self, *inputs, **kwargs)
        if _state.is_frozen(self):
            return _control.frozen_step(self, buckets, spreads, base_step, loss, lr_times)

        # Measure.
        old = _state.read_tuner(self)
        if not self._options_compared:
            _warnings.check_that_base_fits(self)
            params = (p for group in self.param_groups for p in group["params"])
            check_parts(type(self).__name__, params, config.process_group)
            check_agreement(
                type(self).__name__,
                {**config.shared(), "dtype": old.scales.dtype, "the number of scales": len(_state.homes(self))},
                spreads,
            )
            self._options_compared = True
        asks, base_skips = _base.can_ask_host(self), _base.skips_by_itself(self)
        rules = _fused.rules_of(self, buckets, lr_times) if base_skips and not seeks else None
        before = [[torch.empty_like(x) for x in bucket.params] for bucket in buckets] if rules is None else []
        parts = {spread: old.scales.new_zeros(*old.scales.shape[:-1], 4) for spread in [(), *spreads]}
        for bucket, copies in zip_longest(buckets, before):
            bucket.densify()
            parts[bucket.spread][bucket.tuner].add_(bucket.measure(copies).to(old.scales))
        parts = {spread: _base.unscaled(self, part) for spread, part in parts.items()}
        dots = sum_over_processes(parts, spreads)

        # Tune.
        lr = _base.largest_lr(self, dots, lr_times.factors)
        new, memory, length, part = _start.learn(self, old, dots, lr, tune)
        skip = torch.stack(new).isfinite().all().logical_not()
        we_skip = _steps.needs_us(self, buckets)
        if _steps.is_left_out(self, skip, we_skip):
            return loss
        # A group of which nothing was measured has no gradient, in any process.
        left_out = skip | (dots == 0).all(-1) if config.per_group else skip
        new = TunerState(*(torch.where(left_out.unsqueeze(-1), a, b) for a, b in zip(old, new, strict=True)))

        # Base step and move: with "auto" a plain step.
        part = None if part is None else torch.where(left_out, 0.0, part)
        if rules is not None:
            _fused.step_and_move(self, buckets, rules, _start.scales(old, new, length, part), skip)
        else:
            evaluates_again = closure is not None and _base.requires_closure(base_step.func)
            with _buckets.undone_on_error(self, buckets, before, whole_state=evaluates_again):
                undone = _buckets.undone_where(skip if we_skip and not asks else None, self, buckets, before)
                found_inf = _base.found_inf(self, skip if base_skips else None)
                with undone, _state.unseen_by_base(self.state), found_inf, lr_times:
                    loss = base_step()
                if seeks and memory is not None:
                    new, memory = _start.begin(self, buckets, before, spreads, new, memory, dots, lr)
                _buckets.move(buckets, before, _start.scales(old, new, length, part))
        unit, scale = _start.together(memory), new.scales.sum(-1)
        write = _state.prepared(self, new, left_out, skip, unit=unit, lr=lr, scale=scale)
        _buckets.commit(self, buckets, write)
        if asks and not self._base_has_moved and not skip.item():
            _warnings.check_that_base_moved(self, buckets)
        _steps.report(self, buckets)
        return loss

    @property
    def scale(self) -> Tensor:
        """The learned scale, sum(s), 0 at first: a 0-d tensor, or, with `per_group`, one of shape (number of groups,).

        It is on the parameters' device, once a step was made.
        """
        return _state.scale(self)

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped because a gradient was not finite. Reading it copies to the host."""
        _state.attach_tuner(self)
        return int(self.param_groups[0][_state.SKIPPED_STEPS])

    def effective_lr(self) -> list[float]:
        """Return, for each parameter group, its current lr times its learned scale. Copies to the host.

        This is the learning rate at which the plain base optimizer would now make steps of the same size. A base
        without lr counts as lr 1.

        Example:
            >>> import torch
            >>> from mechanic_pytorch import mechanize
            >>> optimizer = mechanize(torch.optim.SGD)([torch.zeros(3, requires_grad=True)], lr=1.0)
            >>> optimizer.effective_lr()
            [0.0]
        """
        scales = self.scale.expand(len(self.param_groups)).tolist()
        return [lr * scale for lr, scale in zip(_base.lrs(self.param_groups), scales, strict=True)]

    def learned_lr(self) -> list[float]:
        """Return, for each parameter group, the lr to give to the plain base optimizer, for a run like this one.

        It is the lr at which the same schedule sums to the same, over the steps so far: max(lr) * sum(scale * lr) /
        sum(lr), that is, the average of the scale, weighted by the schedule. Groups that share a scale are in
        proportion to their "initial_lr", which schedulers set, or else to their lr. Copies to the host.

        Example:
            >>> import torch
            >>> from mechanic_pytorch import mechanize
            >>> optimizer = mechanize(torch.optim.SGD)([torch.zeros(3, requires_grad=True)], lr=1.0)
            >>> optimizer.learned_lr()
            [0.0]
        """
        peaks, shares = _state.average_lrs(self), _base.lrs(self.param_groups, "initial_lr")
        ratios = [share / max(shares) if any(shares) else 1.0 for share in shares]
        return peaks if self.mechanic_config.per_group else [peaks[0] * ratio for ratio in ratios]

    def reset(self) -> None:
        """Start the tuner and the sums of updates anew from the current weights: a new task, new data.

        The base's own state, such as momentum, stays. The counts of steps and of skipped steps begin again, too.
        """
        _state.clear(self)
        self._watched = _warnings.NOTHING_SEEN
        self._log_count = None
        self._start_is_known = False

    def freeze_scale(self) -> None:
        """Stop adapting: from now on a step is the base's own, at lr times the present scale, and costs what that does.

        What is kept up: the counts, `learned_lr()`, and `skip_nonfinite`, which takes a look at the gradients and its
        host read (and a sum over the processes, if they share the tuner). Schedules and changes of lr go on to work,
        and nothing but lr moves the effective lr, `max_lr` included. A step that raises is not undone. Checkpoints hold
        that the scale is frozen; `reset()` unfreezes. Of several processes, all must freeze. Copies to the host.

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
        _control.freeze(self)

    def unfreeze_scale(self) -> None:
        """Learn the scale again, from what it and the sums of updates were when it was frozen. No weight jumps."""
        _control.unfreeze(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as `torch.optim.Optimizer.add_param_group` does.

        With `per_group`, it starts with a tuner that has seen nothing.

        Raises:
            ValueError: the group asks for `differentiable=True`; or with `per_group`, the scales are frozen.
        """
        _control.check_can_grow(self)
        if any(key.startswith("mechanic_") for key in param_group):  # taken over from another optimizer
            param_group = {key: value for key, value in param_group.items() if not key.startswith("mechanic_")}
        super().add_param_group(param_group)
        try:
            _state.check_group(type(self).__name__, self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise
        _state.attach_tuner(self)

    def state_dict(self) -> dict[str, Any]:
        """Return a checkpoint, as `torch.optim.Optimizer.state_dict` does."""
        _state.attach_tuner(self)  # groups may have been changed since the last step
        return super().state_dict()

    def load_state_dict(
        self, state_dict: dict[str, Any], *args: Any, tuner: Literal["saved", "fresh"] = "saved", **kwargs: Any
    ) -> None:
        """Load a checkpoint, as `torch.optim.Optimizer.load_state_dict` does.

        A checkpoint of the plain base loads too: the tuner then starts afresh. It brings the plain learning rate; set
        each group's "lr" back to 1.0 afterwards. Further arguments are passed on to the base.

        Args:
            state_dict: the checkpoint.
            *args: passed on to the base.
            tuner: "fresh" keeps all of a checkpoint but what was learned by the tuner, which starts again: for other
                options than those it was saved with.
            **kwargs: passed on to the base.

        Raises:
            ValueError: the checkpoint does not fit: its tuner has another number of betas, another kind of s_init or
                another `per_group`, or it holds what no run can have written. Nothing is changed.

        Example:
            >>> import torch
            >>> from mechanic_pytorch import mechanize
            >>> params = [torch.zeros(3, requires_grad=True)]
            >>> saved = mechanize(torch.optim.SGD, s_init=1e-8)(params, lr=1.0).state_dict()
            >>> mechanize(torch.optim.SGD, s_init="auto")(params, lr=1.0).load_state_dict(saved, tuner="fresh")
        """
        with _state.checked(self, state_dict, tuner) as fitting:
            super().load_state_dict(fitting, *args, **kwargs)
        self._log_count = None
        self._start_is_known = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or a checkpoint, without showing the base what it has not written."""
        with _state.unseen_by_base(state["state"]):
            super().__setstate__(state)


def tune(state: TunerState, dots: Tensor, config: Config | Numbers) -> TunerState:
    """Return the tuner's next state: in Algorithm 1, what becomes of h, m, v, r, W and s. Pure.

    Args:
        state: the vectors m, v, r, s, shape (n,) each; or (G, n), a row for each of several tuners.
        dots: `[<delta, g>, <delta, x>, |g|^2, |x|^2]`, shape (4,) or (G, 4), before the base's step.
        config: s_decay, betas, s_init, eps, penalty.

    Returns:
        The next state, in the dtype and on the device of the old one, which is not changed.

    Example:
        >>> import torch
        >>> config, start = Config(betas=(0.9, 0.99)), TunerState(*torch.zeros(4, 2))
        >>> state = tune(start, torch.tensor([-3.0, 0.0, 1.0, 1.0]), config)
        >>> state.max_product.tolist(), f"{state.scales.sum():.0e}"
        ([3.0, 3.0], '1e-08')

    Source: arXiv 2306.00144, Algorithm 1.
    """
    m, v, r, s = state
    delta_g, delta_x, g_squared, x_squared = dots.unsqueeze(-1).unbind(-2)  # (1,) or (G, 1), as h
    beta = torch.stack([s.new_full((), beta) for beta in config.betas])  # filled there: copying would block a GPU
    x_norm = x_squared.sqrt().clamp_min(torch.finfo(s.dtype).tiny ** 0.5)  # <delta, x> is 0 where x is

    h = delta_g + config.s_decay * s.sum(-1, keepdim=True) * g_squared.sqrt() * (delta_x / x_norm)
    m = torch.maximum(beta * m, h.abs())
    v = beta.square() * v + h.square()
    reward = -s * h
    r = (beta * r + torch.maximum(reward, config.penalty * reward)).clamp_min(0.0)
    wealth = config.s_init / len(config.betas) * m + r  # type: ignore[operator]  # "auto" has become a number
    s = (wealth / (v.sqrt() + config.eps)).masked_fill(wealth == 0, 0.0)
    return TunerState(m, v, r, s)
