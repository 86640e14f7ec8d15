"""The options of `mechanize`: their defaults, their rules, the wording of every refusal; and what `tune` works on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from functools import partial
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LogFunc = Callable[[dict[str, Any]], object]


class TunerState(NamedTuple):
    """The tuner's memory, shape (G, n), a row for each of G tuners; all 0 at the start (m, v, r, s in the paper)."""

    max_product: Tensor
    sum_squared_products: Tensor
    reward: Tensor
    scales: Tensor


class TuneParams(NamedTuple):
    """The numbers in `tune`: the same for all rows, or of shape (G, 1)."""

    betas: tuple[float, ...]
    s_decay: float | Tensor
    s_init: float | Tensor
    eps: float | Tensor
    loss_weight: float | Tensor  # what a step that lost counts, against one that gained: 1 in Algorithm 1


def _option(default: Any, rule: Callable[[str, Any], Any], *, help: str = "", is_shared: bool = True) -> Any:
    """Declare an option.

    Args:
        default: its default.
        rule: takes its name and a value, and returns the value as it is kept, or refuses it.
        help: one line for the command `mechanic run`, which has no such option without it.
        is_shared: whether all processes of a sharded run must agree in it. What they need not, need not be hashable.
    """
    is_hashed = None if is_shared else False
    return field(default=default, hash=is_hashed, metadata={"rule": rule, "help": help, "is_shared": is_shared})


def _number(name: str, value: object, *, rule: str, remedy: str, other: object = math.nan) -> Any:
    """Return a finite number of at least 0 as a float, or the `other` value that is allowed."""
    if value is other or (isinstance(value, str) and value == other):
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        _refuse(TypeError, name, rule, value, remedy)
    number = float(value)  # a plain one, so that equal options always give the same (cached) class
    if not math.isfinite(number) or number < 0 or (number == 0 and rule.endswith("> 0")):
        _refuse(ValueError, name, rule, value, remedy)
    return number


def _flag(name: str, value: object) -> bool:
    if isinstance(value, str) or value is None or value not in (0, 1):
        _refuse(TypeError, name, "True or False", value, "pass a bool")
    return bool(value)


def _count(name: str, value: object, *, rule: str, remedy: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        _refuse(TypeError, name, rule, value, remedy)
    if value < 0:
        _refuse(ValueError, name, rule, value, remedy)
    return int(value)


def _function(name: str, value: object) -> object:
    if value is not None and not callable(value):
        _refuse(TypeError, name, "a function of one dict, or None", value, "None uses `logging`")
    return value


def _processes(name: str, value: object) -> object:
    if value is not None and not isinstance(value, torch.distributed.ProcessGroup):
        rule, remedy = "a torch.distributed.ProcessGroup, or None", "torch.distributed.group.WORLD holds everybody"
        _refuse(TypeError, name, rule, value, remedy)
    return value


def _betas(name: str, betas: object) -> tuple[float, ...]:
    rule = "a non-empty sequence of numbers in [0, 1)"
    if isinstance(betas, str) or not isinstance(betas, Iterable):
        _refuse(TypeError, name, rule, betas, "one number is written (0.9,)")
    values = tuple(betas)
    if not values:
        _refuse(ValueError, name, rule, betas, "the default is (0.9, 0.99, ..., 0.999999)")
    remedy = "each is a discount factor such as 0.9 or 0.999"
    for i, beta in enumerate(values):
        if not _number(f"{name}[{i}]", beta, rule="in [0, 1)", remedy=remedy) < 1:
            _refuse(ValueError, f"{name}[{i}]", "in [0, 1)", beta, remedy)
    return tuple(float(beta) for beta in values)


def _refuse(error: type[Exception], name: str, rule: str, value: object, remedy: str) -> NoReturn:
    raise error(f"mechanize: {name} must be {rule}. Got {value!r}. Remedy: {remedy}.")


@dataclass(frozen=True)
class Config:
    """Validated options of one mechanized class; see `mechanize` for their meaning.

    Each is declared here once, with its default, its rule and its line in `mechanic run --help`.

    Raises:
        ValueError: an option breaks its rule.
        TypeError: an option is of the wrong kind.
    """

    s_decay: float = _option(
        0.01,
        partial(_number, rule="a finite number >= 0", remedy="0.0 turns it off"),
        help="Weight decay in the tuner.",
    )
    betas: tuple[float, ...] = _option(
        (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999), _betas, help="Discount factors of the tuner."
    )
    s_init: float | Literal["auto"] = _option(
        "auto",
        partial(
            _number,
            rule="'auto' or a finite number > 0",
            remedy="leave it out, or pass a small underestimate such as 1e-8",
            other="auto",
        ),
        help="Initial scale; auto measures it at the first update, a number is the paper's start.",
    )
    eps: float = _option(
        1e-8,
        partial(_number, rule="a finite number >= 0", remedy="the default is 1e-8"),
        help="Added to the tuner's denominator.",
    )
    store_delta: bool = _option(False, _flag, is_shared=False)
    log_func: LogFunc | None = _option(None, _function, is_shared=False)
    log_every: int = _option(
        0,
        partial(_count, rule="an integer >= 0", remedy="0 never logs"),
        help="Print the effective learning rate every so many steps.",
        is_shared=False,
    )
    skip_nonfinite: bool = _option(True, _flag, help="Skip steps whose gradient is inf or nan.")
    process_group: ProcessGroup | None = _option(None, _processes, is_shared=False)
    max_lr: float | None = _option(
        None,
        partial(_number, rule="None or a finite number > 0", remedy="None sets no bound", other=None),
        help="Bound of the effective learning rate; none if not given.",
    )
    per_group: bool = _option(
        False,
        _flag,
        help="Learn one scale for each parameter group; the ratios between their lrs are lost.",
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, each.metadata["rule"](each.name, getattr(self, each.name)))

    @property
    def is_auto(self) -> bool:
        """Whether `s_init` is "auto"."""
        return self.s_init == "auto"

    @property
    def tune_params(self) -> TuneParams:
        """What `tune` needs of these options, for Algorithm 1 as published."""
        return TuneParams(self.betas, self.s_decay, cast(float, self.s_init), self.eps, loss_weight=1.0)

    def shared(self) -> dict[str, object]:
        """Return the options in which all processes of a sharded run must agree."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.metadata["is_shared"]}
