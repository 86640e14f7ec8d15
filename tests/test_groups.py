"""Parameter groups, freezing, missing gradients, and parameters of every shape and kind."""

import numpy as np
import pytest
import torch

from device import DEVICE
from helpers import slot_of, stored_of
from mechanic_pytorch import mechanize
from mechanic_pytorch.telemetry import read_out
from problems import full_loss, layers, mlp, train


def quadratic(params, targets):
    loss = sum(((p - t) ** 2).sum() for p, t in zip(params, targets, strict=True))
    loss.backward()
    return loss


def ones(*shapes, dtype=torch.float64):
    return [torch.ones(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def step(optimizer, *gradients):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, g in zip(params, gradients, strict=True):
        p.grad = None if g is None else torch.full_like(p, g)
    optimizer.step()


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_a_group_added_mid_run_is_scaled_like_the_others(base):
    a, b = ones(3, 2)
    optimizer = mechanize(base, s_init=0.1)([a], lr=1.0)
    for _ in range(5):
        step(optimizer, 1.0)
    scale = float(optimizer.scale)
    optimizer.add_param_group({"params": [b], "lr": 0.5})
    assert float(optimizer.scale) == scale > 0
    before = b.detach().clone()
    step(optimizer, 1.0, 1.0)
    update = stored_of(optimizer, b)
    torch.testing.assert_close(b.detach() - before, optimizer.scale * update)
    assert optimizer.effective_lr() == [float(optimizer.scale), 0.5 * float(optimizer.scale)]


def test_learning_rate_ratios_between_groups_are_kept():
    """Two equal parameters whose groups differ by a factor 10 in lr move in the ratio 10."""
    a, b = ones(3, 3)
    optimizer = mechanize(torch.optim.SGD, s_init=0.01)([{"params": [a]}, {"params": [b], "lr": 0.1}], lr=1.0)
    for _ in range(20):
        step(optimizer, 1.0, 1.0)
    torch.testing.assert_close(1 - a, 10 * (1 - b))
    assert (a < 1).all()


def test_weight_decay_per_group_is_kept():
    a, b = ones(3, 3)
    groups = [{"params": [a], "weight_decay": 0.5}, {"params": [b], "weight_decay": 0.0}]
    optimizer = mechanize(torch.optim.SGD, s_init=0.01)(groups, lr=1.0)
    for _ in range(3):
        step(optimizer, 1.0, 1.0)
    torch.testing.assert_close(stored_of(optimizer, b), torch.full((3,), -3.0, dtype=torch.float64))
    assert (stored_of(optimizer, a) < -4).all()


def test_a_group_with_learning_rate_zero_stays():
    a, b = ones(3, 3)
    optimizer = mechanize(torch.optim.SGD, s_init=0.1)([{"params": [a]}, {"params": [b], "lr": 0.0}], lr=1.0)
    for _ in range(5):
        step(optimizer, 1.0, 1.0)
    assert torch.equal(b.detach(), torch.ones(3, dtype=torch.float64))
    assert (a != 1).all()


def test_a_parameter_without_gradient_stays_and_takes_no_part():
    """The tuner's sums, norms included, run over the parameters that have a gradient."""
    a, b = ones(3, 2)
    optimizer = mechanize(torch.optim.SGD, s_decay=0.5, s_init=0.1)([a, b], lr=1.0)
    for _ in range(4):
        step(optimizer, 1.0, 1.0)
    before, delta = b.detach().clone(), stored_of(optimizer, b).clone()
    a.grad, b.grad = torch.ones_like(a), None
    with torch.no_grad():
        delta_a, scale = stored_of(optimizer, a), optimizer.scale
        h = (delta_a * (a.grad + 0.5 * scale * a.grad.norm() * a / a.norm())).sum()
    v = np.array(read_out(optimizer).sum_squared_products)
    optimizer.step()
    beta = np.array(optimizer.mechanic_config.betas)
    np.testing.assert_allclose(read_out(optimizer).sum_squared_products, beta**2 * v + h.item() ** 2, rtol=1e-7)
    assert torch.equal(b.detach(), before)
    assert torch.equal(stored_of(optimizer, b), delta)


def test_a_parameter_that_paused_goes_on_from_where_it_is():
    """No leap to where it would be now: what it missed while the scale changed is not made up for."""
    a, b = ones(3, 2)
    optimizer = mechanize(torch.optim.SGD, s_init=1e-3)([a, b], lr=1.0)
    for _ in range(4):
        step(optimizer, 1.0, 1.0)
    for _ in range(10):
        step(optimizer, 1.0, None)
    old_scale, before, delta = float(optimizer.scale), b.detach().clone(), stored_of(optimizer, b).clone()
    step(optimizer, 1.0, 1.0)
    new_scale = float(optimizer.scale)
    torch.testing.assert_close(b.detach(), before + new_scale * (delta - 1.0) - old_scale * delta)


def test_layers_frozen_at_first_and_unfrozen_later():
    model = mlp()
    model[0].requires_grad_(False)
    first = model[0].weight.detach().clone()
    optimizer = mechanize(torch.optim.AdamW)(model.parameters(), lr=1.0)
    train(model, optimizer, 60)
    assert torch.equal(model[0].weight, first)
    assert model[0].weight not in optimizer.state
    model[0].requires_grad_(True)
    train(model, optimizer, 200)  # the new layer is a shock: the scale falls to its start, and is found again
    assert not torch.equal(model[0].weight, first)
    assert full_loss(model) < 0.5


def test_reset_softens_unfreezing():
    """What the head has learned is kept, and the scale is found for the whole model."""
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = mechanize(torch.optim.AdamW)(model.parameters(), lr=1.0)
    train(model, optimizer, 100)
    frozen = full_loss(model)
    model[0].requires_grad_(True)
    optimizer.reset()
    losses = train(model, optimizer, 150, first=100)
    assert max(losses) < 2 * frozen + 0.5
    assert full_loss(model) < frozen


def test_no_gradient_at_all_is_a_no_op():
    (a,) = ones(3)
    optimizer = mechanize(torch.optim.AdamW)([a], lr=1.0)
    assert optimizer.step() is None
    step(optimizer, 1.0)
    state = {key: value.clone() for key, value in optimizer.state[a].items()}
    home = dict(optimizer.param_groups[0])
    a.grad = None
    optimizer.step()
    assert all(torch.equal(optimizer.state[a][key], value) for key, value in state.items())
    assert all(home[key] is value or torch.equal(home[key], value) for key, value in optimizer.param_groups[0].items())


def test_tied_parameters_count_once():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)).double()
    model[1].weight = model[0].weight
    alone = torch.nn.Parameter(model[0].weight.detach().clone())
    tied = mechanize(torch.optim.SGD, s_init=0.1)(model.parameters(), lr=1.0)
    single = mechanize(torch.optim.SGD, s_init=0.1)([alone], lr=1.0)
    x = torch.randn(8, 4, dtype=torch.float64)
    for _ in range(5):
        tied.zero_grad()
        single.zero_grad()
        model(x).square().mean().backward()
        (x @ alone.T @ alone.T).square().mean().backward()
        tied.step()
        single.step()
    torch.testing.assert_close(model[1].weight, alone)


