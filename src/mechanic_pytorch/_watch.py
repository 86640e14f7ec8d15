"""What an optimizer says while it runs: the log, and warnings about runs that cannot learn, each with its remedy."""

from __future__ import annotations

import logging
import sys
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from mechanic_pytorch._buckets import SLOTS, Work, values_of
from mechanic_pytorch._config import Config, TunerState
from mechanic_pytorch._torch import can_sync, in_backward, lrs
from mechanic_pytorch._tuner import Tuner, is_ours
from mechanic_pytorch.distributed import check_agreement, check_shards, local

PATIENCE = 15  # steps that a base may take before its first update: SOAP needs one, others ten
# Beginnings of the names of bases that learn a rate, or hold the weights at a length.
OWN_RATE = ("dadapt", "prodigy", "dog", "ldog", "dowg", "cocob", "automagic", "schedulefree", "fromage", "nero", "amos")
LOST = 0.9  # the part of an update whose loss is worth a warning
STUCK = 50  # skipped steps in a row
FIRST_CHECK = 500  # steps before the scale is read; then after twice as many, and so on
GROWTH = 10  # times s_init: what a scale exceeds by then that has begun to grow. docs/design-notes.md has figures
MANY_LONE = (
    "several mechanized optimizers hold one tensor each, so that each learns a scale from that tensor alone. Remedy: "
    "give all parameters to one mechanized optimizer, and call its step() after backward(). Where every tensor needs "
    "its own (optimizer in backward, CPU offload), learn the lr that way in a short run, and give learned_lr() to the "
    "plain base. If the tensors belong to different models, all is well."
)
MANY = 8  # optimizers of one tensor each that begin together: a network has as many tensors, loose scalars are fewer
HELD_BACK = 0.5  # s_decay * scale: the length of the tuner's pull, that of the gradient being 1

# Of optimizers of one tensor, those that have made no second step, and the shapes of the tensors.
_lone: list[tuple[weakref.ref[Watch], torch.Size]] = []
said: set[str] = set()  # what is said once in a process, and again in the report of `mechanic run`


