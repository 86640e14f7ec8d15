"""What users may do to the scale: freeze it, and bound it."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

import oracle
from bases import CASES
from benchmarks.counting import Operations, transient_bytes
from device import DEVICE
from helpers import PUBLISHED, Graphs, assert_identical, count_a_skipped_step, stored_of
from mechanic_pytorch import mechanize
from mechanic_pytorch._auto import bounded
from mechanic_pytorch._config import TunerState
from mechanic_pytorch._torch import NOT_IN_PROPORTION
from mechanic_pytorch.telemetry import read_out
from problems import large_params, loss_of, mlp, noisy_quadratic, train

STEPS = 40
CAN = [name for name, case in CASES.items() if not issubclass(case.base, NOT_IN_PROPORTION)]


def frozen(name="AdamW", **mechanic_options):
    """Return a model and its optimizer, frozen after some steps."""
    case = CASES[name]
    model, optimizer = case.build(**mechanic_options)
    train(model, optimizer, STEPS, closure=case.closure)
    optimizer.freeze_scale()
    return model, optimizer


def plain_twin(model, optimizer, name):
    """Return a copy of the model, and the plain base with the same state at the effective lr."""
    case = CASES[name]
    twin = copy.deepcopy(model)
    plain = case.base(case.params(twin), lr=1.0, **case.options)
    state = {i: {k: v for k, v in s.items() if "mechanic" not in k} for i, s in optimizer.state_dict()["state"].items()}
    plain.load_state_dict(copy.deepcopy({"state": state, "param_groups": plain.state_dict()["param_groups"]}))
    for group, lr in zip(plain.param_groups, optimizer.effective_lr(), strict=True):
        group["lr"] = lr
    return twin, plain


def tuner(optimizer):
    """Return what the tuner and its sums are, without counters."""
    now, sums = read_out(optimizer), [stored_of(optimizer, p) for p in optimizer.state]
    return copy.deepcopy([now.max_product, now.sum_squared_products, now.reward, now.scales, sums])


@pytest.mark.parametrize("name", CAN)
def test_a_frozen_run_is_the_plain_base_at_the_effective_lr(name):
    closure = CASES[name].closure
    model, optimizer = frozen(name)
    (twin, plain), before, steps = plain_twin(model, optimizer, name), tuner(optimizer), STEPS + 15
    assert train(model, optimizer, 15, first=STEPS, closure=closure) == train(twin, plain, 15, STEPS, closure=closure)
    assert_identical([*model.parameters()], [*twin.parameters()])
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_identical({k: v for k, v in optimizer.state[p].items() if "mechanic" not in k}, dict(plain.state[q]))
    assert_identical(tuner(optimizer), before)
    assert read_out(optimizer).steps == steps
    assert all(group["lr"] == 1.0 for group in optimizer.param_groups)


def test_a_frozen_run_with_auto_a_schedule_and_a_tensor_lr_is_the_plain_one():
    """The number by which auto multiplies lr and the frozen scale are put back, one after the other."""
    model = mlp()
    layers = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 3e-5}]
    lr = torch.tensor(1e-4)
    optimizer = mechanize(torch.optim.SGD, s_init="auto")(layers, lr=lr, momentum=0.9)
    train(model, optimizer, STEPS)
    optimizer.freeze_scale()
    scale = float(optimizer.scale)
    twin = copy.deepcopy(model)
    layers = [{"params": twin[0].parameters()}, {"params": twin[2].parameters()}]
    plain = torch.optim.SGD(layers, lr=1.0, momentum=0.9)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        plain.state[q]["momentum_buffer"] = optimizer.state[p]["momentum_buffer"].clone()
    for t in range(10):
        optimizer.param_groups[1]["lr"] = 3e-5 * 0.9**t
        plain.param_groups[0]["lr"], plain.param_groups[1]["lr"] = lr * scale, 3e-5 * 0.9**t * scale
        assert train(model, optimizer, 1, first=t) == pytest.approx(train(twin, plain, 1, first=t), rel=1e-6)
        assert optimizer.param_groups[0]["lr"] is lr
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_which_bases_are_in_proportion_to_lr(name):
    """The update of a frozen step is the scale times that of a step at lr: for all but the bases that are refused."""
    case, updates = CASES[name], []
    for lr in (1.0, 2.0**-9):
        model = case.model().double()
        optimizer = case.base(model.parameters(), lr=2.0**-6, **case.options)
        train(model, optimizer, 5, closure=case.closure)
        before = [p.detach().clone() for p in model.parameters()]
        for group in optimizer.param_groups:
            group["lr"] = lr
        train(model, optimizer, 1, first=5, closure=case.closure)
        updates.append([(p.detach() - x) / lr for p, x in zip(model.parameters(), before, strict=True)])
    difference = max(float((a - b).norm() / a.norm()) for a, b in zip(*updates, strict=True))
    assert (difference < 1e-6) == (name in CAN), difference


@pytest.mark.parametrize("name", [name for name in CASES if name not in CAN])
def test_other_bases_cannot_be_frozen(name):
    case = CASES[name]
    model, optimizer = case.build()
    train(model, optimizer, 5, closure=case.closure)
    with pytest.raises(ValueError, match=rf"^Mechanized{case.base.__name__}: freeze_scale needs .* Remedy: "):
        optimizer.freeze_scale()


def test_a_scale_of_zero_or_a_group_without_lr_cannot_be_frozen():
    model, optimizer = CASES["SGD"].build()
    with pytest.raises(ValueError, match=r"needs a scale that is learned\. Got 0\. Remedy: make some steps first"):
        optimizer.freeze_scale()
    train(model, optimizer, 5)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match=r"with an lr in each parameter group.* Got SGD\. Remedy: "):
        optimizer.freeze_scale()


@pytest.mark.parametrize("name", ["SGD_fused", "AdamW", "AdamW_bfloat16", "AdamW_bfloat16_published"])
def test_to_freeze_and_unfreeze_at_once_changes_nothing(name):
    (model, optimizer), (twin, other) = frozen(name), CASES[name].build()
    optimizer.freeze_scale()  # twice is once
    optimizer.unfreeze_scale()
    train(twin, other, STEPS)
    assert train(model, optimizer, 10, first=STEPS) == train(twin, other, 10, first=STEPS)
    assert_identical([*model.parameters(), optimizer.state_dict()], [*twin.parameters(), other.state_dict()])


@pytest.mark.parametrize("name", ["SGD_fused", "AdamW_float64"])
def test_no_weight_jumps_when_it_is_unfrozen(name):
    """The first step is scale * update, and the change of the scale times the sum of updates from before."""
    model, optimizer = frozen(name, **PUBLISHED)
    losses = train(model, optimizer, 100, first=STEPS)
    optimizer.unfreeze_scale()
    before = [p.detach().clone() for p in model.parameters()]
    sums, scale = [stored_of(optimizer, p).clone() for p in model.parameters()], optimizer.scale
    train(model, optimizer, 1, first=STEPS)
    for p, x, old in zip(model.parameters(), before, sums, strict=True):
        expected = x + optimizer.scale * stored_of(optimizer, p) - scale * old
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)  # some roundings of numbers near 1
    assert max(train(model, optimizer, 20, first=STEPS + 80)) <= max(losses[-20:])  # the same batches


@pytest.mark.parametrize("name", ["SGD_fused", "AdamW", "AdamW_bfloat16", "SparseAdam"])
@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_a_resumed_frozen_run_is_the_same(name, how):
    model, optimizer = frozen(name)
    train(model, optimizer, 3, first=STEPS)
    if how == "state_dict":
        twin, other = CASES[name].build()
        twin.load_state_dict(model.state_dict())
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        twin, other = (
            copy.deepcopy((model, optimizer)) if how == "deepcopy" else pickle.loads(pickle.dumps((model, optimizer)))
        )
    for t in range(20):
        if t == 10:
            optimizer.unfreeze_scale()
            other.unfreeze_scale()
        assert train(model, optimizer, 1, first=t) == train(twin, other, 1, first=t)
        assert_identical([*model.parameters(), optimizer.state_dict()], [*twin.parameters(), other.state_dict()])


@pytest.mark.parametrize("flatten", [False, True])
def test_a_distributed_checkpoint_holds_it(flatten):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    (model, optimizer), (twin, other) = frozen("AdamW_fused"), CASES["AdamW_fused"].build()
    weights, state = copy.deepcopy(get_state_dict(model, optimizer, options=options))
    set_state_dict(twin, other, model_state_dict=weights, optim_state_dict=state, options=options)
    assert other.mechanic_tuner.frozen_scales() == [float(optimizer.scale)] > [0.0]
    assert train(model, optimizer, 5) == train(twin, other, 5)


def test_a_reset_and_a_plain_checkpoint_unfreeze():
    model, optimizer = frozen()
    optimizer.reset()
    train(model, optimizer, 30)
    assert optimizer.scale > 0
    optimizer.freeze_scale()
    optimizer.load_state_dict(torch.optim.AdamW(model.parameters(), lr=1.0).state_dict())
    before = optimizer.scale
    train(model, optimizer, 30)
    assert optimizer.scale > before


def test_parameters_that_come_while_it_is_frozen():
    model, optimizer = frozen()
    added = torch.ones(3, requires_grad=True)
    optimizer.add_param_group({"params": [added], "lr": 0.5})
    for t in range(10):
        optimizer.zero_grad()
        (loss_of(model, t) + added.square().sum()).backward()
        optimizer.step()
        if t == 4:
            expected, lr = added.detach().clone(), 0.5 * float(optimizer.scale)
            torch.testing.assert_close(expected, 1 - torch.ones(3) * lr * 5, rtol=0.02, atol=0)
            optimizer.unfreeze_scale()
    assert (added < expected).all()


def test_the_learned_lr_goes_on_while_frozen():
    model = mlp()
    optimizer = mechanize(torch.optim.SGD, s_init=1e-3)(model.parameters(), lr=3.0)
    schedule = CosineAnnealingLR(optimizer, 50)
    effective, factors = [], []
    for t in range(50):
        if t == 25:
            optimizer.freeze_scale()
        train(model, optimizer, 1, first=t)
        effective.append(optimizer.effective_lr()[0])
        factors.append(optimizer.param_groups[0]["lr"] / 3.0)
        schedule.step()
    assert optimizer.learned_lr()[0] * sum(factors) == pytest.approx(sum(effective), rel=1e-5)


@pytest.mark.parametrize("name", ["SGD_momentum", "SGD_fused", "AdamW", "AdamW_fused", "SGD_closure", "SparseAdam"])
def test_a_gradient_that_is_not_finite_is_skipped(name):
    model, optimizer = frozen(name)
    weight = next(model.parameters())
    before = copy.deepcopy([*model.parameters(), optimizer.state_dict()])

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        (weight.grad._values() if weight.grad.is_sparse else weight.grad)[0, 0] = math.nan
        return loss

    assert optimizer.step(closure) > 0
    count_a_skipped_step(before[-1])
    assert_identical([*model.parameters(), optimizer.state_dict()], before)


def test_gradients_that_are_large_are_finite():
    p = torch.ones(3, requires_grad=True)
    optimizer = mechanize(torch.optim.SGD, s_init=1e-3)([p], lr=1.0)
    for g in (1.0, 1.0, 1e30):
        p.grad = torch.full((3,), g)
        optimizer.step()
        if g == 1.0 and optimizer.scale > 0:
            optimizer.freeze_scale()
    assert optimizer.skipped_steps == 0
    assert (p < -1e20).all()


@pytest.mark.parametrize("skip_nonfinite", [False, True])
@pytest.mark.parametrize("name", ["SGD", "AdamW_fused"])
def test_a_frozen_step_obeys_a_scaler(name, skip_nonfinite):
    model, optimizer = frozen(name, skip_nonfinite=skip_nonfinite)
    twin, plain = plain_twin(model, optimizer, name)
    runs = []
    for m, o in ((model, optimizer), (twin, plain)):
        scaler = torch.amp.GradScaler(DEVICE or "cpu", init_scale=1024.0)
        for t in range(6):
            o.zero_grad()
            scaler.scale(loss_of(m, t)).backward()
            if t == 3:
                m[0].weight.grad[0, 0] = math.inf
            scaler.step(o)
            scaler.update()
        runs.append([scaler.get_scale(), *m.parameters()])
    assert_identical(*runs)
    assert optimizer.skipped_steps == (name == "AdamW_fused")  # a scaler does not call the others


def test_hooks_of_a_frozen_step_come_once():
    model, optimizer = frozen()
    fired = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    torch.optim.AdamW(mlp().parameters())  # a plain one, by which torch wraps the class
    train(model, optimizer, 1)
    assert fired == ["pre", "post"]


def costs(optimizer):
    """Return the operations of a step, and its transient bytes."""
    with Operations() as operations:
        optimizer.step()
    return operations, transient_bytes(optimizer.step)


@pytest.mark.parametrize("skip_nonfinite", [False, True])
@pytest.mark.parametrize(
    ("base", "options"),
    [(torch.optim.SGD, {}), (torch.optim.AdamW, {"foreach": True}), (torch.optim.AdamW, {"fused": True})],
    ids=["SGD", "AdamW_foreach", "AdamW_fused"],
)
def test_a_frozen_step_costs_what_the_base_costs(base, options, skip_nonfinite):
    plain = base(large_params(torch.float32), lr=1e-3, **options)
    mechanized = mechanize(base, skip_nonfinite=skip_nonfinite)(large_params(torch.float32), lr=1.0, **options)
    for _ in range(3):
        plain.step()
        mechanized.step()
    mechanized.freeze_scale()
    (theirs, their_bytes), (ours, our_bytes) = costs(plain), costs(mechanized)
    tensors = len(mechanized.param_groups[0]["params"])
    more = ours.count - theirs.count
    looks = more.pop("linalg_vector_norm", 0) + more.pop("_foreach_norm", 0)
    assert looks <= (tensors + 1 if skip_nonfinite else 0), "one pass over the gradients"
    assert more.total() <= (32 if skip_nonfinite else 16), "on single numbers"
    assert ours.host_reads - theirs.host_reads == (skip_nonfinite and not options.get("fused"))
    # A number takes 64 bytes at least, or 512 on a GPU.
    assert our_bytes <= their_bytes + (16384 if DEVICE else 2048)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable:UserWarning")  # on a GPU, compiled
@pytest.mark.parametrize("name", ["SGD_momentum", "AdamW_fused"])
def test_a_frozen_step_is_compiled_once_and_goes_the_same_way(name):
    torch._dynamo.reset()
    (model, optimizer), graphs = CASES[name].build(s_init=1e-3), Graphs()
    step = torch.compile(optimizer.step, backend=graphs)

    def run(model, optimizer, step, steps):
        for t in range(steps):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            step()

    run(model, optimizer, step, 4)
    optimizer.freeze_scale()
    twin, other = copy.deepcopy((model, optimizer))
    run(model, optimizer, step, 2)
    compiled, runs = graphs.compiled, graphs.runs
    run(model, optimizer, step, 4)
    assert graphs.compiled == compiled, "the scale is a constant, for which it is compiled once"
    assert name == "AdamW_fused" or graphs.runs == runs + 4  # torch breaks the graph of a fused base on a CPU
    run(twin, other, other.step, 2)
    run(twin, other, other.step, 4)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    loss_of(model, 9).backward()
    model[0].weight.grad[0, 0] = math.nan
    before = copy.deepcopy([*model.parameters()])
    step()
    assert_identical([*model.parameters()], before)
    assert optimizer.skipped_steps == 1
    torch._dynamo.reset()


# --- max_lr -----------------------------------------------------------------------------------------------------------


@given(
    scales=st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=6),
    max_lr=st.floats(1e-12, 1e6),
    lr=st.floats(1e-8, 1e6),
    double=st.booleans(),
)
@settings(deadline=None)
def test_the_bound_on_the_scale_is_exact(scales, max_lr, lr, double):
    dtype = torch.float64 if double else torch.float32
    s = torch.tensor(scales, dtype=dtype)
    capped = bounded(TunerState(s, s, s, s), max_lr / torch.tensor(lr, dtype=dtype)).scales
    assert (capped >= 0).all()
    for order in (capped, capped.flip(0), capped.sort().values):
        assert lr * float(order.sum()) <= max_lr
        assert lr * sum(order.tolist()) <= max_lr
    if lr * sum(scales) < max_lr * (1 - 1e-5):
        assert torch.equal(capped, s)


@pytest.mark.parametrize("schedule", ["constant", "warm-up", "decay"])
def test_a_bounded_run_equals_the_oracle(schedule):
    max_lr, factor = 0.02, {"constant": lambda t: 1.0, "warm-up": lambda t: min(1, t / 30), "decay": lambda t: 0.97**t}
    start, gradients = noisy_quadratic(0)
    params = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in start]
    ours = mechanize(torch.optim.SGD, s_init=1e-3, max_lr=max_lr)(params, lr=0.5)
    now, rule = {}, oracle.sgd(1.0)
    theirs = oracle.Oracle(start, lambda x, g: [now["lr"] * u for u in rule(x, g)], s_init=1e-3, max_lr=max_lr)
    bounded = 0
    for t in range(80):
        now["lr"] = ours.param_groups[0]["lr"] = 0.5 * factor[schedule](t)
        for p, g in zip(params, gradients([p.detach().numpy() for p in params], t), strict=True):
            p.grad = torch.tensor(g)
        ours.step()
        theirs.step(gradients(theirs.x, t), now["lr"])
        bounded += theirs.is_bounded
    assert bounded > 10
    for p, x in zip(params, theirs.x, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-9, atol=1e-9 * np.abs(x).max())
    np.testing.assert_allclose(read_out(ours).reward[0], theirs.r, rtol=1e-9)


@pytest.mark.parametrize("s_init", [1e-8, "auto"])
@pytest.mark.parametrize("lr", [1e-3, 7.0, torch.tensor(0.3)], ids=str)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_max_lr_is_never_exceeded(base, lr, s_init):
    model = mlp()
    layers = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 1e-4}]
    optimizer = mechanize(base, s_init=s_init, max_lr=1.7e-3)(layers, lr=lr, fused=True)
    schedule = LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / 50) * 0.99**t)
    seen = []
    for t in range(150):
        train(model, optimizer, 1, first=t)
        seen.append(max(optimizer.effective_lr()))
        assert seen[-1] <= 1.7e-3
        schedule.step()
    assert max(seen) > 1.4e-3  # lr has begun to decay before the bound is reached, in some


@pytest.mark.parametrize("warm_up", [1, 100])
@pytest.mark.parametrize(("base", "max_lr"), [("SGD", 1e-3), ("SGD", 1e-2), ("AdamW", 1e-4), ("AdamW", 1e-3)])
def test_a_search_that_meets_max_lr_stays_there(base, max_lr, warm_up):
    """The bound falls as lr rises in a warm-up, and may be below the first scale: neither is a fall of the scale."""
    model = mlp()
    optimizer = mechanize(getattr(torch.optim, base), max_lr=max_lr)(model.parameters(), lr=1.0)
    schedule = LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / warm_up))
    rates = []
    for t in range(120):
        train(model, optimizer, 1, first=t)
        rates.append(optimizer.effective_lr()[0])
        schedule.step()
    reached = next(t for t, rate in enumerate(rates) if rate > 0.99 * max_lr)
    assert min(rates[reached:]) > 0.5 * max_lr


def test_a_bound_that_is_not_reached_changes_nothing():
    runs = []
    for max_lr in (None, 1e6):
        model = mlp()
        optimizer = mechanize(torch.optim.AdamW, max_lr=max_lr)(model.parameters(), lr=1.0)
        runs.append([train(model, optimizer, 60), optimizer.state_dict()])
    assert_identical(*runs)


# --- a fraction of the learned scale ----------------------------------------------------------------------------------


def test_half_the_lr_of_a_frozen_run_is_half_the_effective_lr():
    """Half the lr is made up for by the tuner; half of it once the scale is frozen is half."""
    learned = {}
    for lr in (1.0, 0.5):
        model = mlp(torch.float64)
        optimizer = mechanize(torch.optim.AdamW, s_init="auto")(model.parameters(), lr=lr)
        train(model, optimizer, 100)
        learned[lr] = optimizer.effective_lr()[0]
    assert learned[0.5] == pytest.approx(learned[1.0], rel=1e-6)
    optimizer.freeze_scale()
    optimizer.param_groups[0]["lr"] *= 0.5
    train(model, optimizer, 100)
    assert optimizer.effective_lr()[0] == 0.5 * learned[0.5]


def test_frozen_steps_do_not_read_whether_a_group_that_waits_has_begun():
    """With "auto" and `per_group`, a group without a gradient has no scale yet; once frozen, nothing looks for it."""
    busy, idle = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    kind = mechanize(torch.optim.SGD, s_init="auto", per_group=True)
    optimizer = kind([{"params": [busy]}, {"params": []}], lr=1.0, fused=True)
    optimizer.param_groups[1]["params"].append(idle)
    reads = []
    for step in range(12):
        if step == 6:
            optimizer.param_groups[1]["params"].clear()
            optimizer.freeze_scale()
            optimizer.param_groups[1]["params"].append(idle)
        busy.grad = busy.detach().clone()
        with Operations() as operations:
            optimizer.step()
        reads.append(operations.host_reads)
    assert min(reads[2:6]) > 0, "it is looked for"
    assert reads[7:] == [0] * 5