def awkward(dtype=torch.float64):
    """Return leaf parameters of every awkward layout."""
    torch.manual_seed(0)
    tensors = [
        torch.randn((), dtype=dtype),
        torch.empty(0, dtype=dtype),
        torch.randn(3, 0, dtype=dtype),
        torch.randn(5, 3, dtype=dtype).t(),
        torch.randn(6, 4, dtype=dtype)[::2, 1:3],
        torch.randn(2, 3, 4, 4, dtype=dtype).to(memory_format=torch.channels_last),
    ]
    return [tensor.requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_layout_does_not_matter(base):
    runs = []
    for params in (awkward(), [p.detach().contiguous().requires_grad_() for p in awkward()]):
        optimizer = mechanize(base, s_init=1e-2)(params, lr=1.0)
        for t in range(20):
            optimizer.zero_grad()
            quadratic(params, [torch.full_like(p, 0.1 * t) for p in params])
            optimizer.step()
        runs.append((params, optimizer.scale))
    (strided, scale), (contiguous, expected) = runs
    torch.testing.assert_close(scale, expected)
    for p, q in zip(strided, contiguous, strict=True):
        torch.testing.assert_close(p, q)
    assert strided[-1].is_contiguous(memory_format=torch.channels_last)


def test_mixed_dtypes_share_one_tuner():
    """Parameters of four dtypes at once give about the trajectory of float64 ones."""
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    runs = []
    for kinds in (dtypes, [torch.float64] * 4):
        params = [torch.ones(4, dtype=dtype, requires_grad=True) for dtype in kinds]
        optimizer = mechanize(torch.optim.SGD, s_init=1e-3)(params, lr=1.0)
        for _ in range(30):
            optimizer.zero_grad()
            quadratic(params, [torch.full_like(p, 0.5) for p in params])
            optimizer.step()
        assert optimizer.scale.dtype == torch.float64
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=0.01, atol=0.01)
    assert all((p < 0.9).all() for p in runs[1])


