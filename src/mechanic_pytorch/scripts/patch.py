"""`patched`: mechanize optimizers as someone else's code builds them.

The hook is `Optimizer.__init__`, which every optimizer calls when its own `__init__` has read its arguments: there an
object whose class is to be mechanized changes its class, before it has any state. Nothing else of torch is touched, so
every way to get hold of a class leads there, and signatures, docstrings and `isinstance` are those of torch. Pickle and
copy call no `__init__`: what they make is of the class that it was before.
"""

from __future__ import annotations

import difflib
import sys
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import fields
from numbers import Real
from threading import RLock
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from mechanic_pytorch._classes import mechanize, with_layout
from mechanic_pytorch._config import Config
from mechanic_pytorch._torch import lrs
from mechanic_pytorch._tuner import SKIPPED_STEPS, STEPS, Tuner, entries_of, is_ours
from mechanic_pytorch.mechanic import Mechanic
from mechanic_pytorch.scripts.place import place_of
from mechanic_pytorch.scripts.wrapping import Function, wrapped

Named = type[Optimizer] | str

_active: list[Patch] = []  # the last one decides
_hook = ExitStack()  # holds our function in its place while there is an active patch
_lock = RLock()


def patched(
    *,
    base_lr: float | None = None,
    include: Iterable[Named] = (),
    exclude: Iterable[Named] = (),
    **options: Any,
) -> AbstractContextManager[Sequence[Built]]:
    """Mechanize every optimizer of `torch.optim` that is built inside this context, by any code.

    The optimizer is an instance of the class that was called, and of `Mechanic`. How the class was got hold of makes no
    difference. Left as they are: third-party optimizers, subclasses of torch's, LBFGS, which assumes that it owns its
    steps, and those of a single number, such as a temperature or a multiplier, unless `include` names them; what is
    mechanized already; copies and unpickled ones; and what `mechanize` refuses (the entry in the list says why). The
    context holds for all threads, until the last one leaves it; contexts may be nested, and the one entered last
    decides.

    Args:
        base_lr: None keeps the learning rate of the code, which makes no difference unless s_init is a number. A number
            replaces it, in proportion: the group with the largest lr gets this one.
        include: further classes to mechanize, or their names: "LBFGS", "package.Class". Names that turn out to be those
            of nothing that was built are warned about at the end.
        exclude: classes to leave plain, or their names.
        **options: the options of `mechanize`.

    Returns:
        A context manager. It gives the list of the optimizers built, in order, one `Built` each, which stays readable
        when the optimizer is gone.

    Raises:
        TypeError: an option is of the wrong kind or does not exist.
        ValueError: an option breaks its rule; a name without a package is that of no optimizer of torch, nor of an
            imported one.

    Example:
        >>> import torch
        >>> from mechanic_pytorch import patched
        >>> def train():  # someone else's
        ...     model = torch.nn.Linear(4, 1)
        ...     optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        ...     for _ in range(20):
        ...         optimizer.zero_grad()
        ...         model(torch.ones(8, 4)).square().mean().backward()
        ...         optimizer.step()
        >>> with patched() as built:
        ...     train()
        >>> [(one.base.__name__, one.steps, one.script_lrs) for one in built]
        [('AdamW', 20, [0.001])]
    """
    return _warning(Patch(base_lr, include, exclude, options))


@contextmanager
def _warning(patch: Patch) -> Iterator[list[Built]]:
    """Patch, and warn at the end of names without effect."""
    with patching(patch) as built:
        yield built
    for sentence in patch.without_effect():
        warnings.warn(f"patched: {sentence}", stacklevel=3)  # where the `with` of the caller is


