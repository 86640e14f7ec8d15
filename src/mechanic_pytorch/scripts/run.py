"""The command `mechanic run`: someone else's training script, without choosing a learning rate.

click reads the command line and nothing else: the script runs when it has returned, so that whatever the script raises
reaches the interpreter as if the script had been started by it.
"""

from __future__ import annotations

import builtins
import itertools
import os
import runpy
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from datetime import datetime
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import click
import torch.distributed as dist
from click.core import ParameterSource
from torch.optim import Optimizer

from mechanic_pytorch._config import Config
from mechanic_pytorch._torch import can_sync
from mechanic_pytorch.mechanic import Mechanic
from mechanic_pytorch.scripts.patch import Built, Patch, patching
from mechanic_pytorch.scripts.plain import PlainPatch
from mechanic_pytorch.scripts.report import CAPACITY, ROUGH, Record, names, say, show, write, write_json

_RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # torchrun and its like; srun; mpirun
FLUSH_SECONDS = 60.0  # report.json is at most so old when a run is killed
AT_ONCE = 60.0  # a script that ends itself sooner, and without an optimizer, was not to train: --help, a wrong argument


class _ScriptPatch(Patch):
    """What the command asks of the optimizers that a script builds.

    Args:
        of_patch: as for `Patch`.
        over_world: whether all processes hold one model.
        log_every: print the effective lr every so many steps of each optimizer; 0 never does.
        directory: of the report, or None.
        facts: what else the report holds.
    """

    def __init__(
        self, *of_patch: Any, over_world: bool, log_every: int, directory: Path | None, facts: dict[str, Any]
    ) -> None:
        super().__init__(*of_patch)
        self.records: dict[Built, Record] = {}
        self.directory, self.facts = directory, facts
        self._over_world, self._log_every = over_world, log_every
        self._start = self._written = time.monotonic()
        self._process = os.getpid()
        self._was_launched = _rank() is not None

    def reason_against(self, cls: type[Optimizer]) -> str | None:
        """Leave all plain in a script that makes processes by itself, because nothing mechanizes the others' part."""
        reason = super().reason_against(cls)
        if reason is None and not self._was_launched and _world_size() > 1:
            return (
                "the script has started other processes by itself, and they train plainly; "
                f"use torchrun --nproc-per-node {_world_size()} -m mechanic_pytorch run"
            )
        return reason

    def mechanized(self, base: type[Optimizer]) -> type[Optimizer]:
        """Name the group, which is there only now."""
        if self._over_world and _world_size() > 1:
            self.options["process_group"] = dist.group.WORLD
        return super().mechanized(base)

    def add(self, optimizer: Optimizer, one: Built) -> None:
        """Say that it was built, and begin its curves and its log."""
        super().add(optimizer, one)
        if not (isinstance(optimizer, Mechanic) and _reports()):
            return
        count = len(optimizer.param_groups)
        groups = "1 parameter group" if count == 1 else f"{count} parameter groups"
        say(f"{one.described()} is mechanized, s_init={optimizer.mechanic_config.s_init}, {groups}")
        self.records[one] = Record(optimizer, ROUGH if self.directory is None else CAPACITY)
        if self.directory is not None:
            optimizer.register_step_post_hook(self._flush)
        if self._log_every:
            optimizer.register_step_post_hook(self._logging(one))

    def is_here(self) -> bool:
        """Return True if this process runs the script, and was not forked by it."""
        return os.getpid() == self._process

    def facts_now(self, outcome: str) -> dict[str, Any]:
        """Return what the report holds beside the optimizers."""
        return {**self.facts, "outcome": outcome, "seconds": round(time.monotonic() - self._start, 1)}

    def _flush(self, optimizer: Optimizer, *_: Any) -> None:
        """Write report.json now and then: nobody can after a SIGTERM or a SIGKILL."""
        if self.directory is None or not can_sync(optimizer) or not self.is_here():
            return
        if time.monotonic() - self._written < FLUSH_SECONDS:
            return
        self._written = time.monotonic()
        with suppress(Exception):  # the end of the run will tell; training goes on
            write_json(self.directory, self.built, self.records, self.facts_now("running"))

    def _logging(self, one: Built) -> Callable[..., None]:
        steps = itertools.count(1)

        def log(optimizer: Mechanic, *_: Any) -> None:
            if can_sync(optimizer) and next(steps) % self._log_every == 0:
                values = dict.fromkeys(f"{lr:.2e}" for lr in optimizer.effective_lr())
                say(
                    f"{names(self.built)[one]}, step {optimizer.mechanic_tuner.steps}: effective lr {', '.join(values)}"
                )

        return log


