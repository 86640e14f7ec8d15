import subprocess
import sys
from pathlib import Path

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
