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

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from mechanic_pytorch._config import Config
from mechanic_pytorch.distributed import is_dtensor, local, whole

DELTA = "mechanic_delta"
REFERENCE = "mechanic_reference"
COMPENSATION = "mechanic_compensation"
UNIT = "mechanic_unit"
# What it holds: the fields of `_start.Memory`, and which power of lr each is in proportion to.
UNIT_POWERS = (0, 0, 1, 0, -1, 0, 0, 0, 0, 0, 0)
UNIT_SIZE = len(UNIT_POWERS)
LR_FACTOR = "mechanic_lr_factor"
LR_LIMIT = "mechanic_lr_limit"
LR_SUMS = "mechanic_lr_sums"
FROZEN_SCALE = "mechanic_frozen_scale"
STEPS = "mechanic_steps"
SKIPPED_STEPS = "mechanic_skipped_steps"

NO_FLOAT64 = ("mps",)  # where the tuner's numbers are float32: squares overflow at 1e19, and sums stop at 2^24

MOST = 1e20  # no run gets to such weights, sums of updates or scales

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
_PER_TUNER = (*_TUNER_KEYS, UNIT, LR_FACTOR, LR_LIMIT, LR_SUMS, FROZEN_SCALE)


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
    """Give the optimizer tuners where it has none: those of groups that have gone or moved, or else new ones."""
    config, first, now = optimizer.mechanic_config, optimizer.param_groups[0], homes(optimizer)
    if STEPS in first and all(_TUNER_KEYS[0] in home for home in now):
        return
    ids = {id(home) for home in now}
    gone = [old for old in optimizer._homes if id(old) not in ids]
    _take_over(optimizer, gone if optimizer.state else [])  # without any state it was initialized anew
    if STEPS not in first:
        first.update({key: torch.zeros((), dtype=torch.int64, device="cpu") for key in (STEPS, SKIPPED_STEPS)})
    for home in now:
        if _TUNER_KEYS[0] not in home:
            home.update({key: torch.zeros(len(config.betas), dtype=torch.float64, device="cpu") for key in _TUNER_KEYS})
        if config.s_init == "auto" and UNIT not in home:
            home[UNIT] = torch.zeros(UNIT_SIZE, dtype=torch.float64, device="cpu")
            home[LR_FACTOR], home[LR_LIMIT] = 1.0, -1.0
            optimizer._start_is_known = False
        if LR_SUMS not in home:
            home[LR_SUMS] = torch.zeros(3, dtype=torch.float64, device="cpu")
        home.setdefault(FROZEN_SCALE, 0.0)  # always there: a flattened checkpoint holds only what a new optimizer has
    optimizer._homes = [*now, *gone]  # groups that are rebuilt come one by one


def _take_over(optimizer: Any, gone: list[dict[str, Any]]) -> None:
    """Give tuner and counters back to the groups they belong to: somebody has removed, reordered or rebuilt groups."""
    per_group, groups = optimizer.mechanic_config.per_group, optimizer.param_groups
    for new in homes(optimizer):
        ids = {id(p) for p in new["params"]}
        for old in gone if per_group else [*groups, *gone]:
            theirs = _TUNER_KEYS[0] in old and (not per_group or any(id(p) in ids for p in old["params"]))
            if theirs and _TUNER_KEYS[0] not in new:
                new.update({key: old.pop(key) for key in _PER_TUNER if key in old})
    for old in [*groups, *gone]:
        if STEPS not in groups[0] and STEPS in old:
            groups[0].update({key: old.pop(key) for key in (STEPS, SKIPPED_STEPS)})


def read(optimizer: Any, key: str) -> Tensor:
    """Return the tuner's own tensor, or, with `per_group`, a copy of those of all groups: one row each."""
    rows = [home[key] for home in homes(optimizer)]
    return torch.stack(rows) if optimizer.mechanic_config.per_group else rows[0]