class Built:
    """What is known of one optimizer that was built inside `patched`. It does not keep the optimizer alive.

    Example:
        >>> import torch
        >>> from mechanic_pytorch import patched
        >>> with patched(exclude=["SGD"]) as built:
        ...     optimizer = torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=0.1)
        >>> built[0].optimizer is optimizer, built[0].is_mechanized, built[0].reason
        (True, False, 'it was excluded')
    """

    def __init__(self, optimizer: Optimizer, base: type[Optimizer], reason: str | None) -> None:
        self.base: type[Optimizer] = getattr(base, "mechanic_base", base)  # the plain class
        self._config = optimizer.mechanic_config if isinstance(optimizer, Mechanic) else None
        self.is_mechanized = self._config is not None
        self.reason = reason  # why it was left as it is, or None
        self.place = place_of(optimizer)  # the line of code that built it
        self._options = _options_of_a_lone_tensor(optimizer)
        self.script_lrs: list[float] = []  # per group, as the code gave them
        self._factor = 1.0
        self._groups: list[dict[str, Any]] = []
        self._reference = weakref.ref(optimizer)
        self._see(optimizer)
        if self.is_mechanized:
            optimizer.register_step_post_hook(self._see)

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer, or None if it is gone."""
        return self._reference()

    @property
    def kind(self) -> Hashable:
        """What it shares with others that one line of code builds in a loop, one for each tensor; None of any other."""
        is_lone = self._options is not None and len(self.script_lrs) == 1  # no group has come since
        return (self.base, self._config, self.place, self._options) if is_lone else None

    def described(self) -> str:
        """Return class, variable and line, as in "Adam optimizerD (train.py:41)"."""
        where = f" ({self.place})" if self.place.path else ""
        return f"{self.base.__name__} {self.place.variable}".rstrip() + where

    @property
    def steps(self) -> int:
        """How many steps were made, skipped ones included; of a mechanized optimizer. Syncs."""
        return int(self._now()[0].get(STEPS, 0))

    @property
    def skipped_steps(self) -> int:
        """How many of them were skipped, because a gradient was not finite. Syncs."""
        return int(self._now()[0].get(SKIPPED_STEPS, 0))

    def learned_lr(self) -> list[float]:
        """Return `Mechanic.learned_lr` as it is, or was at the last step; empty for a plain one. Syncs."""
        return Tuner(self._config).at(self._now()).learned_lr() if self._config else []

    def rescale(self, optimizer: Optimizer, base_lr: float) -> None:
        """Make `base_lr` the largest lr of the groups and keep the ratios, those of groups to come included."""
        values = [group.get("lr") for group in optimizer.param_groups]
        largest = max((float(lr) for lr in values if lr is not None), default=0.0)
        if largest == 0:
            return  # set later by the code
        factor = self._factor = base_lr / largest
        self._see(optimizer)
        reference = self._reference
        add: Callable[..., None] = type(optimizer).add_param_group

        def add_param_group(group: dict[str, Any]) -> None:
            add(reference(), {**group, "lr": group["lr"] * factor} if "lr" in group else group)

        for holder in (*optimizer.param_groups, optimizer.defaults):
            if holder.get("lr") is not None:
                holder["lr"] = holder["lr"] * factor
        vars(optimizer)["add_param_group"] = add_param_group

    def _see(self, optimizer: Optimizer, *_: Any) -> None:
        """Note what a report needs, without a sync: references to tensors, and numbers."""
        self._groups = [entries_of(group) for group in optimizer.param_groups]
        new = optimizer.param_groups[len(self.script_lrs) :]
        self.script_lrs += [lr / self._factor for lr in lrs(new, "initial_lr")]

    def _now(self) -> list[dict[str, Any]]:
        optimizer = self.optimizer
        if optimizer is not None:
            self._see(optimizer)
        return self._groups


def _options_of_a_lone_tensor(optimizer: Optimizer) -> str | None:
    """Return the options of an optimizer of one tensor, without its lr; None if it has several."""
    groups = optimizer.param_groups
    if len(groups) != 1 or len(groups[0]["params"]) != 1:
        return None
    others = ("params", "param_names", "lr", "initial_lr")
    return repr([(key, value) for key, value in groups[0].items() if key not in others and not is_ours(key)])


class Patch:
    """One context: its options, checked, and what was built in it."""

    def __init__(
        self,
        base_lr: float | None,
        include: Iterable[Named],
        exclude: Iterable[Named],
        options: dict[str, Any],
    ) -> None:
        known = [option.name for option in fields(Config)]
        for name in options.keys() - set(known):
            raise TypeError(
                f"patched: there is no option {name!r}. Remedy: base_lr, include, exclude, or one of mechanize: "
                f"{', '.join(known)}."
            )
        mechanize(torch.optim.SGD, **options)  # refuses what is wrong with them
        rule = "patched: base_lr must be a finite number > 0, or None."
        remedy = "Remedy: None keeps the lr of the code, 1.0 is what suits Mechanic."
        if base_lr is not None and (isinstance(base_lr, bool) or not isinstance(base_lr, Real)):
            raise TypeError(f"{rule} Got {base_lr!r}. {remedy}")
        if base_lr is not None and not 0 < float(base_lr) < float("inf"):
            raise ValueError(f"{rule} Got {base_lr!r}. {remedy}")
        self.base_lr = None if base_lr is None else float(base_lr)
        self.include, self.exclude = _names("include", include), _names("exclude", exclude)
        self.options = options
        self.built: list[Built] = []
        self._seen: set[type[Optimizer]] = set()

    def reason_against(self, cls: type[Optimizer]) -> str | None:
        """Return why this class is left as it is, or None if it is not."""
        if issubclass(cls, Mechanic):
            return "it is mechanized already"
        if any(_bears(cls, name) for name in self.exclude):
            return "it was excluded"
        if any(_bears(cls, name) for name in self.include):
            return None
        if not is_torchs(cls):
            name = f"{cls.__module__}.{cls.__qualname__}"
            return f"it is not one of torch.optim; include {name} to mechanize it, unless it wraps another optimizer"
        if issubclass(cls, torch.optim.LBFGS):
            return "it assumes that it owns its steps; include LBFGS to mechanize it anyway"
        return None

    def reason_by_size(self, base: type[Optimizer], optimizer: Optimizer) -> str | None:
        """Return why an optimizer of this class and size is left as it is, or None if it is not."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if len(params) != 1 or is_lazy(params[0]) or params[0].numel() != 1:
            return None
        if any(_bears(base, name) for name in self.include):
            return None
        return (
            "it trains a single number, such as a temperature or a multiplier, whose loss may fall without end; "
            f"include {base.__name__} to mechanize it anyway"
        )

    def reason_as_container(self, optimizer: Optimizer) -> str | None:
        """Return that it calls the steps of mechanized optimizers, if these hold all that it holds; else None."""
        if is_torchs(type(optimizer)) or any(_bears(type(optimizer), name) for name in self.exclude):
            return None
        params = {p for group in optimizer.param_groups for p in group["params"]}
        names: dict[str, None] = {}
        for one in self.built:
            inner = one.optimizer
            if one.is_mechanized and inner is not None:
                theirs = {p for group in inner.param_groups for p in group["params"]}
                if theirs & params:
                    names[one.base.__name__] = None
                    params -= theirs
        return f"its parameters belong to mechanized optimizers: {', '.join(names)}" if names and not params else None

    def mechanized(self, base: type[Optimizer]) -> type[Optimizer]:
        """Return the class to take in the place of this one."""
        return mechanize(base, **self.options)

    def add(self, optimizer: Optimizer, one: Built) -> None:
        """List an optimizer that was built."""
        self.built.append(one)
        self._seen.add(one.base)

    def without_effect(self) -> list[str]:
        """Return what is wrong with names of `include` and `exclude` that could not be checked earlier."""
        paths = [f"{cls.__module__}.{cls.__qualname__}" for cls in self._seen]
        return [
            f"{argument} {name} has no effect, because no such optimizer was built.{_hint(name, paths)}"
            for argument, names in (("include", self.include), ("exclude", self.exclude))
            for name in names
            if isinstance(name, str) and _is_of_others(name) and not any(_bears(cls, name) for cls in self._seen)
        ]


