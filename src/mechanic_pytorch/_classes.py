"""`mechanize`, and the classes that it makes: made once, found by name, pickled as the call that makes them."""

from __future__ import annotations

import copyreg
import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from itertools import count
from threading import Lock
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, cast
from weakref import WeakValueDictionary

import torch
from torch.optim import Optimizer

from mechanic_pytorch._config import Config, LogFunc
from mechanic_pytorch.mechanic import Mechanic

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from mechanic_pytorch._overloads import Mechanize  # a stub alone, written by tools/stubs.py

Options = ParamSpec("Options")

# log_func is compared by identity: a class holds its own, so that no id is used twice while it lives.
_made: WeakValueDictionary[tuple[type, Config, int], type[Mechanic]] = WeakValueDictionary()
_serial_number = count(1)
_lock = Lock()


def _typed_by_base(
    function: Callable[Concatenate[type[Optimizer], Options], type[Optimizer]],
) -> Mechanize[Options]:
    """Return the same function, as type checkers see it: what class it returns for which base."""
    return cast("Mechanize[Options]", function)


@_typed_by_base
def mechanize(
    Base: type[Optimizer],
    s_decay: float = 0.01,
    betas: Sequence[float] = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999),
    s_init: float | Literal["auto"] = "auto",
    eps: float = 1e-8,
    store_delta: bool = False,
    log_func: LogFunc | None = None,
    log_every: int = 0,
    *,
    skip_nonfinite: bool = True,
    process_group: ProcessGroup | None = None,
    max_lr: float | None = None,
    per_group: bool = False,
) -> type[Mechanic]:
    """Return a class like `Base` whose learning-rate scale is learned.

    The result is a subclass of `Base` and of `Mechanic` and takes the arguments of `Base`, and those of this function
    under names that begin with `mechanic_`. If lr is not given, it is 1.0; any other lr gives the same run. Schedules,
    ratios between group learning rates and weight decay keep their meaning, because every lr is multiplied by the same
    learned scale. The same arguments give the same class.

    Args:
        Base: an optimizer class, not an instance.
        s_decay: lambda in the paper, a weight decay inside the tuner. Helps on small data; 0.0 is fine on large. With
            a number for s_init it weighs in proportion to the learned scale, so that it suits lr near 1 and holds a
            much smaller lr back.
        betas: discount factors of the tuner, one copy of the tuner each; unrelated to Adam's betas.
        s_init: initial scale. "auto" starts relative to the first update, so that every base lr gives the same run, and
            makes plain steps of the base, x + scale * u: a scale that falls takes nothing back, and weights whose lr is
            0 rest. docs/safety.md has its rules. A number > 0 selects Algorithm 1 as published. It should be an
            underestimate of the right scale: too small a number costs a few steps, too large a one may diverge. The
            default of version 0.0.1 was 1e-8.
        eps: added to sqrt(v), in units of h (update times gradient). With s_init="auto", which has no fixed
            unit, it has no effect.
        store_delta: accepted for compatibility with version 0.0.1, without effect: one number per weight is kept, with
            all its digits.
        log_func: called with `{"iter_count": t, "s": scale}`, a list of scales with `per_group`; None logs through
            `logging.getLogger("mechanic_pytorch")` at level INFO.
        log_every: log every this many steps; 0 never does.
        skip_nonfinite: leave everything as it was at a step whose gradient is not finite. This costs one host read
            per step, or none with a base that takes `found_inf` (`fused=True`). False avoids it: the base then does
            what it always does with such a gradient; the tuner's vectors are protected either way.
        process_group: the processes that hold the other shards of plain tensors, or other parameters of the same model:
            FSDP1, `ZeroRedundancyOptimizer`, pipeline stages. A `DTensor` (FSDP2, tensor parallelism) knows its own
            group. None: plain tensors are whole, and equal in all processes (DDP).
        max_lr: bound of the effective lr, > 0: the scale never exceeds max_lr / (the largest lr so far, of all groups).
            None: no bound.
        per_group: learn one scale for each parameter group, from that group's gradient, weights and updates alone: for
            groups whose updates have different units. Ratios between their lrs then stop
            mattering. docs/per-group.md says when it helps. False: one scale for all.

    Returns:
        The class `Mechanized<Base>`. For optimizers of torch and classes derived from them, type checkers also see the
        arguments and attributes of the base. For others they see only those of `Mechanic`, because no type says "`Base`
        and `Mechanic`": there, `assert isinstance(optimizer, Base)` adds those of the base.

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
    options = {name: value for name, value in locals().items() if name != "Base"}  # which `Config` declares
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
    if isinstance(s_decay, Iterable) and not isinstance(s_decay, str):
        raise TypeError(
            f"mechanize: s_decay must be a number. Got {type(s_decay).__name__}. Remedy: parameters go to the class "
            f"that mechanize returns: mechanize({Base.__name__})(model.parameters(), lr=1.0)."
        )
    return class_for(Base, Config(**options))


def class_for(base: type[Optimizer], config: Config) -> type[Mechanic]:
    """Return the subclass of `Mechanic` and `base` with these options, the same one at every call.

    It is found in `mechanic_pytorch.optim` under its name, because tools that write classes down, or send them to other
    processes, import them by name.
    """
    key = (base, config, id(config.log_func))
    with _lock:
        found = _made.get(key)
        if found is None:
            found = _made[key] = _make(base, config)
    return found


def _make(base: type[Optimizer], config: Config) -> type[Mechanic]:
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
        "__init__": _init(base, config),
        "_mechanic_made_from": (base, config),
    }
    metaclass_of_base: type = type(base)
    made: type[Mechanic] = _metaclass(metaclass_of_base)(name, (Mechanic, base), body)
    return made


LR = 1.0  # if none is given, whatever the base's own default is

# The name under which each option is passed to a mechanized class: the plain names are the base's (Adam has betas).
_OPTIONS = {f"mechanic_{option.name}": option.name for option in fields(Config)}


def _init(base: type[Optimizer], config: Config) -> Callable[..., None]:
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
            self.__class__ = class_for(base, wanted)
        if "lr" not in kwargs and len(args) < place_of_lr:
            kwargs["lr"] = LR
        super(Mechanic, self).__init__(*args, **kwargs)

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


def class_named(qualname: str) -> type[Mechanic] | None:
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
