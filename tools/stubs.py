"""Write what type checkers and editors read of the optimizers: `src/mechanic_pytorch/optim.pyi` and `_overloads.pyi`.

No annotation says "`Base` and `Mechanic`", so the stubs say it once for each optimizer of torch. Run it when torch has
a new optimizer or argument, or `mechanize` a new option: `python tools/stubs.py`. `tests/test_types.py` compares.
"""

import ast
import inspect
import textwrap
from pathlib import Path

import torch

from mechanic_pytorch import mechanize, optim

PACKAGE = Path(__file__).parents[1] / "src" / "mechanic_pytorch"
VERSION = ".".join(torch.__version__.split(".")[:2])
HEAD = f"# Written by tools/stubs.py for torch {VERSION}. Do not edit.\n\n"
QUOTE, DOUBLE_QUOTE = "'", '"'
OVERLAP = "  # type: ignore[overload-overlap]  # AdamW is an Adam, the mechanized ones are no such pair"


OPTIM = """\
from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from mechanic_pytorch._config import LogFunc
from mechanic_pytorch.mechanic import Mechanic

class _Mechanized(Mechanic):
    def __init__(self, params: ParamsT, *args: Any, **kwargs: Any) -> None: ...

class _Options(TypedDict, total=False):
"""

OVERLOADS = """\
from typing import ParamSpec, Protocol, overload

import torch

from mechanic_pytorch import optim

Options = ParamSpec("Options")

class Mechanize(Protocol[Options]):
"""


def optim_stub() -> str:
    """Return a class for each optimizer of torch, with the arguments of the base and the options of `mechanize`."""
    options = [p for p in inspect.signature(mechanize).parameters.values() if p.name != "Base"]
    lines = [f"    mechanic_{p.name}: {p.annotation.replace(QUOTE, DOUBLE_QUOTE)}" for p in options]
    for name in dir(optim):
        lines += ["", f"class Mechanized{name}(_Mechanized, torch.optim.{name}):", "    def __init__("]
        lines += [f"        {argument}," for argument in arguments(getattr(torch.optim, name))]
        lines += ["        **options: Unpack[_Options],", "    ) -> None: ..."]
    lines += ["", *(f"{name} = Mechanized{name}" for name in dir(optim))]
    return HEAD + OPTIM + "\n".join(lines) + "\n"


def arguments(base: type[torch.optim.Optimizer]) -> list[str]:
    """Return the arguments of its constructor, `self` included: names and types as its source has them."""
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(base.__init__))).body
    written = {arg.arg: ast.unparse(arg) for arg in ast.walk(function) if isinstance(arg, ast.arg)}
    found = []
    for p in inspect.signature(base.__init__).parameters.values():
        if p.kind is p.KEYWORD_ONLY and "*" not in found:
            found.append("*")
        found.append(written[p.name] + ("" if p.default is p.empty else f" = {p.default!r}"))
    return found


def overloads_stub() -> str:
    """Return the type of `mechanize`: an overload for each optimizer of torch, and one for all others."""
    names = sorted(dir(optim), key=lambda name: (-len(getattr(torch.optim, name).__mro__), name))
    results = {f"torch.optim.{name}": f"Mechanized{name}" for name in names}  # subclasses first: AdamW is an Adam
    lines = []
    for base, result in {**results, "torch.optim.Optimizer": "_Mechanized"}.items():
        lines += ["    @overload", f"    def __call__({OVERLAP if base == 'torch.optim.AdamW' else ''}"]
        lines += [f"        self, Base: type[{base}], *args: Options.args, **options: Options.kwargs"]
        lines += [f"    ) -> type[optim.{result}]: ..."]
    return HEAD + OVERLOADS + "\n".join(lines) + "\n"


STUBS = {"optim.pyi": optim_stub, "_overloads.pyi": overloads_stub}

if __name__ == "__main__":
    for name, text in STUBS.items():
        (PACKAGE / name).write_text(text())