@dataclass(frozen=True)
class _Job:
    """What the command line asks for."""

    target: str
    is_module: bool
    arguments: tuple[str, ...]
    patch: _ScriptPatch | PlainPatch
    is_strict: bool


def _reading(read: Callable[[str], Any], rule: str) -> Callable[[str], Any]:
    """Return a function that reads a value of the command line, for click."""

    def convert(text: str) -> Any:
        try:
            return read(text)
        except ValueError:
            raise click.BadParameter(f"{text!r} is not {rule}.") from None

    return convert


def _number_or(word: str) -> Callable[[str], Any]:
    return _reading(lambda text: text if text == word else float(text), f"{word!r} or a number")


_numbers = _reading(lambda text: tuple(float(part) for part in text.split(",")), "a list of numbers such as 0.9,0.99")


_KINDS: dict[str, dict[str, Any]] = {  # how click reads an option, by the type of its field
    "float": {"type": float},
    "float | None": {"type": float},
    "float | Literal['auto']": {"type": _number_or("auto"), "metavar": "auto|NUMBER"},
    "tuple[float, ...]": {"type": _numbers, "metavar": "NUMBER,..."},
    "int": {"type": int, "metavar": "STEPS"},
}


def _options_of_mechanize(command: Callable[..., _Job]) -> Callable[..., _Job]:
    """Give the command the options that `Config` declares, with "auto" as the start."""
    for option in reversed(fields(Config)):
        name, default = option.name.replace("_", "-"), "auto" if option.name == "s_init" else option.default
        text = ",".join(map(str, default)) if isinstance(default, tuple) else default
        if option.type == "bool":
            names = f"--{name}/--no-{name}" if default else f"--{name}"
            kind: dict[str, Any] = {} if default else {"is_flag": True}
        else:
            names, kind = f"--{name}", _KINDS.get(str(option.type), {})
        if option.metadata["help"]:
            shown = bool(default)
            command = click.option(names, default=text, show_default=shown, help=option.metadata["help"], **kind)(
                command
            )
    return command


