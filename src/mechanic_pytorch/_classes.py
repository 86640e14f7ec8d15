"""The classes that `mechanize` makes: made once, found by name, pickled as the call that makes them."""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from functools import cache
from itertools import count
from threading import Lock
from weakref import WeakValueDictionary

import torch
from torch.optim import Optimizer

from mechanic_pytorch._config import Config

# log_func is compared by identity: a class holds its own, so that no id is used twice while it lives.
_made: WeakValueDictionary[tuple[type, Config, int], type[Optimizer]] = WeakValueDictionary()
_serial_number = count(1)
_lock = Lock()


def class_for(mixin: type[Optimizer], base: type[Optimizer], config: Config) -> type[Optimizer]:
    """Return the subclass of `mixin` and `base` with these options, the same one at every call.

    It lives in `mechanic_pytorch.optim` under the name that it bears, for tools that write classes down or ship them to
    other processes import them by name.
    """
    key = (base, config, id(config.log_func))
    with _lock:
        found = _made.get(key)
        if found is None:
            found = _made[key] = _make(mixin, base, config)
    return found


def _make(mixin: type[Optimizer], base: type[Optimizer], config: Config) -> type[Optimizer]:
    name = f"Mechanized{base.__name__}"
    of_torch = config == Config() and vars(torch.optim).get(base.__name__) is base
    doc = f"`{base.__name__}` with a learned learning-rate scale; see `mechanize`.\n\n{base.__doc__ or ''}"
    body = {
        "__doc__": doc,
        "__module__": "mechanic_pytorch.optim",
        "__qualname__": name if of_torch else f"{name}_{next(_serial_number)}",
        "mechanic_config": config,
        "mechanic_base": base,
        "_mechanic_made_from": (mixin, base, config),
    }
    metaclass = _metaclass(type(base))  # type: ignore[arg-type]  # mypy: a metaclass is not Hashable
    return metaclass(name, (mixin, base), body)  # type: ignore[no-any-return]


def class_named(qualname: str) -> type[Optimizer] | None:
    """Return the living class of that name, if there is one in this process."""
    return next((cls for cls in list(_made.values()) if cls.__qualname__ == qualname), None)


@cache
def _metaclass(base_metaclass: type) -> type:
    """Return a metaclass by which pickle knows the classes made here."""
    metaclass = type("MechanizedType", (base_metaclass,), {"__module__": __name__})
    copyreg.pickle(metaclass, _reduce)
    return metaclass


def _reduce(cls: type[Optimizer]) -> str | tuple[Callable[..., type], tuple[object, ...]]:
    if "_mechanic_made_from" not in vars(cls):
        return cls.__qualname__  # someone's own subclass: found by its name, like any class
    return class_for, vars(cls)["_mechanic_made_from"]