def test_names_of_parameters_are_kept_in_the_checkpoint():
    model = mlp()
    optimizer = mechanize(torch.optim.AdamW)(model.named_parameters(), lr=1.0)
    train(model, optimizer, 5)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == [name for name, _ in model.named_parameters()]


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_listed_twice_is_counted_once():
    """torch's base steps it twice, which for SGD is one step at twice the learning rate."""
    runs = []
    for copies, lr in ((2, 1.0), (1, 2.0)):
        (a,) = ones(3)
        # With foreach=True, torch's default on a GPU, both steps of the plain base would race there.
        optimizer = mechanize(torch.optim.SGD, s_init=0.1)([a] * copies, lr=lr, foreach=False)
        for _ in range(5):
            a.grad = torch.ones_like(a)
            optimizer.step()
        runs.append((a, stored_of(optimizer, a), optimizer.scale))
    for twice, once in zip(*runs, strict=True):
        torch.testing.assert_close(twice, once)


def test_a_group_without_parameters_changes_nothing():
    runs = []
    for empty in ([], [{"params": []}]):
        (a,) = ones(3)
        optimizer = mechanize(torch.optim.SGD, s_init=0.1)([*empty, {"params": [a]}], lr=1.0)
        for _ in range(5):
            step(optimizer, 1.0)
        assert optimizer.effective_lr() == [float(optimizer.scale)] * (len(empty) + 1)
        runs.append([a.tolist(), float(optimizer.scale)])
    assert runs[0] == runs[1]
    assert runs[0][1] > 0.1


def reversed_groups(optimizer):
    optimizer.param_groups.reverse()


def rebuilt(optimizer):
    groups = [{"params": group["params"], "lr": group["lr"]} for group in optimizer.param_groups]
    optimizer.param_groups.clear()
    for group in groups:
        optimizer.add_param_group(group)


def merged(optimizer):
    first = optimizer.param_groups.pop(0)
    optimizer.param_groups[0]["params"] += first["params"]


def first_removed(optimizer):
    for p in optimizer.param_groups.pop(0)["params"]:
        p.requires_grad_(False)
        p.grad = None
        optimizer.state.pop(p)


