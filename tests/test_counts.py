"""What a step costs, counted: host reads, slots of memory."""

import pytest
import torch

from bases import CASES
from benchmarks.counting import Operations, state_bytes, transient_bytes
from device import DEVICE
from mechanic_pytorch import kernels, mechanize
from mechanic_pytorch._auto import Memory
from problems import large_params, loss_of, mlp


def reads_per_step(build, warm_up=2, steps=5):
    """Host reads of each step after the first ones, in which state is created and the base's update is checked."""
    model, optimizer = build()
    reads = []
    for t in range(warm_up + steps):
        optimizer.zero_grad()
        loss_of(model, t).backward()
        with Operations() as operations:
            optimizer.step()
        reads.append(operations.host_reads)
    return reads[warm_up:]


def plain(name):
    case = CASES[name]
    model = case.model()
    return model, case.base(model.parameters(), lr=0.01, **case.options)


@pytest.mark.parametrize("name", ["SGD_fused", "SGD_fused_published", "AdamW_fused", "Adagrad_fused"])
def test_no_host_read_with_a_base_that_takes_found_inf(name):
    assert reads_per_step(CASES[name].build) == [0] * 5


@pytest.mark.parametrize(
    "name", ["SGD", "SGD_momentum", "AdamW", "AdamW_published", "AdamW_bfloat16", "Muon", "RMSprop"]
)
def test_one_host_read_more_than_the_base_and_none_when_turned_off(name):
    base = reads_per_step(lambda: plain(name))
    assert reads_per_step(CASES[name].build) == [reads + 1 for reads in base]
    assert reads_per_step(lambda: CASES[name].build(skip_nonfinite=False)) == base


def test_the_counter_counts():
    """The plain, unfused AdamW reads its step counters, one per parameter; with foreach, as on a GPU, twice."""
    assert reads_per_step(lambda: plain("AdamW")) == [8 if DEVICE else 4] * 5


def test_logging_reads_only_at_the_steps_that_it_logs():
    reads = reads_per_step(lambda: CASES["AdamW_fused"].build(log_func=lambda data: None, log_every=3))
    assert [count > 0 for count in reads] == [True, False, False, True, False]
    assert max(reads) == (2 if DEVICE else 1), "from a GPU, the scale is a copy to the host"


def test_the_host_reads_of_the_first_step_are_few():
    """Whether the gradient is finite, and whether the base has moved."""
    model, optimizer = CASES["SGD_fused"].build()
    loss_of(model, 0).backward()
    with Operations() as operations:
        optimizer.step()
    assert operations.host_reads <= 3 + 2 * len(list(model.parameters()))


@pytest.mark.parametrize("s_init", ["auto", 1e-8])
@pytest.mark.parametrize("store_delta", [False, True])
@pytest.mark.parametrize(
    ("dtype", "bytes_per_weight"),
    [(torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 6), (torch.float16, 6)],
    ids=str,
)
def test_one_slot_per_parameter(dtype, bytes_per_weight, store_delta, s_init):
    """One float32 (float64) number per weight; below 32 bits also a compensation of two bytes."""
    model = mlp(dtype)
    optimizer = mechanize(torch.optim.SGD, store_delta=store_delta, s_init=s_init)(model.parameters(), lr=1.0)
    loss_of(model, 0).backward()
    optimizer.step()
    tuner = (4 * 6 + 3) * 8 + 2 * 8  # four vectors, three sums, two counters
    if s_init == "auto":
        tuner += len(Memory._fields) * 8
    assert state_bytes(optimizer) == tuner + bytes_per_weight * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("s_init", ["auto", 1e-8])
@pytest.mark.parametrize(
    ("base", "options", "dtype"),
    [
        (torch.optim.AdamW, {"fused": True}, torch.float32),
        (torch.optim.AdamW, {"fused": True}, torch.bfloat16),
        (torch.optim.SGD, {"fused": True, "momentum": 0.9}, torch.float32),
        (torch.optim.SGD, {}, torch.float32),
        (torch.optim.SGD, {}, torch.bfloat16),
    ],
    ids=["AdamW_fused", "AdamW_fused_bfloat16", "SGD_fused", "SGD", "SGD_bfloat16"],
)
def test_at_most_one_transient_copy_and_none_with_a_fused_base(base, options, dtype, s_init):
    """Beside what the base takes by itself, and a few blocks."""
    plain, mechanized = (cls(large_params(dtype), lr=1e-3, **options) for cls in (base, mechanize(base, s_init=s_init)))
    for _ in range(2):
        plain.step()
        mechanized.step()
    weights = sum(p.numel() for p in mechanized.param_groups[0]["params"])
    copies = 0 if options.get("fused") else dtype.itemsize * weights
    blocks = 4 * kernels.blocks.BLOCK * (2 if dtype == torch.float32 else 10)
    assert transient_bytes(mechanized.step) <= transient_bytes(plain.step) + copies + blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_for_lists_needs_one_transient_copy_and_some_chunks(dtype, monkeypatch):
    monkeypatch.setenv("MECHANIC_KERNEL", "foreach")
    monkeypatch.setattr(kernels.foreach, "CHUNK", 2**16)
    optimizer = mechanize(torch.optim.SGD)(large_params(dtype), lr=1.0)
    for _ in range(2):
        optimizer.step()
    copies = dtype.itemsize * sum(p.numel() for p in optimizer.param_groups[0]["params"])
    assert transient_bytes(optimizer.step) <= copies + 10 * 4 * 2**16


@pytest.mark.skipif(bool(DEVICE), reason="counts what is allocated on a CPU")
def test_the_transient_bytes_are_counted():
    assert 8000 <= transient_bytes(lambda: torch.zeros(1000) + 1) <= 8100
