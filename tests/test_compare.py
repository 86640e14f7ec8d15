"""`mechanic compare SCRIPT`: as it is, mechanized, and plainly at the learned lr, side by side."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

import psutil
import pytest
from matplotlib import image

from mechanic_pytorch._config import Config
from mechanic_pytorch.scripts import cli
from mechanic_pytorch.scripts import compare as comparing
from mechanic_pytorch.scripts.compare import NOT_RUN, OK, TITLES, Trained, _show, last_loss

SCRIPT = """
import json, random, sys
import numpy, torch

print(json.dumps([random.random(), numpy.random.rand(), torch.rand(()).item(), hash("a")]))
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
if type(optimizer).__name__ in sys.argv:
    sys.exit(3)
losses = []
for step in range(30):
    optimizer.zero_grad()
    loss = (model(torch.ones(8, 4)) - 1).square().mean()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(json.dumps(losses))
print("the", "last", "line")
print()
"""

of_one_comparison = pytest.mark.xdist_group("compare")  # one xdist worker: it is made once


@pytest.fixture(scope="module")
def compare(forks):
    """Return a function that compares in a directory; the runs are processes of their own, with warnings as errors."""

    def compare(directory, *arguments):
        (directory / "script.py").write_text(SCRIPT, encoding="utf-8")
        command = ["-m", "mechanic_pytorch", "compare", *arguments]
        done = forks.run(command, directory, cwd=directory, env={"PYTHONWARNINGS": "error"})
        return done, json.loads(next(directory.rglob("compare.json")).read_text(encoding="utf-8"))

    return compare


@pytest.fixture(scope="module")
def compared(compare, tmp_path_factory):
    directory = tmp_path_factory.mktemp("compare")
    done, result = compare(directory, "--seeds", "2", "-m", "script", "--epochs", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    return done, result


def printed(run):
    return (Path(run["directory"]) / "stdout.txt").read_text(encoding="utf-8").splitlines()


def cells(line):
    return [cell.strip() for cell in line.strip("│").split("│")]


@of_one_comparison
def test_the_three_runs_are_one_below_the_other(compared):
    done, result = compared
    assert result["command"] == ["-m", "script", "--epochs", "3"]
    assert [(run["kind"], run["seed"], run["end"]) for run in result["runs"]] == [
        (kind, seed, OK) for seed in (0, 1) for kind in TITLES
    ]
    rows = [cells(line) for line in done.stdout.splitlines() if re.match("│ [aml]", line)]
    assert [row[0] for row in rows] == [*TITLES.values()]
    assert [row[1] for row in rows] == ["AdamW"] * 3
    assert [row[3] for row in rows] == ["30"] * 3
    assert rows[0][2] == "1.0e-03"
    for kind, row in zip(TITLES, rows, strict=True):
        mean = fmean(run["optimizers"][0]["last_loss"] for run in result["runs"] if run["kind"] == kind)
        assert row[4] == f"{mean:.3g}"
    assert "mechanic: mechanized, seed 1, printed last: the last line" in done.stdout
    assert "mechanic: to train without Mechanic, use AdamW with lr=" in done.stdout


@of_one_comparison
def test_the_last_run_has_the_lr_that_the_one_before_has_learned(compared):
    _, result = compared
    lrs = [run["optimizers"][0]["lr"] for run in result["runs"]]
    for plain, mechanized, learned in (lrs[:3], lrs[3:]):
        assert plain == [1e-3]
        assert learned == pytest.approx(mechanized, rel=1e-6)
        assert learned[0] > 2e-3


@of_one_comparison
def test_losses_are_those_of_the_loop_and_the_last_one_is_the_mean_of_a_tenth(compared):
    _, result = compared
    for run in result["runs"]:
        losses = json.loads(printed(run)[1])
        (optimizer,) = json.loads((Path(run["directory"]) / "report.json").read_text())["optimizers"]
        assert optimizer["loss"] == [[i + 1, pytest.approx(loss)] for i, loss in enumerate(losses)]
        assert run["optimizers"][0]["last_loss"] == pytest.approx(fmean(losses[-3:]))


@of_one_comparison
def test_runs_of_one_seed_begin_alike_and_those_of_two_do_not(compared):
    _, result = compared
    numbers = [json.loads(printed(run)[0]) for run in result["runs"]]
    assert numbers[0] == numbers[1] == numbers[2]
    assert numbers[3] == numbers[4] == numbers[5]
    assert all(a != b for a, b in zip(numbers[0], numbers[3], strict=True)), "torch, NumPy, random and hash"


@of_one_comparison
def test_what_it_draws_is_where_it_says(compared):
    done, result = compared
    directory = Path(result["runs"][0]["directory"]).parents[1]
    assert directory.name == "mechanic-compare"
    assert done.stdout.splitlines()[-1] == f"mechanic: table, picture and reports in {directory}"
    height, width, _ = image.imread(directory / "compare.png").shape
    assert width > 2 * height > 600


@pytest.mark.parametrize(
    ("failing", "ends"),
    [
        ("AdamW", ["failed, exit status 3", OK, "failed, exit status 3"]),
        ("MechanizedAdamW", [OK, "failed, exit status 3", NOT_RUN]),
    ],
)
def test_a_run_that_fails_is_shown_and_the_others_go_on(compare, tmp_path, failing, ends):
    stale = tmp_path / "out" / "mechanized" / "0" / "report.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("of an earlier comparison", encoding="utf-8")
    done, result = compare(tmp_path, "--report", "out", "script.py", failing)
    assert done.returncode == 1
    assert [run["end"] for run in result["runs"]] == ends
    because = {NOT_RUN: "not run, because the mechanized run failed"}
    for title, end in zip(TITLES.values(), ends, strict=True):
        assert (f"mechanic: {title}: {because.get(end, end)}" in done.stdout) == (end != OK)
    assert (tmp_path / "out" / "compare.png").exists()


def test_after_ctrl_c_what_has_ended_is_shown(tmp_path, capsys):
    def interrupted():
        yield Trained("plain", 0, tmp_path, OK, {"seconds": 7.2})
        raise KeyboardInterrupt

    assert comparing.compare(cli.Comparison(["x.py"], [], [0], tmp_path), interrupted()) == 130
    assert not (tmp_path / "compare.png").exists(), "there is nothing to draw"
    (run,) = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))["runs"]
    assert (run["kind"], run["seconds"], run["optimizers"]) == ("plain", 7.2, [])
    assert [cells(line) for line in capsys.readouterr().out.splitlines() if "as it is" in line] == [
        ["as it is", "", "", "", "", "7", "ok"]
    ]


def test_sigterm_ends_the_run_too_and_what_has_ended_is_kept(tmp_path):
    (tmp_path / "script.py").write_text(
        """import pathlib, time
