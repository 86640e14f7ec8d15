"""Checkpoints and parameter groups from outside: what is refused, and what torch's loading must not cast."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from mechanic_pytorch._auto import Memory
from mechanic_pytorch._buckets import PER_PARAMETER, slot
from mechanic_pytorch._config import Config
from mechanic_pytorch._tuner import (
    COUNTS,
    FROZEN_SCALE,
    LR_FACTOR,
    LR_LIMIT,
    MEMORY,
    SCALES,
    VECTORS,
    is_ours,
    numbers_of_row,
    tensors_of_row,
)
from mechanic_pytorch.distributed import is_dtensor, local, whole

MOST = 1e20  # above the weights, sums of updates and scales of any run


def check_group(who: str, group: dict[str, Any]) -> None:
    """Refuse a parameter group that cannot be stepped.

    Raises:
        ValueError: `differentiable=True`; a `DTensor` that holds partial sums; several iterations a step without a line
            search (LBFGS).
        TypeError: weights of a class that cannot be copied and subtracted, such as 8-bit ones.
    """
    if any(placement.is_partial() for p in group["params"] for placement in getattr(p, "placements", ())):
        raise ValueError(
            f"{who}: a DTensor must be sharded or replicated. Got Partial among the placements of a parameter. "
            "Remedy: redistribute it before you build the optimizer."
        )
    for p in group["params"]:
        if type(p) not in (Tensor, torch.nn.Parameter) and not is_dtensor(p):
            _check_arithmetic(who, p)
    if group.get("line_search_fn", "") is None and (group.get("max_iter") or 1) > 1:
        raise ValueError(
            f"{who}: several iterations a step need a line search, because LBFGS assumes that its own last step was "
            f"made, and diverges. Got line_search_fn=None and max_iter={group['max_iter']}. Remedy: "
            "max_iter=1; or line_search_fn='strong_wolfe' with a max_iter of about 4; or the plain LBFGS."
        )
    if group.get("differentiable"):
        raise ValueError(
            f"{who}: differentiable must be False. Got True. Remedy: use the plain base to differentiate through "
            "steps; Mechanic's step is not differentiable."
        )


def _check_arithmetic(who: str, p: Tensor) -> None:
    """Refuse a tensor of a class that cannot do what a step does to copies of weights."""
    try:
        with torch.no_grad():
            torch._foreach_copy_([torch.empty_like(p)], [p.detach()])
            torch._foreach_sub([p.detach()], [p.detach()])
    except NotImplementedError as error:
        raise TypeError(
            f"{who}: weights must be of a class that can be copied and subtracted. Got {type(p).__name__}. Remedy: "
            "give these parameters to a plain optimizer of their own, or train them in bfloat16."
        ) from error


@contextmanager
def checked(optimizer: Optimizer, config: Config, state_dict: dict[str, Any], tuner: str) -> Iterator[dict[str, Any]]:
    """Let a block load a checkpoint, refused if it does not fit, and put back what torch's loading has cast.

    Raises:
        ValueError: it does not fit, and nothing has been changed; `tuner` is neither "saved" nor "fresh".
    """
    if tuner not in ("saved", "fresh"):
        raise ValueError(f"{type(optimizer).__name__}: tuner must be 'saved' or 'fresh'. Got {tuner!r}.")
    if not (isinstance(state_dict, Mapping) and {"state", "param_groups"} <= state_dict.keys()):
        got = f"the keys {list(state_dict)[:3]}" if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise ValueError(
            f"{type(optimizer).__name__}: a checkpoint of an optimizer is a dict with 'state' and 'param_groups'. Got "
            f"{got}. Remedy: pass what optimizer.state_dict() returned."
        )
    groups, state = state_dict["param_groups"], state_dict["state"]
    if not (isinstance(state, Mapping) and all(isinstance(group, Mapping) and "params" in group for group in groups)):
        raise ValueError(
            f"{type(optimizer).__name__}: a checkpoint has a dict for 'state', and one with 'params' for each "
            "parameter group. Got something else. Remedy: pass what optimizer.state_dict() returned."
        )
    state_dict = _without_tuner(state_dict) if tuner == "fresh" else _with_whole_tuner(state_dict, config)
    after_hooks = [state_dict]

    def check(_: Optimizer, loaded: dict[str, Any]) -> None:
        _check_loadable(optimizer, config, loaded)
        after_hooks.append(loaded)

    check(optimizer, state_dict)  # for a base that loads without calling hooks
    handle = optimizer.register_load_state_dict_pre_hook(check)  # the last hook: it gets what the others made
    try:
        yield state_dict
    finally:
        handle.remove()
    _restore_uncast(optimizer, after_hooks[-1])


def _with_whole_tuner(state_dict: dict[str, Any], config: Config) -> dict[str, Any]:
    """Return the same checkpoint, in which the tuner's vectors are whole.

    `torch.distributed.checkpoint.load_sharded_optimizer_state_dict`, which Lightning's `FSDPStrategy` calls, gives each
    process a shard of every tensor.
    """
    keys = {*tensors_of_row(config), MEMORY}
    groups = [
        {key: whole(value) if key in keys else value for key, value in group.items()}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


def _without_tuner(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return the same checkpoint as the plain base would have made it, whatever tuner it holds."""
    groups = [{key: value for key, value in group.items() if not is_ours(key)} for group in state_dict["param_groups"]]
    state = {
        p: {key: value for key, value in kept.items() if key not in PER_PARAMETER} if isinstance(kept, dict) else kept
        for p, kept in state_dict["state"].items()
        if p != "_mechanic"  # that of version 0.0.1
    }
    return {**state_dict, "param_groups": groups, "state": {p: kept for p, kept in state.items() if kept != {}}}


