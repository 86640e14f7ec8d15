"""What a step costs, counted: host reads, slots of memory."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bases import CASES
from mechanic_pytorch import mechanize
from problems import loss_of, mlp

HOST_READS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "_unique2", "masked_select")


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))

    @property
    def host_reads(self):
        return sum(self.count[name] for name in HOST_READS)


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


@pytest.mark.parametrize("name", ["SGD_fused", "AdamW_fused", "Adagrad_fused"])
def test_no_host_read_with_a_base_that_takes_found_inf(name):
    assert reads_per_step(CASES[name].build) == [0] * 5


@pytest.mark.parametrize("name", ["SGD", "SGD_momentum", "AdamW", "AdamW_bfloat16", "Muon", "RMSprop"])
def test_one_host_read_more_than_the_base_and_none_when_turned_off(name):
    base = reads_per_step(lambda: plain(name))
    assert reads_per_step(CASES[name].build) == [reads + 1 for reads in base]
    assert reads_per_step(lambda: CASES[name].build(skip_nonfinite=False)) == base


def test_the_counter_counts():
    """The plain, unfused AdamW reads its step counters, one per parameter."""
    assert reads_per_step(lambda: plain("AdamW")) == [4] * 5


def test_logging_reads_only_at_the_steps_that_it_logs():
    reads = reads_per_step(lambda: CASES["AdamW_fused"].build(log_func=lambda data: None, log_every=3))
    assert reads == [1, 0, 0, 1, 0]


def test_the_host_reads_of_the_first_step_are_few():
    """Whether the gradient is finite, and whether the base has moved."""
    model, optimizer = CASES["SGD_fused"].build()
    loss_of(model, 0).backward()
    with Operations() as operations:
        optimizer.step()
    assert operations.host_reads <= 3 + 2 * len(list(model.parameters()))


def state_bytes(optimizer):
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize("store_delta", [False, True])
@pytest.mark.parametrize(
    ("dtype", "bytes_per_weight"),
    [(torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 6), (torch.float16, 6)],
    ids=str,
)
def test_one_slot_per_parameter(dtype, bytes_per_weight, store_delta):
    """One float32 (float64) number per weight; below 32 bits also a compensation of two bytes."""
    model = mlp(dtype)
    optimizer = mechanize(torch.optim.SGD, store_delta=store_delta)(model.parameters(), lr=1.0)
    loss_of(model, 0).backward()
    optimizer.step()
    assert state_bytes(optimizer) == bytes_per_weight * sum(p.numel() for p in model.parameters())