def read_tuner(optimizer: Any) -> TunerState:
    """Return the tuner's vectors, as `read` does; first move them to where the parameters are, if these have moved."""
    attach_tuner(optimizer)
    optimizer._homes = homes(optimizer)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if params:
        device = params[0].device
        dtype = torch.float32 if device.type in NO_FLOAT64 else torch.float64
        for home in homes(optimizer):
            if home[LR_SUMS].device != device or home[LR_SUMS].dtype != dtype:
                home.update({key: home[key].to(device, dtype) for key in (*_TUNER_KEYS, UNIT, LR_SUMS) if key in home})
                home.update({key: home[key].to(device) for key in (STEPS, SKIPPED_STEPS) if key in home})
    return TunerState(*(read(optimizer, key) for key in _TUNER_KEYS))


def scale(optimizer: Any) -> Tensor:
    """Return the sum of s, for the lr that the user sees: shape (), or (G,)."""
    attach_tuner(optimizer)
    scales = [home[_TUNER_KEYS[3]].sum() * float(home.get(LR_FACTOR, 1.0)) for home in homes(optimizer)]
    return torch.stack(scales) if optimizer.mechanic_config.per_group else scales[0]


def rescale(home: dict[str, Any], factor: float) -> None:
    """Multiply the base's lr by a power of two, and let nothing else change: the scale and all that is in its units."""
    m, v, _, s = _TUNER_KEYS
    home[LR_FACTOR] *= factor
    home[FROZEN_SCALE] /= factor
    for key, power in ((m, 1), (v, 2), (s, -1)):
        home[key].mul_(factor**power)
    for key, powers in ((UNIT, UNIT_POWERS), (LR_SUMS, (0, 1, 1))):
        for i, power in enumerate(powers):
            if power:
                home[key][i].mul_(factor**power)


def is_frozen(optimizer: Any) -> bool:
    """Tell whether the scale is frozen: those of all groups that have parameters are, or none."""
    return any(home.get(FROZEN_SCALE) for home in homes(optimizer))


def prepared(
    optimizer: Any,
    tuner: TunerState | None,
    left_out: Tensor,
    skip: Tensor,
    *,
    unit: Tensor | None,
    lr: float | Tensor,
    scale: Tensor,
) -> Callable[[], object]:
    """Return what writes down a step that was made, all of it in one call: an interrupt comes before it or after it.

    Args:
        optimizer: the optimizer.
        tuner: its vectors; None leaves them as they are.
        left_out: which tuners the step leaves as they were, shape () or (G,).
        skip: whether it is to count as skipped, shape ().
        unit: what "auto" remembers.
        lr: the largest of this step's.
        scale: by which it was multiplied.
    """
    before = read(optimizer, LR_SUMS)
    effective, plain, highest = before.unbind(-1)
    lr = lr if isinstance(lr, Tensor) else torch.full_like(plain, lr)
    sums = torch.stack([effective + scale * lr, plain + lr, torch.maximum(highest, lr)], -1)
    values = {LR_SUMS: torch.where(left_out.unsqueeze(-1), before, sums)}
    if unit is not None:
        values[UNIT] = torch.where(left_out.unsqueeze(-1), read(optimizer, UNIT), unit)
    if tuner is not None:
        values.update(zip(_TUNER_KEYS, tuner, strict=True))
    first, per_group = optimizer.param_groups[0], optimizer.mechanic_config.per_group
    places, contents = [first[STEPS], first[SKIPPED_STEPS]], [first[STEPS] + 1, first[SKIPPED_STEPS] + skip]
    for key, value in values.items():
        places += [home[key] for home in homes(optimizer)]
        contents += value.unbind() if per_group else [value]
    return functools.partial(torch._foreach_copy_, places, contents)


def highest_lr(optimizer: Any, lr: float | Tensor) -> Tensor:
    """Return the largest lr so far, that of the present step included; shape (), or (G,)."""
    return read(optimizer, LR_SUMS)[..., 2].clamp_min(lr)


