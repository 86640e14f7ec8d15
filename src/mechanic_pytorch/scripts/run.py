"""What `mechanic run` does: someone else's training script, without choosing a learning rate.

The script runs when the command line has been read (`cli.py`), so that whatever the script raises reaches the
interpreter as if the script had been started by it.
"""

from __future__ import annotations

import builtins
import itertools
import os
import random
import runpy
import signal
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from mechanic_pytorch._torch import can_sync
from mechanic_pytorch.mechanic import Mechanic
from mechanic_pytorch.scripts.children import Children
from mechanic_pytorch.scripts.live import LiveLine
from mechanic_pytorch.scripts.losses import Losses
from mechanic_pytorch.scripts.patch import Built, Patch, patching
from mechanic_pytorch.scripts.plain import LearnedPatch, PlainPatch
from mechanic_pytorch.scripts.report import (
    CAPACITY,
    LISTED,
    ROUGH,
    Record,
    names,
    say,
    show,
    write,
    write_json,
)
from mechanic_pytorch.scripts.sigterm import before_sigterm

_RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # torchrun and its like; srun; mpirun
AT_ONCE = 60.0  # a script that ends itself sooner, and without an optimizer, was not to train: --help, a wrong argument


class ScriptPatch(Patch):
    """What the command asks of the optimizers that a script builds.

    Args:
        of_patch: as for `Patch`.
        over_world: whether all processes hold one model.
        log_every: print the effective lr every so many steps of each optimizer; 0 never does.
        live: seconds between two states of the line on a terminal; 0 draws none.
    """

    def __init__(self, *of_patch: Any, over_world: bool = False, log_every: int = 0, live: float = 0.0) -> None:
        super().__init__(*of_patch)
        self.live = LiveLine(live, self._now) if live and _rank() is None else None  # others would write across it
        self._over_world, self._log_every = over_world, log_every
        self._was_launched = _rank() is not None
        self._of_kind: Counter[Hashable] = Counter()

    def reason_against(self, cls: type[Optimizer]) -> str | None:
        """Leave all plain in a script that starts processes, because nothing mechanizes what they train."""
        reason = super().reason_against(cls)
        if reason is None and not self._was_launched and _world_size() > 1:
            return (
                "the script has started other processes, and they train plainly; "
                f"use torchrun --nproc-per-node {_world_size()} -m mechanic_pytorch run"
            )
        return reason

    def mechanized(self, base: type[Optimizer]) -> type[Optimizer]:
        """Name the group, which is there only now."""
        if self._over_world and _world_size() > 1:
            self.options["process_group"] = dist.group.WORLD
        return super().mechanized(base)

    def without_effect(self) -> list[str]:
        """Return also that the group of all processes was not to be had."""
        said = super().without_effect()
        if self._over_world and "process_group" not in self.options:
            said.append(
                "process-group world has no effect, because no optimizer was mechanized in a group of processes"
            )
        return said

    def add(self, optimizer: Optimizer, one: Built) -> None:
        """Say that it was built, and begin its log."""
        super().add(optimizer, one)
        if not (isinstance(optimizer, Mechanic) and reports()):
            return
        self._say_that_it_was_built(optimizer, one)
        if self._log_every:
            optimizer.register_step_post_hook(self._logging(one))
        if self.live:
            optimizer.register_step_post_hook(self._live)

    def _say_that_it_was_built(self, optimizer: Mechanic, one: Built) -> None:
        """Say it of the first few of those that a loop builds, one for each tensor."""
        kind = one.kind
        if kind is not None:
            self._of_kind[kind] += 1
        if self._of_kind[kind] <= LISTED:
            count = len(optimizer.param_groups)
            groups = "1 parameter group" if count == 1 else f"{count} parameter groups"
            say(f"{one.described()} is mechanized, s_init={optimizer.mechanic_config.s_init}, {groups}")
        elif self._of_kind[kind] == LISTED + 1:
            say(f"{one.described()}: more follow, one for each tensor; the report counts them")

    def _logging(self, one: Built) -> Callable[..., None]:
        steps = itertools.count(1)

        def log(optimizer: Mechanic, *_: Any) -> None:
            if can_sync(optimizer) and next(steps) % self._log_every == 0:
                say(_progress(names(self.built)[one], optimizer))

        return log

    def _live(self, optimizer: Optimizer, *_: Any) -> None:
        if self.live and can_sync(optimizer):
            self.live.tick()

    def _now(self) -> str:
        """Return how far all mechanized optimizers are."""
        living = ((name, one.optimizer) for one, name in names(self.built).items())
        return "mechanic: " + "; ".join(_progress(name, each) for name, each in living if isinstance(each, Mechanic))


def _progress(name: str, optimizer: Mechanic) -> str:
    """Return how far an optimizer is. Syncs."""
    values = dict.fromkeys(f"{lr:.2e}" for lr in optimizer.effective_lr())
    return f"{name}, step {optimizer.mechanic_tuner.steps}: effective lr {', '.join(values)}"


