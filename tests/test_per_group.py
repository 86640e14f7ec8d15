"""`per_group=True`: each parameter group is trained as by an optimizer of its own, in one step for all."""

import copy
import io
import logging
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from benchmarks.counting import Operations
from device import DEVICE
from helpers import PUBLISHED, as_added_up, assert_identical, lr_factors, row_of, stored_of
from mechanic_pytorch import mechanize, patched
from mechanic_pytorch._tuner import LR_FACTOR, SCALES
from mechanic_pytorch.telemetry import Trace, read_out
from problems import full_loss, layers, loss_of, mlp, train


def one_optimizer(model, base, lrs=(1.0, 0.1), options=None, **mechanic_options):
    """Return an optimizer of a group and a scale per layer."""
    groups = [{"params": params, "lr": lr} for params, lr in zip(layers(model), lrs, strict=True)]
    return mechanize(base, per_group=True, **mechanic_options)(groups, lr=1.0, **(options or {}))


def several_optimizers(model, base, lrs=(1.0, 0.1), options=None, **mechanic_options):
    """Return an optimizer per layer, which is what one with a scale per group has to equal."""
    kind = mechanize(base, **mechanic_options)
    return [kind(params, lr=lr, **(options or {})) for params, lr in zip(layers(model), lrs, strict=True)]


def assert_same_as_several(model, optimizer, twin, others, rtol=None, atol=None):
    """Compare weights, sums of updates, base state and tuners."""
    tolerance = {"rtol": rtol, "atol": atol}
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, **tolerance)
    for group, other in zip(optimizer.param_groups, others, strict=True):
        for p, q in zip(group["params"], other.param_groups[0]["params"], strict=True):
            torch.testing.assert_close(dict(optimizer.state[p]), dict(other.state[q]), **tolerance)
        torch.testing.assert_close(row_of(group), row_of(other.param_groups[0]), **tolerance)
    rates = [rate for other in others for rate in other.effective_lr()]
    assert optimizer.effective_lr() == pytest.approx(rates, rel=1e-5)
    assert optimizer.learned_lr() == pytest.approx([rate for other in others for rate in other.learned_lr()], rel=1e-5)
    assert optimizer.scale.tolist() == pytest.approx([float(other.scale) for other in others], rel=1e-5)


BASES = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "sgd_fused": (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    "adamw": (torch.optim.AdamW, {}),
    "adamw_fused": (torch.optim.AdamW, {"fused": True}),
    "adamw_maximize": (torch.optim.AdamW, {"maximize": True}),
}


# --- one step for all is a step of each -------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["triton", "foreach", "for_loop"] if DEVICE else ["blocks", "foreach", "for_loop"])
@pytest.mark.parametrize("s_init", [1e-4, "auto"])
@pytest.mark.parametrize("name", BASES)
def test_it_equals_one_optimizer_per_group(name, s_init, kernel, monkeypatch):
    monkeypatch.setenv("MECHANIC_KERNEL", kernel)
    (base, options), (model, twin) = BASES[name], (mlp(torch.float64), mlp(torch.float64))
    optimizer = one_optimizer(model, base, options=options, s_init=s_init)
    others = several_optimizers(twin, base, options=options, s_init=s_init)
    sign, apart = -1 if options.get("maximize") else 1, 1.0
    for t in range(40):
        for one in (model, twin):
            one.zero_grad()
            (sign * loss_of(one, t)).backward()
        for each in (optimizer, *others):
            each.step()
        a, b = optimizer.effective_lr()
        apart = max(apart, a / b, b / a) if a and b else apart
    assert_same_as_several(model, optimizer, twin, others, rtol=1e-8, atol=1e-12)
    assert full_loss(model) < 2.2
    assert apart > 1.2, "the groups must have something to disagree about"


@pytest.mark.parametrize(
    ("name", "dtype"), [("sgd", torch.bfloat16), ("sgd", torch.float16), ("adamw_fused", torch.bfloat16)], ids=str
)
def test_it_equals_one_optimizer_per_group_in_low_precision(name, dtype):
    """To the bit, as far as the scales go."""
    (base, options), (model, twin) = BASES[name], (mlp(dtype), mlp(dtype))
    optimizer, others = one_optimizer(model, base, options=options), several_optimizers(twin, base, options=options)
    for t in range(15):
        for one in (model, twin):
            one.zero_grad()
            loss_of(one, t).backward()
        for each in (optimizer, *others):
            each.step()
    assert_same_as_several(model, optimizer, twin, others, rtol=1e-6, atol=0)