def average_lrs(optimizer: Any) -> list[float]:
    """Return for each tuner max(lr) * sum(scale * lr) / sum(lr) over its steps so far, 0 before the first.

    Copies to the host.
    """
    attach_tuner(optimizer)
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
        for key in (*_PER_TUNER, STEPS, SKIPPED_STEPS):
            group.pop(key, None)
    optimizer._homes = ()
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
        TypeError: weights of a class without copies and differences, such as 8-bit ones.
    """
    if any(placement.is_partial() for p in group["params"] for placement in getattr(p, "placements", ())):
        raise ValueError(
            f"{who}: a DTensor must be sharded or replicated. Got Partial among the placements of a parameter. "
            "Remedy: redistribute it before you build the optimizer."
        )
    for p in group["params"]:
        if type(p) not in (Tensor, torch.nn.Parameter) and not is_dtensor(p):
            _check_arithmetic(who, p)
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
            f"{who}: weights must be of a class with copies and differences. Got {type(p).__name__}. Remedy: "
            "give these parameters to a plain optimizer of their own, or train them in bfloat16."
        ) from error


# --- checkpoints ------------------------------------------------------------------------------------------------------


@contextmanager
def checked(optimizer: Any, state_dict: dict[str, Any], tuner: str) -> Iterator[dict[str, Any]]:
    """Let a block load a checkpoint, refused if it does not fit, and put back what torch's loading has cast.

    Raises:
        ValueError: it does not fit, and nothing has been changed; `tuner` is neither "saved" nor "fresh".
    """
    if tuner not in ("saved", "fresh"):
        raise ValueError(f"{type(optimizer).__name__}: tuner must be 'saved' or 'fresh'. Got {tuner!r}.")
    state_dict = without_tuner(state_dict) if tuner == "fresh" else with_whole_tuner(state_dict)
    after_hooks = [state_dict]

    def see(_: Optimizer, loaded: dict[str, Any]) -> None:
        check_loadable(optimizer, loaded)
        after_hooks.append(loaded)

    see(optimizer, state_dict)  # for a base that loads without calling hooks
    handle = optimizer.register_load_state_dict_pre_hook(see)  # the last hook: it sees what the others made
    try:
        yield state_dict
    finally:
        handle.remove()
    optimizer._homes = ()
    restore_uncast(optimizer, after_hooks[-1])
    attach_tuner(optimizer)


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


def without_tuner(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return the same checkpoint as the plain base would have made it, whatever tuner it holds."""
    groups = [
        {key: value for key, value in group.items() if not key.startswith("mechanic_")}
        for group in state_dict["param_groups"]
    ]
    state = {
        p: {key: value for key, value in kept.items() if key not in PER_PARAMETER} if isinstance(kept, dict) else kept
        for p, kept in state_dict["state"].items()
        if p != "_mechanic"  # that of version 0.0.1
    }
    return {**state_dict, "param_groups": groups, "state": {p: kept for p, kept in state.items() if kept != {}}}


