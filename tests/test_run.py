"""`mechanic run SCRIPT`: the script behaves as `python SCRIPT` does, learns, and a report follows."""

import json
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path
from statistics import fmean

import pytest
import torch
from matplotlib import image

from mechanic_pytorch import _report, _run, patched
from mechanic_pytorch.__main__ import main
from problems import mlp, train

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples" / "scripts").glob("*.py"))
COMMAND = ["-m", "mechanic_pytorch", "run"]
NOTHING = "mechanic: no torch.optim optimizer was built in this process"
ADVICE = re.compile(r"^mechanic: to train without Mechanic, use (\w+) with lr=(\d\.\de-\d\d)$", re.MULTILINE)

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


def python(*arguments, check=None, **options):
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    options = {"timeout": 120, "capture_output": True, "text": True, "encoding": "utf-8", **options}
    done = subprocess.run(command, check=False, **options)
    assert check is None or done.returncode == check, done.stdout + done.stderr
    return done


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
    "interrupt": ("raise KeyboardInterrupt", -signal.SIGINT),
    "broken pipe": ("raise BrokenPipeError(32, 'Broken pipe')", 1),
    "hook": ("sys.excepthook = lambda *what: print('hook', what[0], what[2].tb_lineno)\nraise KeyError", 1),
    "atexit": ("import atexit; atexit.register(lambda: print('at exit', __name__, sys.argv))\nsys.exit(2)", 2),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_end_is_the_scripts_own_and_the_report_comes_first(script, end):
    code, status = ENDS[end]
    path = script(TRAINING + code + "\n")
    plain = python(path, check=status)
    ours = python(*COMMAND, path, check=status)
    assert ours.stdout == plain.stdout
    assert ours.stderr.endswith(plain.stderr), "the traceback, as it is without us"
    report = ours.stderr.removesuffix(plain.stderr)
    assert ADVICE.findall(report)[0][0] == "AdamW"
    assert report.rstrip().endswith(ADVICE.search(report)[0])
    assert re.search(r"AdamW\W+20\W+0\W+0\W+1\.0e-03\W+" + ADVICE.search(report)[2], report)


def test_a_syntax_error_is_shown_as_python_shows_it(script):
    path = script("x = (\n")
    plain, ours = python(path, check=1), python(*COMMAND, path, check=1)
    assert ours.stderr == f"{NOTHING}\n{plain.stderr}"


