"""The command `mechanic`, also as `python -m mechanic_pytorch`. What it needs is imported when it is needed."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

HELP = """\
Usage: mechanic COMMAND ...

Mechanic: learn the scale of the learning rate while a script trains.

Commands:
  run      Run a training script with mechanized optimizers: mechanic run train.py
  compare  Run it plainly, mechanized, and plainly at the learned lr: mechanic compare train.py
  env      Show versions, devices and kernels, for bug reports.

Options:
  -h, --help     Show this message. "mechanic run --help" has the options of run.
  -V, --version  Show the version.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says, or these arguments."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command, *rest = arguments or ["--help"]
    if "_MECHANIC_COMPLETE" in os.environ:
        _cli("").complete()
    elif command in ("-h", "--help"):
        print(HELP, end="")
    elif command in ("-V", "--version"):
        print(f"mechanic {version('mechanic-pytorch')}")
    elif command == "env":
        from mechanic_pytorch.scripts import environment

        print(environment.describe())
    elif command in ("run", "compare"):
        _cli(f" {command}").main(command, rest)
    else:
        print(f"mechanic: there is no command {command!r}. Remedy: {_remedy(command, rest)}", file=sys.stderr)
        sys.exit(2)


def _cli(command: str) -> Any:
    """Return the module with the command line."""
    try:
        from mechanic_pytorch.scripts import cli
    except ModuleNotFoundError as missing:
        package = str(missing.name).partition(".")[0]
        if package not in ("click", "rich"):
            raise
        sys.exit(
            f"mechanic{command}: it needs click and rich. Got no module named {package!r}. "
            "Remedy: pip install 'mechanic-pytorch[run]'."
        )
    return cli


def _remedy(command: str, rest: Sequence[str]) -> str:
    """Return what was probably meant."""
    if command.startswith("-") or command.endswith(".py") or Path(command).exists():
        return shlex.join(["mechanic", "run", command, *rest])
    return f"mechanic {next(iter(get_close_matches(command, ['run', 'compare', 'env'])), '--help')}"


if __name__ == "__main__":
    main()