class Watch(Patch):
    """What the report is made of. It decides nothing: another patch, inside of it, does.

    Args:
        directory: of the report, or None.
        facts: what else the report holds.
        with_plain: whether optimizers that are left as they are have curves, too.
        flush_seconds: how old report.json is at most when a run is killed.
    """

    def __init__(
        self,
        directory: Path | None,
        facts: dict[str, Any],
        *,
        with_plain: bool = False,
        flush_seconds: float = 60.0,
    ) -> None:
        super().__init__(None, (), (), {})
        self.records: dict[Built, Record] = {}
        self.children = Children()
        self.directory = directory
        self._facts, self._with_plain, self._flush_seconds = facts, with_plain, flush_seconds
        self._losses = Losses()
        self._start = self._written = time.monotonic()
        self._process = os.getpid()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See what the script does in the block."""
        with self.children.watching(), patching(self):
            if self.directory is None:
                yield
            else:
                with self._losses.watching():
                    yield

    def add(self, optimizer: Optimizer, one: Built) -> None:
        """Begin its curves."""
        super().add(optimizer, one)
        if not ((one.is_mechanized or self._with_plain) and reports()):
            return
        self.records[one] = Record(optimizer, ROUGH if self.directory is None else CAPACITY, self._losses)
        if self.directory is not None:
            optimizer.register_step_post_hook(self._flush)

    def is_here(self) -> bool:
        """Return True if this process runs the script, and was not forked by it."""
        return os.getpid() == self._process

    def facts_now(self, outcome: str) -> dict[str, Any]:
        """Return what the report holds beside the optimizers."""
        seconds = round(time.monotonic() - self._start, 3)
        return {**self._facts, "outcome": outcome, "seconds": seconds, "processes": self.children.as_json()}

    def _flush(self, optimizer: Optimizer, *_: Any) -> None:
        """Write report.json now and then: nobody can after a SIGKILL."""
        if not can_sync(optimizer) or not self.is_here():
            return
        if time.monotonic() - self._written < self._flush_seconds:
            return
        self._written = time.monotonic()
        self.write_numbers("running")

    def write_numbers(self, outcome: str) -> None:
        """Write report.json if it can be written; if not, the end of the run will tell."""
        with suppress(Exception):
            if self.directory is not None:
                write_json(self.directory, self.built, self.records, self.facts_now(outcome))


@dataclass(frozen=True)
class Job:
    """What the command line asks for.

    Attributes:
        target: the script, or the name of the module.
        is_module: which of them it is.
        arguments: of the script.
        patch: what becomes of the optimizers.
        watch: what is reported of them.
        seed: what torch, NumPy and random begin with, or None for their own beginning.
        is_strict: whether to fail where nothing mechanized has made a step.
    """

    target: str
    is_module: bool
    arguments: tuple[str, ...]
    patch: ScriptPatch | PlainPatch
    watch: Watch
    seed: int | None
    is_strict: bool


def run(job: Job) -> None:
    """Run the script, and report."""
    watch = job.watch
    outcome, has_news, start = "finished", True, time.monotonic()
    line = job.patch.live if isinstance(job.patch, ScriptPatch) else None

    def was_to_train() -> bool:
        return bool(watch.built) or time.monotonic() - start > AT_ONCE

    def at_sigterm() -> None:
        if was_to_train() and reports() and watch.is_here():
            watch.write_numbers("SIGTERM")  # first, because a SIGKILL may follow soon
            if line:
                line.close()
            _report(job, "SIGTERM")

    try:
        with (
            watch.watching(),
            patching(job.patch),
            line.open() if line else nullcontext(),
            before_sigterm(at_sigterm) if reports() else nullcontext(),
        ):
            _execute(job)
    except BaseException as error:
        has_news = was_to_train()
        if not isinstance(error, SystemExit):
            _show_only_frames_of_script()
        if not (type(error) is SystemExit and error.code in (None, 0)):  # one of a subclass has a reason: SIGTERM
            outcome = _in_words(error)
            raise
    finally:
        if has_news and reports() and watch.is_here():
            _report(job, outcome)
    if isinstance(job.patch, LearnedPatch) and reports() and (unused := job.patch.unused()):
        say(f"--plain-from: the script has not built {', '.join(unused)}, which the report has too")
    if job.is_strict and reports() and not any(one.is_mechanized and one.steps for one in watch.built):
        say("--strict: no mechanized optimizer has made a step. Remedy: see above for what was built.")
        sys.exit(1)


def _execute(job: Job) -> None:
    """Run it as `__main__`, as python does with a script, or with -m."""
    if job.seed is not None:
        _seed(job.seed)
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


def _seed(seed: int) -> None:
    """Give a script that sets no seed this one."""
    random.seed(seed)
    torch.manual_seed(seed)
    with suppress(ImportError):
        import_module("numpy").random.seed(seed)


def _report(job: Job, outcome: str) -> None:
    """Show it, and write it; whatever goes wrong with that must not change how the script ends."""
    watch = job.watch
    try:
        with suppress(Exception):
            sys.stdout.flush()  # else, where both go to one file, what the script has printed may come after the report
        with _deaf_to_interrupts():
            if isinstance(job.patch, ScriptPatch):
                show(watch.built, watch.records, outcome)
                for sentence in watch.children.sentences():
                    say(sentence)
                for sentence in job.patch.without_effect():
                    say(f"--{sentence}")
        directory = watch.directory
        if directory is not None:
            for problem in write(directory, watch.built, watch.records, watch.facts_now(outcome)):
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


def reports() -> bool:
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