@settings(max_examples=30, deadline=None)
@given(
    lrs=st.tuples(*[st.sampled_from([1e-6, 0.01, 1.0, 30.0])] * 3),
    present=st.lists(st.tuples(*[st.booleans()] * 3), min_size=5, max_size=30),
    s_init=st.sampled_from([1e-3, "auto"]),
    max_lr=st.sampled_from([None, 0.02]),
    added=st.integers(0, 10),
)
def test_any_group_may_be_without_gradient_and_any_may_come_later(lrs, present, s_init, max_lr, added):
    """What a group does not take part in leaves its tuner as it is, to the bit; the third one is added later."""
    kind = mechanize(torch.optim.AdamW, per_group=True, s_init=s_init, max_lr=max_lr)
    alone = mechanize(torch.optim.AdamW, s_init=s_init, max_lr=max_lr)
    torch.manual_seed(0)
    start = [torch.randn(n, dtype=torch.float64) for n in (4, 3, 5)]
    ours, theirs = ([x.clone().requires_grad_() for x in start] for _ in range(2))
    optimizer = kind([{"params": [p], "lr": lr} for p, lr in zip(ours[:2], lrs[:2], strict=True)], lr=1.0)
    others = [alone([p], lr=lr) for p, lr in zip(theirs, lrs, strict=True)]
    for t, here in enumerate(present):
        if t == added:
            optimizer.add_param_group({"params": [ours[2]], "lr": lrs[2]})
        here = (*here[:2], here[2] and t >= added)
        for params in (ours, theirs):
            for i, (p, is_here) in enumerate(zip(params, here, strict=True)):
                noise = torch.randn(
                    len(p), dtype=torch.float64, generator=torch.Generator(p.device).manual_seed(10 * t + i)
                )
                p.grad = 10.0**i * (p.detach() - 1) + noise if is_here else None
        absent = [group for group, is_here in zip(optimizer.param_groups, here, strict=False) if not is_here]
        before = copy.deepcopy([row_of(group) for group in absent])
        optimizer.step()
        for other in others:
            other.step()
        for group, kept in zip(absent, before, strict=True):
            if LR_FACTOR in kept and kept[SCALES].any():  # its unit may still be chosen
                optimizer.mechanic_tuner._rescale(kept, group[LR_FACTOR] / kept[LR_FACTOR])
            for key in (key for key, value in kept.items() if isinstance(value, torch.Tensor)):
                assert torch.equal(group[key].cpu().double(), kept[key].cpu().double()), key
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-12)
    rates = [other.effective_lr()[0] for other in others][: len(optimizer.param_groups)]
    assert optimizer.effective_lr() == pytest.approx(rates, rel=1e-6)
    assert optimizer.learned_lr() == pytest.approx([o.learned_lr()[0] for o in others][: len(rates)], rel=1e-6)


@pytest.mark.parametrize("s_decay", [0.0, 1.0])
def test_each_group_equals_the_oracle_of_its_own_sums(s_decay):
    rng = np.random.default_rng(0)
    start = [[rng.standard_normal((4, 3)), rng.standard_normal(2)], [rng.standard_normal(5)]]
    params = [[torch.tensor(x, requires_grad=True) for x in group] for group in start]
    groups = [{"params": params[0]}, {"params": params[1], "lr": 7.0}]
    optimizer = mechanize(torch.optim.AdamW, per_group=True, s_decay=s_decay, s_init=1e-4)(groups, lr=1.0)
    options = {"s_decay": s_decay, "s_init": 1e-4}
    theirs = [oracle.Oracle(x, oracle.adamw(lr), **options) for x, lr in zip(start, (1.0, 7.0), strict=True)]

    def gradients(group, x, t):
        noise = np.random.default_rng(t)
        return [(1 + 9 * group) * (xi - 1) + noise.standard_normal(xi.shape) for xi in x]

    for t in range(60):
        for i, one in enumerate(theirs):
            for p, g in zip(params[i], gradients(i, [p.detach().numpy() for p in params[i]], t), strict=True):
                p.grad = torch.tensor(g)
            one.step(gradients(i, one.x, t))
        optimizer.step()
    now = read_out(optimizer)
    vectors = now.max_product, now.sum_squared_products, now.reward, now.scales
    for group, one, *ours in zip(optimizer.param_groups, theirs, *vectors, strict=True):
        for p, x, delta in zip(group["params"], one.x, one.delta, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-9)
            np.testing.assert_allclose(stored_of(optimizer, p).numpy(), delta, rtol=1e-9)
        for actual, vector in zip(ours, (one.m, one.v, one.r, one.s), strict=True):
            np.testing.assert_allclose(actual, vector, rtol=1e-9, atol=1e-9 * vector.max())