def is_torchs(cls: type[Optimizer]) -> bool:
    """Return True if this is an optimizer of `torch.optim`."""
    return _is_in_torch_optim(cls.__module__)


def _is_in_torch_optim(module: str) -> bool:
    """Return True for `torch.optim` and the modules in it."""
    return f"{module}.".startswith("torch.optim.")


def _names(argument: str, names: Iterable[Named]) -> list[Named]:
    rule = f"patched: {argument} must hold optimizer classes or their names."
    remedy = f'Remedy: pass a list: {argument}=[torch.optim.SGD, "package.Class"].'
    if isinstance(names, str | type) or not isinstance(names, Iterable):
        raise TypeError(f"{rule} Got {names!r}. {remedy}")
    listed = list(names)
    for name in listed:
        if isinstance(name, str):
            _check_name(argument, name)
        elif not (isinstance(name, type) and issubclass(name, Optimizer)):
            raise TypeError(f"{rule} Got {name!r}. {remedy}")
    return listed


def _is_of_others(name: str) -> bool:
    """Return True for a name with a package that is not torch: it may be imported later."""
    module = name.rpartition(".")[0]
    return bool(module) and not _is_in_torch_optim(module)


def _check_name(argument: str, name: str) -> None:
    """Refuse a name without a package, or one of torch.optim, that nothing bears."""
    if _is_of_others(name):
        return
    module, _, last = name.rpartition(".")
    known = {name for name, cls in vars(torch.optim).items() if isinstance(cls, type) and issubclass(cls, Optimizer)}
    if not module:
        known |= {cls.__name__ for cls in _subclasses(Optimizer)}
    if last not in known:
        raise ValueError(
            f"patched: {argument} must name optimizers of torch.optim, or others with their package. Got {name!r}."
            f"{_hint(last, known)} Remedy: 'AdamW', or 'package.Class' for a class from elsewhere."
        )


