"""Where Mechanic keeps its state, and how that state survives what people do to optimizers.

Per parameter, in `optimizer.state[p]`: one slot, which is the sum of updates or, with `s_init="auto"`, the weights from
which their way is measured; and for parameters of less than 32 bits, the compensation. They are written only after the
base's first step, because many bases take an empty `state[p]` for "not started".

Per tuner, in `optimizer.param_groups[0]`, or in each parameter group with `per_group`: its vectors and some notes. Per
optimizer, in `param_groups[0]`: two counters. Parameter groups are what every checkpointing tool carries whole and
uncast; a key of `optimizer.state` that is not a parameter is what some refuse.

All keys start with `mechanic_`; the values are tensors, and two numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from mechanic_pytorch._config import Config
from mechanic_pytorch.distributed import whole

DELTA = "mechanic_delta"
REFERENCE = "mechanic_reference"
COMPENSATION = "mechanic_compensation"
UNIT = "mechanic_unit"
UNIT_SIZE = 10  # what it holds: the fields of `_start.Memory`
LR_FACTOR = "mechanic_lr_factor"
LR_SUMS = "mechanic_lr_sums"
FROZEN_SCALE = "mechanic_frozen_scale"
STEPS = "mechanic_steps"
SKIPPED_STEPS = "mechanic_skipped_steps"

SLOTS = {DELTA, REFERENCE}
PER_PARAMETER = {*SLOTS, COMPENSATION}


class TunerState(NamedTuple):
    """The tuner's memory: one entry per beta, each of shape (n,), all 0 at the start (m, v, r, s in the paper).

    With `per_group`, the tuners of all G parameter groups are stepped at once: shape (G, n).
    """

    max_product: Tensor
    sum_squared_products: Tensor
    reward: Tensor
    scales: Tensor


def slot(config: Config) -> str:
    """Return under which key a parameter's slot is: the sum of updates; or with "auto", where D is measured from."""
    return REFERENCE if config.s_init == "auto" else DELTA


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the real dtype in which a parameter's sums are kept: float32, or float64 for 64-bit numbers."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


# --- the tuner's state ------------------------------------------------------------------------------------------------

_TUNER_KEYS = tuple(f"mechanic_{name}" for name in TunerState._fields)


def tuners(optimizer: Any) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Return for each tuner the parameter group that holds it, and all groups whose scale it learns."""
    groups = optimizer.param_groups
    return [(group, [group]) for group in groups] if optimizer.mechanic_config.per_group else [(groups[0], groups)]


def homes(optimizer: Any) -> list[dict[str, Any]]:
    """Return the parameter groups that hold a tuner."""
    return [home for home, _ in tuners(optimizer)]


def for_each_group(optimizer: Any, values: list[Any]) -> list[Any]:
    """Return, of values of each tuner, that of each parameter group."""
    return values if optimizer.mechanic_config.per_group else values * len(optimizer.param_groups)


def attach_tuner(optimizer: Any) -> None:
    """Give the optimizer tuners that have seen nothing, where it has none already."""
    config, first = optimizer.mechanic_config, optimizer.param_groups[0]
    if STEPS not in first:
        first.update({key: torch.zeros((), dtype=torch.int64, device="cpu") for key in (STEPS, SKIPPED_STEPS)})
    for home in homes(optimizer):
        if _TUNER_KEYS[0] not in home:
            home.update({key: torch.zeros(len(config.betas), device="cpu") for key in _TUNER_KEYS})
        if config.s_init == "auto" and UNIT not in home:
            home[UNIT], home[LR_FACTOR] = torch.zeros(UNIT_SIZE, device="cpu"), 1.0
            optimizer._start_is_known = False
        if LR_SUMS not in home:
            home[LR_SUMS] = torch.zeros(3, device="cpu")
        home.setdefault(FROZEN_SCALE, 0.0)  # always there: a flattened checkpoint holds only what a new optimizer has


def read(optimizer: Any, key: str) -> Tensor:
    """Return the tuner's own tensor, or, with `per_group`, a copy of those of all groups: one row each."""
    rows = [home[key] for home in homes(optimizer)]
    return torch.stack(rows) if optimizer.mechanic_config.per_group else rows[0]


def write(optimizer: Any, key: str, value: Tensor) -> None:
    """Write in place what `read` returns."""
    rows = list(value.unbind()) if optimizer.mechanic_config.per_group else [value]
    torch._foreach_copy_([home[key] for home in homes(optimizer)], rows)


