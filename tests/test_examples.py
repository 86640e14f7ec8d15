import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import torch
from matplotlib import image
from nbclient import NotebookClient
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.utils._pytree import keystr, tree_leaves_with_path

from forks import torchrun
from mnist import write_digits_as_mnist

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_demo_prints_its_table_and_draws_its_picture(tmp_path, forks):
    output = tmp_path / "demo.png"
    demo = forks.run([EXAMPLES / "demo.py", "--epochs", "2", "--output", output], tmp_path)
    assert demo.returncode == 0, demo.stderr

    words = [line.split() for line in demo.stdout.splitlines()]
    rows = [line[1] for line in words if len(line) > 6 and line[0] == line[2] == line[-1]]  # the lines of a table
    assert rows == ["1e-08", "1e-06", "1e-04", "1e-02", "1e+00", "1e+02", "1e+04", "1e+06"]

    assert f"Picture: {output.resolve()}" in demo.stdout.splitlines()
    assert output.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    height, width, _ = image.imread(output).shape
    assert height >= 400
    assert width >= 600
    assert 10_000 < output.stat().st_size < 1_000_000


@pytest.mark.xdist_group("frameworks")
@pytest.mark.parametrize(
    ("name", "arguments", "pattern", "is_learned"),
    [
        ("trainer", ["--steps", "40"], r"loss (\S+) -> (\S+), learned lr \de-0\d", lambda a, b: b < a - 1),
        ("lightning_digits", ["--epochs", "3"], r"accuracy (\S+), learned lr \de-0\d", lambda a: a > 0.9),
        (
            "muon_adamw",
            ["--steps", "80"],
            r"accuracy (\S+), learned lr Muon \de-0\d, AdamW \de-0\d",
            lambda a: a > 0.95,
        ),
        (
            "lora",
            ["--steps", "150"],
            r"accuracy (\S+), mirrored (\S+) with 1616 numbers trained,\nlearned lr \de-0\d",
            lambda *both: min(both) > 0.9,
        ),
    ],
)
def test_a_small_program_for_each_framework_learns_and_prints_its_lr(
    name, arguments, pattern, is_learned, tmp_path, forks_of_frameworks
):
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
    done = forks_of_frameworks.run([path, *arguments], tmp_path)
    assert done.returncode == 0, done.stderr
    found = re.search(pattern, done.stdout)
    assert found, done.stdout
    assert is_learned(*map(float, found.groups())), done.stdout


def test_the_notebook_runs_from_top_to_bottom_and_is_stored_without_outputs(tmp_path, monkeypatch):
    """Digits stand for Fashion-MNIST: the tests need no download."""
    (tmp_path / "fashion-mnist").mkdir()
    write_digits_as_mnist(tmp_path / "fashion-mnist")
    monkeypatch.setenv("MECHANIC_DATA", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(EXAMPLES / "digits.ipynb", 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)

    NotebookClient(notebook, timeout=300).execute()
    outputs = [output for cell in code for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    warned = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stderr")
    assert warned == ""
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert "Fashion-MNIST is not in" not in printed
    number = r" +(\d+\.\d+)"
    sweep, mechanized = (
        [float(found) for found in re.search(rf"{name}.* {runs}{number}{number}", printed).groups()]
        for name, runs in (("sweep", 11), ("mechanized", 1))
    )
    assert mechanized[1] > sweep[1] - 0.01, "the text says so"
    assert mechanized[0] < sweep[0]


def run_script(path, arguments, data):
    """What each process does that torchrun starts."""
    os.environ["MECHANIC_DATA"] = str(data)
    torch.set_num_threads(1)
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.xdist_group("distributed")
def test_fsdp2_goes_on_after_a_process_was_killed_as_if_nothing_had_happened(tmp_path):
    """On two processes. The text is English, but not Shakespeare's: the tests need no download."""
    data = tmp_path / "data" / "tinyshakespeare"
    data.mkdir(parents=True)
    shutil.copy(EXAMPLES.parent / "LICENSE", data / "input.txt")
    script = EXAMPLES / "fsdp2.py"

    def options(runs):
        return ["--steps", "24", "--save-every", "4", "--checkpoints", str(runs)]

    def start(runs):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        environment = {**os.environ, "MECHANIC_DATA": str(data.parent), "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*command, str(script), *options(runs)], env=environment, **pipes)

    def finish(runs):
        """In forks, as all but the one that is killed."""
        out = torchrun(run_script, script, options(runs), data.parent, output=tmp_path / "output")
        assert out.splitlines()[-1].startswith("step    23  loss "), out
        return out.splitlines()

    def last_checkpoint(runs):
        dcp_to_torch_save(runs / "00000024", runs / "last.pt")
        return torch.load(runs / "last.pt", weights_only=False)

    uninterrupted = finish(tmp_path / "uninterrupted")
    assert uninterrupted[0].startswith("step     0  loss ")

    interrupted = tmp_path / "interrupted"
    launcher = start(interrupted)
    deadline = time.monotonic() + 120
    while not (interrupted / "00000004" / ".metadata").exists():
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    workers = psutil.Process(launcher.pid).children(recursive=True)
    next(worker for worker in workers if worker.environ().get("RANK") == "1").kill()
    _, err = launcher.communicate(timeout=180)
    assert launcher.returncode != 0
    assert "SIGKILL" in err
    assert not (interrupted / "00000024").exists(), "was killed too late"
    shutil.copytree(interrupted / "00000004", interrupted / "00000023", dirs_exist_ok=True)
    (interrupted / "00000023" / ".metadata").unlink()  # as if it had been killed while it wrote this one

    assert finish(interrupted) == uninterrupted[1:]
    expected, resumed = last_checkpoint(tmp_path / "uninterrupted"), last_checkpoint(interrupted)
    compared = {"model": 0, "optimizer": 0, "schedule": 0}
    for (path, value), (other_path, other) in zip(*map(tree_leaves_with_path, (expected, resumed)), strict=True):
        assert path == other_path
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, keystr(path)
        compared[path[0].key] += 1
    assert min(compared.values()) > 5