def _subclasses(cls: type[Optimizer]) -> Iterator[type[Optimizer]]:
    """Return all that is derived from a class, but nothing that we have made."""
    for each in cls.__subclasses__():
        if not issubclass(each, Mechanic):
            yield each
            yield from _subclasses(each)


def _hint(name: str, known: Iterable[str]) -> str:
    """Return the question whether another name was meant."""
    close = difflib.get_close_matches(name, sorted(known))
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _bears(cls: type[Optimizer], name: Named) -> bool:
    """Return True if this is the class of that name, which may be the name of the class alone. Imports nothing."""
    if not isinstance(name, str):
        return cls is name
    module, _, last = name.rpartition(".")
    if last != cls.__name__:
        return False
    return module in ("", cls.__module__) or getattr(sys.modules.get(module), last, None) is cls


@contextmanager
def patching(patch: Patch) -> Iterator[list[Built]]:
    """Mechanize what is built in the block as this patch says."""
    with _lock:
        _active.append(patch)
        if len(_active) == 1:
            _hook.enter_context(_hooked())
    try:
        yield patch.built
    finally:
        with _lock:
            _active.remove(patch)
            if not _active:
                _hook.close()


@contextmanager
def _hooked() -> Iterator[None]:
    """Let `Optimizer.__init__` ask the active patches.

    If someone wraps it meanwhile, our function stays below theirs, inactive.
    """
    is_on = True

    def around(original: Function) -> Function:
        def init(self: Optimizer, params: Any, defaults: dict[str, Any]) -> None:
            with _lock:
                patches = list(_active) if is_on else []
            if patches:
                _build(self, params, defaults, original, patches)
            else:
                original(self, params, defaults)

        return init

    with wrapped(Optimizer, "__init__", around):
        try:
            yield
        finally:
            is_on = False


def _build(self: Optimizer, params: Any, defaults: dict[str, Any], init: Function, patches: list[Patch]) -> None:
    """Call `init` on an object of the mechanized class, or of its own, and list it."""
    patch, base = patches[-1], type(self)
    reason = patch.reason_against(base)
    if reason is None:
        params, put_back = _kept(params)
        attributes = dict(vars(self))
        try:
            _change_class(self, patch.mechanized(base))
            init(self, params, defaults)
            reason = patch.reason_by_size(base, self)
        except Exception as refusal:
            reason = str(refusal)
        if reason is not None:
            self.__class__ = base
            vars(self).clear()
            vars(self).update(attributes)
            put_back()
    if not isinstance(self, Mechanic) or issubclass(base, Mechanic):
        init(self, params, defaults)  # if it raises, it does so as if we had never been there
    one = Built(self, base, reason and (patch.reason_as_container(self) or reason))
    if patch.base_lr is not None and reason is None:
        one.rescale(self, patch.base_lr)
    for each in patches:
        each.add(self, one)


def _change_class(self: Optimizer, mechanized: type[Optimizer]) -> None:
    """Make the object an instance of the mechanized class, or of a subclass that Python takes to be laid out alike.

    It does not if the base does not begin with `Optimizer`, as in `class Base(ABC, Optimizer)`, although all that
    either adds to an object is its `__dict__`.
    """
    try:
        self.__class__ = mechanized
    except TypeError:
        root: Any = type(self)
        while _sizes(root.__base__) == _sizes(root):
            root = root.__base__
        layout = type(root.__base__)("Layout", (root.__base__,), {})
        self.__class__ = with_layout(mechanized, layout)


def _sizes(cls: type) -> tuple[int, int, int]:
    return cls.__basicsize__, cls.__dictoffset__, cls.__weakrefoffset__


def _kept(params: Any) -> tuple[Any, Callable[[], None]]:
    """Return the same parameters, which can be read twice, and a function that puts dicts of groups back."""
    if isinstance(params, Iterator):
        params = list(params)
    groups = [group for group in params if isinstance(group, dict)] if isinstance(params, list | tuple) else []
    for group in groups:
        if isinstance(group.get("params"), Iterator):
            group["params"] = list(group["params"])
    copies = [dict(group) for group in groups]

    def put_back() -> None:
        for group, copy in zip(groups, copies, strict=True):
            group.clear()
            group.update(copy)

    return params, put_back
