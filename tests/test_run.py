"""`mechanic run SCRIPT`: the script behaves as `python SCRIPT` does, learns, and a report follows."""

import ast
import inspect
import io
import json
import linecache
import os
import platform
import re
import signal
import subprocess
import sys
import time
import types
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

import psutil
import pytest
import torch
from matplotlib import image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers import set_steps
from mechanic_pytorch import mechanize, patched
from mechanic_pytorch.__main__ import main
from mechanic_pytorch.scripts import cli, environment
from mechanic_pytorch.scripts import report as reporting
from mechanic_pytorch.scripts import run as command
from mechanic_pytorch.scripts.confidence import confidence
from mechanic_pytorch.scripts.sigterm import before_sigterm
from mnist import write_digits_as_mnist
from problems import mlp, train

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples" / "scripts").glob("*.py"))
COMMAND = ["-m", "mechanic_pytorch", "run"]
NOTHING = "mechanic: no torch.optim optimizer was built in this process"
ADVICE = re.compile(r"^mechanic: to train without Mechanic, use (\w+) with lr=(\de-\d\d).*$", re.MULTILINE)
NO_ADVICE = "mechanic: no lr is advised, because the script ended with "

TRAINING = """
import os, sys, time, torch
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

def train(steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(torch.ones(8, 4)) - 1).square().mean()
        loss.backward()
        optimizer.step()
    return loss

train(20)
print("trained", flush=True)
"""


@pytest.fixture(autouse=True)
def interruptible():
    """A shell has its jobs in the background ignore Ctrl-C, and what they start does, too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def python(*arguments, check=None, **options):
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    options = {"timeout": 300, "capture_output": True, "text": True, "encoding": "utf-8", **options}
    done = subprocess.run(command, check=False, **options)
    assert check is None or done.returncode == check, done.stdout + done.stderr
    return done


@pytest.fixture
def run(forks, tmp_path):
    """Return a function that does what `python` does, in a fork of a Python that has imported torch."""

    def run(*arguments, check=0, **options):
        done = forks.run(arguments, tmp_path, **options)
        assert check is None or done.returncode == check, done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def script(tmp_path):
    """Return a function that writes a script and gives its path."""

    def write(text, name="script.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


# --- how it ends ------------------------------------------------------------------------------------------------------

ENDS = {
    "runs out": ("", 0),
    "exit": ("sys.exit()", 0),
    "exit code": ("sys.exit(3)", 3),
    "exit message": ("sys.exit('a message')", 1),
    "error": ("def f():\n    raise ValueError('of the script')\nf()", 1),
    "chain": ("try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise RuntimeError from e", 1),
    "interrupt": ("raise KeyboardInterrupt", None),  # killed by the signal, unless something runs code at exit
    "broken pipe": ("raise BrokenPipeError(32, 'Broken pipe')", 1),
    "hook": ("sys.excepthook = lambda *what: print('hook', what[0], what[2].tb_lineno)\nraise KeyError", 1),
    "atexit": ("import atexit; atexit.register(lambda: print('at exit', __name__, sys.argv))\nsys.exit(2)", 2),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_end_is_the_scripts_own_and_the_report_comes_first(script, run, end):
    code, status = ENDS[end]
    path = script(TRAINING + code + "\n")
    if end == "interrupt":  # what is loaded may change the status
        plain = python(path, check=status)
        ours = python(*COMMAND, path, check=plain.returncode)
    else:  # how Python ends does not depend on torch, which takes seconds to import
        without_torch = script(
            "import sys, unittest.mock\nsys.modules['torch'] = unittest.mock.MagicMock()", "no/torch.py"
        )
        plain = python(path, check=status, env={**os.environ, "PYTHONPATH": str(without_torch.parent)})
        ours = run(*COMMAND, path, check=plain.returncode)
    assert ours.stdout == plain.stdout
    assert ours.stderr.endswith(plain.stderr), "the traceback, as it is without us"
    report = ours.stderr.removesuffix(plain.stderr)
    learned = re.search(r"AdamW\W+20\W+0\W+0\W+1\.0e-03\W+(\de-\d\d) ", report)[1]
    last = report.splitlines()[-1]
    if status == 0:
        assert ADVICE.findall(report) == [("AdamW", learned)]
        assert ADVICE.fullmatch(last)
    else:
        assert not ADVICE.search(report)
        assert last.startswith(NO_ADVICE)


def test_strict_fails_where_nothing_was_mechanized(script, run):
    assert run(*COMMAND, "--strict", script(TRAINING)).returncode == 0
    done = run(*COMMAND, "--strict", "--exclude", "AdamW", script(TRAINING), check=1)
    assert done.stdout == "trained\n"
    assert "mechanic: --strict: no mechanized optimizer has made a step." in done.stderr
    assert run(*COMMAND, "--strict", script("import sys; sys.exit(3)"), check=3), "the script's own status stays"
    assert run(*COMMAND, "--strict", script("import sys; sys.exit(0)"), check=1), "it ends well"
    assert run(*COMMAND, script("import sys; sys.exit(None)")).returncode == 0


def test_a_run_that_is_killed_leaves_a_report_that_is_at_most_a_minute_old(tmp_path):
    with command.Watch(tmp_path, {"command": ["x.py"]}, flush_seconds=0.0).watching(), patched():
        p = torch.ones(3, requires_grad=True)
        optimizer = torch.optim.SGD([p], lr=0.1)
        for step in range(1, 4):
            p.grad = p.detach().clone()
            optimizer.step()
            report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
            assert (report["outcome"], report["command"]) == ("running", ["x.py"])
            assert [point[0] for point in report["optimizers"][0]["effective_lr"]][-1] >= step - 1
        optimizer.add_param_group({"params": [torch.ones(2, requires_grad=True)]})
        optimizer.step()
        del optimizer.param_groups[1]  # a report that cannot be written must not end the training
        optimizer.step()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json"]


def test_a_syntax_error_is_shown_as_python_shows_it(script):
    path = script("x = (\n")
    plain, ours = python(path, check=1), python(*COMMAND, path, check=1)
    assert ours.stderr == plain.stderr


SLOW = """
from mechanic_pytorch.scripts import report
report._draw = lambda *_: (print('drawing', file=sys.stderr, flush=True), time.sleep(60))
"""


def interrupted(*arguments, by=signal.SIGINT, again_at=None):
    """Press Ctrl-C when the script has trained, and once more when it says so; return what comes of it."""
    command = [sys.executable, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == "trained\n"
        while psutil.Process(process.pid).status() != psutil.STATUS_SLEEPING:  # it may not have left that line yet
            time.sleep(0.01)
        process.send_signal(by)
        seen = ""
        for line in process.stderr if again_at is not None else ():
            seen += line
            if line == again_at:
                process.send_signal(by)
                break
        out, err = process.communicate(timeout=180)
    return process.returncode, out, seen + err


def test_ctrl_c_ends_it_as_it_ends_python(script):
    path = script(TRAINING + "time.sleep(60)\n")
    plain_status, _, plain_err = interrupted(path)
    status, _, err = interrupted(*COMMAND, path)
    assert status == plain_status != 0
    assert f"{NO_ADVICE}KeyboardInterrupt\n" in err
    traceback = err[err.index("Traceback") :].splitlines()
    assert traceback[1].startswith(f'  File "{path}", line ')
    assert traceback == plain_err.splitlines()


def test_a_second_ctrl_c_ends_the_report_and_not_what_the_script_says(script, tmp_path):
    path = script(SLOW + TRAINING + "time.sleep(60)\n")
    status, _, err = interrupted(*COMMAND, "--report", tmp_path / "report", path, again_at="drawing\n")
    assert status != 0
    assert f"{NO_ADVICE}KeyboardInterrupt\n" in err
    last = err[err.index("drawing") :].splitlines()
    assert last[1] == "mechanic: the report could not be finished. Got KeyboardInterrupt"
    assert last[2:4] == ["Traceback (most recent call last):", last[3]]
    assert last[3].startswith(f'  File "{path}", line ')
    assert json.loads((tmp_path / "report" / "report.json").read_text())["outcome"] == "KeyboardInterrupt"


def test_sigterm_ends_it_as_it_ends_python_after_the_report(script, tmp_path):
    """A second one while the report is made ends it at once; the numbers are written by then."""
    path = script(TRAINING + "time.sleep(60)\n")
    assert interrupted(path, by=signal.SIGTERM) == (-signal.SIGTERM, "", "")
    status, out, err = interrupted(*COMMAND, "--report", tmp_path / "a", path, by=signal.SIGTERM)
    assert (status, out) == (-signal.SIGTERM, "")
    assert f"{NO_ADVICE}SIGTERM\n" in err
    assert err.endswith(f"mechanic: report in {tmp_path / 'a'}\n")
    assert (tmp_path / "a" / "effective_lr.png").exists()

    path = script(SLOW + TRAINING + "time.sleep(60)\n")
    by = {"by": signal.SIGTERM, "again_at": "drawing\n"}
    status, _, err = interrupted(*COMMAND, "--report", tmp_path / "b", path, **by)
    assert (status, err[err.index("drawing") :]) == (-signal.SIGTERM, "drawing\n")
    report = json.loads((tmp_path / "b" / "report.json").read_text(encoding="utf-8"))
    assert (report["outcome"], report["optimizers"][0]["steps"]) == ("SIGTERM", 20)


def test_a_script_that_handles_sigterm_does_so_and_the_report_comes_at_its_end(script):
    path = script("import signal\nsignal.signal(15, lambda *_: sys.exit(7))\n" + TRAINING + "time.sleep(60)\n")
    status, _, err = interrupted(*COMMAND, path, by=signal.SIGTERM)
    assert status == 7
    assert f"{NO_ADVICE}SystemExit: 7\n" in err


def test_a_forked_process_dies_of_sigterm_without_a_report(script, run):
    child = """
