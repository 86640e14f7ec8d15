import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import image

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_demo_prints_its_table_and_draws_its_picture(tmp_path):
    output = tmp_path / "demo.png"
    command = [sys.executable, "-W", "error", EXAMPLES / "demo.py", "--epochs", "2", "--output", output]
    demo = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)
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


@pytest.mark.xdist_group("distributed")
def test_fsdp2_trains_and_goes_on_after_an_interruption(tmp_path):
    """On two processes. The text is English, but not Shakespeare's: the tests need no download."""
    data = tmp_path / "data" / "tinyshakespeare"
    data.mkdir(parents=True)
    shutil.copy(EXAMPLES.parent / "LICENSE", data / "input.txt")

    def run():
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += [str(EXAMPLES / "fsdp2.py"), "--steps", "12", "--save-every", "4"]
        environment = {**os.environ, "MECHANIC_DATA": str(data.parent), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, "--checkpoints", str(tmp_path / "runs")],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=180,
        )
        lines = done.stdout.splitlines()
        # Not the exit code: once, a process aborted while it left Python, after all was done ("terminate called without
        # an active exception", from a thread of torch's). The last line and the checkpoints say whether it trained.
        assert lines, done.stderr
        assert lines[-1].startswith("step    11  loss "), done.stderr
        return lines

    uninterrupted = run()
    assert uninterrupted[0].startswith("step     0  loss ")
    last = sorted((tmp_path / "runs").iterdir())
    assert [path.name for path in last] == ["00000004", "00000008", "00000012"]
    shutil.rmtree(last[2])
    (last[1] / ".metadata").unlink()  # a process died while this one was written
    assert run() == uninterrupted[1:]
