"""The classes that `mechanize` makes: made once, found by name, pickled as the call that makes them."""

from __future__ import annotations

import copyreg
import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import count
from threading import Lock
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, cast
from weakref import WeakValueDictionary

import torch
from torch.optim import Optimizer

from mechanic_pytorch._config import Config

if TYPE_CHECKING:
    from mechanic_pytorch._overloads import Mechanize  # a stub alone, written by tools/stubs.py

Mixin = TypeVar("Mixin", bound=Optimizer)
Options = ParamSpec("Options")

# log_func is compared by identity: a class holds its own, so that no id is used twice while it lives.
_made: WeakValueDictionary[tuple[type, Config, int], type[Optimizer]] = WeakValueDictionary()
_serial_number = count(1)
_lock = Lock()


def class_for(mixin: type[Mixin], base: type[Optimizer], config: Config) -> type[Mixin]:
    """Return the subclass of `mixin` and `base` with these options, the same one at every call.

    It lives in `mechanic_pytorch.optim` under the name that it bears, for tools that write classes down or ship them to
    other processes import them by name.
    """
    key = (base, config, id(config.log_func))
    with _lock:
        found = _made.get(key)
        if found is None:
            found = _made[key] = _make(mixin, base, config)
    return cast(type[Mixin], found)


def typed_by_base(
    function: Callable[Concatenate[type[Optimizer], Options], type[Optimizer]],
) -> Mechanize[Options]:
    """Return the same function, as type checkers see it: what class it returns for which base."""
    return cast("Mechanize[Options]", function)


def _make(mixin: type[Optimizer], base: type[Optimizer], config: Config) -> type[Optimizer]:
    name = f"Mechanized{base.__name__}"
    of_torch = config == Config() and vars(torch.optim).get(base.__name__) is base
    default = f" If lr is not given, it is {LR}." if _place_of_lr(base) else ""
    doc = f"`{base.__name__}` with a learned learning-rate scale; see `mechanize`.{default}\n\n{base.__doc__ or ''}"
    body = {
        "__doc__": doc,
        "__module__": "mechanic_pytorch.optim",
        "__qualname__": name if of_torch else f"{name}_{next(_serial_number)}",
        "mechanic_config": config,
        "mechanic_base": base,
        "__init__": _init(mixin, base, config),
        "_mechanic_made_from": (mixin, base, config),
    }
    metaclass_of_base: type = type(base)
    made: type[Optimizer] = _metaclass(metaclass_of_base)(name, (mixin, base), body)
    return made


LR = 1.0  # if none is given: what suits the tuner, whatever the base's own default is

# By which name each option is passed to a mechanized class: its own are the base's (Adam has betas and an eps).
_OPTIONS = {f"mechanic_{option.name}": option.name for option in fields(Config)}


def _init(mixin: type[Optimizer], base: type[Optimizer], config: Config) -> Callable[..., None]:
    """Return an `__init__` that takes the options of `mechanize`, too, under names that begin with `mechanic_`.

    An object that is built with such options is of the class that `mechanize` makes for them.
    """
    place_of_lr = _place_of_lr(base)

    @functools.wraps(base.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807  # it becomes one
        who, cls = type(self).__name__, type(self)
        for key in [key for key in kwargs if key.startswith("mechanic_") and key not in _OPTIONS]:
            raise TypeError(f"{who}: {key!r} is no option of mechanize. Remedy: pass one of {', '.join(_OPTIONS)}.")
        for key in [key for key in kwargs if f"mechanic_{key}" in _OPTIONS and not _takes(base, key)]:
            raise TypeError(
                f"{who}: {base.__name__} takes no {key!r}, which is an option of mechanize. Remedy: pass it as "
                f"mechanic_{key}, or to mechanize({base.__name__}, {key}={kwargs[key]!r})."
            )
        options = {_OPTIONS[key]: kwargs.pop(key) for key in list(kwargs) if key in _OPTIONS}
        wanted = replace(config, **options)
        others = [name for name in options if getattr(wanted, name) != getattr(config, name)]
        if others and "_mechanic_made_from" not in vars(cls):  # its own are no change: tools pass all that they know
            raise TypeError(
                f"{who}: a class that is derived from a mechanized one cannot take options of mechanize. Got "
                f"{', '.join(others)}. Remedy: derive it from mechanize({base.__name__}, ...) with these options."
            )
        if others:
            self.__class__ = class_for(mixin, base, wanted)
        if "lr" not in kwargs and len(args) < place_of_lr:
            kwargs["lr"] = LR
        super(mixin, self).__init__(*args, **kwargs)

    signature = _signature(base, config)
    if signature is not None:
        made: Any = __init__
        made.__signature__ = signature
        empty = inspect.Parameter.empty
        made.__annotations__ = {
            p.name: p.annotation for p in signature.parameters.values() if p.annotation is not empty
        }
    return __init__


def _takes(base: type[Optimizer], key: str) -> bool:
    signature = _signature_of(base)
    parameters = {} if signature is None else signature.parameters
    return signature is None or key in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _place_of_lr(base: type[Optimizer]) -> int:
    """Return how many arguments stand before lr, `self` included; 0 if the base does not know lr, or has no default."""
    signature = _signature_of(base)
    lr = signature.parameters.get("lr") if signature else None
    if signature is None or lr is None or lr.default in (None, inspect.Parameter.empty):
        return 0
    return list(signature.parameters).index("lr")


def _signature_of(base: type[Optimizer]) -> inspect.Signature | None:
    try:
        return inspect.signature(base.__init__)
    except (TypeError, ValueError):  # compiled, or spoiled by someone's decorator
        return None


def _signature(base: type[Optimizer], config: Config) -> inspect.Signature | None:
    """Return the base's signature with our lr, and the options with the class's defaults; None if it has none."""
    signature = _signature_of(base)
    if signature is None:
        return None
    types = typing.get_type_hints(Config, localns={"ProcessGroup": Any})
    options = [
        inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=getattr(config, name), annotation=types[name])
        for key, name in _OPTIONS.items()
        if key not in signature.parameters
    ]
    parameters = [
        p.replace(default=LR) if p.name == "lr" and _place_of_lr(base) else p for p in signature.parameters.values()
    ]
    rest = [p for p in parameters if p.kind is p.VAR_KEYWORD]
    return signature.replace(parameters=[*(p for p in parameters if p not in rest), *options, *rest])


def with_layout(cls: type[Optimizer], layout: type) -> type[Optimizer]:
    """Return a class that begins with `layout`, and is `cls` to whoever asks for its name or pickles it."""
    keys = "__doc__", "__module__", "__qualname__", "_mechanic_made_from"
    metaclass: type = type(cls)
    made: type[Optimizer] = metaclass(cls.__name__, (layout, cls), {key: getattr(cls, key) for key in keys})
    return made


def class_named(qualname: str) -> type[Optimizer] | None:
    """Return the living class of that name, if there is one in this process."""
    return next((cls for cls in list(_made.values()) if cls.__qualname__ == qualname), None)


@functools.cache
def _metaclass(base_metaclass: type) -> type:
    """Return a metaclass by which pickle knows the classes made here."""
    metaclass = type("MechanizedType", (base_metaclass,), {"__module__": __name__})
    copyreg.pickle(metaclass, _reduce)
    return metaclass


def _reduce(cls: type[Optimizer]) -> str | tuple[Callable[..., type], tuple[object, ...]]:
    if "_mechanic_made_from" not in vars(cls):
        return cls.__qualname__  # someone's own subclass: found by its name, like any class
    return class_for, vars(cls)["_mechanic_made_from"]