class Watch:
    """Counts the steps of one optimizer in this process, logs, and gives each warning once.

    Args:
        who: the name of the optimizer's class.
        base: its plain class.
        config: the options.
    """

    def __init__(self, who: str, base: type[torch.optim.Optimizer], config: Config) -> None:
        self._who, self._base, self._config = who, base, config
        self._logged_step: int | None = None
        self._steps_without_move = 0
        self._has_moved = False
        self._is_checked = False
        self._skips_in_a_row = 0
        self._new_shape_was_said = False
        self.restart()

    def restart(self) -> None:
        """Watch for the scale to start again."""
        self._steps, self._next_check = 0, FIRST_CHECK
        self.forget_step()

    def forget_step(self) -> None:
        """Read the number of the next step from the tuner."""
        self._logged_step = None

    # --- The base ----------------------------------------------------------------------------------------------------

    def before_step(self, tuner: Tuner, old: TunerState, work: Work) -> None:
        """Before a first step, warn of a base that does not fit, and compare the options of all processes.

        Raises:
            ValueError: parameters are shards of whose process group nothing is known; or processes disagree.
        """
        if self._is_checked:
            return
        self._check_base(tuner.groups)
        params = [p for group in tuner.groups for p in group["params"]]
        if len(params) == 1:
            self._check_company(params[0])
        check_shards(self._who, params, self._config.process_group)
        facts = {"dtype": old.scales.dtype, "the number of scales": len(old.scales)}
        check_agreement(self._who, {**self._config.shared(), **facts}, work.shard_groups)
        self._is_checked = True

    def _check_base(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Warn if the base is known for steps that are not in proportion to its lr, or parameters for a manifold."""
        name = self._base.__name__
        names = [kind.__name__.lower().replace("_", "") for kind in self._base.__mro__]
        if any(each.startswith(OWN_RATE) for each in names):
            self._warn(
                f"{name} has a rate, a length or an average of its own, which steps at a learned scale upset. "
                f"Remedy: use {name} as it is, with the lr that its authors advise; or mechanize a base whose "
                "steps are in proportion to its lr, such as AdamW."
            )
        elif any(getattr(p, "manifold", None) is not None for group in groups for p in group["params"]):
            self._warn(
                "some parameters belong to a manifold, which a rescaled step leaves. "
                f"Remedy: give them to {name} as it is, and the others to a mechanized one."
            )

    def _check_company(self, p: Tensor) -> None:
        """Warn, of one tensor's optimizer, if others of one tensor begin together with it: those of one model.

        Tensors that all have one shape do not count: someone is comparing runs.
        """
        begin = [(other, shape) for other, shape in _lone if (watch := other()) is not None and watch._steps <= 1]
        _lone[:] = [*begin, (weakref.ref(self), p.shape)]
        are_many = len(_lone) >= MANY and len({shape for _, shape in _lone}) > 1
        if (are_many or (len(_lone) > 1 and in_backward())) and MANY_LONE not in said:
            said.add(MANY_LONE)
            self._warn(MANY_LONE)

    def _check_move(self, work: Work, groups: Sequence[dict[str, Any]]) -> None:
        """Warn if rounding has swallowed the base's first update. Syncs until one was due, and then never again."""
        resting = {p for g in groups if lrs([g]) == [0] for p in g["params"]}
        grads = [
            g for bucket in work.buckets for p, g in zip(bucket.params, bucket.grads, strict=True) if p not in resting
        ]
        active = sum(int(g.count_nonzero()) for g in grads)
        if active == 0:
            return  # nothing to follow, or a warm-up from zero
        moved = sum(bucket.count_moved() for bucket in work.buckets)
        self._steps_without_move += moved == 0
        if moved == 0 and self._steps_without_move <= PATIENCE:
            return
        self._has_moved = True
        if moved < (1 - LOST) * active:
            larger = (
                "" if self._config.is_auto else 'pass s_init="auto", or a larger lr, for which the scale makes up; or '
            )
            self._warn(
                f"the base optimizer's update changed only {moved} of {active} weights that have a gradient; the rest "
                f"of it was lost in rounding, and a lost update cannot be rescaled. Got lr={lrs(groups)}. "
                f"Remedy: {larger}use weights in float32, a base whose updates do not shrink with the gradient (Adam), "
                "and fused=False on a CPU, where torch's fused SGD leaves 16-bit weights where they are."
            )

    # --- After a step ------------------------------------------------------------------------------------------------

    def after_step(self, tuner: Tuner, work: Work, skip: Tensor, *, can_sync: bool) -> None:
        """Check what a step has done, and log; `skip` is on the device: whether it was skipped."""
        self._skips_in_a_row = 0
        if can_sync and not self._has_moved and not skip.item():
            self._check_move(work, tuner.groups)
        self._check_shapes(work)
        self.check_scale(tuner, can_sync=can_sync)
        self._log(tuner)

    def after_frozen_step(self, tuner: Tuner, work: Work) -> None:
        """Check what a step at a frozen scale has done, and log."""
        self._skips_in_a_row = 0
        self._check_shapes(work)
        self._log(tuner)

    def after_skip(self, tuner: Tuner, optimizer: torch.optim.Optimizer, *, can_sync: bool) -> None:
        """Log a step that was skipped, and warn if many have been in a row."""
        if not tuner.is_frozen:
            self.check_scale(tuner, can_sync=can_sync)
        self._log(tuner)
        self._skips_in_a_row += 1
        if self._skips_in_a_row == STUCK:
            self._warn_of_skips(optimizer)

    def _log(self, tuner: Tuner) -> None:
        """Log if the turn of this step has come."""
        if not self._config.log_every:
            return
        self._logged_step = tuner.steps if self._logged_step is None else self._logged_step + 1
        if self._logged_step % self._config.log_every == 0:
            scales = tuner.scale.tolist()
            data = {"iter_count": self._logged_step, "s": scales if self._config.per_group else scales[0]}
            log = _log if self._config.log_func is None else self._config.log_func
            log(data)

    def _check_shapes(self, work: Work) -> None:
        """Warn, once, that a parameter was replaced by one of another shape: points were added, or pruned."""
        if self._new_shape_was_said or not any(bucket.has_new_shapes for bucket in work.buckets):
            return
        self._new_shape_was_said = True
        self._warn(
            "a parameter comes with the tuner's tensors of another shape. They begin again from the weights as they "
            "are now; the scale is kept. Remedy: none is needed where points or rows were added or pruned; to keep "
            "their way, treat the keys 'mechanic_...' of optimizer.state[p] as those of the base."
        )

    def _warn_of_skips(self, optimizer: torch.optim.Optimizer) -> None:
        """Warn that many steps in a row were skipped, and say why."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        stored = [t for p in params for k, t in optimizer.state.get(p, {}).items() if k in SLOTS]
        kinds = {
            "a gradient": [p.grad for p in params if p.grad is not None],
            "a weight": params,
            "stored state": stored,
        }
        found = [name for name, tensors in kinds.items() if not all(_is_finite(tensor) for tensor in tensors)]
        if found:
            reason = f"because {' and '.join(found)} is not finite"
            remedy = "look for inf or nan there; once mended, call optimizer.reset()"
        elif getattr(optimizer, "found_inf", None) is not None:
            reason = "because the GradScaler has found an overflow, or another process has"
            remedy = "look for inf or nan in the gradients of all processes"
        else:
            reason = "because a square overflows: all numbers are finite, but gradients or weights are as long as 1e19"
            remedy = "scale the data or the loss down, then call optimizer.reset()"
        self._warn(f"the last {STUCK} steps were skipped, {reason}. Remedy: {remedy}.")

    def check_scale(self, tuner: Tuner, *, can_sync: bool) -> None:
        """Count the steps of this process, and warn if by now a scale should have been learned and is not.

        Of several tuners, those of parameter groups that never had a gradient, or an lr, may wait as long as others
        learn. Syncs after 500 steps, 1000, 2000 and so on, until it has warned; never while a step is recorded.
        """
        if not can_sync:
            return
        self._steps += 1
        if self._steps != self._next_check:
            return
        self._next_check = 0  # never again
        is_auto, config = self._config.is_auto, self._config
        scales, rates = tuner.scale.tolist(), lrs(tuner.groups)
        begun = [scale > (0.0 if is_auto else GROWTH * config.s_init) for scale in scales]
        idle = [any(begun) and average == 0 for average in tuner.average_lrs()]
        decays = [
            0.0 if is_auto or max(lrs(groups, "initial_lr")) >= 1 else config.s_decay * scale
            for scale, groups in zip(scales, tuner.members, strict=True)
        ]
        if not all(a or b for a, b in zip(begun, idle, strict=True)):
            noise = "" if is_auto else ' If the gradient is mostly noise, pass s_init="auto", or a larger number.'
            self._warn(
                f"training has not started: after {self._steps} steps the scale is {_listed(scales)}, and s_init is "
                f"{config.s_init}. Got lr={rates}. Remedy: make sure that lr is not 0, that the optimizer holds the "
                f"parameters of the model that is trained, and that their gradients are neither None nor 0.{noise}"
            )
        elif max(decays) >= HELD_BACK:
            self._warn(
                f"the scale is held back: after {self._steps} steps s_decay times the scale is {max(decays):.1f}, so "
                "that the tuner's decay pulls it back about as strongly as the gradient drives it. "
                f"Got lr={rates} and s_decay={config.s_decay}, which is too much for so small an lr. "
                'Remedy: pass s_init="auto", or lr=1.0 or larger.'
            )
        else:
            self._next_check = 2 * self._steps

    def _warn(self, message: str) -> None:
        """Warn where the step is called, by whom neither torch nor we are."""
        level, frame = 2, sys._getframe(1)
        while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in ("mechanic_pytorch", "torch"):
            level, frame = level + 1, frame.f_back
        warnings.warn(f"{self._who}: {message}", stacklevel=level)


def _log(data: dict[str, Any]) -> None:
    scales = data["s"] if isinstance(data["s"], list) else [data["s"]]
    s = " ".join(f"{scale:.6e}" for scale in scales)
    logging.getLogger("mechanic_pytorch").info("iter_count=%d s=%s", data["iter_count"], s)


def _is_finite(tensor: Tensor) -> bool:
    return bool(values_of(local(tensor.detach())).isfinite().all())


def text_of(optimizer: torch.optim.Optimizer, tuner: Tuner) -> str:
    """Return what `repr` shows: options that differ from the defaults, settings and effective lr of groups. Syncs."""
    options = [
        f"{each.name}={getattr(tuner.config, each.name)!r}"
        for each in fields(tuner.config)
        if getattr(tuner.config, each.name) != each.default or each.name == "s_init"
    ]
    lines = [f"{type(optimizer).__name__} (", f"Options of mechanize: {', '.join(options)}"]
    rates = [f"{lr:.3g}" for lr in tuner.effective_lr()] if can_sync(optimizer) else ["unknown"] * len(tuner.groups)
    for i, (group, lr) in enumerate(zip(tuner.groups, rates, strict=True)):
        settings = {key: group[key] for key in sorted(group) if key != "params" and not is_ours(key)}
        lines += [f"Parameter Group {i}", *(f"    {key}: {value}" for key, value in settings.items())]
        lines += [f"    effective lr: {lr}"]
    return "\n".join([*lines, ")"])


def _listed(scales: list[float]) -> str:
    return f"{scales[0]:.0e}" if len(scales) == 1 else f"{', '.join(f'{s:.0e}' for s in scales)} (per parameter group)"