plain = pathlib.Path("plain")
if not plain.exists():
    plain.touch()
    raise SystemExit
pathlib.Path("mechanized").touch()
time.sleep(600)
""",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "mechanic_pytorch", "compare", "script.py"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while not (tmp_path / "mechanized").exists():
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.1)
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        assert process.wait(60) == -signal.SIGTERM
    _, left = psutil.wait_procs(children, timeout=60)
    assert children
    assert all(child.status() == psutil.STATUS_ZOMBIE for child in left)  # where nobody waits for orphans
    (run,) = json.loads(next(tmp_path.rglob("compare.json")).read_text(encoding="utf-8"))["runs"]
    assert run["kind"] == "plain"


def test_where_nothing_is_known_the_last_lines_are_shown(tmp_path, capsys):
    (tmp_path / "stdout.txt").write_text("1\n2\n3\n\n4\n", encoding="utf-8")
    (tmp_path / "stderr.txt").write_text("Traceback\n\nKilled\n", encoding="utf-8")
    runs = [Trained("plain", 0, tmp_path, OK, {}), Trained("mechanized", 0, tmp_path, "failed, SIGKILL", {})]
    job = cli.Comparison(["x.py"], [], [0], tmp_path)
    _show(job, runs)
    out = capsys.readouterr().out.splitlines()
    assert "mechanic: as it is, printed last: 2 / 3 / 4" in out
    assert f"mechanic: mechanized: failed, SIGKILL: Killed ({tmp_path / 'stderr.txt'})" in out


def test_a_loss_that_is_not_a_number_is_not_taken_for_none():
    assert last_loss({"loss": []}) is None
    assert str(last_loss({"loss": [(1, 0.5), (2, None)]})) == "nan"
    assert last_loss({"loss": [(1, None), (2, 0.5)]}) == 0.5


def test_options_of_mechanize_reach_the_mechanized_run(tmp_path):
    options = ["--include", "LBFGS", "--include", "a.B", "--betas", "0.9,0.99", "--no-skip-nonfinite", "--per-group"]
    read = {"standalone_mode": False}
    job = cli._compare.main(["--report", str(tmp_path), *options, "--max-lr", "0.5", __file__, "--x"], **read)
    assert (job.command, list(job.seeds), job.directory) == ([__file__, "--x"], [0], tmp_path)
    patch = cli._run.main([*job.options, __file__], **read).patch
    given = {"betas": (0.9, 0.99), "skip_nonfinite": False, "per_group": True, "max_lr": 0.5}
    defaults = {name: value for name, value in vars(Config(s_init="auto")).items() if name in patch.options}
    assert patch.options == defaults | given
    assert patch.include == ["LBFGS", "a.B"]
