"""benchmarks/convergence: no result is lost or made twice, and the comparison is a fair one.

`python -m tests.test_convergence run …` is the program with one tiny task in the place of all others.
"""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_iris

from benchmarks.convergence import __main__ as program
from benchmarks.convergence import data, methods, plan, tables, tasks
from benchmarks.convergence.results import IDENTITY, Results, key

ROOT = Path(__file__).parents[1]
PROGRAM = [sys.executable, "-m", "tests.test_convergence", "run"]  # in ROOT
METHODS = ["--methods", "grid", "ours", "ours-auto", "plain@learned"]


def tiny(name="tiny", base="Adam", steps=20, **options):
    def load():
        x, y = (torch.tensor(part) for part in load_iris(return_X_y=True))
        x = (x - x.mean(0)).float()
        return x, y, x, y

    model = partial(tasks.linear, 4, 3)
    lengths = {"quick": steps, "full": steps}
    return tasks.Task(name, base, load, model, "accuracy, %", "cosine", 16, lengths, **{"warm_up": 0.05, **options})


@pytest.fixture
def task():
    return tiny()


def main(arguments, task):
    """Call the program, which then knows one task."""
    return program.main(arguments, {task.name: task})


def run_program(path, task, *arguments, seeds=("0", "1")):
    return main(["run", "--results", str(path), "--jobs", "1", *METHODS, "--seeds", *seeds, *arguments], task)


def identities(path):
    return [key(json.loads(line)) for line in path.read_text().splitlines()]


