"""The command `mechanic run`: somebody else's training script, without choosing a learning rate.

click reads the command line and nothing else: the script runs when it has returned, so that whatever the script raises
reaches the interpreter as if the script had been started by it.
"""

from __future__ import annotations

import builtins
import os
import runpy
import sys
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import click
from torch.optim import Optimizer

from mechanic_pytorch._config import Config
from mechanic_pytorch._patch import Built, _Patch, _patching
from mechanic_pytorch._report import Record, show, write


@dataclass(frozen=True)
class _Job:
    """What the command line asks for."""

    target: str
    is_module: bool
    arguments: tuple[str, ...]
    patch: _Patch
    directory: Path | None
    records: dict[Built, Record]


class _NumberOr(click.ParamType):  # type: ignore[type-arg]  # generic in new versions only
    """A number, or one word."""

    def __init__(self, word: str) -> None:
        self.word = self.name = word

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == self.word:
            return value
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} is neither {self.word!r} nor a number.", param, ctx)


class _Numbers(click.ParamType):  # type: ignore[type-arg]  # generic in new versions only
    """Numbers with commas between them."""

    name = "NUMBER,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 0.9,0.99.", param, ctx)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mechanic-pytorch", prog_name="mechanic")
def _mechanic() -> None:
    """Mechanic: learn the scale of the learning rate while a script trains."""


@_mechanic.command("run", context_settings={"allow_interspersed_args": False})
@click.argument("script")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.option("-m", "--module", "is_module", is_flag=True, help="SCRIPT is the name of a module, as for python -m.")
@click.option(
    "--base-lr",
    type=_NumberOr("keep"),
    metavar="keep|NUMBER",
    default="keep",
    show_default=True,
    help="Keep the learning rates of the script, or give this one to the group with the largest and keep the ratios.",
)
@click.option(
    "--include",
    "--optimizer",
    "include",
    multiple=True,
    metavar="NAME",
    help="Mechanize this class, too: LBFGS, or package.Class of others. May be repeated.",
)
@click.option("--exclude", multiple=True, metavar="NAME", help="Leave this class plain. May be repeated.")
@click.option(
    "--report",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write report.json, a picture of the learning rate over the steps and a TensorBoard log into this directory.",
)
@click.option(
    "--s-init",
    type=_NumberOr("auto"),
    metavar="auto|NUMBER",
    default="auto",
    show_default=True,
    help="Initial scale; auto measures it at the first update.",
)
@click.option("--s-decay", type=float, default=Config.s_decay, show_default=True, help="Weight decay in the tuner.")
@click.option("--betas", type=_Numbers(), default=Config.betas, help="Discount factors of the tuner, as for mechanize.")
@click.option("--eps", type=float, default=Config.eps, show_default=True, help="Added to the tuner's denominator.")
@click.option("--log-every", type=int, metavar="STEPS", default=0, help="Print the scale every so many steps.")
@click.option(
    "--skip-nonfinite/--no-skip-nonfinite",
    default=True,
    show_default=True,
    help="Skip steps whose gradient is inf or nan.",
)
def _run(
    script: str,
    args: tuple[str, ...],
    is_module: bool,
    base_lr: float | str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    directory: Path | None,
    **options: Any,
) -> _Job:
    """Run a training script with mechanized optimizers, and say which learning rate they found.

    SCRIPT runs as `python SCRIPT ARGS...` does, unchanged, but every optimizer of torch.optim that it builds learns the
    scale of its learning rate. Options of this command stand before SCRIPT, those of the script after it.

    \b
    Examples:
      mechanic run train.py --epochs 10
      mechanic run --report runs/1 -m package.train
      torchrun --nproc-per-node 2 -m mechanic_pytorch run train.py
    """  # noqa: D301  (that is no path but click's mark: leave these lines as they are)
    if not is_module and not Path(script).exists():
        raise click.BadParameter(f"{script!r} does not exist.", param_hint="SCRIPT")
    if directory is not None:
        if find_spec("matplotlib") is None:
            raise click.UsageError("--report needs matplotlib. Remedy: pip install 'mechanic-pytorch[run]'.")
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise click.BadParameter(f"cannot be made: {error}", param_hint="--report") from None
        directory = directory.resolve()  # the script may change to another one
    records: dict[Built, Record] = {}

    def record(optimizer: Optimizer, one: Built) -> None:
        if one.is_mechanized and directory is not None and _reports():
            records[one] = Record(optimizer)

    log = _log if options["log_every"] else None
    try:
        number = None if isinstance(base_lr, str) else base_lr
        patch = _Patch(number, include, exclude, {**options, "log_func": log}, on_built=record)
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from None
    return _Job(script, is_module, args, patch, directory, records)