@pytest.mark.parametrize("change", [reversed_groups, rebuilt, merged, first_removed])
@pytest.mark.parametrize("per_group", [False, True])
@pytest.mark.parametrize("s_init", ["auto", 1e-4])
def test_groups_that_are_moved_keep_what_was_learned(s_init, per_group, change):
    """At once, in a checkpoint, and in the next steps; with a scale for each group, each parameter its own."""
    model = mlp()
    groups = [{"params": params} for params in layers(model)]
    optimizer = mechanize(torch.optim.AdamW, s_init=s_init, per_group=per_group)(groups, lr=1.0)
    train(model, optimizer, 60)
    scales, sums = optimizer.scale.tolist(), optimizer.learned_lr()
    change(optimizer)
    expected = {reversed_groups: [1, 0], rebuilt: [0, 1], merged: [1], first_removed: [1]}[change]
    assert optimizer.scale.tolist() == ([scales[i] for i in expected] if per_group else scales)
    assert optimizer.learned_lr() == [sums[i] for i in expected]
    assert read_out(optimizer).steps == 60
    assert optimizer.skipped_steps == 0
    before = full_loss(model)
    train(model, optimizer, 60, first=60)
    assert read_out(optimizer).steps == 120
    assert full_loss(model) < before


def test_a_reset_between_changes_of_groups_forgets():
    model = mlp()
    optimizer = mechanize(torch.optim.AdamW, s_init="auto")(model.parameters(), lr=1.0)
    train(model, optimizer, 20)
    optimizer.reset()
    rebuilt(optimizer)
    assert optimizer.scale == 0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "options", [{"s_init": "auto"}, {"s_init": 1e-4}, {"s_init": "auto", "per_group": True}], ids=str
)
@pytest.mark.parametrize("change", ["grow", "prune"])
def test_points_that_are_added_or_pruned(change, options, fused):
    """As code for Gaussian splatting does it, which knows the state of Adam and nothing else."""
    generator = torch.Generator(DEVICE or "cpu").manual_seed(0)
    target = torch.randn(6, 3, generator=generator).repeat(2, 1)
    p = torch.nn.Parameter(torch.zeros(6, 3))
    optimizer = mechanize(torch.optim.Adam, **options)([{"params": [p], "name": "means"}], lr=1.0, fused=fused)
    losses, scales = [], []
    for t in range(200):
        if t in (30, 60):
            rows = torch.cat([torch.arange(len(p))] * 2) if change == "grow" and len(p) == 6 else torch.arange(3)
            state, new = optimizer.state.pop(p), torch.nn.Parameter(p.detach()[rows].clone())
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = state[key][rows].clone()
            optimizer.param_groups[0]["params"][0], optimizer.state[new], p = new, state, new
        optimizer.zero_grad()
        loss = (p - target[: len(p)]).square().mean()
        loss.backward()
        if t == 30:
            with pytest.warns(UserWarning, match=r"a parameter comes with .* They begin again from the weights"):
                optimizer.step()
        else:
            optimizer.step()
        losses.append(loss.item())
        scales.append(float(optimizer.scale))
    assert losses[-1] < 1e-2 * losses[0]
    assert losses[32] < 1.5 * losses[29]
    assert scales[30] > 0.2 * scales[29]
    assert optimizer.state[p][next(k for k in optimizer.state[p] if k.startswith("mechanic"))].shape == p.shape


def test_points_of_another_shape_are_no_newcomers():
    """Their rows are doubled and their gradient grows: the scale is kept, as the warning says."""
    torch.manual_seed(0)
    weight, other = torch.nn.Parameter(torch.randn(8, 3)), torch.nn.Parameter(torch.randn(4))
    optimizer = mechanize(torch.optim.AdamW, s_init="auto")([weight, other], lr=1.0)

    def step(times=1.0):
        for p in (weight, other):
            p.grad = times * (p.detach() - 1)
        optimizer.step()

    for _ in range(60):
        step()
    before = float(optimizer.scale)
    bigger = torch.nn.Parameter(weight.detach().repeat(2, 1))
    grown = {
        key: value.repeat(2, 1) if value.shape == weight.shape else value
        for key, value in optimizer.state.pop(weight).items()
    }
    optimizer.state[bigger] = {key: value for key, value in grown.items() if not key.startswith("mechanic_")}
    optimizer.state[bigger][slot_of(optimizer)] = weight.detach().clone()
    optimizer.param_groups[0]["params"][0] = weight = bigger
    with pytest.warns(UserWarning, match="the scale is kept"):
        step(20.0)
    assert float(optimizer.scale) > 0.3 * before
