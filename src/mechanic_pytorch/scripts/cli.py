"""The command line of `mechanic run` and `mechanic compare`.

click reads it, and does nothing else: what it says is done when click has returned.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from mechanic_pytorch._config import Config
from mechanic_pytorch.scripts.compare import Comparison, compare, train_all
from mechanic_pytorch.scripts.plain import LearnedPatch, PlainPatch
from mechanic_pytorch.scripts.report import say
from mechanic_pytorch.scripts.run import Job, ScriptPatch, Watch, reports, run

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

SCRIPT, MECHANIZED, REPORT = "The script", "What is mechanized", "What is reported"
PLAIN, TUNER, OTHER = "Without Mechanic", "Options of mechanize", "Other"


class _Option(click.Option):
    """An option with the title under which --help has it."""

    def __init__(self, *names: Any, section: str, **rest: Any) -> None:
        super().__init__(*names, **rest)
        self.section = section


class _Command(click.Command):
    """A command whose --help has a title for each kind of option."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, by title, in the order in which the titles come first."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)):
                sections.setdefault(getattr(parameter, "section", OTHER), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _option(section: str, *names: str, **rest: Any) -> Callable[[Decorated], Decorated]:
    return click.option(*names, cls=_Option, section=section, **rest)


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


def _options_of_mechanize(command: Decorated) -> Decorated:
    """Give the command the options that `Config` declares."""
    for option in reversed(fields(Config)):
        name, default = option.name.replace("_", "-"), option.default
        text = ",".join(map(str, default)) if isinstance(default, tuple) else default
        if option.type == "bool":
            names = f"--{name}/--no-{name}" if default else f"--{name}"
            kind: dict[str, Any] = {} if default else {"is_flag": True}
        else:
            names, kind = f"--{name}", _KINDS.get(str(option.type), {})
        if text_of_help := option.metadata["help"]:
            section = REPORT if option.name == "log_every" else TUNER
            kind |= {"default": text, "show_default": bool(default), "help": text_of_help}
            command = _option(section, names, **kind)(command)
    return command


def _what_is_mechanized(command: Decorated) -> Decorated:
    """Give the command the names of classes."""
    exclude = _option(
        MECHANIZED, "--exclude", multiple=True, metavar="NAME", help="Leave this class plain. May be repeated."
    )
    include = _option(
        MECHANIZED,
        "--include",
        "--optimizer",
        "include",
        multiple=True,
        metavar="NAME",
        help="Mechanize this class, too: LBFGS, or package.Class. May be repeated.",
    )
    return include(exclude(command))


def _script(command: Decorated) -> Decorated:
    """Give the command a script and its arguments."""
    files = lambda *_: [CompletionItem("", type="file")]  # noqa: E731  (a shell then completes them by itself)
    for decorate in (
        _option(
            SCRIPT,
            "-m",
            "--module",
            "is_module",
            is_flag=True,
            help="SCRIPT is the name of a module, as for python -m.",
        ),
        click.argument("args", nargs=-1, type=click.UNPROCESSED, shell_complete=files),
        click.argument("script", shell_complete=files),
    ):
        command = decorate(command)
    return command


def _check(script: str, is_module: bool, directory: Path | None) -> Path | None:
    """Refuse a script that is not there; return the directory of the report, which is made."""
    if not is_module and not Path(script).exists():
        raise click.BadParameter(f"{script!r} does not exist.", param_hint="SCRIPT")
    if directory is None:
        return None
    if find_spec("matplotlib") is None:
        raise click.UsageError("--report needs matplotlib. Remedy: pip install 'mechanic-pytorch[run]'.")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.BadParameter(f"cannot be made: {error}", param_hint="--report") from None
    return directory.resolve()  # the script may change to another one


_SETTINGS = {"allow_interspersed_args": False, "help_option_names": ["-h", "--help"]}
_DIRECTORY = click.Path(file_okay=False, path_type=Path)


@click.command(cls=_Command, context_settings=_SETTINGS)
@_script
@_option(
    SCRIPT, "--seed", type=int, help="Seed torch, NumPy and random before the script begins, which may set its own."
)
@_what_is_mechanized
@_option(
    MECHANIZED,
    "--base-lr",
    type=_number_or("keep"),
    metavar="keep|NUMBER",
    default="keep",
    show_default=True,
    help="Keep the learning rates of the script, or give this one to the group with the largest and keep the ratios.",
)
@_option(
    MECHANIZED,
    "--process-group",
    type=click.Choice(["world"]),
    help="All processes together hold one model, in parts: FSDP1, ZeroRedundancyOptimizer.",
)
@_option(
    REPORT,
    "--report",
    "directory",
    type=_DIRECTORY,
    help="Write report.json, a picture of the learning rate over the steps and a TensorBoard log into this directory.",
)
@_option(
    REPORT,
    "--live",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    default=10,
    show_default=True,
    help="On a terminal, show the effective learning rate in a line that changes every so many seconds; 0 for none.",
)
@_option(REPORT, "--strict", "is_strict", is_flag=True, help="Fail if no mechanized optimizer has made a step.")
@_option(
    PLAIN,
    "--plain",
    "is_plain",
    is_flag=True,
    help="Mechanize nothing: a report of the script as it is. Goes with no option but -m, --seed and --report.",
)
@_option(
    PLAIN,
    "--plain-from",
    "plain_from",
    type=click.Path(dir_okay=False, exists=True, path_type=Path),
    metavar="REPORT.JSON",
    help="As --plain, but give the optimizers the learned lrs of this report.",
)
@_options_of_mechanize
def _run(
    script: str,
    args: tuple[str, ...],
    is_module: bool,
    seed: int | None,
    base_lr: float | str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    directory: Path | None,
    is_plain: bool,
    plain_from: Path | None,
    process_group: str | None,
    is_strict: bool,
    live: float,
    **options: Any,
) -> Job:
    """Run a training script with mechanized optimizers, and say which learning rate they found.

    SCRIPT runs as `python SCRIPT ARGS...` does, unchanged, but every optimizer of torch.optim that it builds learns the
    scale of its learning rate. Options of this command stand before SCRIPT, those of the script after it.

    \b
    Examples:
      mechanic run train.py --epochs 10
      mechanic run --report runs/1 -m package.train
      torchrun --nproc-per-node 2 -m mechanic_pytorch run train.py
    """  # noqa: D301  (that is no path but click's mark: leave these lines as they are)
    directory = _check(script, is_module, directory)
    own = {"base_lr": base_lr, "include": include, "exclude": exclude, "process_group": process_group, "seed": seed}
    facts = {
        "schema": 1,
        "command": [*(["-m"] if is_module else []), script, *args],
        "options": {**own, **options},
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    log_every = Config(log_every=options.pop("log_every")).log_every
    number = None if isinstance(base_lr, str) else base_lr
    try:
        patch: ScriptPatch | PlainPatch
        if is_plain or plain_from is not None:
            _refuse_more_than_plain("--plain" if plain_from is None else "--plain-from")
            patch = (
                PlainPatch() if plain_from is None else LearnedPatch(plain_from, say if reports() else lambda _: None)
            )
        else:
            over_world = process_group is not None
            patch = ScriptPatch(
                number, include, exclude, options, over_world=over_world, log_every=log_every, live=live
            )
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from None
    watch = Watch(directory, facts, with_plain=isinstance(patch, PlainPatch))
    return Job(script, is_module, args, patch, watch, seed, is_strict)


def _given(context: click.Context) -> dict[str, click.Parameter]:
    """Return what the command line has, by name, in the order of the declarations."""
    parameters = {str(each.name): each for each in context.command.params}
    return {
        name: each
        for name, each in parameters.items()
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT
    }


def _refuse_more_than_plain(option: str) -> None:
    goes_with = "script", "args", "is_module", "seed", "directory"
    for name, parameter in _given(click.get_current_context()).items():
        if name not in goes_with and parameter.opts[0] != option:
            raise click.UsageError(
                f"{option} goes with no option but -m, --seed and --report. Got {parameter.opts[0]}. "
                "Remedy: leave one of them out."
            )


@click.command(cls=_Command, context_settings=_SETTINGS)
@_script
@_option(
    SCRIPT,
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Repeat with so many seeds of torch, NumPy and random: 0, 1, ... A script that sets its own repeats itself.",
)
@_what_is_mechanized
@_option(
    REPORT,
    "--report",
    "directory",
    type=_DIRECTORY,
    default="mechanic-compare",
    show_default=True,
    help="Where compare.json, compare.png and, in a directory each, the report and the output of every run go.",
)
@_options_of_mechanize
def _compare(
    script: str,
    args: tuple[str, ...],
    is_module: bool,
    seeds: int,
    directory: Path,
    **options: Any,
) -> Comparison:
    """Run a training script three times, and put the runs side by side.

    It runs as it is, with mechanized optimizers, and without Mechanic at the lr that these have learned. The script may
    not go on from what an earlier run has saved.

    \b
    Examples:
      mechanic compare train.py --epochs 10
      mechanic compare --seeds 3 --report runs/compared -m package.train
    """  # noqa: D301
    made = _check(script, is_module, directory)
    assert made is not None
    tokens = [
        token
        for name, parameter in _given(click.get_current_context()).items()
        if name in options
        for token in _tokens(parameter, options[name])
    ]
    return Comparison([*(["-m"] if is_module else []), script, *args], tokens, range(seeds), made)


def _tokens(option: click.Parameter, value: Any) -> list[str]:
    """Return how an option is written on a command line."""
    if isinstance(value, bool):
        return [option.opts[0] if value else option.secondary_opts[0]]
    if option.multiple:
        return [token for each in value for token in (option.opts[0], str(each))]
    return [option.opts[0], ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]


_COMMANDS = {"run": _run, "compare": _compare}


def main(name: str, arguments: Sequence[str]) -> None:
    """Read the command line, as it goes on after `mechanic run` or `mechanic compare`, and do what it says."""
    program = "mechanic" if Path(sys.argv[0]).stem == "mechanic" else f"{Path(sys.executable).name} -m mechanic_pytorch"
    try:
        job = _COMMANDS[name].main([*arguments], prog_name=f"{program} {name}", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    if isinstance(job, Job):
        run(job)
    elif isinstance(job, Comparison):
        sys.exit(compare(job, train_all(job)))
    else:
        sys.exit(job)  # --help has printed what it had to


def complete() -> None:
    """Answer the shell that asks what may come next: `_MECHANIC_COMPLETE=bash_source mechanic` has its part."""
    env = click.Command("env", help="Show versions, devices and kernels, for bug reports.")
    click.Group("mechanic", commands={**_COMMANDS, "env": env}).main(prog_name="mechanic")