@click.command(context_settings={"allow_interspersed_args": False, "help_option_names": ["-h", "--help"]})
@click.argument("script")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.option("-m", "--module", "is_module", is_flag=True, help="SCRIPT is the name of a module, as for python -m.")
@click.option(
    "--base-lr",
    type=_number_or("keep"),
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
    help="Mechanize this class, too: LBFGS, or package.Class. May be repeated.",
)
@click.option("--exclude", multiple=True, metavar="NAME", help="Leave this class plain. May be repeated.")
@click.option(
    "--report",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write report.json, a picture of the learning rate over the steps and a TensorBoard log into this directory.",
)
@click.option(
    "--plain-from",
    "plain_from",
    type=click.Path(dir_okay=False, exists=True, path_type=Path),
    metavar="REPORT.JSON",
    help="Mechanize nothing: give the optimizers the learned lrs of this report. Goes with no option but -m.",
)
@click.option("--strict", "is_strict", is_flag=True, help="Fail if no mechanized optimizer has made a step.")
@_options_of_mechanize
@click.option(
    "--process-group",
    type=click.Choice(["world"]),
    help="All processes together hold one model, in parts: FSDP1, ZeroRedundancyOptimizer.",
)
def _run(
    script: str,
    args: tuple[str, ...],
    is_module: bool,
    base_lr: float | str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    directory: Path | None,
    plain_from: Path | None,
    process_group: str | None,
    is_strict: bool,
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
    if plain_from is not None:
        return _Job(script, is_module, args, _plain_patch(plain_from), is_strict)
    if directory is not None:
        if find_spec("matplotlib") is None:
            raise click.UsageError("--report needs matplotlib. Remedy: pip install 'mechanic-pytorch[run]'.")
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise click.BadParameter(f"cannot be made: {error}", param_hint="--report") from None
        directory = directory.resolve()  # the script may change to another one
    number = None if isinstance(base_lr, str) else base_lr
    own = {"base_lr": base_lr, "include": include, "exclude": exclude, "process_group": process_group}
    facts = {
        "schema": 1,
        "command": [*(["-m"] if is_module else []), script, *args],
        "options": {**own, **options},
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    log_every = Config(log_every=options.pop("log_every")).log_every
    try:
        patch = _ScriptPatch(
            number,
            include,
            exclude,
            options,
            over_world=process_group is not None,
            log_every=log_every,
            directory=directory,
            facts=facts,
        )
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from None
    return _Job(script, is_module, args, patch, is_strict)


def _plain_patch(path: Path) -> PlainPatch:
    """Return what --plain-from asks for."""
    context = click.get_current_context()
    alone = {"script", "args", "is_module", "plain_from"}
    for parameter in context.command.params:
        name = str(parameter.name)
        if name not in alone and context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise click.UsageError(
                f"--plain-from goes with no option but -m. Got {parameter.opts[0]}. Remedy: leave one of them out."
            )
    try:
        return PlainPatch(path, say if _reports() else lambda line: None)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def main(arguments: Sequence[str]) -> None:
    """Read the command line, as it goes on after `mechanic run`, run the script, and report."""
    name = "mechanic" if Path(sys.argv[0]).stem == "mechanic" else f"{Path(sys.executable).name} -m mechanic_pytorch"
    try:
        job = _run.main([*arguments], prog_name=f"{name} run", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    if not isinstance(job, _Job):
        sys.exit(job)  # --help has printed what it had to
    outcome, has_news, start = "finished", True, time.monotonic()
    try:
        with patching(job.patch):
            _execute(job)
    except BaseException as error:
        has_news = bool(job.patch.built) or time.monotonic() - start > AT_ONCE
        if not isinstance(error, SystemExit):
            _show_only_frames_of_script()
        if not (isinstance(error, SystemExit) and error.code in (None, 0)):
            outcome = _in_words(error)
            raise
    finally:
        if isinstance(job.patch, _ScriptPatch) and has_news and _reports() and job.patch.is_here():
            _report(job.patch, outcome)
    if isinstance(job.patch, PlainPatch) and _reports() and (unused := job.patch.unused()):
        say(f"--plain-from: the script has not built {', '.join(unused)}, which the report has too")
    if job.is_strict and _reports() and not any(one.is_mechanized and one.steps for one in job.patch.built):
        say("--strict: no mechanized optimizer has made a step. Remedy: see above for what was built.")
        sys.exit(1)


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


def _report(patch: _ScriptPatch, outcome: str) -> None:
    """Show it, and write it; whatever goes wrong with that must not change how the script ends."""
    try:
        with suppress(Exception):
            sys.stdout.flush()  # else, where both go to one file, what the script has printed may come after the report
        with _deaf_to_interrupts():
            show(patch.built, patch.records, outcome)
            for sentence in patch.without_effect():
                say(f"--{sentence}")
        directory = patch.directory
        if directory is not None:
            for problem in write(directory, patch.built, patch.records, patch.facts_now(outcome)):
                say(problem)
            say(f"report in {directory}")
    except (Exception, KeyboardInterrupt) as error:
        with suppress(Exception):
            say(f"the report could not be finished. Got {_in_words(error)}")


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Ignore Ctrl-C: torchrun sends its processes one more, just after that of the terminal."""
    before = signal.getsignal(signal.SIGINT)
    with suppress(ValueError):  # in another thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        with suppress(ValueError):
            signal.signal(signal.SIGINT, before)


def _rank() -> str | None:
    """Return the number that a launcher gave this process, or None if none has launched it."""
    return next((os.environ[name] for name in _RANKS if name in os.environ), None)


def _reports() -> bool:
    """Return True if this process speaks for all of them."""
    return _rank() in (None, "0")


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


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