def test_with_one_group_it_changes_nothing():
    runs = []
    for per_group in (False, True):
        model = mlp()
        optimizer = mechanize(torch.optim.AdamW, per_group=per_group)(model.parameters(), lr=1.0)
        train(model, optimizer, 20)
        runs.append((model, optimizer))
    (model, optimizer), (twin, other) = runs
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    assert other.scale.shape == (1,)
    other.load_state_dict(optimizer.state_dict())  # there is nothing to tell them apart
    assert float(other.scale) == float(optimizer.scale)


def test_the_ratio_of_the_learning_rates_says_nothing():
    """With "auto" exactly: the run is the same up to rounding, whatever the lr of each group."""
    losses = []
    for lrs in ((1.0, 1.0), (1e-4, 300.0)):
        model = mlp(torch.float64)
        optimizer = one_optimizer(model, torch.optim.AdamW, lrs, {"weight_decay": 0.0}, s_init="auto")
        losses.append(train(model, optimizer, 60))
        assert lr_factors(optimizer)[0] == 1 / lrs[0]
    # eps of AdamW is no part of the update's unit, and the first losses are those of the same weights.
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# --- what must hold as it does for one scale --------------------------------------------------------------------------


def operations_of_a_step(count, **mechanic_options):
    """Count those of a step of eight parameters in so many groups, after the first ones."""
    params = [torch.ones(5, requires_grad=True) for _ in range(8)]
    groups = [{"params": params[i::count]} for i in range(count)]
    optimizer = mechanize(torch.optim.AdamW, **mechanic_options)(groups, lr=1.0, fused=True)
    for _ in range(4):
        for p in params:
            p.grad = p.detach().clone()
        with Operations() as operations:
            optimizer.step()
    return operations


@pytest.mark.parametrize("s_init", [1e-8, "auto"])
def test_a_scale_more_costs_no_host_read_and_two_operations_at_most(s_init):
    """Beside what is done for each group anyway, also with one scale for all."""
    more = []
    for count in (1, 2, 4, 8):
        own, shared = (operations_of_a_step(count, s_init=s_init, per_group=kind) for kind in (True, False))
        assert own.host_reads == shared.host_reads == 0
        more.append(own.count.total() - shared.count.total())
    assert more[0] <= 16, "a row of numbers in the place of one"
    assert all(extra <= more[0] + 2 * (count - 1) for extra, count in zip(more, (1, 2, 4, 8), strict=True))


def test_a_gradient_that_is_not_finite_skips_the_step_of_all_groups():
    model = mlp()
    optimizer = one_optimizer(model, torch.optim.AdamW, s_init=1e-4)
    train(model, optimizer, 5)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    loss_of(model, 5).backward()
    model[2].bias.grad[0] = torch.inf
    optimizer.step()
    assert optimizer.skipped_steps == 1
    for (name, p), q in zip(model.state_dict().items(), before[0].values(), strict=True):
        assert torch.equal(p, q), name
    for group, old in zip(optimizer.param_groups, before[1]["param_groups"], strict=True):
        assert_identical(row_of(group), row_of(old))


def test_max_lr_bounds_each_group():
    model = mlp()
    optimizer = one_optimizer(model, torch.optim.SGD, s_init=1e-3, max_lr=0.02)
    for t in range(60):
        train(model, optimizer, 1, first=t)
        assert max(optimizer.effective_lr()) <= 0.02 * (1 + 1e-6)
    assert max(optimizer.effective_lr()) == pytest.approx(0.02, rel=1e-5)


def test_reset_forgets_all_groups():
    model = mlp()
    optimizer = one_optimizer(model, torch.optim.AdamW, s_init="auto")
    train(model, optimizer, 10)
    optimizer.reset()
    assert optimizer.scale.tolist() == [0.0, 0.0]
    assert all(stored_of(optimizer, p) is None for p in model.parameters())
    train(model, optimizer, 10, first=10)
    assert min(optimizer.scale.tolist()) > 0