def read_tuner(optimizer: Any) -> TunerState:
    """Return the tuner's vectors, as `read` does; first move them to where the parameters are, if these have moved."""
    attach_tuner(optimizer)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if params:
        wide = any(accumulator_dtype(p.dtype) is torch.float64 for p in params)
        device, dtype = params[0].device, torch.float64 if wide else torch.float32
        for home in homes(optimizer):
            if home[LR_SUMS].device != device or home[LR_SUMS].dtype != dtype:
                home.update({key: home[key].to(device, dtype) for key in (*_TUNER_KEYS, UNIT, LR_SUMS) if key in home})
                home.update({key: home[key].to(device) for key in (STEPS, SKIPPED_STEPS) if key in home})
    return TunerState(*(read(optimizer, key) for key in _TUNER_KEYS))


def write_tuner(optimizer: Any, state: TunerState) -> None:
    """Write the tuner's vectors in place."""
    for key, value in zip(_TUNER_KEYS, state, strict=True):
        write(optimizer, key, value)


def scale(optimizer: Any) -> Tensor:
    """Return the sum of s, for the lr that the user sees: shape (), or (G,)."""
    scales = [home[_TUNER_KEYS[3]].sum() * float(home.get(LR_FACTOR, 1.0)) for home in homes(optimizer)]
    return torch.stack(scales) if optimizer.mechanic_config.per_group else scales[0]


def is_frozen(optimizer: Any) -> bool:
    """Tell whether the scale is frozen: those of all groups that have parameters are, or none."""
    return any(home.get(FROZEN_SCALE) for home in homes(optimizer))


def note(optimizer: Any, left_out: Tensor, *, unit: Tensor | None, lr: float | Tensor, scale: Tensor) -> None:
    """Write down the unit of the start and the sums of `average_lrs`; nothing where `left_out` holds."""
    before = read(optimizer, LR_SUMS)
    effective, plain, highest = before.unbind(-1)
    lr = lr if isinstance(lr, Tensor) else torch.full_like(plain, lr)
    sums = torch.stack([effective + scale * lr, plain + lr, torch.maximum(highest, lr)], -1)
    write(optimizer, LR_SUMS, torch.where(left_out.unsqueeze(-1), before, sums))
    if unit is not None:
        write(optimizer, UNIT, torch.where(left_out.unsqueeze(-1), read(optimizer, UNIT), unit))


def highest_lr(optimizer: Any, lr: float | Tensor) -> Tensor:
    """Return the largest lr so far, that of the present step included; shape (), or (G,)."""
    return read(optimizer, LR_SUMS)[..., 2].clamp_min(lr)


def average_lrs(optimizer: Any) -> list[float]:
    """Return for each tuner max(lr) * sum(scale * lr) / sum(lr) over its steps so far, 0 before the first.

    Copies to the host.
    """
    sums = read(optimizer, LR_SUMS).reshape(-1, 3).tolist()
    return [highest * effective / plain if plain else 0.0 for effective, plain, highest in sums]


def stand_in(kind: type[Any], groups: list[dict[str, Any]]) -> Any:
    """Return an optimizer that has nothing but parameter groups, for what is computed from these alone."""
    optimizer = object.__new__(kind)
    optimizer.param_groups = groups
    return optimizer


def worth_reading(group: dict[str, Any]) -> dict[str, Any]:
    """Return what of a parameter group tells what was learned: its lr, and our own keys. Nothing is looked at."""
    return {key: group[key] for key in group if key in ("lr", "initial_lr") or key.startswith("mechanic_")}


def clear(optimizer: Any) -> None:
    """Forget everything: a new tuner, no sums. The base's own state stays."""
    for group in optimizer.param_groups:
        for key in (*_TUNER_KEYS, UNIT, LR_FACTOR, LR_SUMS, FROZEN_SCALE, STEPS, SKIPPED_STEPS):
            group.pop(key, None)
    for state in optimizer.state.values():
        for key in PER_PARAMETER:
            state.pop(key, None)
    attach_tuner(optimizer)


# --- what the base sees, and what cannot work -------------------------------------------------------------------------


