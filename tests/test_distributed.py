"""Sharded and distributed training on real processes (gloo): the same scale, the same weights, on every layout."""

import functools
import multiprocessing

import pytest
import torch

import layouts
from forks import OF_TORCH

pytestmark = pytest.mark.xdist_group("distributed")  # one xdist worker: each world is started once

TIED = ["fsdp2_tied_flat", "fsdp2_tied_nested"]  # two modules share a weight
LAYOUTS = {
    2: ["ddp", "fsdp2", *TIED, "tp", "sequence_parallel", "fsdp1", "zero", "owners"],
    4: ["ddp", "fsdp2", "hsdp", "tp", "fsdp2_tp", "zero", "owners"],
}
MUON = {"ddp", "zero", "owners"}  # where each matrix is whole; torch's Muon refuses uneven shards by itself
TRAJECTORIES = [
    (size, layout, base)
    for size, names in LAYOUTS.items()
    for layout in names
    for base in ["sgd", "adamw", *(["muon"] if layout in MUON else [])]
]
FROZEN = [("fsdp2", "sgd"), ("fsdp2", "adamw_fused"), ("fsdp1", "sgd"), ("owners", "adamw")]
SAVED = [(torch.float64, False), (torch.bfloat16, False), (torch.float64, True)]  # dtype, per_group
PER_GROUP = [
    *((2, layout, "adamw", 1e-4) for layout in ("ddp", "fsdp2", "fsdp1", "zero", "owners")),
    *((2, layout, "sgd", "auto") for layout in ("fsdp2", "owners")),
    (4, "fsdp2_tp", "adamw", "auto"),
]