import _signal, signal
child = os.fork()
if not child:
    handler = _signal.getsignal(15)  # what Python itself knows
    os._exit(3) if handler else os.kill(os.getpid(), 15)
print(os.waitpid(child, 0)[1], signal.getsignal(15) is signal.SIG_DFL)
"""
    done = run(*COMMAND, script(TRAINING + child))
    assert done.stdout == "trained\n15 True\n"
    assert len(ADVICE.findall(done.stderr)) == 1
    assert NO_ADVICE not in done.stderr


def test_code_that_asks_who_handles_sigterm_is_told_that_nobody_does():
    real, said, default = signal.signal, [], signal.SIG_DFL
    before = signal.signal(signal.SIGTERM, default)
    try:
        with before_sigterm(lambda: pytest.fail("someone else handles it")):
            assert signal.getsignal(signal.SIGTERM) is default
            assert signal.signal(signal.SIGTERM, lambda *_: said.append(1)) is default
            signal.raise_signal(signal.SIGTERM)
            theirs = signal.getsignal(signal.SIGTERM)
            assert (said, callable(theirs)) == ([1], True)
            assert signal.signal(signal.SIGTERM, default) is theirs, "and ours is back"
            assert signal.getsignal(signal.SIGTERM) is default
            ours = real(signal.SIGTERM, default)
            assert ours not in (theirs, default)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            assert signal.signal(signal.SIGINT, signal.SIG_IGN) is signal.default_int_handler
            real(signal.SIGTERM, ours)
            late = signal.signal
        assert (signal.signal, signal.getsignal(signal.SIGTERM)) == (real, default)
        late(signal.SIGTERM, default)  # from code that has imported the function while it was ours
        assert signal.getsignal(signal.SIGTERM) is default
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with before_sigterm(lambda: pytest.fail("the caller ignores it, as nohup does with others")):
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_is_learned_is_shown_though_torchrun_sends_its_interrupt_after_that_of_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr(command, "show", lambda *_: (signal.raise_signal(signal.SIGINT), print("shown")))
    job = types.SimpleNamespace(patch=command.ScriptPatch(None, (), (), {}), watch=command.Watch(None, {}))
    command._report(job, "finished")
    assert capsys.readouterr().out == "shown\n"
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_the_report_comes_after_what_the_script_has_printed_where_both_go_to_one_file(script, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    path = script(TRAINING.replace(", flush=True", ""))
    with open(tmp_path / "log", "w") as log:
        done = python(*COMMAND, path, capture_output=False, stdout=log, stderr=log, env=environment)
    lines = (tmp_path / "log").read_text(encoding="utf-8").splitlines()
    assert done.returncode == 0
    first = "mechanic: AdamW optimizer (script.py:5) is mechanized, s_init=auto, 1 parameter group"
    assert lines[:2] == [first, "trained"]
    assert ADVICE.match(lines[-1])


def test_a_forked_process_that_ends_like_the_script_does_not_report(script, run):
    path = script(TRAINING + "if os.fork() == 0: sys.exit()\nos.wait()\n")
    assert len(ADVICE.findall(run(*COMMAND, path).stderr)) == 1


@pytest.mark.parametrize("width", [30, 50, 80])
def test_a_terminal_gets_a_new_line_first_whole_numbers_and_lines_that_break_between_words(width):
    with patched() as built:
        (optimizer,) = [trained([0.1, 0.1, 0.05, 0.1, 0.025])]
        set_steps(optimizer, 12_345)
    numbers = ["12345", "1.0e-01", *(f"{lr:.0e}" for lr in optimizer.learned_lr())]
    texts = {}
    for is_terminal in (True, False):
        file = io.StringIO()
        console = Console(file=file, force_terminal=is_terminal, width=width, color_system=None)
        reporting.show(built, {}, console=console)
        texts[is_terminal] = file.getvalue()
        table, sentence = texts[is_terminal].split("mechanic: ")
        assert all(number in table for number in numbers)
        assert max(map(len, table.splitlines())) <= max(width, reporting.NARROWEST)
        assert sentence.split()[:4] == ["to", "train", "without", "Mechanic,"]
        assert (max(map(len, sentence.splitlines())) <= width) == is_terminal
    assert texts[True].startswith("\n")
    assert texts[True].split() == texts[False].split(), "no word and no number is broken"


def test_a_script_that_is_not_to_train_gets_no_report(script, run, tmp_path):
    path = script("import argparse\nargparse.ArgumentParser().parse_args()\n")
    for argument, status in (("--help", 0), ("--no-such-option", 2)):
        plain, ours = run(path, argument, check=status), run(*COMMAND, path, argument, check=status)
        assert (ours.stdout, ours.stderr) == (plain.stdout, plain.stderr)
    run(*COMMAND, "--report", "out", path, "--help", cwd=tmp_path)
    assert list((tmp_path / "out").iterdir()) == [], "and a report of before is kept"
    late = script("from mechanic_pytorch.scripts import run\nrun.AT_ONCE = 0.0\nimport sys\nsys.exit()\n")
    assert run(*COMMAND, late).stderr == f"{NOTHING}\n", "after hours, it is news"


# --- how it begins ----------------------------------------------------------------------------------------------------

SURROUNDINGS = """
import os, sys, pickle, neighbour
import __main__