def test_it_moves_with_the_parameters_to_another_dtype():
    model = mlp()
    optimizer = one_optimizer(model, torch.optim.SGD, s_init=1e-3)
    train(model, optimizer, 5)
    model.double()
    train(model, optimizer, 5, first=5)
    assert optimizer.scale.dtype == torch.float64
    assert {stored_of(optimizer, p).dtype for p in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("position", [0, 1])
def test_a_group_that_is_taken_out_takes_its_tuner_along(position):
    """The other goes on as with an optimizer of its own."""
    model, twin = mlp(torch.float64), mlp(torch.float64)
    optimizer = one_optimizer(model, torch.optim.SGD, s_init=1e-3)
    others = several_optimizers(twin, torch.optim.SGD, s_init=1e-3)
    for t in range(20):
        if t == 10:
            scales = optimizer.scale.tolist()
            del optimizer.param_groups[position], others[position]
            assert optimizer.scale.tolist() == [scales[1 - position]]
        for one in (model, twin):
            one.zero_grad()
            loss_of(one, t).backward()
        for each in (optimizer, *others):
            each.step()
    assert optimizer.scale.item() > 1.5 * scales[1 - position]
    assert_same_as_several(model, optimizer, twin, others, rtol=1e-8, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's compiler imports it
def test_a_compiled_step_is_the_same_and_one_graph():
    torch._dynamo.reset()
    runs, graphs = [], []
    for compiled in (False, True):
        model = mlp(torch.float64)
        optimizer = one_optimizer(model, torch.optim.SGD, lrs=(torch.tensor(1.0), torch.tensor(0.1)), s_init=1e-3)
        backend = lambda graph, inputs: graphs.append(graph) or graph  # noqa: E731
        step = torch.compile(optimizer.step, backend=backend, fullgraph=True) if compiled else optimizer.step
        for t in range(8):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            (step if t > 0 else optimizer.step)()  # the first step creates state
        runs.append((model, optimizer.scale))
    (model, scale), (twin, other) = runs
    torch.testing.assert_close(scale, other)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert len(graphs) == 1


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s_init", [1e-3, "auto"])
def test_a_resumed_run_is_the_same_to_the_bit(s_init):
    model = mlp()
    optimizer = one_optimizer(model, torch.optim.AdamW, s_init=s_init)
    train(model, optimizer, 10)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    train(model, optimizer, 10, first=10)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    twin = mlp(seed=1)
    other = one_optimizer(twin, torch.optim.AdamW, lrs=(3.0, 3.0), s_init=s_init)
    twin.load_state_dict(weights)
    other.load_state_dict(state)
    train(twin, other, 10, first=10)
    assert_same_as_several(model, optimizer, twin, [SingleGroup(other, i) for i in range(2)], rtol=0, atol=0)


class SingleGroup:
    """One group of an optimizer, seen as an optimizer."""

    def __init__(self, optimizer, i):
        self.param_groups, self.state = [optimizer.param_groups[i]], optimizer.state
        self.scale = optimizer.scale[i]
        self.effective_lr = lambda: [optimizer.effective_lr()[i]]
        self.learned_lr = lambda: [optimizer.learned_lr()[i]]


@pytest.mark.parametrize("per_group", [False, True])
def test_a_checkpoint_of_the_other_kind_is_refused(per_group):
    model = mlp()
    saved, optimizer = (
        mechanize(torch.optim.SGD, per_group=kind)([{"params": params} for params in layers(model)], lr=1.0)
        for kind in (not per_group, per_group)
    )
    train(model, saved, 3)
    train(model, optimizer, 3)
    before = copy.deepcopy(optimizer.state_dict())
    kinds = ("one tuner in it and one per group", "one tuner per group in it and a single one")
    expected = (
        f"the checkpoint must be of an optimizer with the same per_group. Got {kinds[not per_group]} here. Remedy"
    )
    with pytest.raises(ValueError, match=re.escape(f"{expected}: pass mechanize per_group={not per_group}; or keep")):
        optimizer.load_state_dict(saved.state_dict())
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)
    plain = copy.deepcopy(saved.state_dict())  # the remedy
    for holder in (*plain["param_groups"], *plain["state"].values()):
        for key in [key for key in holder if key.startswith("mechanic_")]:
            del holder[key]
    optimizer.load_state_dict(plain)
    assert optimizer.scale.sum() == 0


def test_a_checkpoint_of_the_plain_base_starts_all_tuners():
    model = mlp()
    plain = torch.optim.AdamW([{"params": params} for params in layers(model)], lr=1e-3)
    train(model, plain, 5)
    optimizer = one_optimizer(model, torch.optim.AdamW, s_init="auto")
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.scale.tolist() == [0.0, 0.0]
    train(model, optimizer, 20)
    assert min(optimizer.effective_lr()) > 0


# --- watching and controlling -----------------------------------------------------------------------------------------


def test_frozen_groups_keep_a_scale_each():
    model = mlp()
    optimizer = one_optimizer(model, torch.optim.AdamW, s_init=1e-3)
    train(model, optimizer, 20)
    optimizer.freeze_scale()
    rates, state = optimizer.effective_lr(), copy.deepcopy(optimizer.state_dict())
    twin = copy.deepcopy(model)
    plain = torch.optim.AdamW([{"params": p, "lr": rate} for p, rate in zip(layers(twin), rates, strict=True)])
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        plain.state[q] = copy.deepcopy({k: v for k, v in optimizer.state[p].items() if "mechanic" not in k})
    train(model, optimizer, 10, first=20)
    train(twin, plain, 10, first=20)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert optimizer.effective_lr() == rates
    with pytest.raises(ValueError, match=r"add_param_group with per_group=True needs .* Remedy: .*unfreeze_scale"):
        optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)]})
    assert len(optimizer.param_groups) == 2
    other = one_optimizer(model, torch.optim.AdamW, s_init=1e-3)
    other.load_state_dict(state)
    assert other.mechanic_tuner.frozen_scales() == optimizer.scale.tolist()
    optimizer.unfreeze_scale()
    train(model, optimizer, 10, first=30)
    assert optimizer.effective_lr() != rates