def test_a_second_run_repeats_nothing(task, tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    assert run_program(path, task) == 0
    before = path.read_bytes()
    assert run_program(path, task) == 0
    assert path.read_bytes() == before
    assert capsys.readouterr().out.splitlines()[-1].startswith("0 jobs run, 0 failed")
    assert len(identities(path)) == len(set(identities(path)))
    found = {(line["method"], line["seed"]) for line in Results(path).lines()}
    assert {(method, seed) for method in ("ours", "ours-auto", "plain@learned") for seed in (0, 1)} <= found


def test_other_steps_profiles_and_versions_are_other_jobs(task, tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    run_program(path, task, "--methods", "ours", seeds=["0"])
    run_program(path, task, "--methods", "ours", "--profile", "full", seeds=["0"])
    longer = tiny(steps=21)
    run_program(path, longer, "--methods", "ours", seeds=["0"])
    monkeypatch.setattr(methods, "package_version", lambda: "9.9")
    run_program(path, longer, "--methods", "ours", seeds=["0"])
    assert len(set(identities(path))) == len(identities(path)) == 4


def test_a_failed_job_stops_no_other_and_is_tried_again(task, tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.jsonl"
    whole = methods.train
    monkeypatch.setattr(methods, "train", lambda job, *rest: 1 / 0 if job.method == "ours" else whole(job, *rest))
    assert run_program(path, task) == 1
    assert "failed: tiny, ours, seed 1: ZeroDivisionError: division by zero" in capsys.readouterr().err
    errors = [line for line in Results(path).lines() if "error" in line]
    assert {(line["method"], line["seed"]) for line in errors} == {("ours", 0), ("ours", 1)}
    assert "1 / 0" in errors[0]["traceback"]
    main(["report", "--results", str(path)], task)
    assert "tiny, ours, seed 0: failed, ZeroDivisionError" in capsys.readouterr().out
    monkeypatch.setattr(methods, "train", whole)
    before = len(Results(path).lines())
    assert run_program(path, task) == 0
    assert len(Results(path).lines()) == before + 2
    main(["report", "--results", str(path)], task)
    assert "ZeroDivisionError" not in capsys.readouterr().out


def test_no_0_0_1_is_an_error_of_its_jobs_alone(task, tmp_path):
    path = tmp_path / "results.jsonl"
    assert run_program(path, task, "--methods", "0.0.1", "ours", "--peers", str(tmp_path), seeds=["0"]) == 1
    ours, old = sorted(Results(path).lines(), key=lambda line: "error" in line)
    assert math.isfinite(ours["loss"])
    assert old["error"].startswith("SystemExit: start.py: no version 0.0.1 under")


def line(**changes):
    return dict.fromkeys(IDENTITY, 0) | {"loss": 1.0} | changes


@pytest.mark.parametrize("cut", [1, 2, 20, None])
def test_a_torn_last_line_is_ignored_and_never_joined_to_the_next(tmp_path, cut):
    path = tmp_path / "results.jsonl"
    results = Results(path)
    results.append(line(task="first", error="ü" * 10))
    results.append(line(task="torn"))
    path.write_bytes(path.read_bytes()[: -cut or None] if cut else path.read_bytes() + b'{"task": "\xc3')
    lost = cut is not None and cut > 1  # without its line feed alone the line is whole
    before = ["first"] if lost else ["first", "torn"]
    assert [found["task"] for found in results.lines()] == before
    results.append(line(task="last"))
    assert [found["task"] for found in results.lines()] == [*before, "last"]


def test_a_result_that_is_not_finite_is_valid_json(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    results.append(line(loss=math.inf, points=[[1, math.nan]]))
    json.loads(results.path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert [methods.finite(found["loss"]) for found in results.lines()] == [math.inf]


def test_after_kill_9_every_job_ends_up_there_once(task, tmp_path):
    path = tmp_path / "results.jsonl"
    command = [*PROGRAM, "--results", path, "--jobs", "2", *METHODS, "--seeds", "0", "1"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 300  # of a busy machine; it takes a few seconds
        while len(Results(path).lines()) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        assert process.poll() is None, (tmp_path / "log").read_text()
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its workers, too
        process.wait()
    kept = Results(path).lines()
    assert len(kept) >= 3
    assert run_program(path, task) == 0
    lines = Results(path).lines()
    assert lines[: len(kept)] == kept
    keys = [key(found) for found in lines]
    assert len(keys) == len(set(keys)) > len(kept)
    expected = tmp_path / "expected.jsonl"
    run_program(expected, task)
    assert set(keys) == set(identities(expected))


def test_on_a_local_ray(task, tmp_path):
    """The same jobs, on a worker of Ray, which starts as a process of its own and knows no module of this test."""
    path = tmp_path / "results.jsonl"
    few = ["--methods", "ours", "ours-auto", "plain@learned", "--seeds", "0"]
    command = [*PROGRAM, "--results", path, "--backend", "ray", "--jobs", "1", *few]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    expected = tmp_path / "expected.jsonl"
    run_program(expected, task, *few)
    found, here = ({(line["method"], line["loss"]) for line in Results(p).lines()} for p in (path, expected))
    assert found == here
    assert len(identities(path)) == len(here) == 3


def test_an_interruption_by_hand_leaves_what_was_finished(task, tmp_path):
    path = tmp_path / "results.jsonl"
    count = [0]
    append = Results.append

    def once_too_often(self, found):
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        append(self, found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Results, "append", once_too_often)
        with pytest.raises(KeyboardInterrupt):
            run_program(path, task)
    assert len(identities(path)) == 3
    run_program(path, task)
    assert len(identities(path)) == len(set(identities(path)))


@pytest.mark.parametrize("best", [-14, -9, -2, 3, 9])
def test_the_grid_grows_until_the_best_point_is_inside(best):
    losses = {}
    while (todo := [k for k in plan.grid(-2, 2, losses) if k not in losses]) != []:
        losses |= {k: 1 + abs(k - best) if k < best + 4 else math.inf for k in todo}
    assert min(losses) < best < max(losses)
    assert plan.best_point(losses, -2) == best
    assert list(range(min(losses), max(losses) + 1)) == sorted(losses)
    assert min(losses) >= min(best - 1, -4)  # and no further
    assert max(losses) <= max(best + 1, 0)


def test_a_grid_that_is_incomplete_or_hopeless_or_perfect_does_not_grow_for_ever():
    start = dict.fromkeys(range(-4, 1), 1.0)
    assert plan.grid(-2, 2, {**start, 0: 0.5, -1: None}) == [*range(-4, 1)]
    below = {k: 0.0 if k > -3 else 1e-5 for k in range(-4, 1)}
    assert plan.grid(-2, 2, below) == [*range(-4, 1)]  # all as good as zero: the one in the middle
    everything = dict.fromkeys(range(-100, 100), math.inf)
    assert min(plan.grid(-2, 2, everything)) == -methods.FURTHEST


def test_diverged_runs_count_as_infinite_in_the_average():
    assert plan.seed_average([{"loss": 1.0}, {"loss": None}]) == math.inf
    assert plan.seed_average([{"loss": 1.0}, None]) is None
    assert plan.seed_average([{"loss": 1.0}, {"loss": 3.0}]) == 2.0


def test_names_of_grid_points():
    assert [methods.grid_name(k) for k in (-5, -4, 0, 1)] == [
        "plain@10^-2.5", "plain@10^-2", "plain@10^0", "plain@10^0.5"
    ]  # fmt: skip
    assert all(methods.grid_point(methods.grid_name(k)) == k for k in range(-30, 30))
    assert {methods.grid_point(name) for name in methods.METHODS} == {None}


def test_every_method_starts_from_the_same_weights_and_batches(task, tmp_path):
    """What is hashed when the optimizer is there, not only what is recorded, and for every method that there is."""
    seen = {}
    build = methods.build

    class Spy(tasks.Run):
        def loss(self, batch):
            self.order = [*getattr(self, "order", []), batch.tolist()]
            return super().loss(batch)

        def final_loss(self):
            spied.append(self.order)
            return super().final_loss()

    for name in (*methods.FIXED, "plain@10^-1"):
        if name == "0.0.1":
            continue  # is not among the development dependencies, and goes the same way
        spied = []

        def watch(method, task, model, lr, peers, steps, seen=seen):
            seen.setdefault("weights", []).append([p.tolist() for p in model.parameters()])
            return build(method, task, model, lr, peers, steps)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(methods, "build", watch)
            patch.setattr(methods, "Run", Spy)
            found = methods.train(methods.Job(task, name, 3, "quick"), None, Path())
        assert math.isfinite(found["loss"]), name
        seen.setdefault("batches", []).append(spied[0])
        seen.setdefault("start", []).append(found["start"])
    assert all(value == values[0] for values in seen.values() for value in values)
    assert len(seen["batches"][0]) == 20
    other = methods.train(methods.Job(task, "ours", 4, "quick"), None, Path())
    assert other["start"] != seen["start"][0]


def test_the_learned_rate_is_that_of_the_same_seed(task, tmp_path):
    path = tmp_path / "results.jsonl"
    run_program(path, task)
    by_name = {(found["method"], found["seed"]): found for found in Results(path).lines()}
    for seed in (0, 1):
        assert by_name["plain@learned", seed]["lr"] == by_name["ours-auto", seed]["learned lr"] > 0
        assert by_name["plain@learned", seed]["peak lr"] == pytest.approx(by_name["ours-auto", seed]["learned lr"])
        assert len(by_name["ours", seed]["lr over time"]) == 20


def test_schedules_rise_and_fall_as_they_should():
    cosine = tiny()
    factors = [cosine.factor(step, 100) for step in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(factors) == 1
    assert 0 < factors[-1] < 1e-3
    steps = tasks.TASKS["linear-wine"]
    assert [steps.factor(step, 100) for step in (0, 59, 60, 79, 80, 99)] == [1, 1, 0.1, 0.1, 0.01, 0.01]


def test_a_schedule_is_a_multiplier_of_the_peers_rate(task):
    found = methods.train(methods.Job(task, "plain@10^-1", 0, "quick"), None, Path())
    steps = task.steps("quick")
    for step, lr in found["lr over time"]:
        assert lr == pytest.approx(0.1 * task.factor(step, steps))
    free = methods.train(methods.Job(task, "schedule-free", 0, "quick"), None, Path())
    assert {lr for _, lr in free["lr over time"]} == {0.0025}


def test_a_run_that_diverges_is_a_result():
    found = methods.train(methods.Job(tiny(base="SGD"), "plain@10^12", 0, "quick"), None, Path())
    assert methods.finite(found["loss"]) == math.inf or found["loss"] > 1e6
    regression = tiny()
    assert methods.train(methods.Job(regression, "plain@10^-1", 0, "quick"), None, Path())["metric"] > 50


def fake(method, seed, loss, metric=90.0, **more):
    common = {"task": "tiny", "profile": "quick", "steps": 20, "torch": "2", "package": "1", "start": f"s{seed}"}
    common |= {"python": "3", "machine": "some machine"}
    measured = {"loss": loss, "metric": metric, "peak lr": 0.1, "seconds": 1.0, "lr over time": [[0, 0.1], [19, 0.0]]}
    return common | {"method": method, "seed": seed} | measured | more


@pytest.fixture
def written(task, tmp_path):
    results = Results(tmp_path / "results.jsonl")
    for seed in (0, 1):
        for k, loss in {-4: 3.0, -3: 2.0, -2: 1.0, -1: 2.0, 0: math.inf}.items():
            results.append(fake(methods.grid_name(k), seed, loss * (1 + seed)))
        results.append(fake("ours", seed, 3.0 * (1 + seed), 88.0))
    results.append(fake("ours-auto", 0, 0.5, 91.0))  # the other seed is missing
    results.append(fake("ldog", 0, math.nan, 10.0))
    return results


def report_of(results, *arguments, capsys):
    assert main(["report", "--results", str(results.path), *arguments], tiny()) == 0
    return capsys.readouterr().out


def row(text, method):
    cells = next(line for line in text.splitlines() if line.startswith(f"| {method}")).split("|")
    return [cell.strip() for cell in cells[2:-1]]


def test_the_report_is_right(written, tmp_path, capsys):
    text = report_of(written, "--output", str(tmp_path / "out"), capsys=capsys)
    assert row(text, "mechanized, `s_init=1e-8`") == ["3.00", "3.00 (tiny)", "", "", "-2.0"]
    assert row(text, "mechanized") == ["0.50", "0.50 (tiny)", "", "", "+1.0"]  # of the common seed
    assert row(text, "LDoG")[:2] == ["∞", "∞ (tiny)"]
    assert row(text, "tiny") == ["0.1", "0.1", "0.50", "3.00", "", "", "", "∞", *[""] * 8]
    assert "ours-auto (seeds 1)" in text
    assert "schedule-free (seeds 0, 1)" not in text  # nothing of it is there, so no list
    assert "schedule-free" in text
    for name in ("loss-by-lr", "relative-loss", "learned-lr"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 5000


def test_the_report_says_what_must_not_be_believed(written, capsys):
    assert "at the edge of the grid" not in report_of(written, capsys=capsys)
    written.append(fake("plain@10^-2", 0, 0.001))
    written.append(fake("plain@10^-2", 1, 0.001))
    written.append(fake("prodigy", 0, 1.0, start="others"))
    written.append(fake("prodigy", 1, 1.0, steps=99))
    text = report_of(written, capsys=capsys)
    assert "left aside" in text  # another length ran last
    written.append(fake("prodigy", 1, 1.0))
    text = report_of(written, capsys=capsys)
    assert "at the edge of the grid" in text
    assert "tiny, seed 0: **methods differ in weights or batches" in text
    assert "tiny, seed 1: **" not in text


@pytest.mark.parametrize("count", [0, 1, 4, 6])
def test_a_report_of_a_few_results(written, tmp_path, capsys, count):
    lines = written.path.read_text().splitlines(keepends=True)
    few = Results(tmp_path / "few.jsonl")
    few.path.write_text("".join(lines[-count:] if count else []))
    text = report_of(few, "--output", str(tmp_path / "few"), capsys=capsys)
    assert ("No results" in text) == (count == 0)
    assert report_of(few, "--profile", "full", capsys=capsys).startswith("No results of profile full")


def test_marked_tables_are_made_anew_and_nothing_else(written, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(
        "# ü\n\n<!-- convergence: overview -->\nold\n<!-- end -->\nbelow\n\n"
        "<!-- convergence: origin -->\n<!-- end -->\n<!-- convergence: tasks -->\n<!-- end -->"
    )
    for _ in range(2):
        report_of(written, "--fill", str(page), capsys=capsys)
        text = page.read_text()
        assert text.startswith("# ü\n\n<!-- convergence: overview -->\n| method | 1 networks, mean | worst |")
        assert "\n<!-- end -->\nbelow\n\n<!-- convergence: origin -->\n<sub>" in text
        assert "\n<!-- end -->\n<!-- convergence: tasks -->\n| task | tuned lr |" in text
        assert text.endswith("\n<!-- end -->")
        assert "old" not in text
    assert row(text, "mechanized, `s_init=1e-8`") == ["3.00", "3.00 (tiny)", "", "", "-2.0"]
    assert row(text, "LDoG") == ["∞", "∞ (tiny)", "", "", "-80.0"]
    assert row(text, "tiny") == ["0.1", "0.1", "0.50", "3.00", "", "", "", "∞", *[""] * 8]
    assert "14 runs, seeds 0, 1; torch 2, Python 3, some machine" in text
    page.write_text("<!-- convergence: nothing -->\n<!-- end -->")
    with pytest.raises(SystemExit, match=r"no table is called 'nothing'\. Known: overview"):
        main(["report", "--results", str(written.path), "--fill", str(page)], tiny())


def test_every_profile_is_known_everywhere():
    assert set(tasks.PROFILES) == set(methods.REACH) == set(program.SEEDS)
    assert set(tasks.PROFILES) == {profile for task in tasks.TASKS.values() for profile in task.lengths}


def test_the_documentation_says_what_the_results_say():
    lines = Results(ROOT / "benchmarks" / "convergence" / "results.jsonl").lines()
    filled = {}
    for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]:
        text = page.read_text(encoding="utf-8")
        filled[page.name] = text.count("<!-- convergence: ")
        assert tables.fill(text, lines, "full") == text, page.name
    assert {name for name, marks in filled.items() if marks} >= {"README.md", "convergence.md", "limits.md"}


def test_an_unknown_name_is_an_error_that_lists_the_known(task, tmp_path):
    with pytest.raises(SystemExit, match=r"nothing is called 'adam'\. Known: tiny"):
        main(["run", "--tasks", "adam", "--results", str(tmp_path / "r")], task)


def test_published_figures_are_only_beside_the_same_data():
    published = {task.published for task in tasks.TASKS.values()} - {None}
    assert published == {"DNA", "Glass", "Iris", "Letter", "Pendigits", "USPS", "Vehicle", "Vowel", "Wine"}
    assert tasks.TASKS["linear-sensorless2200"].published is None


# Data


@pytest.fixture
def small_file(monkeypatch, tmp_path):
    """A file of which the program knows address and checksum, and an empty cache."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "names.txt").write_text("ada\n")
    monkeypatch.setitem(data.SHA256, "names/names.txt", data.content_hash(tmp_path / "home" / "names.txt"))
    monkeypatch.setattr(data, "cache", lambda: tmp_path / "cache")
    monkeypatch.delenv("MECHANIC_DATA", raising=False)
    handler = partial(QuietHandler, directory=tmp_path / "home")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setitem(data.URLS, "names/", f"http://127.0.0.1:{server.server_port}/")
        yield tmp_path / "home" / "names.txt"
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_a_file_is_downloaded_once(small_file, tmp_path):
    assert data.fetch("names/names.txt").read_text() == "ada\n"
    small_file.unlink()
    assert data.fetch("names/names.txt") == tmp_path / "cache" / "names" / "names.txt"
    with pytest.raises(data.DataError, match=r"not public\. Remedy: put it into the directory \$MECHANIC_DATA"):
        data.fetch("libsvm/sensorless2200.scale")


def test_a_download_with_a_wrong_checksum_is_an_error(small_file, tmp_path):
    small_file.write_text("eve\n")
    with pytest.raises(data.DataError, match=r"cache/names/names.txt: SHA-256 .* Remedy: delete it and run again"):
        data.fetch("names/names.txt")


def test_a_download_that_fails_is_an_error(small_file):
    small_file.unlink()
    with pytest.raises(data.DataError, match=r"names/names.txt: cannot be had from http.*Remedy"):
        data.fetch("names/names.txt")


def test_a_file_at_hand_is_checked_too(small_file, tmp_path, monkeypatch):
    (tmp_path / "mine" / "names").mkdir(parents=True)
    file = tmp_path / "mine" / "names" / "names.txt"
    monkeypatch.setenv("MECHANIC_DATA", str(tmp_path / "mine"))
    file.write_text("ada\n")
    assert data.fetch("names/names.txt") == file
    file.write_text("eve\n")
    with pytest.raises(data.DataError, match="SHA-256"):
        data.fetch("names/names.txt")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], tiny()))