def _check_loadable(optimizer: Optimizer, config: Config, state_dict: dict[str, Any]) -> None:
    """Refuse a checkpoint that does not fit; nothing has been changed yet.

    Raises:
        ValueError: its tuner has another number of betas, or another kind of start, or has learned but come without the
            sums of updates; it has one tuner where there is one per group here, or the reverse; a key is missing, has
            another shape or holds impossible numbers; it was made by version 0.0.1; it is differentiable.
    """
    refuse = functools.partial(_refuse, type(optimizer).__name__)
    if "_mechanic" in state_dict["state"]:
        refuse("must come from this package or from the plain base", "one of version 0.0.1, whose tuner differs")
    for group in state_dict["param_groups"]:
        check_group(type(optimizer).__name__, {**group, "params": []})
    if not any(is_ours(key) for group in state_dict["param_groups"] for key in group):
        return  # of the plain base
    _check_tuners(config, getattr(optimizer, "mechanic_base", type(optimizer)), state_dict["param_groups"], refuse)
    _check_stored(optimizer, config, state_dict, refuse)


def _refuse(who: str, rule: str, got: str, remedy: str = "") -> NoReturn:
    raise ValueError(
        f"{who}: the checkpoint {rule}. Got {got}. Remedy: {remedy and remedy + '; or '}keep all but the tuner, which "
        'then starts again: load_state_dict(..., tuner="fresh").'
    )