@contextmanager
def unseen_by_base(state: dict[Any, Any]) -> Iterator[None]:
    """Take our tensors out of the state of parameters for which the base has none yet: to it, that means "not started".

    Such a base may begin to fill its state at any later step (one that accumulates gradients by itself).
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


def check_group(who: str, group: dict[str, Any]) -> None:
    """Refuse what cannot work.

    Raises:
        ValueError: `differentiable=True`, or a `DTensor` that holds partial sums.
    """
    if any(placement.is_partial() for p in group["params"] for placement in getattr(p, "placements", ())):
        raise ValueError(
            f"{who}: a DTensor must be sharded or replicated. Got Partial among the placements of a parameter. "
            "Remedy: redistribute it before you build the optimizer."
        )
    if group.get("differentiable"):
        raise ValueError(
            f"{who}: differentiable must be False. Got True. Remedy: use the plain base to differentiate through "
            "steps; Mechanic's step is not differentiable."
        )


# --- checkpoints ------------------------------------------------------------------------------------------------------


def with_whole_tuner(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return the same checkpoint, in which the tuner's vectors are whole.

    `torch.distributed.checkpoint.load_sharded_optimizer_state_dict`, which Lightning's `FSDPStrategy` calls, gives each
    process a part of every tensor.
    """
    groups = [
        {key: whole(value) if key in (*_TUNER_KEYS, UNIT, LR_SUMS) else value for key, value in group.items()}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


def check_loadable(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """Refuse a checkpoint that does not fit; nothing has been changed yet.

    Raises:
        ValueError: its tuner has another number of betas, or another kind of start, or has learned but come without the
            sums of updates; it has one tuner where there is one per group here, or the reverse; it was made by version
            0.0.1; it is differentiable.
    """
    who, config = type(optimizer).__name__, optimizer.mechanic_config
    n = len(config.betas)
    if "_mechanic" in state_dict["state"]:
        raise ValueError(
            f"{who}: a checkpoint must come from this package or from the plain base. Got one of version 0.0.1, whose "
            "tuner cannot be resumed. Remedy: drop '_mechanic' from its state to start the tuner afresh."
        )
    for group in state_dict["param_groups"]:
        check_group(who, {**group, "params": []})
        for key in _TUNER_KEYS:
            if key in group and len(group[key]) != n:
                raise ValueError(
                    f"{who}: the checkpoint's tuner must have as many betas as the optimizer. Got {len(group[key])} in "
                    f"the checkpoint and {n} here. Remedy: pass mechanize the betas that it was saved with, or drop "
                    "the keys that start with 'mechanic_' from param_groups[0] and state of a deep copy of it to start "
                    "the tuner afresh."
                )
        if STEPS in group and (UNIT in group) != (config.s_init == "auto"):
            kinds = ("'auto'", "a number") if UNIT in group else ("a number", "'auto'")
            raise ValueError(
                f"{who}: s_init must be of the kind that the checkpoint was saved with. Got {kinds[0]} in the "
                f"checkpoint and {kinds[1]} here. Remedy: pass mechanize the same s_init, or drop the keys that start "
                "with 'mechanic_' from param_groups[0] and state of a deep copy of it to start the tuner afresh."
            )
        if UNIT in group and len(group[UNIT]) != UNIT_SIZE:
            raise ValueError(
                f"{who}: the checkpoint's {UNIT!r} must hold {UNIT_SIZE} numbers. Got {len(group[UNIT])}, from a "
                "version whose s_init='auto' had other rules. Remedy: go on with that version, or drop the keys that "
                "start with 'mechanic_' from param_groups and state of a deep copy of it to start the tuner afresh."
            )
    first, *others = state_dict["param_groups"]
    if STEPS in first and others and config.per_group != any(_TUNER_KEYS[0] in group for group in others):
        kinds = ("one tuner", "one per group") if config.per_group else ("one tuner per group", "a single one")
        raise ValueError(
            f"{who}: per_group must be what the checkpoint was saved with. Got {kinds[0]} in the checkpoint and "
            f"{kinds[1]} here. Remedy: pass mechanize per_group={not config.per_group}, or drop the keys that start "
            "with 'mechanic_' from all param_groups and state of a deep copy of it to start afresh."
        )
    has_learned = any(int(g.get(STEPS, 0)) > int(g.get(SKIPPED_STEPS, 0)) for g in state_dict["param_groups"])
    has_params = any(group["params"] for group in state_dict["param_groups"])
    if has_learned and has_params and not any(SLOTS & state.keys() for state in state_dict["state"].values()):
        raise ValueError(
            f"{who}: a checkpoint whose tuner has learned must hold the sums of updates, {slot(config)!r}. Got none. "
            "Remedy: save and load without flatten_optimizer_state_dict, or drop the keys that start with 'mechanic_' "
            "from param_groups[0] of a deep copy of it to start the tuner afresh."
        )


def restore_uncast(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Put the saved sums back in the dtype they were saved in.

    `Optimizer.load_state_dict` has just cast them to the dtype of their parameter, which for bfloat16 destroys them.
    They are copied, so that two optimizers never share one.
    """
    saved_ids = (i for group in state_dict["param_groups"] for i in group["params"])
    params = (p for group in optimizer.param_groups for p in group["params"])
    for p, saved_id in zip(params, saved_ids, strict=True):
        for key, value in state_dict["state"].get(saved_id, {}).items():
            if key in PER_PARAMETER:
                optimizer.state[p][key] = value.detach().to(p.device, copy=True)