class Thing: pass

print(__name__, __file__, sys.argv, sys.path, os.getcwd(), type(__loader__), __doc__)
print(__main__.Thing is Thing, type(pickle.loads(pickle.dumps(Thing()))) is Thing)
"""


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize(
    "call", [["a/script.py"], ["-m", "a.script"], ["-m", "a"], ["a"]], ids=["script", "module", "package", "directory"]
)
def test_a_script_finds_the_surroundings_that_python_gives_it(script, run, tmp_path, call, safe):
    for name in ("script", "__main__"):
        script(SURROUNDINGS, f"a/{name}.py")
    script("", "a/neighbour.py")
    script("", "neighbour.py")
    call = [*call, "--epochs", "3", "--help", "--", "-m"]
    if safe:  # which Python must know when it starts
        path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        options = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}, "check": 0}
        plain, ours = python(*call, **options), python(*COMMAND, *call, **options)
    else:
        plain, ours = python(*call, cwd=tmp_path, check=0), run(*COMMAND, *call, cwd=tmp_path)
    if call[0] == "a":  # runpy makes the name of a directory absolute
        assert ours.stdout.count(f"['{tmp_path / 'a'}', '--epochs'") == 1
        assert ours.stdout.replace(f"['{tmp_path / 'a'}', '--epochs'", "['a', '--epochs'") == plain.stdout
    else:
        assert ours.stdout == plain.stdout


CHILDREN = """
import multiprocessing, sys, torch, torch.multiprocessing as mp

def work(*args):
    optimizer = torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=0.1)
    print(type(optimizer).__name__)

class Forked(multiprocessing.get_context("fork").Process):
    def run(self):
        work()

if __name__ == "__main__":
    list(torch.utils.data.DataLoader([1, 2], num_workers=2))
    mp.spawn(work, nprocs=1)
    process = Forked()
    process.start()
    process.join()
"""


def test_processes_that_the_script_starts_are_named_with_what_becomes_of_their_optimizers(script, run, tmp_path):
    """A spawned one trains plainly, and only that it does is promised. A worker of a DataLoader is no news."""
    done = run(*COMMAND, "--report", tmp_path / "out", script(CHILDREN))
    assert done.stdout.split() == ["SGD", "MechanizedSGD"]
    lines = done.stderr.splitlines()
    spawned = "optimizers built there stay plain. Remedy: torchrun -m mechanic_pytorch run"
    forked = "optimizers built there are mechanized, too, but are not in this report"
    assert lines[1:4] == [
        NOTHING,
        f"mechanic: the script has spawned 1 process, work: {spawned}",
        f"mechanic: the script has forked 1 process, Forked: {forked}",
    ]
    processes = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["processes"]
    assert [(one["start_method"], one["covered"], one["loads_data"]) for one in processes] == [
        *[("fork", True, True)] * 2,
        ("spawn", False, False),
        ("fork", True, False),
    ]


# --- what it does -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def mnist(tmp_path_factory):
    """Return a directory with the four files of MNIST, of scikit-learn's digits: the tests need no download."""
    folder = tmp_path_factory.mktemp("mnist")
    write_digits_as_mnist(folder)
    return folder


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_that_know_nothing_of_it_learn_at_a_useless_learning_rate(path, mnist, run):
    assert "mechanic" not in path.read_text(encoding="utf-8").lower()

    data = ["--data", mnist] if path.stem == "mnist_cnn" else []

    def last_loss(*arguments):
        done = run(*arguments, *data, "--epochs", "4")
        assert arguments[0] == path or ADVICE.search(done.stderr)
        return float(re.findall(r"loss (\S+)", done.stdout)[-1])

    tuned = last_loss(path)  # its own default
    useless = last_loss(path, "--lr", "1e-7")
    learned = [last_loss(*COMMAND, path, "--lr", lr) for lr in ("1e-7", "10")]
    assert useless > 1.2 * tuned
    assert max(learned) < 1.05 * tuned


def test_options_reach_the_tuner(script, run):
    path = script(
        "import torch\n"
        "p = [torch.zeros(3, requires_grad=True)]\n"
        "for o in (torch.optim.SGD(p, lr=0.5), torch.optim.Adam(p), torch.optim.LBFGS(p, max_iter=1)):\n"
        "    c = getattr(o, 'mechanic_config', None)\n"
        "    config = c and (c.s_init, c.s_decay, c.betas, c.eps, c.skip_nonfinite, c.log_every)\n"
        "    config = c and (*config, c.max_lr, c.per_group)\n"
        "    print(type(o).__name__, config, o.param_groups[0]['lr'])\n"
    )
    done = run(*COMMAND, path)
    config = "('auto', 0.01, (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999), 1e-08, True, 0, None, False)"
    assert done.stdout.splitlines() == [
        f"MechanizedSGD {config} 0.5",
        f"MechanizedAdam {config} 0.001",
        "LBFGS None 1",
    ]
    assert "mechanic: SGD has learned no learning rate: its step() was never called" in done.stderr
    assert "mechanic: LBFGS was left as it is: it assumes" in done.stderr
    options = ["--s-init", "1e-6", "--s-decay", "0.1", "--betas", "0.9,0.99", "--eps", "1e-9", "--log-every", "2"]
    options += [
        "--no-skip-nonfinite",
        "--base-lr",
        "2",
        "--max-lr",
        "3",
        "--per-group",
        "--include",
        "LBFGS",
        "--exclude",
        "torch.optim.Adam",
    ]
    done = run(*COMMAND, *options, path)
    config = "(1e-06, 0.1, (0.9, 0.99), 1e-09, False, 0, 3.0, True)"  # the command logs by itself
    assert done.stdout.splitlines() == [
        f"MechanizedSGD {config} 2.0",
        "Adam None 0.001",
        f"MechanizedLBFGS {config} 2.0",
    ]
    assert "mechanic: Adam was left as it is: it was excluded" in done.stderr


def test_optimizers_of_others_are_reported_and_may_be_named(script, run):
    path = script(
        TRAINING.replace("optimizer = torch.optim.AdamW", "class Mine(torch.optim.AdamW): pass\noptimizer = Mine")
    )
    done = run(*COMMAND, path)
    reason = "it is not one of torch.optim; include __main__.Mine to mechanize it, unless it wraps another optimizer"
    assert done.stderr.splitlines() == [NOTHING, f"mechanic: Mine was left as it is: {reason}"]
    done = run(*COMMAND, "--optimizer", "__main__.Mine", "--log-every", "10", path)
    assert ADVICE.findall(done.stderr)[0][0] == "Mine"
    logged = re.findall(r"^mechanic: Mine, step (\d+): effective lr \d\.\d\de-\d\d$", done.stderr, re.MULTILINE)
    assert logged == ["10", "20"]


def test_a_scale_per_group_is_printed_and_reported_per_group(script, run):
    path = script(
        TRAINING.replace(
            "optimizer = torch.optim.AdamW(model.parameters()",
            "optimizer = torch.optim.AdamW([{'params': [p]} for p in model.parameters()]",
        )
    )
    done = run(*COMMAND, "--per-group", "--log-every", "20", path)
    assert "mechanic: AdamW optimizer (script.py:5) is mechanized, s_init=auto, 2 parameter groups\n" in done.stderr
    (lrs,) = re.findall(r"^mechanic: AdamW, step 20: effective lr (.+)$", done.stderr, re.MULTILINE)
    a, b = map(float, lrs.split(", "))
    assert a != b
    spread = r"\de-\d\d( \(\de-\d\d to \de-\d\d\))?"
    assert re.search(rf"use AdamW with lr={spread} in group 0, lr={spread} in group 1; ", done.stderr)


