"""Mechanic for PyTorch: wrap any optimizer, keep the schedule, never tune the learning-rate scale again."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mechanic_pytorch import optim
    from mechanic_pytorch._classes import mechanize
    from mechanic_pytorch.mechanic import Mechanic, is_mechanized
    from mechanic_pytorch.scripts.patch import patched

    __version__: str
else:
    _HOMES = {
        "Mechanic": "mechanic",
        "is_mechanized": "mechanic",
        "mechanize": "_classes",
        "patched": "scripts.patch",
    }

    def __getattr__(name: str) -> object:
        """Import a name when it is asked for, because torch takes seconds, and `mechanic --help` needs none of it."""
        if name in ("optim", "telemetry"):
            return import_module(f"mechanic_pytorch.{name}")
        if name == "__version__":
            return version("mechanic-pytorch")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"mechanic_pytorch.{_HOMES[name]}"), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = ["Mechanic", "is_mechanized", "mechanize", "optim", "patched"]
