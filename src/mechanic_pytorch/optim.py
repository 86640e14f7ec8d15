"""Every optimizer, mechanized, under an importable name: for configuration files and command lines.

`mechanic_pytorch.optim.AdamW` is `mechanize(torch.optim.AdamW)`, as is `mechanic_pytorch.optim.MechanizedAdamW`, the
name by which the class calls itself. Any other optimizer is found by its own dotted name after this one:
`mechanic_pytorch.optim.torchao.optim.AdamW8bit` is `mechanize(torchao.optim.AdamW8bit)`.

The options of `mechanize` are passed with those of the base, under names that begin with `mechanic_`. The object is
then of the class that `mechanize` makes with these options.

Example:
    >>> import mechanic_pytorch.optim, torch
    >>> mechanic_pytorch.optim.AdamW is mechanic_pytorch.mechanize(torch.optim.AdamW)
    True
    >>> params = [torch.zeros(3, requires_grad=True)]
    >>> optimizer = mechanic_pytorch.optim.AdamW(params, lr=1.0, betas=(0.8, 0.99), mechanic_max_lr=1e-2)
    >>> type(optimizer) is mechanic_pytorch.mechanize(torch.optim.AdamW, max_lr=1e-2)
    True
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeGuard

from torch import optim as _torch_optim  # not as `torch`, which would be a module in here

from mechanic_pytorch._classes import class_named, mechanize

__path__: list[str] = []  # so that Python asks for modules in here, which `_Others` makes


def _is_optimizer(value: object) -> TypeGuard[type[_torch_optim.Optimizer]]:
    return isinstance(value, type) and issubclass(value, _torch_optim.Optimizer) and value is not _torch_optim.Optimizer


def __getattr__(name: str) -> Any:
    base = vars(_torch_optim).get(name.removeprefix("Mechanized"))
    if _is_optimizer(base):
        return mechanize(base)
    made = class_named(name)  # of another base, or with other options: known to this process alone
    if made is None:
        close = {known.lower(): known for known in __dir__()}.get(name.lower())
        remedy = f"did you mean {close}?" if close else f"another optimizer has its whole dotted name: package.{name}"
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}: torch.optim has no such optimizer. Remedy: {remedy}"
        )
    return made


def __dir__() -> list[str]:
    return sorted(name for name, value in vars(_torch_optim).items() if _is_optimizer(value))


class _Others(MetaPathFinder, Loader):
    """Makes `mechanic_pytorch.optim.<module>`, which has the optimizers of a module, mechanized."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        theirs = name.removeprefix(f"{__name__}.")
        if theirs == name or (theirs not in sys.modules and importlib.util.find_spec(theirs) is None):
            return None
        return ModuleSpec(name, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        theirs = importlib.import_module(module.__name__.removeprefix(f"{__name__}."))

        def find(name: str) -> Any:
            base = getattr(theirs, name, None)
            if not _is_optimizer(base):
                raise AttributeError(f"module {theirs.__name__!r} has no optimizer {name!r}")
            return mechanize(base)

        vars(module)["__getattr__"] = find


sys.meta_path.append(_Others())
