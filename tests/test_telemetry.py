"""`read_out` and `Trace`: the numbers are those of the optimizer, and cost one copy to the host."""

import copy
import dataclasses
import gc
import io
import json
import os
import weakref

import pytest
import torch

from benchmarks.counting import Operations
from device import DEVICE
from helpers import as_added_up, set_steps
from mechanic_pytorch import mechanize
from mechanic_pytorch.telemetry import ReadOut, Thinned, Trace, read, read_out, snapshot, unwrap
from problems import loss_of, mlp, train


def two_groups(model, base=torch.optim.SGD, lrs=(1.0, 0.25), **mechanic_options):
    first, _, second = model
    groups = [{"params": layer.parameters(), "lr": lr} for layer, lr in zip((first, second), lrs, strict=True)]
    return mechanize(base, **{"s_init": 1e-3, **mechanic_options})(groups, lr=1.0)


def trained(steps=5, dtype=torch.float32, **options):
    model = mlp(dtype)
    optimizer = two_groups(model, **options)
    train(model, optimizer, steps)
    return model, optimizer


# --- read_out ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s_init", [1e-3, "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_it_reads_what_the_optimizer_says(dtype, s_init):
    _, optimizer = trained(dtype=dtype, s_init=s_init)
    optimizer.mechanic_tuner.count_skipped()
    m, v, r, s = optimizer.mechanic_tuner.state
    now = read_out(optimizer)
    assert now == ReadOut(
        steps=6,
        skipped_steps=1,
        scale=as_added_up([optimizer.scale.item()]),
        effective_lr=as_added_up(optimizer.effective_lr()),
        learned_lr=as_added_up(optimizer.learned_lr()),
        max_product=m.tolist(),
        sum_squared_products=v.tolist(),
        reward=r.tolist(),
        scales=s.tolist(),
        kernels={"cuda:0": os.environ.get("MECHANIC_KERNEL", "triton")} if DEVICE else {"cpu": "blocks"},
    )
    assert optimizer.scale > 0


def test_the_numbers_are_related_as_the_paper_says():
    """s = ((s_init / n) m + r) / sqrt(v), with eps=0; the effective lr is the sum of s, times lr."""
    _, optimizer = trained(eps=0.0)
    now = read_out(optimizer)
    m, v, r = (torch.tensor(each[0]) for each in (now.max_product, now.sum_squared_products, now.reward))
    torch.testing.assert_close(torch.tensor(now.scales[0]), (1e-3 / 6 * m + r) / v.sqrt())
    (scale,) = now.scale
    assert scale == pytest.approx(sum(now.scales[0]), rel=1e-6)
    assert now.effective_lr == [scale, scale / 4]


def test_it_stays_as_it_was_while_training_goes_on():
    model, optimizer = trained()
    now = read_out(optimizer)
    before = copy.deepcopy(now)
    train(model, optimizer, 3)
    assert now == before != read_out(optimizer)
    with pytest.raises(dataclasses.FrozenInstanceError):
        now.scale = 0.0


def test_counts_are_exact_and_everything_is_json():
    _, optimizer = trained()
    set_steps(optimizer, 2**53 + 1)  # the first integer that no float64 is
    now = read_out(optimizer)
    assert now.steps == 2**53 + 1
    assert json.loads(json.dumps(dataclasses.asdict(now))) == dataclasses.asdict(now)


def test_learning_rates_may_be_tensors_and_may_be_missing():
    _, optimizer = trained(base=torch.optim.AdamW, lrs=(torch.tensor(1.0), torch.tensor(0.5, dtype=torch.float64)))
    assert read_out(optimizer).effective_lr == optimizer.effective_lr()

    class WithoutLr(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad)

    p = torch.ones(3, requires_grad=True)
    optimizer = mechanize(WithoutLr, s_init=1e-3)([p])
    for _ in range(3):
        p.grad = torch.ones(3)
        optimizer.step()
    assert read_out(optimizer).effective_lr == as_added_up([optimizer.scale.item()]) != [0.0]


@pytest.mark.parametrize("lrs", [(1.0, 0.5), (torch.tensor(1.0), torch.tensor(0.5))], ids=["numbers", "tensors"])
def test_one_copy_to_the_host(lrs, monkeypatch):
    """A snapshot holds one tensor, and is made without a look at it; what is read of it is read of the one copy."""
    _, optimizer = trained(base=torch.optim.AdamW, lrs=lrs, s_init="auto")
    with Operations() as operations:
        taken = snapshot(optimizer)
    assert operations.host_reads == 0
    assert not any(isinstance(value, torch.Tensor) for group in taken.groups for value in group.values())

    expected = as_added_up(optimizer.effective_lr())
    copies, cpu = [], torch.Tensor.cpu

    def copy_to_host(tensor):
        assert operations.host_reads == 0, "a look at the device before"
        copies.append(tensor.nbytes)
        return cpu(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", copy_to_host)
    with Operations() as operations:
        assert read([taken] * 3)[2].effective_lr == expected
    assert copies == [3 * taken.packed.nbytes]
    assert taken.packed.nbytes < 400


def test_what_is_not_mechanized_is_refused():
    plain = torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=0.1)
    for call in (read_out, Trace):
        for wrong in (plain, None):
            with pytest.raises(
                TypeError, match=r"must be mechanized. Got (SGD|NoneType). Remedy: build it with mechanize"
            ):
                call(wrong)
    assert unwrap(plain) is None