def test_a_script_without_an_optimizer_is_said_to_have_none(script, run):
    done = run(*COMMAND, script("print('hello')\n"))
    assert (done.stdout, done.stderr) == ("hello\n", f"{NOTHING}\n")


ON_TWO_PROCESSES = """
import torch, torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1)))
optimizer = OPTIMIZER
for _ in range(20):
    optimizer.zero_grad()
    (model(torch.ones(2, 4) * (1 + dist.get_rank())) - 1).square().mean().backward()
    optimizer.step()
print(f"scale {float(getattr(optimizer, 'optim', optimizer).scale)!r}\\n", end="")
dist.destroy_process_group()
"""


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("layout", ["DDP", "ZeRO"])
def test_under_torchrun_the_scale_is_the_same_everywhere_and_one_process_reports(script, tmp_path, layout):
    optimizer = {
        "DDP": "torch.optim.SGD(model.parameters(), lr=1e-5)",
        "ZeRO": "ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.SGD, lr=1e-5)",
    }[layout]
    path = script(ON_TWO_PROCESSES.replace("OPTIMIZER", optimizer))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--report", tmp_path / "report", *(["--process-group", "world"] if layout == "ZeRO" else [])]
    command = [sys.executable, *torchrun, *COMMAND, *map(str, options), str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    scales = re.findall(r"scale (\S+)", done.stdout)
    assert len(scales) == 2
    assert scales[0] == scales[1]
    assert len(ADVICE.findall(done.stderr)) == 1
    optimizers = json.loads((tmp_path / "report" / "report.json").read_text())["optimizers"]
    # ZeRO's is an optimizer itself, which builds the one of torch after it has begun.
    assert [one["mechanized"] for one in optimizers] == [False] * (layout == "ZeRO") + [True]


@pytest.mark.parametrize("launcher", [None, *command._RANKS])
def test_all_processes_are_mechanized_or_none(monkeypatch, launcher):
    """If the script starts the others by itself, they know nothing of us."""
    for name in command._RANKS:
        monkeypatch.delenv(name, raising=False)
    if launcher is not None:
        monkeypatch.setenv(launcher, "1")
    assert command.reports() == (launcher is None)
    patch = command.ScriptPatch(None, (), (), {})
    assert patch.reason_against(torch.optim.SGD) is None
    monkeypatch.setattr(command, "_world_size", lambda: 2)
    reason = patch.reason_against(torch.optim.SGD)
    if launcher is None:
        assert reason.endswith("use torchrun --nproc-per-node 2 -m mechanic_pytorch run")
    else:
        assert reason is None


# --- the report in words ----------------------------------------------------------------------------------------------


def shown(built, records=None):
    text = io.StringIO()
    reporting.show(built, records or {}, console=Console(file=text, width=80))
    return text.getvalue().splitlines()


def cells(line):
    return [cell.strip() for cell in line.strip("│").split("│")]


def trained(lrs, steps=20, cls=torch.optim.SGD):
    """Return an optimizer that was trained, with a group for each lr."""
    optimizer = cls([{"params": [torch.ones(3, requires_grad=True)], "lr": lr} for lr in lrs])
    for _ in range(steps):
        for group in optimizer.param_groups:
            group["params"][0].grad = group["params"][0].detach() + 1
        optimizer.step()
    return optimizer


def named(source, path):
    """Return what the optimizers that a script builds are called."""
    linecache.clearcache()
    path.write_text(f"import torch\nfrom torch.optim import SGD, Adam\np = [torch.zeros(1)]\n{source}")
    with patched() as built:
        exec(compile(path.read_text(), path, "exec"), {})
    names = reporting.names(built)
    assert list(names) == built
    return [*names.values()]


def test_optimizers_of_one_class_are_told_apart_by_what_the_script_calls_them(tmp_path):
    path = tmp_path / "train.py"
    gan = "optimizerD = Adam(\n    p,\n    lr=1e-3,\n)\noptimizerG: Adam = Adam(p)\nother = SGD(p)\n"
    assert named(gan, path) == ["Adam optimizerD", "Adam optimizerG", "SGD"]
    of_object = "class Mine(SGD): pass\nclass T: pass\nt = T()\nt.a = SGD(p)\nt.b = SGD(p)\nc = Mine(p)\n"
    assert named(of_object, path) == ["SGD t.a", "SGD t.b", "Mine"]
    others = "d = {}\nd['G'] = SGD(p)\nif 0: pass\nelse: x = SGD(p)\n"
    assert named(others, path) == ["SGD train.py:5", "SGD train.py:7"], "unless all of them have one"
    assert named("d = {}\nd['G'] = SGD(p)\nd['D'] = SGD(p)\n", path) == ["SGD d['G']", "SGD d['D']"]
    assert named("def f(): return Adam(p)\ndef g(): return Adam(p)\na, b = f(), g()\n", path) == [
        "Adam train.py:4",
        "Adam train.py:5",
    ]
    assert named("several = [Adam(p) for _ in range(2)]\n", path) == ["Adam 1", "Adam 2"]
    assert named("a = 1; b = Adam(p)\nc = 2; d = Adam(p)\n", path) == ["Adam train.py:4", "Adam train.py:5"]
    subclass = "class A(SGD):\n    def __init__(self, *a):\n        super().__init__(*a)\n[A(p)]\n[A(p, 1.0)]\n"
    assert named(subclass, path) == ["A train.py:7", "A train.py:8"]


def test_an_optimizer_that_a_library_builds_is_named_by_the_line_of_the_script_that_calls_it(tmp_path):
    library = tmp_path / "site-packages" / "library.py"
    library.parent.mkdir()
    library.write_text("from torch.optim import SGD\ndef build(p):\n    inner = SGD(p)\n    return inner\n")
    code = f"import sys; sys.path.insert(0, {str(library.parent)!r}); from library import build\nfirst = build(p)\n"
    assert named(f"{code}second = build(p)\n", tmp_path / "train.py") == ["SGD first", "SGD second"]


def test_the_table_and_the_sentence_name_them_alike():
    with patched() as built:
        optimizers = [torch.optim.Adam([p := torch.ones(3, requires_grad=True)]) for _ in range(2)]
        for optimizer in optimizers:
            p = optimizer.param_groups[0]["params"][0]
            for _ in range(3):
                p.grad = p.detach().clone()
                optimizer.step()
    lines = shown(built)
    assert [cells(line)[0] for line in lines[3:5]] == ["Adam 1", "Adam 2"]
    rates = [cells(line)[-1] for line in lines[3:5]]
    assert lines[-2:] == [
        f"mechanic: to train without Mechanic, use Adam with lr={rates[0]} for Adam 1; only 3 steps",
        f"mechanic: to train without Mechanic, use Adam with lr={rates[1]} for Adam 2; only 3 steps",
    ]


def a_tensor_each(count, build, steps=3, learning=lambda i: True):
    """Train `count` tensors, each with an optimizer of its own."""
    params = [torch.full((3,), 1.0 + i, requires_grad=True) for i in range(count)]
    optimizers = [build([p], i) for i, p in enumerate(params)]
    for i, (p, optimizer) in enumerate(zip(params, optimizers, strict=True)):
        for _ in range(steps if learning(i) else 0):
            p.grad = p.detach().clone()
            optimizer.step()
    return optimizers


@pytest.mark.filterwarnings("ignore:.*several mechanized optimizers hold one tensor each")
def test_many_optimizers_of_a_tensor_each_are_told_as_one():
    def build(params, i):
        return torch.optim.Adam(params, lr=1e-3 * (1 + i % 2), weight_decay=0.1 * (i % 2))

    with patched() as built:
        kept = a_tensor_each(40, build, learning=lambda i: i < 30)
    lines = shown(built)
    rows = [cells(line) for line in lines if line.startswith("│")]
    assert len(rows) <= 2 * 4 < 40, "names may wrap"
    assert len(lines) <= 20
    learned = [[f"{lr:.0e}" for one in built[first:30:2] for lr in sorted(one.learned_lr())] for first in (0, 1)]
    sentences = [line for line in lines if line.startswith("mechanic: to train")]
    assert len(sentences) == 2
    for sentence, who, of_kind in zip(sentences, ("Adam 1", "Adam 2"), learned, strict=True):
        low, high = min(of_kind, key=float), max(of_kind, key=float)
        assert low != high
        assert sentence.startswith(
            f"mechanic: to train without Mechanic, use Adam with lr={low} to {high}, one for each"
        )
        assert f"for {who} and 14 like it;" in sentence
        assert sentence.endswith("--report DIR lists each; only 3 steps")
    nothing = "like it have learned no learning rate: its step() was never called, or no parameter had a gradient"
    assert lines[-2:] == [f"mechanic: Adam 31 and 4 {nothing}", f"mechanic: Adam 32 and 4 {nothing}"]
    assert len(kept) == 40


@pytest.mark.filterwarnings("ignore:.*several mechanized optimizers hold one tensor each")
def test_optimizers_that_the_script_tells_apart_are_listed():
    def of_another_model(params, i):
        return torch.optim.SGD([*params, torch.ones(2, requires_grad=True)], lr=1e-3)

    def of_other_options(params, i):
        return torch.optim.SGD(params, lr=1e-3, momentum=0.1 * i)

    for build in (of_another_model, of_other_options):
        with patched() as built:
            a_tensor_each(6, build)
        assert sum(line.startswith("mechanic: to train") for line in shown(built)) == 6
    with patched() as built:
        a_tensor_each(4, lambda params, i: torch.optim.SGD(params, lr=1e-3))
    assert sum(line.startswith("mechanic: to train") for line in shown(built)) == 4, "a few can be read"


IN_BACKWARD = """
import torch
params = [torch.full((3,), 1.0 + i, requires_grad=True) for i in range(40)]
optimizers = {p: torch.optim.Adam([p], lr=1e-3, foreach=False) for p in params}
for p in params:
    p.register_post_accumulate_grad_hook(lambda p: optimizers[p].step() or optimizers[p].zero_grad())
import warnings
warnings.simplefilter("ignore")
for _ in range(3):
    sum(p.square().sum() for p in params).backward()
"""


def test_a_script_with_an_optimizer_for_each_tensor_gets_a_short_report_and_a_whole_file(script, run, tmp_path):
    done = run(*COMMAND, "--report", tmp_path / "report", script(IN_BACKWARD))
    said = done.stderr.splitlines()
    assert len(said) < 20, done.stderr
    assert said[3] == "mechanic: Adam optimizers (script.py:4) is mechanized, s_init=auto, 1 parameter group"
    assert (
        said[4] == "mechanic: Adam optimizers (script.py:4): more follow, one for each tensor; the report counts them"
    )
    assert sum(line.startswith("│ Adam 1 ") for line in said) == 1
    assert sum(line.startswith("mechanic: to train") and "Adam 1 and 39 like it" in line for line in said) == 1
    assert any("hold one tensor each" in line for line in said)
    optimizers = json.loads((tmp_path / "report" / "report.json").read_text())["optimizers"]
    assert [one["name"] for one in optimizers] == [f"Adam {i}" for i in range(1, 41)]
    assert all(one["steps"] == 3 and one["groups"][0]["learned_lr"] > 0 for one in optimizers)


def row(step, learned, scale=(1.0,), lrs=(1.0,)):
    """Return what is known after a step: the lr learned so far, the scale, and the lr that the schedule gives."""
    effective = [lr * scale[i if len(scale) > 1 else 0] for i, lr in enumerate(lrs)]
    learned = [learned] * len(lrs) if isinstance(learned, float) else learned
    return types.SimpleNamespace(steps=step, learned_lr=learned, scale=list(scale), effective_lr=effective)


@pytest.mark.parametrize(
    ("rows", "trend"),
    [
        ([row(50, 1.0), row(100, 1.4)], "steady"),
        ([row(50, 1.0), row(51, 3.0), row(100, 1.6)], "rising"),
        ([row(50, 1.6), row(100, 1.0)], "falling"),
        ([row(100, 0.1), row(200, 9.0), row(50, 1.0), row(100, 1.0)], "steady"),  # after a reset
        ([row(50, [1.0, 1.0]), row(100, [1.0, 2.0, 9.0], lrs=(1.0, 1.0, 1.0))], "rising"),
        ([row(901, 1.0), row(1000, 9.0)], None),  # a resumed run, whose first half is not known
        ([], None),
    ],
)
def test_an_lr_still_rises_if_half_the_run_would_have_advised_another_digit(rows, trend):
    assert confidence(rows, 100).trend == trend


def test_the_range_is_that_of_the_second_half_without_the_schedule():
    lrs = [(0.5, 0.05), (1.0, 0.1), (0.5, 0.05), (0.1, 0.01)]
    rows = [
        row(step, 1.0, (scale,), lr) for step, scale, lr in zip((1, 2, 3, 4), (9.0, 8.0, 2.0, 4.0), lrs, strict=True)
    ]
    assert confidence(rows, 4).ranges == [(2.0, 4.0), pytest.approx((0.2, 0.4))]
    rows = [row(step, 1.0, (1.0, scale), (1.0, 0.1)) for step, scale in ((1, 1.0), (2, 3.0), (3, 2.0))]
    assert confidence(rows, 3).ranges == [(1.0, 1.0), pytest.approx((0.2, 0.3))]
    rows.append(row(4, 1.0, (1.0, 3.0, 0.0), (1.0, 0.1, 1.0)))
    assert confidence(rows, 4).ranges == [(1.0, 1.0), pytest.approx((0.2, 0.3)), (0.0, 0.0)]


def test_the_sentence_says_what_makes_the_lr_uncertain():
    def sentence(steps, s_init="auto"):
        with patched(s_init=s_init) as built:
            model = mlp()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            records = {built[0]: reporting.Record(optimizer, 100)}
            train(model, optimizer, steps)
        return ADVICE.fullmatch(shown(built, records)[-1])[0].partition("lr=")[2]

    assert re.fullmatch(r"\de-\d\d; only 1 step", sentence(1))
    assert re.fullmatch(r"\de-\d\d( \(\de-\d\d to \de-\d\d\))?; still rising; only 20 steps", sentence(20))
    assert re.fullmatch(r"\de-\d\d \(\de-\d\d to \de-\d\d\); still rising", sentence(120, s_init=1e-8))
    assert re.fullmatch(r"\de-\d\d( \(\de-\d\d to \de-\d\d\))?", sentence(300))


def test_groups_are_told_apart_where_they_differ():
    def rows_and_sentence(lrs):
        with patched() as built:
            trained(lrs)
        *lines, sentence = shown(built)
        rows = [cells(line) for line in lines[3:-1]]
        assert rows[0][:3] == ["SGD", "20", "0"]
        assert all(row[:3] == ["", "", ""] for row in rows[1:])
        return [row[3:] for row in rows], sentence.removeprefix("mechanic: to train without Mechanic, use SGD with ")

    ((groups, script_lr, learned),), sentence = rows_and_sentence([0.1] * 30)
    assert (groups, script_lr, sentence) == ("0-29", "1.0e-01", f"lr={learned}; only 20 steps")
    ((a, _, lr_a), (b, _, lr_b)), sentence = rows_and_sentence([0.1, 0.1, 0.01, 0.1])
    assert (a, b) == ("0-1, 3", "2")
    assert float(lr_a) == pytest.approx(10 * float(lr_b))
    assert sentence == f"lr={lr_a} in groups 0-1, 3, lr={lr_b} in group 2; only 20 steps"
    rows, sentence = rows_and_sentence([0.1 * 0.8**i for i in range(30)])
    assert [row[0] for row in rows] == [str(i) for i in range(30)]
    assert sentence == f"lr={rows[-1][2]} to {rows[0][2]}, by group as listed; only 20 steps"


def test_with_base_lr_the_table_has_the_lr_of_the_script_and_the_sentence_the_same_advice():
    learned = []
    for base_lr in (None, 1.0):
        with patched(base_lr=base_lr) as built:
            trained([1e-3])
        row = cells(shown(built)[3])
        assert row[4] == "1.0e-03"
        learned.append(built[0].learned_lr())
        assert row[5] == f"{learned[-1][0]:.0e}"
    assert learned[0] == pytest.approx(learned[1], rel=0.03)


def test_it_says_why_nothing_was_learned():
    p = torch.ones(3, requires_grad=True)
    with patched() as built:
        _, bad, idle = (torch.optim.SGD([p], lr=0.1) for _ in range(3))
    for optimizer, value in ((bad, torch.nan), (idle, 0.0)):
        p.grad = torch.full((3,), value)
        optimizer.step()
        optimizer.step()
    said = "mechanic: SGD {} has learned no learning rate: {}"
    assert shown(built)[-3:] == [
        said.format(1, "its step() was never called, or no parameter had a gradient"),
        said.format(2, "every step was skipped, because a gradient was inf or nan"),
        said.format(3, "nothing has moved in 2 steps"),
    ]


# --- the report in a directory ----------------------------------------------------------------------------------------


def test_the_report_holds_what_was_learned_and_how(script, tmp_path, run):
    path = script(
        TRAINING
        + "groups = [{'params': [model.weight]}, {'params': [model.bias], 'lr': 0.05}]\n"
        + "optimizer = torch.optim.SGD(groups, lr=0.1)\n"
        + "def closure():\n    optimizer.zero_grad()\n    loss = model(torch.ones(4)).square().sum()\n"
        + "    loss.backward()\n    return loss\n"
        + "for _ in range(5): optimizer.step(closure)\n"
        + "torch.optim.LBFGS(model.parameters())\n"
        + "os.chdir('/')\nsys.exit(len(sys.argv) - 1)\n"
    )
    done = run(*COMMAND, "--report", "out/1", path, cwd=tmp_path)
    out = tmp_path / "out" / "1"
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["command"] == [str(path)]
    assert report["outcome"] == "finished"
    assert report["schema"] == 1
    assert report["seconds"] > 0
    assert datetime.fromisoformat(report["started"]).tzinfo is not None
    assert report["options"]["s_init"] == "auto", "so that the run can be repeated"
    assert report["versions"]["python"] == platform.python_version()
    assert report["versions"]["torch"] == torch.__version__
    adamw, sgd, lbfgs = report["optimizers"]
    assert (adamw["class"], adamw["mechanized"], adamw["steps"], adamw["skipped_steps"]) == (
        "torch.optim.adamw.AdamW",
        True,
        20,
        0,
    )
    assert [step for step, _ in adamw["effective_lr"]] == list(range(1, 21))
    assert adamw["groups"][0]["script_lr"] == 1e-3
    assert adamw["groups"][0]["learned_lr"] == pytest.approx(
        fmean(lrs[0] for _, lrs in adamw["effective_lr"]), rel=1e-6
    )
    assert f"mechanic: {adamw['advice']}" in done.stderr.splitlines()
    assert [step for step, _ in adamw["loss"]] == list(range(1, 21)), "what backward() was called on"
    assert adamw["loss"][0][1] > adamw["loss"][-1][1] > 0
    assert [group["script_lr"] for group in sgd["groups"]] == [0.1, 0.05]
    assert all(a == pytest.approx(2 * b) for _, (a, b) in sgd["effective_lr"])
    assert re.match(r"to train without Mechanic, use SGD with lr=\S.* in group 0, lr=\S.* in group 1; ", sgd["advice"])
    assert (sgd["has_few_steps"], adamw["built_at"], adamw["variable"]) == (True, f"{path}:5", "optimizer")
    assert adamw["trend"] == "rising", "it begins with a scale that is much too small"
    low, high = adamw["groups"][0]["range"]
    assert (low, high) == tuple(f(lrs[0] for _, lrs in adamw["effective_lr"][10:]) for f in (min, max))
    assert [step for step, _ in sgd["loss"]] == [1, 2, 3, 4, 5]
    assert sgd["loss"][0][1] > sgd["loss"][-1][1] > 0
    assert (lbfgs["mechanized"], lbfgs["steps"], lbfgs["groups"]) == (
        False,
        None,
        [{"script_lr": 1.0, "learned_lr": None, "range": None}],
    )
    height, width, _ = image.imread(out / "effective_lr.png").shape
    assert min(height, width) > 600
    assert f"mechanic: report in {out}" in done.stderr.splitlines()
    run(*COMMAND, "--report", "out/1", path, "--x", check=1, cwd=tmp_path)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert (report["command"], report["outcome"]) == ([str(path), "--x"], "SystemExit: 1")
    assert [one["advice"] for one in report["optimizers"]] == [None] * 3
    assert report["optimizers"][0]["groups"][0]["learned_lr"] == adamw["groups"][0]["learned_lr"]


def test_a_report_that_cannot_be_written_changes_nothing(script, tmp_path, run):
    path = script(TRAINING + "import shutil; shutil.rmtree('out')\nsys.exit(5)\n")
    done = run(*COMMAND, "--report", "out", path, check=5, cwd=tmp_path)
    assert "mechanic: the report could not be finished. Got FileNotFoundError" in done.stderr
    assert f"{NO_ADVICE}SystemExit: 5\n" in done.stderr


def record_of_training(steps, closure, capacity=100):
    with patched() as built:
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    record = reporting.Record(optimizer, capacity)
    losses = train(model, optimizer, steps, closure=closure)
    return built, {built[0]: record}, losses


def test_curves_are_bounded():
    _, records, losses = record_of_training(30, closure=True, capacity=8)
    (record,) = records.values()
    rows, kept = record.read()
    assert [step for step, _ in kept] == [1, 5, 9, 13, 17, 21, 25, 29]
    assert [loss for _, loss in kept] == [losses[step - 1] for step, _ in kept]
    assert [row.steps for row in rows] == [step for step, _ in kept]


def scalars(directory):
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_gets_every_curve_and_no_earlier_one(tmp_path):
    for steps in (5, 3):
        built, records, losses = record_of_training(steps, closure=True)
        assert reporting.write(tmp_path, built, records, {}) == []
    (record,) = records.values()
    expected = {
        "AdamW/effective lr": [(row.steps, *row.effective_lr) for row in record.read()[0]],
        "AdamW/loss": list(enumerate(losses, 1)),
    }
    logged = scalars(tmp_path)
    assert logged.keys() == expected.keys()
    for tag, curve in expected.items():
        assert [step for step, _ in logged[tag]] == [step for step, _ in curve] == [1, 2, 3]
        assert [value for _, value in logged[tag]] == pytest.approx([value for _, value in curve], rel=1e-6)  # float32


def test_tensorboard_is_asked_for_if_it_is_not_there(monkeypatch, tmp_path):
    built, records, _ = record_of_training(3, closure=True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert reporting.write(tmp_path, built, records, {}) == [
        "no TensorBoard log: tensorboard is not installed. Remedy: pip install tensorboard"
    ]


def test_groups_of_one_lr_share_a_curve_and_late_ones_begin_late(tmp_path):
    with patched() as built:
        optimizer = trained([0.1, 0.1, 0.01], steps=0)
        record = reporting.Record(optimizer, 100)
        for steps in (2, 3):
            for _ in range(steps):
                for group in optimizer.param_groups:
                    group["params"][0].grad = torch.ones(3)
                optimizer.step()
            optimizer.add_param_group({"params": [torch.ones(3, requires_grad=True)], "lr": 0.1})
    reporting.write(tmp_path, built, {built[0]: record}, {})
    logged = scalars(tmp_path)
    assert {tag: [step for step, _ in curve] for tag, curve in logged.items()} == {
        "SGD/effective lr, groups 0-1": [1, 2, 3, 4, 5],
        "SGD/effective lr, group 2": [1, 2, 3, 4, 5],
        "SGD/effective lr, group 3": [3, 4, 5],
    }


def test_pictures_of_many_groups_and_of_many_optimizers_are_drawn(tmp_path):
    records = {}
    with patched() as built:
        for i in range(3):
            record = reporting.Record(optimizer := trained([0.1 * 0.8**j for j in range(30)], steps=0), 100)
            records[built[i]] = record
            for _ in range(3):
                for group in optimizer.param_groups:
                    group["params"][0].grad = torch.ones(3)
                optimizer.step()
    problems = reporting.write(tmp_path, built, records, {}, max_panels=2)
    assert problems == ["the picture shows the first 2 optimizers of 3; report.json has all"]
    assert image.imread(tmp_path / "effective_lr.png").shape[:2] == (960, 1200)
    assert len(scalars(tmp_path)) == 90


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    built, records, _ = record_of_training(2, closure=False)
    built[0].script_lrs[0] = float("inf")
    reporting.write(tmp_path, built, records, {})
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["optimizers"][0]["groups"][0]["script_lr"] is None


def test_where_nothing_is_drawn_the_true_reason_is_given(tmp_path):
    def reason(steps, **options):
        with patched(**options) as built:
            optimizer = trained([0.1], steps)
        (problem,) = reporting.write(tmp_path, built, {}, {})
        assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
        assert optimizer is built[0].optimizer
        return problem.removeprefix("no picture: ")

    assert reason(steps=0) == "no step was made"
    assert reason(steps=3, exclude=["SGD"]) == "no optimizer was mechanized"
    assert reason(steps=3) == "no step was recorded, as those of a compiled optimizer.step are not"


# --- without Mechanic, at the learned lr ------------------------------------------------------------------------------

OF_A_GAN = """
import sys, torch
p, q, r = ([torch.ones(3, requires_grad=True)] for _ in range(3))
optimizerD = torch.optim.Adam([{"params": p}, {"params": q, "lr": 1e-4}], lr=1e-3)
unused = torch.optim.SGD(p, lr=0.5)
optimizerG = torch.optim.Adam(r, lr=1e-3)
for _ in range(20):
    for (x,) in (p, q, r): x.grad = x.detach() + 1
    optimizerD.step()
    optimizerG.step()
optimizerD.add_param_group({"params": [torch.ones(3)], "lr": 2e-3})
print([(type(o).__name__, [g["lr"] for g in o.param_groups]) for o in (optimizerD, unused, optimizerG)])
"""


@pytest.mark.parametrize("options", [[], ["--per-group"]])
def test_a_script_runs_without_mechanic_at_the_lrs_of_a_report(script, run, tmp_path, options):
    path, report = script(OF_A_GAN), tmp_path / "out" / "report.json"
    run(*COMMAND, *options, "--report", report.parent, path)
    (a, b, late), _, (g,) = (
        [group["learned_lr"] for group in one["groups"]] for one in json.loads(report.read_text())["optimizers"]
    )
    done = run(*COMMAND, "--plain-from", report, path)
    names, lrs = zip(*ast.literal_eval(done.stdout), strict=True)
    assert names == ("Adam", "SGD", "Adam")
    assert lrs[0][:2] == pytest.approx([a, b])
    assert lrs[0][2] == pytest.approx(2 * max(a, b)), "the ratios hold for groups to come"
    assert lrs[1:] == ([0.5], pytest.approx([g]))
    assert (a == pytest.approx(10 * b)) == (not options)
    assert late == (0 if options else pytest.approx(2 * a))
    assert re.fullmatch(
        r"mechanic: Adam optimizerD \(script.py:4\) stays plain, with lr=\S+(, \S+)?\n"
        r"mechanic: Adam optimizerG \(script.py:6\) stays plain, with lr=\S+\n",
        done.stderr,
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "Adam(r, lr=1e-3)",
            "AdamW(r, lr=1e-3)",
            "optimizer 3 must be the one of the report, torch.optim.adam.Adam.",
        ),
        (
            "Adam(r, lr=1e-3)",
            "Adam(r, lr=0.0)",
            "at most 1 groups, as in the report. Got 1 with lr 0.0 at",
        ),
        ("Adam(r,", "Adam([{'params': r}, {'params': p}],", "Got 2 with lr 0.001, 0.001 at"),
        ("unused =", "more = torch.optim.Adam(p)\nunused =", "optimizer 2 must be the one of the report"),
    ],
)
def test_a_script_that_does_not_fit_the_report_is_ended_with_a_remedy(script, run, tmp_path, old, new, message):
    assert OF_A_GAN.count(old) == 1
    run(*COMMAND, "--report", "out", script(OF_A_GAN), cwd=tmp_path)
    done = run(*COMMAND, "--plain-from", "out/report.json", script(OF_A_GAN.replace(old, new)), check=1, cwd=tmp_path)
    assert "mechanic: --plain-from out/report.json: " in done.stderr
    assert message in done.stderr
    assert done.stderr.endswith("Remedy: run the same script with the same arguments, or set the lr by hand.\n")


