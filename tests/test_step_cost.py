"""The figures of `docs/speed.md` are those that were measured."""

import json
from pathlib import Path

from benchmarks import step_cost
from benchmarks.pages import between_marks

ROOT = Path(__file__).parent.parent


def test_the_page_says_what_was_measured():
    figures = json.loads((ROOT / "benchmarks" / "step_cost_gpu.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    assert "NVIDIA" in page
    assert between_marks(page, "step cost", {"gpu": step_cost.text(figures)}.get) == page


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