def test_an_empty_group_may_be_frozen():
    """Also the first one."""
    model = mlp()
    optimizer = mechanize(torch.optim.SGD, per_group=True)([{"params": []}, {"params": model.parameters()}], lr=1.0)
    train(model, optimizer, 5)
    optimizer.freeze_scale()
    rates = optimizer.effective_lr()
    train(model, optimizer, 5, first=5)
    assert optimizer.effective_lr() == rates
    assert rates[1] > 0


def test_a_group_that_has_no_scale_cannot_be_frozen():
    model = mlp()
    optimizer = one_optimizer(model, torch.optim.SGD, s_init=1e-3)
    model[2].requires_grad_(False)
    train(model, optimizer, 5)
    with pytest.raises(ValueError, match=r"needs a scale that is learned. Got 0 in parameter group 1. Remedy: "):
        optimizer.freeze_scale()
    train(model, optimizer, 5, first=5)  # nothing is half frozen
    assert optimizer.scale[0] != 0 == optimizer.scale[1]


def test_read_outs_traces_and_logs_have_a_row_per_group(caplog):
    model, logged = mlp(), []
    optimizer = one_optimizer(model, torch.optim.SGD, s_init=1e-3, log_func=logged.append, log_every=1)
    trace = Trace(optimizer)
    train(model, optimizer, 3)
    now = read_out(optimizer)
    assert now == trace.read()[-1]
    assert optimizer.scale.tolist() == logged[-1]["s"] == as_added_up(now.scale)
    assert now.reward == optimizer.mechanic_tuner.state.reward.tolist()
    assert (as_added_up(now.effective_lr), as_added_up(now.learned_lr)) == (
        optimizer.effective_lr(),
        optimizer.learned_lr(),
    )
    assert now.scalars("")["scale/1"] == now.scale[1]
    optimizer = one_optimizer(model, torch.optim.SGD, s_init=1e-3, log_every=1)
    with caplog.at_level(logging.INFO, "mechanic_pytorch"):
        train(model, optimizer, 2)
    assert caplog.messages[-1] == "iter_count=2 s=" + " ".join(f"{s:.6e}" for s in optimizer.scale.tolist())


@pytest.mark.parametrize(
    ("idle", "options"),
    [(idle, options) for idle in ("without gradient", "at lr 0") for options in ({}, PUBLISHED)]
    + [("noise", PUBLISHED)],  # in which "auto" starts
)
def test_a_group_that_does_not_start_is_warned_of_unless_it_is_meant_to_stay(idle, options, recwarn):
    torch.manual_seed(0)
    a, b = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    groups = [{"params": [a]}, {"params": [b], "lr": 0.0 if idle == "at lr 0" else 1.0}]
    optimizer = mechanize(torch.optim.SGD, per_group=True, **options)(groups, lr=1.0)
    for _ in range(500):
        a.grad = a.detach().clone()
        b.grad = None if idle == "without gradient" else torch.randn(3) * 1e-6
        optimizer.step()
    messages = [str(warning.message) for warning in recwarn]
    if idle == "noise":
        assert len(messages) == 1
        assert re.search(r"has not started: .* the scale is \S+, \S+ \(per parameter group\)", messages[0])
    else:
        assert messages == []


def test_patched_scripts_may_have_a_scale_per_group():
    model = mlp()
    with patched(per_group=True) as built:
        optimizer = torch.optim.AdamW([{"params": p, "lr": 10.0**-i} for i, p in enumerate(layers(model), 1)])
        train(model, optimizer, 30)
    assert built[0].learned_lr() == optimizer.learned_lr()
    assert optimizer.scale.shape == (2,)
    del optimizer
    assert min(built[0].learned_lr()) > 0
