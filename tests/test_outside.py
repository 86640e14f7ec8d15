"""Pages say what programs have counted and measured: other people's benchmarks, and bytes per weight."""

import re
from pathlib import Path

import pytest

from benchmarks import deepobs, memory, nanogpt
from benchmarks.outside import RESULTS, Results
from benchmarks.pages import between_marks

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_every_mark_has_a_program_and_every_program_a_mark():
    pages = (ROOT / "README.md", *DOCS.glob("*.md"))
    marked = {name for page in pages for name in re.findall(r"<!-- ([a-z ]+): [a-z ]+ -->", page.read_text("utf-8"))}
    call = r'(?:print_or_fill|between_marks)\(.*?, "([a-z ]+)", '
    programs = (ROOT / "benchmarks").rglob("*.py")
    assert marked == {name for path in programs for name in re.findall(call, path.read_text("utf-8"))}


def test_the_page_on_outside_benchmarks_says_what_was_measured():
    path, suites = ROOT / RESULTS, {"nanoGPT": nanogpt.table, "DeepOBS": deepobs.table}
    made = {suite.lower(): Results(path, suite).shown(table) for suite, table in suites.items()}
    page = (DOCS / "outside.md").read_text(encoding="utf-8")
    assert between_marks(page, "outside", made.get) == page


def test_a_run_that_is_known_is_not_made_again(tmp_path):
    results = Results(tmp_path / "results.jsonl", "some suite")
    results.add({"seed": 0}, lambda: {"loss": 1.0})
    again = Results(tmp_path / "results.jsonl", "some suite")
    again.add({"seed": 0}, lambda: pytest.fail("it was made again"))
    again.add({"seed": 1}, lambda: {"loss": 2.0})
    assert [row["loss"] for row in Results(tmp_path / "results.jsonl", "some suite").rows] == [1.0, 2.0]
    assert Results(tmp_path / "results.jsonl", "another").rows == []


@pytest.mark.filterwarnings("ignore:Mechanized.* lost in rounding")
@pytest.mark.parametrize("name", ["AdamW, fused", "AdamW, foreach", "SGD"])
def test_the_table_of_memory_says_what_is_counted(name):
    page = (DOCS / "speed.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if line.startswith(f"| {name} | ") and " / " in line]
    base, options = memory.BASES[name]
    kinds = ((base, options), (memory.mechanize(base, s_init="auto"), {**options, "lr": 1.0}))
    counted = [memory.counted(*kind, memory.DTYPES["float32"]) for kind in kinds]
    assert row.split(" | ")[1:3] == [f"{kept:.1f} / {peak:.1f}" for kept, peak in counted]