def _check_tuners(
    config: Config, base: type[Optimizer], groups: list[dict[str, Any]], refuse: Callable[..., NoReturn]
) -> None:
    """Refuse the tuners of a checkpoint if they are not what this optimizer would have saved."""
    first = groups[0]
    per_tuner = {*tensors_of_row(config), *numbers_of_row(config), MEMORY, LR_FACTOR, LR_LIMIT}
    holders = [group for group in groups if any(key in group for key in per_tuner)]
    if len(groups) > 1 and config.per_group != any(group is not first for group in holders):
        kinds = ("one tuner", "one per group") if config.per_group else ("one tuner per group", "a single one")
        refuse(
            "must be of an optimizer with the same per_group",
            f"{kinds[0]} in it and {kinds[1]} here",
            f"pass mechanize per_group={not config.per_group}",
        )
    for row in groups if config.per_group else [first]:
        if any(key in row for key in per_tuner) and (MEMORY in row) != config.is_auto:
            kinds, remedy = ("'auto'", "a number"), f"build the optimizer with mechanize({base.__name__})"
            if MEMORY not in row:  # it does not say which number
                kinds = ("a number", "'auto'")
                remedy = (
                    f"build the optimizer with the number that it was saved with, such as mechanize({base.__name__}, "
                    "s_init=1e-8)"
                )
            refuse("must have the same kind of s_init", f"{kinds[0]} in it and {kinds[1]} here", remedy)
        for key, powers in tensors_of_row(config).items():
            value = row.get(key)
            if not isinstance(value, Tensor):
                refuse(f"must hold {key!r}", "none" if value is None else type(value).__name__)
            if value.shape != (len(powers),):
                hint = "pass mechanize the betas that it was saved with" if key in VECTORS else ""
                refuse(f"must hold {len(powers)} numbers in {key!r}", f"a tensor of shape {tuple(value.shape)}", hint)
            is_plausible = value.dtype in (torch.float32, torch.float64) and _is_plausible(
                value, lowest=0.0, largest=MOST if key == SCALES else math.inf
            )
            if not is_plausible:
                refuse(f"must hold numbers from 0 up in {key!r}, of which a run can have come", str(value.tolist()))
        allowed: dict[str, Callable[[float], bool]] = {
            FROZEN_SCALE: lambda x: 0 <= x < MOST,
            LR_FACTOR: lambda x: 0 < x < math.inf,
            LR_LIMIT: lambda x: 0 < abs(x) < math.inf,
        }
        for key in numbers_of_row(config):
            value = row.get(key)
            if not isinstance(value, int | float) or not allowed[key](value):
                refuse(f"must hold a number in {key!r}, of which a run can have come", repr(value))
    counts = [first.get(key) for key in COUNTS]
    made = [int(c) for c in counts if isinstance(c, Tensor) and c.numel() == 1 and c.dtype == torch.int64]
    if len(made) < 2 or not 0 <= made[1] <= made[0]:
        refuse(f"must hold two counts, {COUNTS[0]!r} and {COUNTS[1]!r}", repr(counts))
    for row in groups if config.per_group else [first]:
        if MEMORY in row and not row[MEMORY].is_meta:
            memory, scale = Memory(*row[MEMORY].tolist()), float(row[SCALES].sum())
            begun = (memory.pace, memory.longest, memory.highest, memory.floor, memory.peak)
            if (scale > 0 and not all(begun)) or max(memory.age - 1, memory.rest) > made[0]:
                refuse(f"must hold numbers in {MEMORY!r} that belong to its scale and its steps", str(memory))
    for group in groups:
        lr = group.get("lr")
        if lr is not None and not math.isfinite(lr):
            refuse("must hold a finite lr in each parameter group", str(lr), "set it in the checkpoint")


def _check_stored(
    optimizer: Optimizer, config: Config, state_dict: dict[str, Any], refuse: Callable[..., NoReturn]
) -> None:
    """Refuse what a checkpoint holds for each parameter if it cannot be meant for these parameters."""
    key = slot(config)
    steps, skipped = (int(state_dict["param_groups"][0][count]) for count in COUNTS)
    saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    states = [state_dict["state"].get(i, {}) for i in saved_ids]
    has_slot = [key in state for state in states]
    if steps > skipped and saved_ids and not any(has_slot):
        refuse(
            f"must hold {key!r} for each parameter, because its tuner has learned",
            "none",
            "save and load without flatten_optimizer_state_dict",
        )
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, state in zip(params, states, strict=False):  # torch itself compares how many there are
        if any(has_slot) and key not in state and state.keys() - PER_PARAMETER:
            refuse(f"must hold {key!r} for each parameter that has state of the base", "none for one of them")
        for name in PER_PARAMETER & state.keys():
            value = state[name]
            if not isinstance(value, Tensor) or value.shape != p.shape or value.layout is not torch.strided:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                refuse(f"must hold {name!r} in the shape of its parameter, {tuple(p.shape)}", str(got))
            if not _is_plausible(value, lowest=-MOST, largest=MOST):
                refuse(f"must hold finite numbers in {name!r}", "others")


def _is_plausible(value: Tensor, lowest: float, largest: float) -> bool:
    """Return True if all numbers are finite and in range, or there are none, as on "meta"."""
    value = local(value.detach())
    if not (value.is_floating_point() or value.is_complex()):
        return False
    if value.is_meta or not value.numel():
        return True
    if value.is_complex():
        value = torch.view_as_real(value)
    least, most = (float(bound) for bound in value.aminmax())
    return lowest <= least and most <= largest and math.isfinite(most)  # not so of NaN


def _restore_uncast(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
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