def check_loadable(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """Refuse a checkpoint that does not fit; nothing has been changed yet.

    Raises:
        ValueError: its tuner has another number of betas, or another kind of start, or has learned but come without the
            sums of updates; it has one tuner where there is one per group here, or the reverse; a key is missing, has
            another shape or holds what no run can have written; it was made by version 0.0.1; it is differentiable.
    """
    refuse = functools.partial(_refuse, type(optimizer).__name__)
    if "_mechanic" in state_dict["state"]:
        refuse("must come from this package or from the plain base", "one of version 0.0.1, whose tuner differs")
    for group in state_dict["param_groups"]:
        check_group(type(optimizer).__name__, {**group, "params": []})
    if not any(key.startswith("mechanic_") for group in state_dict["param_groups"] for key in group):
        return  # of the plain base
    _check_tuners(optimizer, state_dict["param_groups"], refuse)
    _check_stored(optimizer, state_dict, refuse)


def _refuse(who: str, rule: str, got: str, remedy: str = "") -> NoReturn:
    raise ValueError(
        f"{who}: the checkpoint {rule}. Got {got}. Remedy: {remedy and remedy + '; or '}keep all but the tuner, which "
        'then starts afresh: load_state_dict(..., tuner="fresh").'
    )


def _check_tuners(optimizer: Any, groups: list[dict[str, Any]], refuse: Callable[..., NoReturn]) -> None:
    """Refuse the tuners of a checkpoint if they are not what this optimizer would have saved."""
    config, first = optimizer.mechanic_config, groups[0]
    is_auto = config.s_init == "auto"
    holders = [group for group in groups if any(key in group for key in _PER_TUNER)]
    if len(groups) > 1 and config.per_group != any(group is not first for group in holders):
        kinds = ("one tuner", "one per group") if config.per_group else ("one tuner per group", "a single one")
        refuse(
            "must be of an optimizer with the same per_group",
            f"{kinds[0]} in it and {kinds[1]} here",
            f"pass mechanize per_group={not config.per_group}",
        )
    sizes = {**dict.fromkeys(_TUNER_KEYS, len(config.betas)), LR_SUMS: 3}
    for home in groups if config.per_group else [first]:
        if any(key in home for key in _PER_TUNER) and (UNIT in home) != is_auto:
            kinds = ("'auto'", "a number") if UNIT in home else ("a number", "'auto'")
            refuse("must have the same kind of s_init", f"{kinds[0]} in it and {kinds[1]} here", "pass the same s_init")
        for key, size in ({**sizes, UNIT: UNIT_SIZE} if is_auto else sizes).items():
            value = home.get(key)
            if not isinstance(value, Tensor):
                refuse(f"must hold {key!r}", "none" if value is None else type(value).__name__)
            if value.shape != (size,):
                hint = "pass mechanize the betas that it was saved with" if key in _TUNER_KEYS else ""
                refuse(f"must hold {size} numbers in {key!r}", f"a tensor of shape {tuple(value.shape)}", hint)
            if not _is_plausible(value, lowest=0.0, largest=MOST if key == _TUNER_KEYS[3] else math.inf):
                refuse(f"must hold numbers from 0 up in {key!r}, of which a run can have come", str(value.tolist()))
        numbers: dict[str, Callable[[float], bool]] = {FROZEN_SCALE: lambda x: 0 <= x < MOST}
        if is_auto:
            numbers |= {LR_FACTOR: lambda x: 0 < x < math.inf, LR_LIMIT: lambda x: 0 < abs(x) < math.inf}
        for key, is_allowed in numbers.items():
            value = home.get(key)
            if not isinstance(value, (int, float)) or not is_allowed(value):
                refuse(f"must hold a number in {key!r}, of which a run can have come", repr(value))
    counts = [first.get(key) for key in (STEPS, SKIPPED_STEPS)]
    made = [int(count) for count in counts if isinstance(count, Tensor) and count.numel() == 1]
    if len(made) < 2 or not 0 <= made[1] <= made[0]:
        refuse(f"must hold two counts, {STEPS!r} and {SKIPPED_STEPS!r}", repr(counts))


def _check_stored(optimizer: Any, state_dict: dict[str, Any], refuse: Callable[..., NoReturn]) -> None:
    """Refuse what a checkpoint holds for each parameter if it cannot be meant for these parameters."""
    first, key = state_dict["param_groups"][0], slot(optimizer.mechanic_config)
    saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    states = [state_dict["state"].get(i, {}) for i in saved_ids]
    has_slot = [key in state for state in states]
    if int(first[STEPS]) > int(first[SKIPPED_STEPS]) and saved_ids and not any(has_slot):
        refuse(
            f"must hold {key!r} for each parameter, for its tuner has learned",
            "none",
            "save and load without flatten_optimizer_state_dict",
        )
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, state in zip(params, states, strict=False):  # torch itself compares how many there are
        if any(has_slot) and key not in state and state.keys() - PER_PARAMETER:
            refuse(f"must hold {key!r} for each parameter that has state of the base", "none for one of them")
        for name in PER_PARAMETER & state.keys():
            value = state[name]
            if not isinstance(value, Tensor) or value.shape != p.shape:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                refuse(f"must hold {name!r} in the shape of its parameter, {tuple(p.shape)}", str(got))
            if not _is_plausible(value, lowest=-MOST, largest=MOST):
                refuse(f"must hold finite numbers in {name!r}", "others")


def _is_plausible(value: Tensor, lowest: float, largest: float) -> bool:
    """Tell whether all numbers are finite and in range; those that are not here (on "meta") are."""
    value = local(value.detach())
    if not (value.is_floating_point() or value.is_complex()):
        return False
    if value.is_meta or not value.numel():
        return True
    if value.is_complex():
        value = torch.view_as_real(value)
    least, most = (float(bound) for bound in value.aminmax())
    return lowest <= least and most <= largest and math.isfinite(most)  # not so of NaN


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
