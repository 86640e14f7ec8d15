"""Pages say what programs have counted and measured: other people's benchmarks, and bytes per weight."""

import inspect
import re
from pathlib import Path

import pytest
import torch

from benchmarks import deepobs, finetune, larger_gpt, lightbench, memory, nanogpt, rl
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
    path = ROOT / RESULTS
    suites = {"nanoGPT": nanogpt.table, "DeepOBS": deepobs.table, "larger GPT": larger_gpt.table}
    suites |= {"LightBench": lightbench.table, "RL zoo": rl.table}
    made = {suite.lower(): Results(path, suite).shown(table) for suite, table in suites.items()} | finetune.tables(path)
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


def test_below_a_table_stands_what_it_rests_on(tmp_path):
    results = Results(tmp_path / "results.jsonl", "some suite")
    results.add({"packages": "net 0.1, loader 2.0"}, dict)
    results.add({"commit": "abc1234"}, dict)
    shown = results.shown(lambda rows: f"{len(rows)} rows")
    setting = results.rows[0]["setting"]
    assert shown == f"2 rows\n\n<sub>commit abc1234; {setting}; net 0.1, loader 2.0; {setting}.</sub>"


TASK = finetune.Task("Net", lambda: pytest.fail("it was made"), (), usual=1e-3, reach=1, steps=10, batch=2)


def fine_tuned(lr, seed, loss, learned=None):
    return {"lr": lr, "seed": seed, finetune.LOSS: loss, "test accuracy, %": 90.0 + seed, "learned lr": learned}


def test_fine_tuning_makes_ours_and_the_usual_lr_first_and_the_grid_grows_to_where_its_best_is_inside():
    rows, order = [], []
    losses = {None: 1.0, 1e-3: 3.0, 3.2e-4: 2.0, 3.2e-3: 4.0, 1e-4: 1.5, 3.2e-5: None}  # None: it diverged
    for lr, seed in finetune.runs(TASK, rows, seeds=2):
        order.append((lr, seed))
        rows.append(fine_tuned(lr, seed, losses[lr]))
    first = [None, 1e-3, 3.2e-4, 3.2e-3]
    grown = [(lr, seed) for lr in (1e-4, 3.2e-5) for seed in (0, 1)]
    assert order == [*((lr, 0) for lr in first), *((lr, 1) for lr in first), *grown]
    assert finetune.best(TASK, rows) == 1e-4
    assert finetune.missing(TASK, rows, seeds=2) == []
    assert finetune.missing(TASK, rows[:-1], seeds=2) == [-3]


def test_the_tables_of_fine_tuning_show_each_lr_and_what_diverged():
    rows = [
        *(fine_tuned(None, seed, loss, 2e-3) for seed, loss in ((0, 1.0), (1, 1.1))),
        *(fine_tuned(1e-3, seed, loss) for seed, loss in ((0, 1.4), (1, 1.6))),
        *(fine_tuned(3.2e-4, seed, loss) for seed, loss in ((0, 0.9), (1, 1.2))),
        *(fine_tuned(3.2e-3, seed, None) for seed in (0, 1)),
        fine_tuned(1e-2, 0, 0.5),  # a seed is missing, so it is not the best
    ]
    lines = finetune.table(TASK, rows).splitlines()
    assert lines[0] == "| Net, AdamW's lr | validation loss | test accuracy, % | learned lr |"
    assert lines[2] == "| mechanized, lr 1 | 1.050 (1.000, 1.100) | 90.5 (90.0, 91.0) | 2.0e-03 |"
    assert lines[3] == "| **3.2e-04** | 1.050 (0.900, 1.200) | 90.5 (90.0, 91.0) |  |"
    assert lines[5].startswith("| 3.2e-03 | diverged |")
    assert finetune.summary({TASK: rows}).splitlines()[2:] == [
        "| Net | 1.050 | 1.050 | 1.500 | 1.00 | 2.0e-03 | 3.2e-04 | 1.0e-03 |"
    ]
    assert finetune.table(TASK, []) == finetune.summary({TASK: []}) == ""


def test_fine_tuning_warms_up_and_ends_at_zero():
    factors = [finetune.factor(step, 100) for step in range(101)]
    assert factors[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert factors[6:] == pytest.approx([1 - step / 94 for step in range(95)])


def test_the_larger_gpt_runs_ours_and_the_recipe_first_and_shows_the_best_of_its_grid(tmp_path, monkeypatch):
    monkeypatch.setattr(larger_gpt, "prepare", lambda home: None)
    keys = [key for key, _ in larger_gpt.runs(tmp_path, seeds=2)]
    assert keys[:2] == [{"lr": None, "seed": 0}, {"lr": 1e-3, "seed": 0}]
    assert [key["seed"] for key in keys] == [0] * 6 + [1] * 6
    rows = [{**key, "train": 1.0, "validation": 1.5 + (key["lr"] or 0), "learned lr": None} for key in keys]
    rows[0]["learned lr"] = 2e-3
    lines = larger_gpt.table(rows).splitlines()
    assert lines[2] == "| `mechanic run` | 1.500 | 1.000 | 2.0e-03 |"
    assert lines[3] == "| **as it is, lr 1e-04** | 1.500 | 1.000 |  |"
    assert "**" not in "".join(lines[4:])


def test_the_larger_gpt_is_the_recipe_with_other_sizes_and_a_floor_of_a_tenth(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(larger_gpt, "train", lambda *arguments: called.append(arguments))
    larger_gpt.run(tmp_path, 3e-4, 1)
    larger_gpt.run(tmp_path, None, 0)
    (_, plain, *is_plain), (_, ours, *is_ours) = called
    assert plain[-2:] == ["--learning_rate=0.0003", "--min_lr=3e-05"]
    assert ours == plain[:-2] == [*nanogpt.FLAGS, *larger_gpt.SIZE]
    assert (is_plain, is_ours) == ([False, 1], [True, 0])


@pytest.mark.filterwarnings("ignore:Mechanized.* lost in rounding")
@pytest.mark.parametrize("name", ["AdamW, fused", "AdamW, foreach", "SGD"])
def test_the_table_of_memory_says_what_is_counted(name):
    page = (DOCS / "speed.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if line.startswith(f"| {name} | ") and " / " in line]
    base, options = memory.BASES[name]
    kinds = ((base, options), (memory.mechanize(base, s_init="auto"), {**options, "lr": 1.0}))
    counted = [memory.counted(*kind, memory.DTYPES["float32"]) for kind in kinds]
    assert row.split(" | ")[1:3] == [f"{kept:.1f} / {peak:.1f}" for kept, peak in counted]