def _log(data: dict[str, Any]) -> None:
    if _reports():
        click.echo(f"mechanic: step {data['iter_count']}: scale {data['s']:.3e}", err=True)


def main() -> None:
    """Read the command line, run the script, and report."""
    name = "mechanic" if Path(sys.argv[0]).stem == "mechanic" else f"{Path(sys.executable).name} -m mechanic_pytorch"
    try:
        job = _mechanic.main(prog_name=name, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    if not isinstance(job, _Job):
        sys.exit(job)  # --help and --version have printed what they had to
    outcome = "finished"
    try:
        with _patching(job.patch):
            _execute(job)
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if not isinstance(error, SystemExit):
            _show_only_frames_of_script()
        raise
    finally:
        if _reports():
            _report(job, outcome)


def _execute(job: _Job) -> None:
    """Run it as `__main__`, as python does with a script, or with -m."""
    sys.argv = [job.target, *job.arguments]
    is_safe = sys.flags.isolated or getattr(sys.flags, "safe_path", False)  # python -I and -P: nothing goes there
    if job.is_module:
        if not is_safe:
            sys.path[0] = os.getcwd()
        runpy.run_module(job.target, run_name="__main__", alter_sys=True)
        return
    path = os.path.abspath(job.target)
    if os.path.isdir(path) or zipfile.is_zipfile(path):
        if not is_safe:
            del sys.path[0]
        runpy.run_path(path, run_name="__main__")  # which puts it there itself
        return
    if not is_safe:
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    # Not by run_path: it would take the name of the file for both __file__ and sys.argv[0], of which one is absolute.
    module = ModuleType("__main__")
    vars(module).update(__file__=path, __loader__=SourceFileLoader("__main__", path), __builtins__=builtins)
    sys.modules["__main__"] = module
    exec(compile(Path(path).read_bytes(), path, "exec", dont_inherit=True), vars(module))


def _report(job: _Job, outcome: str) -> None:
    """Show it, and write it; whatever goes wrong with that must not change how the script ends."""
    try:
        show(job.patch.built)
        if job.directory is not None:
            command = [*(["-m"] if job.is_module else []), job.target, *job.arguments]
            facts = {"command": command, "outcome": outcome}
            for problem in write(job.directory, job.patch.built, job.records, facts):
                click.echo(f"mechanic: {problem}", err=True)
            click.echo(f"mechanic: report in {job.directory}", err=True)
    except Exception as error:
        with suppress(Exception):
            click.echo(f"mechanic: the report cannot be made. Got {type(error).__name__}: {error}", err=True)


def _reports() -> bool:
    """Tell whether this process speaks for all of them; torchrun and its like number them."""
    return os.environ.get("RANK", "0") == "0"


def _show_only_frames_of_script() -> None:
    """Have the interpreter print a traceback that begins where the script does."""
    theirs = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        inner = traceback
        while inner is not None and inner.tb_frame.f_code is not _execute.__code__:
            inner = inner.tb_next
        if inner is not None:
            traceback = inner.tb_next
            while traceback is not None and traceback.tb_frame.f_globals.get("__name__") == "runpy":
                traceback = traceback.tb_next
        theirs(kind, error.with_traceback(traceback), traceback)

    sys.excepthook = excepthook
