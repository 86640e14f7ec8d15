"""The options of `mechanize`: their defaults, their rules, and the wording of every refusal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn

import torch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LogFunc = Callable[[dict[str, Any]], object]


@dataclass(frozen=True)
class Config:
    """Validated options of one mechanized class; see `mechanize` for their meaning.

    Raises:
        ValueError: an option breaks its rule.
        TypeError: an option is of the wrong kind.
    """

    s_decay: float = 0.01
    betas: tuple[float, ...] = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)
    s_init: float | Literal["auto"] = 1e-8
    eps: float = 1e-8
    store_delta: bool = False
    # Never hashed: a callable need not be hashable.
    log_func: LogFunc | None = field(default=None, hash=False)
    log_every: int = 0
    skip_nonfinite: bool = True
    process_group: ProcessGroup | None = field(default=None, hash=False)
    max_lr: float | None = None
    per_group: bool = False

    penalty: ClassVar[float] = 1.0  # Algorithm 1 has no other; `_start.py` has

    def __post_init__(self) -> None:
        # Numbers become plain floats so that equal options always give the same (cached) class.
        self._set("s_decay", _number("s_decay", self.s_decay, "a finite number >= 0", "0.0 turns it off"))
        if not (isinstance(self.s_init, str) and self.s_init == "auto"):
            remedy = "a small underestimate such as 1e-8, or 'auto'"
            self._set("s_init", _number("s_init", self.s_init, "'auto' or a finite number > 0", remedy))
        self._set("eps", _number("eps", self.eps, "a finite number >= 0", "the default is 1e-8"))
        if self.max_lr is not None:
            self._set("max_lr", _number("max_lr", self.max_lr, "None or a finite number > 0", "None sets no bound"))
        self._set("betas", _betas(self.betas))
        for name in ("store_delta", "skip_nonfinite", "per_group"):
            value = getattr(self, name)
            if isinstance(value, str) or value is None or value not in (0, 1):
                _refuse(TypeError, name, "True or False", value, "pass a bool")
            self._set(name, bool(value))
        if self.log_func is not None and not callable(self.log_func):
            _refuse(TypeError, "log_func", "a function of one dict, or None", self.log_func, "None uses `logging`")
        if isinstance(self.log_every, bool) or not isinstance(self.log_every, Integral):
            _refuse(TypeError, "log_every", "an integer >= 0", self.log_every, "0 never logs")
        self._set("log_every", int(self.log_every))
        if self.log_every < 0:
            _refuse(ValueError, "log_every", "an integer >= 0", self.log_every, "0 never logs")
        if self.process_group is not None and not isinstance(self.process_group, torch.distributed.ProcessGroup):
            rule, remedy = "a torch.distributed.ProcessGroup, or None", "torch.distributed.group.WORLD holds everybody"
            _refuse(TypeError, "process_group", rule, self.process_group, remedy)

    def shared(self) -> dict[str, object]:
        """Return the options in which all processes of a sharded run must agree."""
        names = ("s_decay", "betas", "s_init", "eps", "skip_nonfinite", "max_lr", "per_group")
        return {name: getattr(self, name) for name in names}

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def _number(name: str, value: object, rule: str, remedy: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        _refuse(TypeError, name, rule, value, remedy)
    number = float(value)
    if not math.isfinite(number) or number < 0 or (number == 0 and rule.endswith("> 0")):
        _refuse(ValueError, name, rule, value, remedy)
    return number


def _betas(betas: object) -> tuple[float, ...]:
    rule = "a non-empty sequence of numbers in [0, 1)"
    if isinstance(betas, str) or not isinstance(betas, Iterable):
        _refuse(TypeError, "betas", rule, betas, "one number is written (0.9,)")
    values = tuple(betas)
    if not values:
        _refuse(ValueError, "betas", rule, betas, "the default is (0.9, 0.99, ..., 0.999999)")
    remedy = "each is a discount factor such as 0.9 or 0.999"
    for i, beta in enumerate(values):
        if not _number(f"betas[{i}]", beta, "in [0, 1)", remedy) < 1:
            _refuse(ValueError, f"betas[{i}]", "in [0, 1)", beta, remedy)
    return tuple(float(beta) for beta in values)


def _refuse(error: type[Exception], name: str, rule: str, value: object, remedy: str) -> NoReturn:
    raise error(f"mechanize: {name} must be {rule}. Got {value!r}. Remedy: {remedy}.")
