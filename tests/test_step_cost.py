"""The figures of `docs/speed.md` are those that were measured."""

import json
from pathlib import Path

import pytest

from benchmarks import step_cost
from benchmarks.pages import between_marks

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("device", "machine"), [("cpu", "x86_64"), ("gpu", "NVIDIA")])
def test_the_page_says_what_was_measured(device, machine):
    figures = json.loads((ROOT / "benchmarks" / f"step_cost_{device}.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    text = step_cost.text(figures)
    assert machine in text
    assert between_marks(page, "step cost", {device: text}.get) == page


def test_a_step_is_measured_and_reported():
    method = step_cost.methods(ROOT / ".venv" / "peers", "cpu")[0]
    row = step_cost.cost(method, [(30, 20), (7,)], step_cost.DTYPES["bfloat16"], "cpu", 3)
    speeds = {"a copy": 10.0, "fused AdamW": 8.0}
    figures = {"gpu": False, "tables": {"some, bfloat16": [row]}, "GB/s": speeds, "training": {"GPT": 1.25}}
    text = step_cost.text({**figures, "command": "python", "machine": "a CPU", "rounds": 3})
    assert row["time"] > 0
    assert row["host reads"] == 0
    assert f"| fused AdamW, mechanized | {row['time']:.1f} |" in text
    assert "| fused AdamW | 8 | 80% |" in text
    assert "GPT: 1.25." in text
