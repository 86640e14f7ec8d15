"""Training loops of other packages, on two real processes: equal to one process without them, and resumable."""

import functools

import pytest
import torch

import frameworks
from forks import torchrun

pytestmark = pytest.mark.xdist_group("frameworks")  # one xdist worker: each run is made once

RUNS = [(name, run.__name__) for name, runs in frameworks.FRAMEWORKS.items() for run in runs if name != "refusals"]


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory):
    """Return a function that gives what each of two processes had learned at the end.

    They start as with torchrun, but are forks of a process that has imported the frameworks, which takes seconds.
    """
    directory = tmp_path_factory.mktemp("frameworks")

    @functools.cache
    def launch(framework, first):
        if first:
            launch(framework, 0)  # which saves what the other resumes from
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            patch.setenv("DS_ACCELERATOR", "cpu")
            torchrun(frameworks.main, framework, directory, first, output=directory, packages=frameworks.PACKAGES)
        files = [directory / f"{framework}-{first}-{rank}.pt" for rank in range(2)]
        return [torch.load(file, weights_only=False) for file in files]

    return lambda framework, run, first: [results[run] for results in launch(framework, first)]


@pytest.mark.parametrize(("framework", "run"), RUNS)
def test_a_framework_on_two_processes_equals_one_process(outcomes, framework, run):
    results = outcomes(framework, run, 0)
    in_float32 = framework == "deepspeed" or run == "lightning_fsdp1"  # Lightning casts to it, DeepSpeed has no other
    rtol = 2**-6 if run.endswith("bf16") else 1e-5 if in_float32 else 1e-9
    expected = frameworks.one_process()
    assert expected["scale"] > 1e-4
    for result in results:
        assert torch.equal(result["scale"], results[0]["scale"]), "bit for bit the same scale in all processes"
        torch.testing.assert_close(result["scale"].double(), expected["scale"], rtol=rtol, atol=0)
        assert result["weights"].keys() == expected["weights"].keys()
        for name, weight in expected["weights"].items():
            atol = rtol * weight.abs().max().item()
            torch.testing.assert_close(result["weights"][name].double(), weight, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("framework", "run"), RUNS)
def test_resumes_in_new_processes_as_if_never_interrupted(outcomes, framework, run):
    for uninterrupted, resumed in zip(outcomes(framework, run, 0), outcomes(framework, run, 8), strict=True):
        assert resumed["steps"] == uninterrupted["steps"]
        assert torch.equal(resumed["scale"], uninterrupted["scale"])
        for name, weight in uninterrupted["weights"].items():
            assert torch.equal(resumed["weights"][name], weight), name


def test_what_would_be_silently_wrong_is_refused(outcomes):
    """Parts of larger tensors whose group was not named, and a framework that steps through them in turn."""
    for fsdp1, zero1, zero3 in outcomes("refusals", "refused", 0):
        rule = "process_group must be given for parameters that are shards of larger ones. Got None and parameters cut "
        assert fsdp1.startswith(f"MechanizedSGD: {rule}by FSDP1. Remedy: mechanize(..., process_group=")
        assert zero1.startswith(f"MechanizedAdamW: {rule}by DeepSpeed. Remedy: mechanize(..., process_group=")
        assert zero3.startswith("MechanizedAdamW: all parameters must be stepped together. ZeRO stage 3 of DeepSpeed")