def test_names_of_scalars():
    _, optimizer = trained()
    now = read_out(optimizer)
    assert now.scalars("a/") == {
        "a/effective_lr/0": now.effective_lr[0],
        "a/effective_lr/1": now.effective_lr[1],
        "a/scale": now.scale[0],
        "a/skipped_steps": 0.0,
    }


# --- Thinned ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [1, 2, 3, 8])
def test_a_series_is_bounded_even_and_keeps_the_first(capacity):
    values, made = Thinned(capacity), []
    for i in range(100):
        values.add(lambda i=i: made.append(i) or i)
        n = i + 1
        stride = 1
        while -(-n // stride) > capacity:
            stride *= 2
        assert values.values == list(range(0, n, stride))
    assert len(made) <= capacity * 8  # all of the first ones, then half of them again at each of at most 7 thinnings


def test_a_capacity_below_one_is_refused():
    with pytest.raises(ValueError, match=r"capacity must be at least 1. Got 0. Remedy: 1000"):
        Trace(trained()[1], capacity=0)


# --- Trace ------------------------------------------------------------------------------------------------------------


def test_a_trace_holds_every_step_as_it_was():
    """With a schedule of its own for each group, so that the learned lr depends on the "initial_lr" of both."""
    model = mlp()
    optimizer = two_groups(model)
    trace, expected = Trace(optimizer), []
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda t: 1 - t / 8, lambda t: 1 / (1 + t)])
    for t in range(8):
        optimizer.zero_grad()
        loss_of(model, t).backward()
        optimizer.step()
        expected.append((t + 1, [optimizer.scale.item()], optimizer.effective_lr(), optimizer.learned_lr()))
        schedule.step()
    rows = [(row.steps, row.scale, row.effective_lr, row.learned_lr) for row in trace.read()]
    for row, numbers in zip(rows, expected, strict=True):
        assert row == tuple(map(as_added_up, numbers))
    assert len({scale for _, (scale,), *_ in expected}) > 5


def test_a_step_reads_no_more_for_a_trace():
    def reads(attach):
        model = mlp()
        optimizer = mechanize(torch.optim.AdamW, s_init="auto")(model.parameters(), lr=torch.tensor(1.0), fused=True)
        attach(optimizer)
        counts = []
        for t in range(6):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            with Operations() as operations:
                optimizer.step()
            counts.append(operations.host_reads)
        return counts

    assert reads(lambda optimizer: Trace(optimizer, capacity=3)) == reads(lambda optimizer: None)


def test_a_trace_is_bounded():
    model = mlp()
    optimizer = mechanize(torch.optim.SGD)(model.parameters(), lr=1.0)
    trace = Trace(optimizer, capacity=8)
    train(model, optimizer, 30)
    assert [row.steps for row in trace.read()] == [1, 5, 9, 13, 17, 21, 25, 29]


def test_groups_may_be_added_and_nothing_was_recorded_before_the_first_step():
    first, second = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = mechanize(torch.optim.SGD, s_init=1e-3)([first], lr=1.0)
    trace = Trace(optimizer)
    assert trace.read() == []
    for _ in range(3):
        first.grad = torch.ones(3)
        optimizer.step()
    optimizer.add_param_group({"params": [second], "lr": 0.5})
    optimizer.step()
    assert [len(row.effective_lr) for row in trace.read()] == [1, 1, 1, 2]
    assert trace.read()[-1] == read_out(optimizer)


def test_the_trace_of_a_resumed_run_goes_on_where_the_first_ended():
    model = mlp()
    optimizer = two_groups(model)
    whole = Trace(optimizer)
    train(model, optimizer, 4)
    saved = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], saved)
    train(model, optimizer, 4, first=4)

    twin = mlp(seed=1)
    other = two_groups(twin)
    rest = Trace(other)
    saved.seek(0)
    for each, state in zip((twin, other), torch.load(saved), strict=True):
        each.load_state_dict(state)
    train(twin, other, 4, first=4)
    assert rest.read() == whole.read()[4:]
    assert [row.steps for row in rest.read()] == [5, 6, 7, 8]


def test_a_trace_does_not_keep_the_optimizer_alive_nor_go_with_its_copies():
    model, optimizer = trained()
    trace = Trace(optimizer)
    train(copy.deepcopy(model), copy.deepcopy(optimizer), 1)
    assert trace.read() == []
    train(model, optimizer, 1)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    assert len(trace.read()) == 1


# torch's own compiler imports what torch itself calls deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_a_compiled_step_stays_one_graph_and_can_be_recorded_after_it():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def run(compiled):
        model = mlp()
        optimizer = mechanize(torch.optim.SGD, s_init=1e-3)(model.parameters(), lr=torch.tensor(1.0), fused=True)
        trace = Trace(optimizer)
        for t in range(6):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            if t == 0 or not compiled:  # the first step creates state and is never compiled
                optimizer.step()
            else:
                torch.compile(optimizer.step, backend=backend, fullgraph=True)()
                assert len(trace.read()) == t
                trace.record(optimizer)
            optimizer.param_groups[0]["lr"] *= 0.9
        return trace.read()

    expected, rows = run(compiled=False), run(compiled=True)
    torch._dynamo.reset()
    assert len(graphs) == 1
    assert [row.steps for row in rows] == [1, 2, 3, 4, 5, 6]
    for row, other in zip(rows, expected, strict=True):
        assert row.effective_lr == pytest.approx(other.effective_lr, rel=1e-5)