def test_ctrl_c_kills_it_as_it_kills_python(script):
    path = script(TRAINING + "time.sleep(60)\n")
    command = [sys.executable, *COMMAND, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "trained\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert len(ADVICE.findall(err)) == 1
    traceback = err[err.index("Traceback") :].splitlines()
    assert traceback[1].startswith(f'  File "{path}", line ')
    assert traceback[-1] == "KeyboardInterrupt"
    assert "mechanic_pytorch" not in err


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
def test_a_script_finds_the_surroundings_that_python_gives_it(script, tmp_path, call, safe):
    for name in ("script", "__main__"):
        script(SURROUNDINGS, f"a/{name}.py")
    script("", "a/neighbour.py")
    script("", "neighbour.py")
    call = [*call, "--epochs", "3", "--help", "--", "-m"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    environment |= {"PYTHONSAFEPATH": "1"} if safe else {}
    plain = python(*call, cwd=tmp_path, env=environment, check=0)
    ours = python(*COMMAND, *call, cwd=tmp_path, env=environment, check=0)
    if call[0] == "a":  # runpy makes the name of a directory absolute
        assert ours.stdout.count(f"['{tmp_path / 'a'}', '--epochs'") == 1
        assert ours.stdout.replace(f"['{tmp_path / 'a'}', '--epochs'", "['a', '--epochs'") == plain.stdout
    else:
        assert ours.stdout == plain.stdout


def test_it_also_works_in_processes_that_the_script_spawns(script):
    """They train plainly; only that they do is promised."""
    path = script(
        "import torch, torch.multiprocessing as mp\n"
        "def work(rank):\n"
        "    torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=0.1).step()\n"
        "if __name__ == '__main__':\n"
        "    mp.spawn(work, nprocs=1)\n"
    )
    assert python(*COMMAND, path, check=0).stderr.splitlines() == [NOTHING]


# --- what it does -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_that_know_nothing_of_it_learn_at_a_useless_learning_rate(path):
    assert "mechanic" not in path.read_text(encoding="utf-8").lower()

    def last_loss(*arguments):
        done = python(*arguments, "--epochs", "4", check=0, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert arguments[0] == path or ADVICE.search(done.stderr)
        return float(re.findall(r"loss (\S+)", done.stdout)[-1])

    tuned = last_loss(path)  # its own default
    useless = last_loss(path, "--lr", "1e-7")
    learned = [last_loss(*COMMAND, path, "--lr", lr) for lr in ("1e-7", "10")]
    assert useless > 1.2 * tuned
    assert max(learned) < 1.05 * tuned


def test_options_reach_the_tuner(script):
    path = script(
        "import torch\n"
        "p = [torch.zeros(3, requires_grad=True)]\n"
        "for o in (torch.optim.SGD(p, lr=0.5), torch.optim.Adam(p), torch.optim.LBFGS(p)):\n"
        "    c = getattr(o, 'mechanic_config', None)\n"
        "    print(type(o).__name__, c and (c.s_init, c.s_decay, c.betas, c.eps, c.skip_nonfinite, c.log_every),\n"
        "        o.param_groups[0]['lr'])\n"
    )
    done = python(*COMMAND, path, check=0)
    config = "('auto', 0.01, (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999), 1e-08, True, 0)"
    assert done.stdout.splitlines() == [
        f"MechanizedSGD {config} 0.5",
        f"MechanizedAdam {config} 0.001",
        "LBFGS None 1",
    ]
    assert "mechanic: SGD has learned no learning rate in 0 steps" in done.stderr
    assert "mechanic: LBFGS was left as it is: it assumes" in done.stderr
    options = ["--s-init", "1e-6", "--s-decay", "0.1", "--betas", "0.9,0.99", "--eps", "1e-9", "--log-every", "2"]
    options += ["--no-skip-nonfinite", "--base-lr", "2", "--include", "LBFGS", "--exclude", "torch.optim.Adam"]
    done = python(*COMMAND, *options, path, check=0)
    config = "(1e-06, 0.1, (0.9, 0.99), 1e-09, False, 2)"
    assert done.stdout.splitlines() == [
        f"MechanizedSGD {config} 2.0",
        "Adam None 0.001",
        f"MechanizedLBFGS {config} 2.0",
    ]
    assert "mechanic: Adam was left as it is: it was excluded" in done.stderr


def test_optimizers_of_others_are_reported_and_may_be_named(script):
    path = script(
        TRAINING.replace("optimizer = torch.optim.AdamW", "class Mine(torch.optim.AdamW): pass\noptimizer = Mine")
    )
    done = python(*COMMAND, path, check=0)
    reason = "it is not one of torch.optim; include __main__.Mine to mechanize it"
    assert done.stderr.splitlines() == [NOTHING, f"mechanic: Mine was left as it is: {reason}"]
    done = python(*COMMAND, "--optimizer", "__main__.Mine", "--log-every", "10", path, check=0)
    assert ADVICE.findall(done.stderr)[0][0] == "Mine"
    assert re.findall(r"^mechanic: step (\d+): scale \d", done.stderr, re.MULTILINE) == ["10", "20"]


def test_a_script_without_an_optimizer_is_said_to_have_none(script):
    done = python(*COMMAND, script("print('hello')\n"), check=0)
    assert (done.stdout, done.stderr) == ("hello\n", f"{NOTHING}\n")


@pytest.mark.xdist_group("distributed")
def test_under_torchrun_one_process_reports(script, tmp_path):
    path = script(
        "import torch, torch.distributed as dist\n"
        "from torch.nn.parallel import DistributedDataParallel\n"
        "dist.init_process_group('gloo')\n"
        "torch.manual_seed(0)\n"
        "model = DistributedDataParallel(torch.nn.Linear(4, 1))\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)\n"
        "for _ in range(20):\n"
        "    optimizer.zero_grad()\n"
        "    (model(torch.ones(2, 4) * (1 + dist.get_rank())) - 1).square().mean().backward()\n"
        "    optimizer.step()\n"
        "print(f'scale {float(optimizer.scale)!r}')\n"
        "dist.destroy_process_group()\n"
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *torchrun, *COMMAND, "--report", str(tmp_path / "report"), str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    scales = re.findall(r"scale (\S+)", done.stdout)
    assert len(scales) == 2
    assert scales[0] == scales[1]
    assert len(ADVICE.findall(done.stderr)) == 1
    assert len(json.loads((tmp_path / "report" / "report.json").read_text())["optimizers"]) == 1


# --- the report in a directory ----------------------------------------------------------------------------------------


def test_the_report_holds_what_was_learned_and_how(script, tmp_path):
    path = script(
        TRAINING
        + "groups = [{'params': [model.weight]}, {'params': [model.bias], 'lr': 0.05}]\n"
        + "optimizer = torch.optim.SGD(groups, lr=0.1)\n"
        + "def closure():\n    optimizer.zero_grad()\n    loss = model(torch.ones(4)).square().sum()\n"
        + "    loss.backward()\n    return loss\n"
        + "for _ in range(5): optimizer.step(closure)\n"
        + "torch.optim.LBFGS(model.parameters())\n"
        + "os.chdir('/')\nsys.exit(4)\n"
    )
    done = python(*COMMAND, "--report", "out/1", path, "--x", check=4, cwd=tmp_path)
    out = tmp_path / "out" / "1"
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["command"] == [str(path), "--x"]
    assert report["outcome"] == "SystemExit: 4"
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
    assert adamw["loss"] == []
    assert [group["script_lr"] for group in sgd["groups"]] == [0.1, 0.05]
    assert all(a == pytest.approx(2 * b) for _, (a, b) in sgd["effective_lr"])
    assert re.fullmatch(r"to train without Mechanic, use SGD with lr=\S+, \S+ in its groups", sgd["advice"])
    assert [step for step, _ in sgd["loss"]] == [1, 2, 3, 4, 5]
    assert sgd["loss"][0][1] > sgd["loss"][-1][1] > 0
    assert (lbfgs["mechanized"], lbfgs["steps"], lbfgs["groups"]) == (
        False,
        None,
        [{"script_lr": 1.0, "learned_lr": None}],
    )
    height, width, _ = image.imread(out / "effective_lr.png").shape
    assert min(height, width) > 600
    assert f"mechanic: report in {out}" in done.stderr.splitlines()


def test_a_report_that_cannot_be_written_changes_nothing(script, tmp_path):
    path = script(TRAINING + "import shutil; shutil.rmtree('out')\nsys.exit(5)\n")
    done = python(*COMMAND, "--report", "out", path, check=5, cwd=tmp_path)
    assert "mechanic: the report cannot be made. Got FileNotFoundError" in done.stderr
    assert ADVICE.search(done.stderr)


def record_of_training(steps, closure):
    with patched() as built:
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    record = _report.Record(optimizer)
    losses = train(model, optimizer, steps, closure=closure)
    return built, {built[0]: record}, losses


def test_curves_are_bounded(monkeypatch):
    monkeypatch.setattr(_report, "CAPACITY", 8)
    _, records, losses = record_of_training(30, closure=True)
    (record,) = records.values()
    kept = record.losses()
    assert [step for step, _ in kept] == [1, 5, 9, 13, 17, 21, 25, 29]
    assert [loss for _, loss in kept] == [losses[step - 1] for step, _ in kept]
    assert [step for step, _ in record.effective_lr()] == [step for step, _ in kept]


def test_tensorboard_gets_every_curve_if_it_is_there_and_is_asked_for_if_not(monkeypatch, tmp_path):
    built, records, losses = record_of_training(3, closure=True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert _report.write(tmp_path, built, records, {}) == [
        "no TensorBoard log: tensorboard is not installed. Remedy: pip install tensorboard"
    ]
    scalars = []

    class SummaryWriter:
        def __init__(self, directory):
            assert directory == str(tmp_path / "tensorboard")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            scalars.append("closed")

        def add_scalar(self, *scalar):
            scalars.append(scalar)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    assert _report.write(tmp_path, built, records, {}) == []
    (record,) = records.values()
    assert scalars == [
        *(("0 AdamW/effective lr", lr, step) for step, (lr,) in record.effective_lr()),
        *(("0 AdamW/loss", loss, step) for step, loss in enumerate(losses, 1)),
        "closed",
    ]


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    built, records, _ = record_of_training(2, closure=False)
    built[0].script_lrs[0] = float("inf")
    _report.write(tmp_path, built, records, {})
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["optimizers"][0]["groups"][0]["script_lr"] is None


def test_nothing_is_drawn_of_a_run_without_steps(tmp_path):
    with patched() as built:
        torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=0.1)
    assert _report.write(tmp_path, built, {}, {}) == ["no picture: no step was recorded"]
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.py"], "'missing.py' does not exist."),
        (["--s-init", "0", __file__], "mechanize: s_init must be 'auto' or a finite number > 0. Got 0.0. Remedy:"),
        (["--s-init", "automatic", __file__], "'automatic' is neither 'auto' nor a number."),
        (["--base-lr", "-1", __file__], "patched: base_lr must be a finite number > 0, or None. Got -1.0. Remedy:"),
        (["--betas", "0.9;0.99", __file__], "'0.9;0.99' is not a list of numbers such as 0.9,0.99."),
        (["--report", __file__, __file__], "is a file"),
        (["--no-such-option", __file__], "No such option"),
        ([], "Missing argument 'SCRIPT'"),
    ],
)
def test_a_wrong_command_line_is_refused_before_the_script_runs(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["mechanic", "run", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_help_names_every_option_of_mechanize_and_keeps_the_examples_on_their_lines(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mechanic", "run", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("Usage: mechanic run [OPTIONS] SCRIPT [ARGS]...\n")
    assert "\n    mechanic run train.py --epochs 10\n" in text
    for option in ("--s-init", "--s-decay", "--betas", "--eps", "--log-every", "--skip-nonfinite"):
        assert option in text


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_a_missing_extra_is_named(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; import mechanic_pytorch.__main__ as m; m.main()"
    done = python("-c", code, check=1)
    rule = f"the command needs click and rich. Got no module named {missing!r}."
    assert done.stderr == f"mechanic: {rule} Remedy: pip install 'mechanic-pytorch[run]'.\n"


def test_a_picture_without_matplotlib_is_refused_before_the_script_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(_run, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["mechanic", "run", "--report", str(tmp_path / "out"), __file__])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "--report needs matplotlib. Remedy: pip install 'mechanic-pytorch[run]'." in capsys.readouterr().err


def test_the_console_command_is_the_same():
    assert 'mechanic = "mechanic_pytorch.__main__:main"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