def test_an_optimizer_that_the_script_no_longer_builds_is_named(script, run, tmp_path):
    run(*COMMAND, "--report", "out", script(OF_A_GAN), cwd=tmp_path)
    fewer = script(OF_A_GAN.partition("unused =")[0])
    done = run(*COMMAND, "--plain-from", "out/report.json", fewer, cwd=tmp_path)
    last = "the script has not built torch.optim.adam.Adam, which the report has too"
    assert done.stderr.splitlines()[-1] == f"mechanic: --plain-from: {last}"


def test_an_lr_of_a_run_that_failed_is_given_with_a_warning(script, run, tmp_path):
    run(*COMMAND, "--report", "out", script(TRAINING + "sys.exit(3)"), check=3, cwd=tmp_path)
    done = run(*COMMAND, "--plain-from", "out/report.json", script(TRAINING), cwd=tmp_path)
    warning = "may be far off, because the script ended with SystemExit: 3 in that run"
    assert done.stderr.splitlines()[0] == f"mechanic: the lr of out/report.json {warning}"


@pytest.mark.parametrize(
    ("report", "options", "message"),
    [
        ("{", [], "JSONDecodeError"),
        ("[]", [], "TypeError"),
        ('{"optimizers": [], "outcome": "finished", "options": {}}', [], "KeyError: 'per_group'"),
        ('{"optimizers": [], "outcome": "finished", "options": {"per_group": false}}', [], "with a learned lr. Got"),
        (
            "{}",
            ["--s-init", "auto"],
            "--plain-from goes with no option but -m, --seed and --report. Got --s-init.",
        ),
        ("{}", ["--strict"], "Got --strict. Remedy:"),
        ("{}", ["--plain"], "Got --plain. Remedy:"),
    ],
)
def test_a_report_that_holds_no_lr_is_refused(tmp_path, capsys, report, options, message):
    path = tmp_path / "r.json"
    path.write_text(report)
    with pytest.raises(SystemExit) as ended:
        main(["run", "--plain-from", str(path), *options, __file__])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.py"], "'missing.py' does not exist."),
        (["--s-init", "0", __file__], "mechanize: s_init must be 'auto' or a finite number > 0. Got 0.0. Remedy:"),
        (["--s-init", "automatic", __file__], "'automatic' is not 'auto' or a number."),
        (["--base-lr", "-1", __file__], "patched: base_lr must be a finite number > 0, or None. Got -1.0. Remedy:"),
        (["--betas", "0.9;0.99", __file__], "'0.9;0.99' is not a list of numbers such as 0.9,0.99."),
        (["--report", __file__, __file__], "is a file"),
        (["--exclude", "Adamm", __file__], "Got 'Adamm'. Did you mean Adam"),
        (["--no-such-option", __file__], "No such option"),
        ([], "Missing argument 'SCRIPT'"),
    ],
)
def test_a_wrong_command_line_is_refused_before_the_script_runs(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        main(["run", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_help_names_every_option_of_mechanize_and_keeps_the_examples_on_their_lines(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/mechanic"])  # as which it was called
    with pytest.raises(SystemExit) as ended:
        main(["run", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("Usage: mechanic run [OPTIONS] SCRIPT [ARGS]...\n")
    assert "\n    mechanic run train.py --epochs 10\n" in text
    titles = [
        "The script",
        "What is mechanized",
        "What is reported",
        "Without Mechanic",
        "Options of mechanize",
        "Other",
    ]
    assert re.findall(r"^(\S.*):$", text, re.MULTILINE) == titles
    assert text.index("What is reported:") < text.index("--log-every") < text.index("Without Mechanic:")
    for_python = {"Base", "store_delta", "log_func"}  # a class, a word without effect, a function
    ours = inspect.signature(mechanize).parameters.keys() - for_python
    assert len(ours) >= 8
    assert all(f"--{option.replace('_', '-')}" in text for option in ours)


@pytest.mark.parametrize(
    ("words", "answers"),
    [
        ("mechanic ru", ["plain,run"]),
        ("mechanic run --plain", ["plain,--plain", "plain,--plain-from"]),
        ("mechanic compare --seed", ["plain,--seeds"]),
        ("mechanic run tr", ["file,"]),
        ("mechanic run train.py --config tr", ["file,"]),
    ],
)
def test_a_shell_completes_the_command_line(words, answers, capsys, monkeypatch):
    monkeypatch.setenv("_MECHANIC_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().out.splitlines() == answers


def test_a_name_that_nothing_bears_is_reported_with_the_closest_one(script, run):
    path = script(
        TRAINING.replace("optimizer = torch.optim.AdamW", "class Mine(torch.optim.AdamW): pass\noptimizer = Mine")
    )
    done = run(*COMMAND, "--include", "__main__.Mien", "--exclude", "torch.optim.LBFGS", path)
    reason = "no such optimizer was built. Did you mean __main__.Mine?"
    assert done.stderr.splitlines()[-1] == f"mechanic: --include __main__.Mien has no effect, because {reason}"


def test_a_group_of_one_process_is_said_to_have_no_effect(script, run):
    done = run(*COMMAND, "--process-group", "world", script(TRAINING))
    assert done.stderr.splitlines()[-1].startswith(
        "mechanic: --process-group world has no effect, because no optimizer"
    )
    assert "has no effect" not in run(*COMMAND, script(TRAINING)).stderr


def without(modules, *arguments, **options):
    """Call the command where these modules cannot be imported."""
    hidden = f"sys.modules.update(dict.fromkeys({modules!r}))"
    code = f"import sys; sys.argv[0] = 'mechanic'; {hidden}; from mechanic_pytorch.__main__ import main; main()"
    return python("-c", code, *arguments, **options)


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_a_missing_extra_is_named(missing):
    done = without([missing], "run", "train.py", check=1)
    rule = f"it needs click and rich. Got no module named {missing!r}."
    assert done.stderr == f"mechanic run: {rule} Remedy: pip install 'mechanic-pytorch[run]'.\n"


def test_help_and_version_need_no_extra_and_do_not_wait_for_torch():
    nothing = ["click", "rich", "matplotlib", "torch"]
    (short, long, none) = (without(nothing, *arguments, check=0) for arguments in (["-h"], ["--help"], []))
    assert short.stdout == long.stdout == none.stdout
    assert long.stdout.startswith("Usage: mechanic COMMAND ...\n")
    assert {"run", "env"} <= set(re.findall(r"^  (\w+)  ", long.stdout, re.MULTILINE))
    for option in ("-V", "--version"):
        assert without(nothing, option, check=0).stdout == f"mechanic {version('mechanic-pytorch')}\n"


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["train.py", "--lr", "1 e"], "mechanic run train.py --lr '1 e'"),
        ([str(ROOT)], f"mechanic run {ROOT}"),
        (["--report", "out", "train.py"], "mechanic run --report out train.py"),
        (["rum", "train.py"], "mechanic run"),
        (["wandb"], "mechanic --help"),
    ],
)
def test_an_unknown_command_is_answered_with_the_one_that_was_probably_meant(arguments, remedy, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"mechanic: there is no command {arguments[0]!r}. Remedy: {remedy}\n"


def test_env_says_what_a_bug_report_needs():
    done = without(["click", "rich", "matplotlib"], "env", check=0)
    said = dict(re.split(r"  +", line, maxsplit=1) for line in done.stdout.splitlines())
    assert said["mechanic-pytorch"] == version("mechanic-pytorch")
    assert said["Python"].startswith(platform.python_version())
    assert said["torch"] == version("torch")
    assert said["cpu"].endswith("kernel: blocks")


def test_env_says_which_kernel_fails_and_why(monkeypatch):
    monkeypatch.setenv("MECHANIC_KERNEL", "fast")
    assert "none works. Got ValueError: mechanic_pytorch: MECHANIC_KERNEL must be" in environment.describe()


def test_a_picture_without_matplotlib_is_refused_before_the_script_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        main(["run", "--report", str(tmp_path / "out"), __file__])
    assert ended.value.code == 2
    assert "--report needs matplotlib. Remedy: pip install 'mechanic-pytorch[run]'." in capsys.readouterr().err


def test_the_console_command_is_the_same():
    assert 'mechanic = "mechanic_pytorch.__main__:main"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
