"""Pages say what programs have counted and measured: other people's benchmarks, and bytes per weight."""

import inspect
import re
from pathlib import Path

import pytest
import torch

from benchmarks import deepobs, lightbench, memory, nanogpt, rl
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
    suites |= {"LightBench": lightbench.table, "RL zoo": rl.table}
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


def test_a_task_that_is_not_solved_counts_as_all_runs_that_it_gets():
    drawn, default = "AdamW, lr and betas drawn", "mechanized, nothing drawn"
    rows = [{"method": drawn, "solved": True, "attempts": 3}, {"method": drawn, "solved": True, "attempts": 5}]
    rows += [{"method": drawn, "solved": False, "attempts": 1}, {"method": default, "solved": True, "attempts": 1}]
    assert lightbench.table(rows).splitlines()[2:] == [
        "| AdamW, lr and betas drawn | 2 of 3 | 20 | 5 | 9.3 |",
        "| mechanized, nothing drawn | 1 of 1 | 1 |  |  |",
    ]


def test_lightbench_runs_what_has_an_easy_setting_and_reads_cuda_as_cpu(tmp_path):
    (tmp_path / "lightbench").mkdir()
    sources = {"easy_one": '{"easy": {}}', "trivial_one": '{"trivial": {}}', "memory_constrained": '{"easy": {}}'}
    for name, configs in sources.items():
        path = tmp_path / "lightbench" / f"{name}.py"
        path.write_text(f'configs = {configs}\ndevice = "cuda"\nmoved = "model".cuda()\n', encoding="utf-8")
    assert lightbench.tasks(tmp_path) == ["easy_one"]
    names = {}
    exec(lightbench.OnCpu("easy_one", str(tmp_path / "lightbench" / "easy_one.py")).get_code("easy_one"), names)
    assert (names["device"], names["moved"]) == ("cpu", "model")
    assert len(list((tmp_path / "lightbench").iterdir())) == len(sources)  # the clone stays as it is


@pytest.mark.parametrize("build", [lightbench.plain_defaults, lightbench.auto_defaults])
def test_lightbench_draws_nothing_for_defaults(build):
    assert list(inspect.signature(build).parameters) == ["params"]
    (group,) = build([torch.nn.Parameter(torch.ones(2))]).param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.999), 0.0)


def test_the_table_of_returns_has_those_of_the_last_evaluation_and_each_lr():
    task, plain, run = "SAC, Pendulum", "as it is", "`mechanic run`"
    rows = [{"task": task, "method": plain, "returns": [-1400.0, -150.0], "learned lr": None}]
    for last, rates in ((-140.0, [1e-3, 2e-3, 0.5]), (-160.0, [3e-3, 2e-3, 0.1])):
        rows.append({"task": task, "method": run, "returns": [-1000.0, last], "learned lr": rates})
    learned = "actor 1e-03 to 3e-03, critic 2e-03 to 2e-03, entropy coefficient 1e-01 to 5e-01"
    assert rl.table(rows).splitlines()[2:] == [
        "| SAC, Pendulum | -157 ± 89 | as it is | -150 | -150 | 1e-3 |",
        f"| SAC, Pendulum | -157 ± 89 | `mechanic run` | -150 ± 14 | -140, -160 | {learned} |",
    ]


@pytest.mark.filterwarnings("ignore:Mechanized.* lost in rounding")
@pytest.mark.parametrize("name", ["AdamW, fused", "AdamW, foreach", "SGD"])
def test_the_table_of_memory_says_what_is_counted(name):
    page = (DOCS / "speed.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if line.startswith(f"| {name} | ") and " / " in line]
    base, options = memory.BASES[name]
    kinds = ((base, options), (memory.mechanize(base, s_init="auto"), {**options, "lr": 1.0}))
    counted = [memory.counted(*kind, memory.DTYPES["float32"]) for kind in kinds]
    assert row.split(" | ")[1:3] == [f"{kept:.1f} / {peak:.1f}" for kept, peak in counted]
