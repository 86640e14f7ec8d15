"""`s_init="auto"`: the run does not depend on the base lr, and starts wherever a first step is special."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim.lr_scheduler import LambdaLR

import oracle
from benchmarks.counting import Operations
from device import DEVICE
from helpers import assert_identical, compensation_of, lr_factors, stored_of
from mechanic_pytorch import _numbers, mechanize
from mechanic_pytorch._auto import MEMORY_POWERS, Memory
from mechanic_pytorch.telemetry import read_out
from problems import SparseClassifier, full_loss, loss_of, mlp, noisy_quadratic, train

BASES = {
    "SGD": (torch.optim.SGD, {}),
    "SGD_fused": (torch.optim.SGD, {"fused": True}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 1e-3}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "AdamW_fused": (torch.optim.AdamW, {"weight_decay": 0.1, "fused": True}),
}


def auto(name, params, lr=1.0, **options):
    base, base_options = BASES[name]
    return mechanize(base, s_init="auto", **options)(params, lr=lr, **base_options)


def relative_distance(actual, expected):
    difference = torch.cat([(a - e).flatten() for a, e in zip(actual, expected, strict=True)])
    return (difference.norm() / torch.cat([e.flatten() for e in expected]).norm()).item()


@pytest.fixture(params=["quick", "tensors"])
def arithmetic(request, monkeypatch):
    """On numbers of numpy, if the device is a CPU; and on tensors, as on a GPU."""
    if request.param == "tensors":
        monkeypatch.setattr(_numbers, "numpy", None)


WARM_UP = {"constant": lambda t: 1.0, "warm-up": lambda t: min(1.0, t / 20), "decay": lambda t: 0.97**t}
WARM_UP["jump"] = lambda t: 1e-3 if t < 5 else 1.0


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("begins", ["at random", "near zero"])
@pytest.mark.parametrize("schedule", WARM_UP)
@pytest.mark.parametrize("name", BASES)
def test_auto_equals_its_oracle_whatever_the_schedule(name, schedule, begins):
    lr, steps = 1e-3, 200
    start, gradients = noisy_quadratic(0)
    if begins == "near zero":  # the parameters become long on the way, which is what decay is measured by
        start = [1e-6 * x for x in start]
    params = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in start]
    ours = auto(name, params, lr)
    now = {"lr": lr}
    rule = {
        "SGD": lambda lr: oracle.sgd(lr),
        "momentum": lambda lr: oracle.sgd(lr, 0.9, 1e-3),
        "AdamW": lambda lr: oracle.adamw(lr, weight_decay=0.1),
    }[name.removesuffix("_fused")](1.0)  # all these rules are proportional to lr
    theirs = oracle.AutoOracle(start, lambda x, g: [now["lr"] * u for u in rule(x, g)])
    for t in range(steps):
        now["lr"] = ours.param_groups[0]["lr"] = lr * WARM_UP[schedule](t)
        for p, g in zip(params, gradients([p.detach().numpy() for p in params], t % 60), strict=True):
            p.grad = torch.tensor(g)
        ours.step()
        theirs.step(gradients(theirs.x, t % 60), now["lr"])
    assert theirs.longest > 1e3 * oracle.norm(oracle.flat(start)) or begins == "at random"
    assert theirs.is_found or begins == "near zero" or schedule == "decay"
    for p, x in zip(params, theirs.x, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-9, atol=1e-9 * np.abs(x).max())


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_later_search_that_goes_farther(name):
    """One gradient is too long. From step 60 on it is always the same, and from step 80 on the opposite."""
    start, gradients = noisy_quadratic(0)
    params = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in start]
    ours = auto(name, params)
    rule = oracle.sgd(1.0) if name == "SGD" else oracle.adamw(1.0, weight_decay=0.1)
    theirs = oracle.AutoOracle(start, rule)

    def changed(g, t):
        return (20.0 if t == 40 else 1.0) * g if t < 60 else np.full_like(g, 1.0 if t < 80 else -1.0)

    for t in range(110):
        for p, g in zip(params, gradients([p.detach().numpy() for p in params], t % 60), strict=True):
            p.grad = torch.tensor(changed(g, t))
        ours.step()
        theirs.step([changed(g, t) for g in gradients(theirs.x, t % 60)], 1.0)
    assert theirs.ends > 1
    for p, x in zip(params, theirs.x, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-9, atol=1e-9 * np.abs(x).max())


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_newcomers_with_a_long_gradient_begin_anew(name):
    """Parameters take part in turns, the second from step 20 on, the third from step 60 on; one gradient is long."""
    torch.manual_seed(0)
    start = [torch.randn(n, dtype=torch.float64).numpy() for n in (5, 3, 4)]
    params = [torch.tensor(x, requires_grad=True) for x in start]
    ours = auto(name, params)
    rules = [oracle.sgd(1.0) if name == "SGD" else oracle.adamw(1.0, weight_decay=0.1) for _ in start]

    def base(x, g):
        made = zip(rules, x, g, strict=True)
        return [0 * xi if gi is None else rule([xi], [gi])[0] for rule, xi, gi in made]

    theirs = oracle.AutoOracle(start, base)
    for t in range(120):
        factors = (0.1, None, None) if t < 20 else [(0.1, 9.0, None), (None, 9.0, None), (0.1, 3.0, 1.0)][t // 5 % 3]
        factors = [None if f is None or (i == 2 and t < 60) else f for i, f in enumerate(factors)]
        for p, f in zip(params, factors, strict=True):
            p.grad = None if f is None else f * (p.detach() - 3.0)
        ours.step()
        theirs.step([None if f is None else f * (x - 3.0) for f, x in zip(factors, theirs.x, strict=True)], 1.0)
        assert theirs.begun == (1 if t < 20 else 2), "not where the third comes, whose gradient is short"
        assert (Memory(*ours.param_groups[0]["mechanic_unit"]).age > 0) == theirs.is_found
    for p, x in zip(params, theirs.x, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-9, atol=1e-9 * np.abs(x).max())


@pytest.mark.parametrize("size", [0.0, 1e-6])
def test_a_bad_batch_of_the_others_does_not_begin_anew_because_somebody_is_new(size):
    """Experts and heads come one by one; what makes them another problem is their own gradient."""
    scales = []
    for comes in (False, True):
        torch.manual_seed(0)
        first, second = torch.randn(5, requires_grad=True), torch.randn(3, requires_grad=True)
        optimizer = auto("AdamW", [first, second])
        for t in range(61):
            first.grad = (20.0 if t == 60 else 1.0) * (first.detach() - 3 + torch.randn(5))
            second.grad = torch.full((3,), size) if comes and t == 60 else None
            optimizer.step()
        scales.append(float(optimizer.scale))
    assert scales[1] == pytest.approx(scales[0], rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_newcomers_begin_anew_in_their_group_alone(dtype):
    """The way of a parameter that rests then, begins where it is."""
    others = []
    for comes in (False, True):
        torch.manual_seed(0)
        first, second, other = (torch.randn(n, dtype=dtype, requires_grad=True) for n in (5, 3, 4))
        optimizer = auto("momentum", [{"params": [first, second]}, {"params": [other]}], per_group=True)
        for t in range(21):
            first.grad = None if comes and t == 20 else 0.1 * (first.detach() - 3)
            second.grad = 9 * (second.detach() - 3) if comes and t == 20 else None
            other.grad = other.detach() - 3
            before = float(optimizer.scale[0]) if t == 20 else 0.0
            optimizer.step()
        others.append([other, *(value for key, value in optimizer.param_groups[1].items() if key != "params")])
        lost = compensation_of(optimizer, first)
        here = first.detach().float() + (0.0 if lost is None else lost)
        assert torch.equal(stored_of(optimizer, first), here) == comes
        assert (optimizer.scale[0] < 0.01 * before) == comes
    assert_identical(*others)


@pytest.mark.parametrize("name", BASES)
def test_float64_runs_at_any_lr_are_the_same(name):
    weights = {}
    for lr in (1e-8, 1.0, 1e8):
        model = mlp(torch.float64)
        optimizer = auto(name, model.parameters(), lr)
        train(model, optimizer, 100, scheduler=LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / 10)))
        weights[lr] = [p.detach() for p in model.parameters()]
        assert full_loss(model) < 0.5
    for lr in (1e-8, 1e8):
        assert relative_distance(weights[lr], weights[1.0]) < 1e-6


@pytest.mark.parametrize("name", BASES)
def test_float32_runs_at_any_lr_are_the_same(name):
    """Not only alike, because chaos makes another run of another rounding."""
    losses = []
    for lr in [1e-6, 1e-3, 0.3, 1.0, 7.0, 1e6]:
        model = mlp()
        optimizer = auto(name, model.parameters(), lr)
        train(model, optimizer, 150, scheduler=LambdaLR(optimizer, lambda t: 1 - t / 150))
        losses.append(full_loss(model))
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("schedule", WARM_UP)
def test_every_step_is_a_plain_step_at_the_learned_scale(name, schedule):
    """Whatever the scale has done: x moves by S * u, and u is the update of a plain base that has seen the same."""
    model, twin = mlp(torch.float64), mlp(torch.float64)
    base, options = BASES[name]
    optimizer, plain = auto(name, model.parameters()), base(twin.parameters(), lr=1.0, **options)
    scales, lengths = [], []
    for t in range(60):
        before = [p.detach().clone() for p in model.parameters()]
        plain.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] = WARM_UP[schedule](t)
        with torch.no_grad():
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                q.copy_(p)
        train(model, optimizer, 1, first=t)
        train(twin, plain, 1, first=t)
        scales.append(float(optimizer.scale))
        moved = oracle.flat([(p.detach() - x).numpy() for p, x in zip(model.parameters(), before, strict=True)])
        u = oracle.flat([(q.detach() - x).numpy() for q, x in zip(twin.parameters(), before, strict=True)])
        lengths.append(1.0 if not u.any() or not scales[-1] else moved @ u / (u @ u) / scales[-1])
        np.testing.assert_allclose(moved, lengths[-1] * scales[-1] * u, rtol=1e-6, atol=1e-12)
    assert max(lengths) < 1 + 1e-6, "a step is shortened after a long gradient, never lengthened"
    assert sum(length > 1 - 1e-6 for length in lengths) > 50
    assert len({f"{s:.3g}" for s in scales}) > 20, "the scale must have changed"


def scale_after(model, optimizer, steps=150, **options):
    train(model, optimizer, steps, **options)
    assert full_loss(model) < 1.0  # 2.3 at first
    return optimizer.scale


@pytest.mark.parametrize("name", BASES)
def test_weights_that_start_at_zero(name):
    model = mlp()
    for p in model[2].parameters():
        torch.nn.init.zeros_(p)
    scale_after(model, auto(name, model.parameters()))
    classifier = torch.nn.Linear(64, 10)
    for p in classifier.parameters():
        torch.nn.init.zeros_(p)
    scale_after(classifier, auto(name, classifier.parameters()))


@pytest.mark.parametrize("name", BASES)
def test_the_start_waits_for_an_update_and_a_gradient(name):
    """Warm-up from lr 0: the first update is zero; then gradients that are."""
    model = mlp()
    optimizer = auto(name, model.parameters())
    schedule = LambdaLR(optimizer, lambda t: 0.0 if t < 3 else 1.0)
    for t in range(5):
        optimizer.zero_grad()
        (loss_of(model, t) * (0.0 if t in (3, 4) else 1.0)).backward()
        optimizer.step()
        schedule.step()
        assert optimizer.scale == 0, t
    assert scale_after(model, optimizer, scheduler=schedule) > 0


def test_parameters_whose_first_gradients_are_zero():
    model = mlp()
    model[0].weight.register_hook(lambda g: g * float(read_out(optimizer).steps > 3))
    optimizer = auto("AdamW", model.parameters())
    scale_after(model, optimizer)


def test_auto_starts_with_sparse_gradients():
    model = SparseClassifier()
    optimizer = mechanize(torch.optim.SparseAdam, s_init="auto")(model.parameters(), lr=1.0)
    scale_after(model, optimizer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_train_at_lr_one(dtype):
    """No lr is too large for the weights of 16 bits, in which updates of lr 1e-8 would vanish."""
    model = mlp(dtype)
    optimizer = mechanize(torch.optim.SGD, s_init="auto")(model.parameters(), lr=1.0)
    scale_after(model, optimizer)
    assert optimizer.scale.dtype == torch.float64


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 30])
def test_a_resumed_run_is_the_same(cut):
    model = mlp()
    optimizer = auto("AdamW_fused", model.parameters(), 1e-4)
    train(model, optimizer, cut)
    other = copy.deepcopy(model)
    resumed = auto("AdamW_fused", other.parameters(), 1e-4)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 10, first=cut)
    train(other, resumed, 10, first=cut)
    assert_identical(
        [list(other.parameters()), resumed.state_dict()], [list(model.parameters()), optimizer.state_dict()]
    )


@pytest.mark.parametrize("full", [False, True])
def test_a_run_resumed_through_distributed_checkpoint_is_the_same(full):
    """It makes state by a step of zero gradients at lr 0, which must not be taken for the start."""
    options = StateDictOptions(full_state_dict=full)
    model, other = mlp(), mlp(seed=1)
    optimizer, resumed = (auto("AdamW_fused", m.parameters()) for m in (model, other))
    train(model, optimizer, 5)
    weights, state = copy.deepcopy(get_state_dict(model, optimizer, options=options))
    train(model, optimizer, 5, first=5)
    set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=state, options=options)
    train(other, resumed, 5, first=5)
    assert_identical([*other.parameters()], [*model.parameters()])
    assert resumed.learned_lr() == optimizer.learned_lr()


def test_scaled_gradients_make_the_same_start():
    runs = []
    for init_scale in (1.0, 2.0**16):
        model = mlp()
        optimizer = auto("AdamW_fused", model.parameters())
        scaler = torch.amp.GradScaler(DEVICE or "cpu", init_scale=init_scale)
        for t in range(20):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, t)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.scale > 0
        runs.append([*model.parameters()])
    assert_identical(*runs)


def test_a_tensor_lr_is_the_same():
    runs = []
    for lr in (0.5, torch.tensor(0.5)):
        model = mlp(torch.float64)
        layers = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.25}]
        optimizer = mechanize(torch.optim.AdamW, s_init="auto")(layers, lr=lr, fused=True)
        train(model, optimizer, 20)
        runs.append([p.detach() for p in model.parameters()])
    assert relative_distance(*runs) < 1e-12


def test_a_reset_starts_anew():
    """The run is then that of a new optimizer, to the bit: SGD itself remembers nothing."""
    model = mlp()
    optimizer = auto("SGD", model.parameters())
    train(model, optimizer, 20)
    optimizer.reset()
    assert optimizer.scale == 0
    twin = copy.deepcopy(model)
    assert train(model, optimizer, 20) == train(twin, auto("SGD", twin.parameters()), 20)


def test_a_checkpoint_of_another_kind_of_start_is_refused():
    kinds = {}
    for s_init in ("auto", 1e-8):
        model = mlp()
        kinds[s_init] = mechanize(torch.optim.SGD, s_init=s_init)(model.parameters(), lr=1.0)
        train(model, kinds[s_init], 3)
    for one, other in (("auto", 1e-8), (1e-8, "auto")):
        before = copy.deepcopy(kinds[one].state_dict())
        with pytest.raises(
            ValueError, match=r"must have the same kind of s_init.*load_state_dict\(\.\.\., tuner=\"fresh\"\)"
        ):
            kinds[one].load_state_dict(kinds[other].state_dict())
        assert_identical(kinds[one].state_dict(), before)
        model = mlp()
        fresh = mechanize(torch.optim.SGD, s_init=one)(model.parameters(), lr=1.0)
        fresh.load_state_dict(kinds[other].state_dict(), tuner="fresh")
        assert fresh.scale == 0
        train(model, fresh, 3)
        assert fresh.scale > 0
    plain = torch.optim.SGD(mlp().parameters(), lr=1.0)
    kinds["auto"].load_state_dict(plain.state_dict())


def test_a_checkpoint_of_other_rules_is_refused():
    assert len(Memory._fields) == len(MEMORY_POWERS)
    model, other = mlp(), mlp()
    ours, theirs = (auto("AdamW_fused", m.parameters()) for m in (model, other))
    train(model, ours, 3)
    before, checkpoint = copy.deepcopy(theirs.state_dict()), copy.deepcopy(ours.state_dict())
    checkpoint["param_groups"][0]["mechanic_unit"] = checkpoint["param_groups"][0]["mechanic_unit"][:7]
    with pytest.raises(ValueError, match=r"must hold 18 numbers in 'mechanic_unit'\. Got a tensor of shape \(7,\)"):
        theirs.load_state_dict(checkpoint)
    assert_identical(theirs.state_dict(), before)


def test_a_skipped_first_gradient_is_not_taken_for_the_start():
    model = mlp()
    optimizer = auto("AdamW_fused", model.parameters())
    loss_of(model, 0).backward()
    model[0].weight.grad[0, 0] = torch.nan
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert optimizer.scale == 0
    scale_after(model, optimizer)


def test_once_begun_auto_costs_no_host_read_and_no_pass_more(monkeypatch):
    monkeypatch.setattr(_numbers, "numpy", None)  # as on a GPU
    counts = {}
    for s_init in ("auto", 1e-8):
        model = mlp()
        optimizer = mechanize(torch.optim.AdamW, s_init=s_init)(model.parameters(), lr=1.0, fused=True)
        train(model, optimizer, 3)
        loss_of(model, 3).backward()
        with Operations() as counts[s_init]:
            optimizer.step()
    assert counts["auto"].host_reads == counts[1e-8].host_reads == 0
    small = {"measure": sum(counts["auto"].count.values()) - sum(counts[1e-8].count.values())}
    assert small["measure"] < 255  # operations on a few numbers
    # And in the passes that are made anyway, of the two blocks here: |D|^2 while measuring, |u|^2 while moving.
    assert counts["auto"].count["dot"] - counts[1e-8].count["dot"] == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("lr", [1e-6, 1e6])
def test_no_lr_is_lost_in_rounding_or_overflows(dtype, lr):
    """Without the factor, updates of 1e-8 vanish in bfloat16 weights, and those of 1e6 are infinite in float16."""
    model = mlp(dtype)
    optimizer = mechanize(torch.optim.SGD, s_init="auto")(model.parameters(), lr=lr)
    scale_after(model, optimizer)


def test_the_lr_that_the_user_sees_is_the_users():
    """The base finds another; after its step, and after an error, the very objects are back."""
    seen, lr = [], torch.tensor(1e-3)

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            seen.append([float(group["lr"]) for group in self.param_groups])
            if len(seen) == 3:
                raise RuntimeError("stop")
            return super().step(closure)

    model = mlp()
    layers = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 5e-4}]
    optimizer = mechanize(Watched, s_init="auto")(layers, lr=lr)
    train(model, optimizer, 2)
    scale = float(optimizer.scale)
    assert scale > 0
    assert optimizer.effective_lr() == pytest.approx([1e-3 * scale, 5e-4 * scale])
    with pytest.raises(RuntimeError, match="stop"):
        train(model, optimizer, 1, first=2)
    assert [group["lr"] for group in optimizer.param_groups] == [lr, 5e-4]
    assert optimizer.param_groups[0]["lr"] is lr
    factor = lr_factors(optimizer)[0]
    assert seen == [pytest.approx([1.0, 0.5]), *[pytest.approx([1e-3 * factor, 5e-4 * factor])] * 2]
    assert factor > 999


def test_once_chosen_the_factor_changes_only_if_lr_grows_past_it():
    """A warm-up and a checkpoint keep the unit in which the sums were begun; lr changed by hand, by a power of two."""
    model = mlp()
    optimizer = auto("SGD", model.parameters(), 1e-3)
    schedule = LambdaLR(optimizer, lambda t: min(1.0, t / 5))
    train(model, optimizer, 3, scheduler=schedule)
    factor = lr_factors(optimizer)[0]
    assert math.log2(factor / 1000.0) % 1 == 0
    train(model, optimizer, 10, first=3, scheduler=schedule)
    other = auto("SGD", mlp().parameters(), 1.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one in (optimizer, other):
        train(model, one, 1, first=13)
        assert lr_factors(one)[0] == factor
    peak, learned = optimizer.effective_lr(), optimizer.learned_lr()
    optimizer.param_groups[0]["lr"] = 5e-3
    train(model, optimizer, 1, first=14)
    assert lr_factors(optimizer)[0] == factor / 8
    assert optimizer.learned_lr() == pytest.approx([5 * learned[0]], rel=0.5)
    assert optimizer.effective_lr()[0] < 10 * peak[0]
    optimizer.reset()
    optimizer.param_groups[0]["initial_lr"] = 1.0
    train(model, optimizer, 1)
    assert lr_factors(optimizer)[0] == 1.0


@pytest.mark.parametrize("can_sync", [True, False])
def test_a_first_update_too_short_to_use_is_used_where_lr_cannot_grow(can_sync, monkeypatch):
    """While a CUDA graph records, the host learns nothing by which to choose another lr."""
    monkeypatch.setattr("mechanic_pytorch._base_step.can_sync", lambda optimizer: can_sync)
    p = torch.ones(4, requires_grad=True)
    optimizer = auto("SGD", [p])
    scales = []
    for _ in range(3):
        p.grad = 1e-5 * p.detach()
        optimizer.step()
        scales.append(float(optimizer.scale))
    assert (scales[0] > 0) == (not can_sync)
    assert scales[-1] > 0
    assert (lr_factors(optimizer)[0] > 1) == can_sync


def test_a_base_that_sets_its_own_lr_keeps_what_it_set():
    class Halving(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                group["lr"] = group["lr"] / 2

    model = mlp()
    optimizer = mechanize(Halving, s_init="auto")(model.parameters(), lr=1e-3)
    train(model, optimizer, 3)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 / 8, rel=1e-15)