def path_of(directory, dtype, per_group):
    return str(directory / f"{dtype}{' per group' * per_group}")


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="session")
def world(directory):
    """Return a function that gives the results of a job in each process of a world of that size.

    The processes are forks of one that has imported torch, which takes seconds.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(OF_TORCH)

    def jobs_of(size):
        jobs = [("trajectory", layout, base) for n, layout, base in TRAJECTORIES if n == size]
        jobs += [("resume", path_of(directory, *saved), *saved) for saved in SAVED] if size != 2 else []
        jobs += [("per_group", *job) for n, *job in PER_GROUP if n == size]
        if size == 2:
            jobs += [("save", path_of(directory, *saved), *saved) for saved in SAVED]
            jobs += [("resume", path_of(directory, *saved), *saved) for saved in SAVED]
            jobs += [("collectives", layout, "adamw_fused") for layout in ("ddp", "fsdp2", "fsdp1")]
            jobs += [("collectives", "fsdp2", "adamw_fused per_group")]
            jobs += [("missing_gradient", layout) for layout in ("owners", "fsdp1")]
            jobs += [("one_bad_rank", layout, "sgd") for layout in ("fsdp2", "owners", "fsdp1")]
            jobs += [("one_bad_rank", "fsdp2", "adamw_fused"), ("one_overflow",)]
            jobs += [("accumulated", layout) for layout in ("ddp", "fsdp2")]
            jobs += [("frozen", *job) for job in FROZEN]
            jobs += [("sums_of_others",), ("empty_process",), ("mixed_precision",), ("full_state_dict",)]
            jobs += [("mismatch", name) for name in ("s_init", "betas", "the number of scales")]
            jobs += [("auto_start", layout, "adamw") for layout in ("ddp", "fsdp2", "fsdp1", "owners")]
        else:
            jobs += [("collectives", "fsdp2_tp", "adamw"), ("collectives", "hsdp", "adamw_fused")]
            jobs += [("auto_start", "fsdp2_tp", "adamw")]
        return jobs

    @functools.cache
    def run(size):
        if size != 2:
            run(2)  # which saves what the others resume from
        out = directory / f"world{size}"
        out.mkdir()
        arguments = (size, str(directory / f"store{size}"), str(out), jobs_of(size))
        torch.multiprocessing.start_processes(layouts.work, arguments, size, start_method="forkserver")
        return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(size)]

    def result(size, *job):
        results = [rank[job] for rank in run(size)]
        for rank, value in enumerate(results):
            if isinstance(value, str) and value.startswith("Traceback"):
                pytest.fail(f"rank {rank} raised:\n{value}")
        return results

    return result


@functools.cache
def one_process(layout, base):
    return layouts.outcome(layouts.train(getattr(layouts, layout)(base)))


def assert_equal_to_one_process(results, expected, rtol=1e-9):
    assert expected["scale"].max() > 1e-4
    for result in results:
        assert torch.equal(result["scale"], results[0]["scale"]), "bit for bit the same scale in all processes"
        torch.testing.assert_close(result["scale"], expected["scale"], rtol=rtol, atol=0)
        assert result["weights"].keys() == expected["weights"].keys()
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(
                result["weights"][name], weight, rtol=rtol, atol=rtol * weight.abs().max().item()
            )


@pytest.mark.parametrize(("size", "layout", "base"), TRAJECTORIES)
def test_a_run_on_several_processes_equals_that_of_one(world, size, layout, base):
    expected = one_process("single_tied" if layout in TIED else "single", base)
    rtol = 1e-9 if base == "muon" else 1e-11  # torch's Muon counts in bfloat16
    assert_equal_to_one_process(world(size, "trajectory", layout, base), expected, rtol)


@pytest.mark.parametrize(("size", "layout"), [(2, "ddp"), (2, "fsdp2"), (2, "fsdp1"), (2, "owners"), (4, "fsdp2_tp")])
def test_a_start_without_units_sees_all_parts(world, size, layout):
    expected = layouts.auto_start("single", "adamw")
    assert_equal_to_one_process(world(size, "auto_start", layout, "adamw"), expected)


@pytest.mark.parametrize(("size", "layout", "base", "s_init"), PER_GROUP)
def test_a_scale_per_group_sees_all_parts_of_its_group(world, size, layout, base, s_init):
    expected = layouts.per_group("single", base, s_init)
    assert expected["scale"].shape == (2,)
    assert_equal_to_one_process(world(size, "per_group", layout, base, s_init), expected)


@pytest.mark.parametrize(
    ("size", "layout", "base", "calls"),
    [
        (2, "ddp", "adamw_fused", 0),
        (2, "fsdp2", "adamw_fused", 1),
        (2, "fsdp1", "adamw_fused", 1),
        (2, "fsdp2", "adamw_fused per_group", 1),
        (4, "hsdp", "adamw_fused", 1),
        (4, "fsdp2_tp", "adamw", 2),
    ],
)
def test_one_collective_of_four_numbers_per_process_group(world, size, layout, base, calls):
    """Nothing else is communicated, and with a fused base nothing is read by the host. Two scales take eight."""
    for result in world(size, "collectives", layout, base):
        assert result["sizes"] == [8 if base.endswith("per_group") else 4] * calls
        assert sum(result["counts"].values()) == calls
        if base.startswith("adamw_fused"):
            assert result["host_reads"] == 0


@pytest.mark.parametrize("layout", ["owners", "fsdp1"])
def test_a_process_without_gradient_does_not_hang_the_others(world, layout):
    results = world(2, "missing_gradient", layout)
    assert torch.equal(results[0]["scale"], results[1]["scale"])
    assert results[0]["scale"] > 1e-4


def test_a_process_that_has_nothing_to_add_adds_nothing(world):
    """In neither of two groups, though a sum over the first leaves its result in place."""
    assert world(2, "sums_of_others") == [([3.0], [1.0])] * 2


def test_a_process_without_parameters_does_not_hang_the_others(world):
    holder, empty = world(2, "empty_process")
    assert torch.equal(holder["scale"], empty["scale"])
    expected = layouts.outcome(layouts.train(layouts.single("sgd", dtype=torch.float32), 12))
    assert torch.equal(holder["scale"], expected["scale"])


@pytest.mark.parametrize(
    ("layout", "base"), [("fsdp2", "sgd"), ("owners", "sgd"), ("fsdp1", "sgd"), ("fsdp2", "adamw_fused")]
)
def test_all_skip_when_one_has_a_bad_gradient(world, layout, base):
    """The run is then that of one process that skips these steps."""

    def poison(t):
        if t in (0, 5):
            next(run.model.parameters()).grad.view(-1)[0] = float("nan")

    run = layouts.single(base)
    expected = layouts.outcome(layouts.train(run, 12, after_backward=poison))
    results = world(2, "one_bad_rank", layout, base)
    assert [result["skipped"] for result in results] == [2, 2]
    assert_equal_to_one_process(results, expected)


@pytest.mark.parametrize(("layout", "base"), FROZEN)
def test_frozen_steps_are_the_same_and_skipped_by_all(world, layout, base):
    results = world(2, "frozen", layout, base)
    assert [result["skipped"] for result in results] == [1, 1]
    assert_equal_to_one_process(results, layouts.frozen("single", base))


def test_all_skip_when_one_scaler_found_an_overflow(world):
    def poison(t):
        if t == 5:
            next(run.model.parameters()).grad.view(-1)[0] = float("nan")

    run = layouts.single("adamw_fused")
    expected = layouts.outcome(layouts.train(run, 12, after_backward=poison))
    results = world(2, "one_overflow")
    assert [result["skipped"] for result in results] == [1, 1]
    assert_equal_to_one_process(results, expected)


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_accumulation_and_clipping_equal_whole_batches_in_one_process(world, layout):
    run = layouts.single("sgd")

    def clip(t):
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.5)

    expected = layouts.outcome(layouts.train(run, 20, after_backward=clip))
    assert_equal_to_one_process(world(2, "accumulated", layout), expected)


def test_a_mixed_precision_policy_equals_the_same_by_hand(world):
    """Weights float32, forward and backward bfloat16: the same as doing that by hand."""
    results, expected = world(2, "mixed_precision"), layouts.mixed_precision_by_hand(2)
    assert results[0]["scale"].dtype == torch.float64
    assert_equal_to_one_process(results, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("s_init", ("0.0001", "0.0002")),
        ("betas", ("(0.9,)", "(0.9, 0.99)")),
        ("the number of scales", ("1", "2")),
    ],
)
def test_different_options_are_reported_with_both_values(world, name, values):
    for message in world(2, "mismatch", name):
        assert message is not None, "did not raise"
        assert message.startswith("MechanizedSGD: processes that share parameters must share their options. Got: ")
        assert f"{name} is {values[0]} in rank 0 and {values[1]} in rank 1" in message
        assert "Remedy: " in message


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("dtype", "per_group"), SAVED, ids=str)
def test_a_checkpoint_of_two_processes_resumes_on_any_number(world, directory, size, dtype, per_group):
    path = path_of(directory, dtype, per_group)
    expected = world(2, "save", path, dtype, per_group)[0]
    results = world(size, "resume", path, dtype, per_group)
    for result in results:
        assert result["delta_dtypes"] == {torch.float64 if dtype == torch.float64 else torch.float32}
        assert result["scale"].shape == ((2,) if per_group else ())
    # In bfloat16 another order of the sums may fall on the other side of a rounding boundary.
    assert_equal_to_one_process(results, expected, rtol=1e-9 if dtype == torch.float64 else 2**-6)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")  # it is one process
@pytest.mark.parametrize(("dtype", "per_group"), SAVED, ids=str)
def test_a_checkpoint_of_two_processes_resumes_in_one(world, directory, dtype, per_group):
    path = path_of(directory, dtype, per_group)
    expected = world(2, "save", path, dtype, per_group)[0]
    result = layouts.resume(path, dtype, per_group, 0, 1)
    assert_equal_to_one_process([result], expected, rtol=1e-9 if dtype == torch.float64 else 2**-6)


def test_full_state_dict_round_trip(world):
    for uninterrupted, resumed in world(2, "full_state_dict"):
        assert torch.equal(resumed["scale"], uninterrupted["scale"])
        for name, weight in uninterrupted["weights"].items():
            assert torch.equal(resumed["weights"][name], weight)
