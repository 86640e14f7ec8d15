"""Every optimizer of `torch.optim`, mechanized with default options, under an importable name.

`mechanic_pytorch.optim.AdamW` is `mechanize(torch.optim.AdamW)`, so that a configuration file can name it. So is
`mechanic_pytorch.optim.MechanizedAdamW`, the name by which the class calls itself.

Example:
    >>> import mechanic_pytorch.optim, torch
    >>> mechanic_pytorch.optim.AdamW is mechanic_pytorch.mechanize(torch.optim.AdamW)
    True
"""

from typing import Any, TypeGuard

import torch

from mechanic_pytorch._classes import class_named
from mechanic_pytorch.mechanic import mechanize


def _is_optimizer(value: object) -> TypeGuard[type[torch.optim.Optimizer]]:
    return isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer


def __getattr__(name: str) -> Any:
    base = vars(torch.optim).get(name.removeprefix("Mechanized"))
    if _is_optimizer(base):
        return mechanize(base)
    made = class_named(name)  # of another base, or with other options: known to this process alone
    if made is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}, for torch.optim has no such optimizer")
    return made


def __dir__() -> list[str]:
    return sorted(name for name, value in vars(torch.optim).items() if _is_optimizer(value))
