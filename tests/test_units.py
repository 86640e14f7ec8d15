"""Whatever units data, loss and weights have: nothing is lost in rounding, nothing overflows, or it is said."""

import functools
import warnings
from statistics import fmean

import pytest
import torch
from torch.nn import functional as F

from helpers import lr_factors
from mechanic_pytorch import mechanize
from problems import full_loss, loss_of, mlp, train

AUTO = {"s_init": "auto"}
SGD = torch.optim.SGD
ORDERS = (0, 1000, 2000)  # of batches, by the first one


def train_scaled(model, optimizer, factor, steps=300, first=0):
    """Train on a loss that is multiplied by a number, and return the loss over all data."""
    for t in range(first, first + steps):
        optimizer.zero_grad()
        (factor * loss_of(model, t)).backward()
        optimizer.step()
    return full_loss(model)


@functools.cache
def plain_losses(dtype):
    models = [mlp(dtype) for _ in ORDERS]
    return [
        train_scaled(model, SGD(model.parameters(), lr=0.1, momentum=0.9), 1.0, first=first)
        for model, first in zip(models, ORDERS, strict=True)
    ]


@pytest.mark.parametrize("factor", [1e-12, 1e-6, 1e-3, 1e3, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_loss_in_other_units(dtype, factor):
    """Updates of SGD shrink and grow with the loss, far below what is added to a weight of 16 bits, or of 32.

    One run is half noise: the plain one ends between 0.05 and 0.09.
    """
    losses = []
    for first in ORDERS:
        model = mlp(dtype)
        optimizer = mechanize(SGD, **AUTO)(model.parameters(), lr=1.0, momentum=0.9)
        losses.append(train_scaled(model, optimizer, factor, first=first))
    assert fmean(losses) < 1.1 * fmean(plain_losses(dtype))


@pytest.mark.parametrize("kernel", ["blocks", "foreach", "for_loop", "triton"])
@pytest.mark.parametrize("s_init", ["auto", 1e-8])
def test_a_loss_scale_of_which_float32_has_no_square(s_init, kernel, monkeypatch, request):
    """Where gradients are of 32 bits or bfloat16 nothing overflows, so a `GradScaler` doubles its scale for ever."""
    if kernel == "triton":
        request.getfixturevalue("triton_kernel")
    monkeypatch.setenv("MECHANIC_KERNEL", kernel)
    runs = []
    for scale in (1.0, 2.0**100):
        model = mlp()
        optimizer = mechanize(torch.optim.AdamW, s_init=s_init)(model.parameters(), lr=1.0, fused=True)
        for t in range(8):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            torch._foreach_mul_([p.grad for p in model.parameters()], scale)
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
            optimizer.step()
        assert optimizer.skipped_steps == 0
        runs.append([*model.parameters(), optimizer.scale])
    assert all(map(torch.equal, *runs)), "a power of two rounds nothing"


@pytest.mark.parametrize("factor", [1e-3, 1e2])
def test_a_loss_in_other_units_in_float16(factor):
    model = mlp(torch.float16)
    assert train_scaled(model, mechanize(SGD, **AUTO)(model.parameters(), lr=1.0, momentum=0.9), factor) < 0.1


@pytest.mark.parametrize("per_group", [False, True])
def test_groups_share_a_factor_or_have_their_own(per_group):
    """Their first updates differ a thousandfold."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, 32), torch.nn.Linear(32, 10)]
    model = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1]).bfloat16()
    groups = [{"params": layer.parameters(), "lr": lr} for layer, lr in zip(layers, (1.0, 1e-3), strict=True)]
    optimizer = mechanize(SGD, per_group=per_group, **AUTO)(groups, lr=1.0)
    train_scaled(model, optimizer, 1e-3)
    factors = lr_factors(optimizer)
    assert len(set(factors)) == 1 + per_group
    assert all(factor > 100 for factor in factors)
    assert full_loss(model) < (0.1 if per_group else 0.5)


def unscaled(generator):
    """Return a regression nobody has scaled: features of 1e2, 1e3 and 1e4, targets of 1e5."""
    low, width = torch.tensor([30.0, 1950.0, 0.0]), torch.tensor([200.0, 70.0, 3e4])
    x = low + width * torch.rand(400, 3, generator=generator)
    y = x @ torch.tensor([3000.0, 500.0, -2.0]) - 975e3 + 2e4 * torch.randn(400, generator=generator)
    return x, y


def test_sgd_on_unscaled_data_does_not_run_away():
    """All data at every step: as soon as lr is too large for the steepest direction, each step is larger than the last.

    Plain SGD is best at lr 1e-9, where the gradient is 1e10 long.
    """
    x, y = unscaled(torch.Generator().manual_seed(0))
    losses = {}
    for name, build in {
        "plain": lambda params: SGD(params, lr=1e-9),
        "ours": lambda params: mechanize(SGD, **AUTO)(params, lr=1.0),
    }.items():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
        optimizer = build(model.parameters())
        for _ in range(1000):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x).squeeze(1), y)
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
    assert losses["ours"] < 1.1 * losses["plain"]
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1e6, 1e9])
@pytest.mark.parametrize("base", [SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_parameters_of_any_size(base, size):
    """The constant of an inverse problem, found from a start three times as large."""
    p = torch.full((1,), 3 * size, dtype=torch.float64, requires_grad=True)
    optimizer = mechanize(base, **AUTO)([p], lr=1.0)
    worst = 0.0
    for _ in range(400):
        optimizer.zero_grad()
        loss = ((p / size - 1) ** 2).sum()
        loss.backward()
        optimizer.step()
        worst = max(worst, loss.item())
    assert loss.item() < 1e-3
    assert worst <= 16.0, "4 at the start"


@pytest.mark.parametrize("first", [1e-8, 1e-4])
@pytest.mark.parametrize(
    ("base", "options"),
    [(torch.optim.AdamW, {"eps": 1e-4}), (torch.optim.AdamW, {"eps": 1e-4, "fused": True}), (SGD, {"momentum": 0.9})],
)
def test_a_warm_up_by_hand_in_float16(base, options, first):
    """No `initial_lr` tells how large lr will be, and the optimizer was built with the smallest."""
    model = mlp(torch.float16)
    optimizer = mechanize(base, **AUTO)(model.parameters(), lr=first, **options)
    for t in range(300):
        optimizer.param_groups[0]["lr"] = first + min(1 - first, t / 50)
        train(model, optimizer, 1, first=t)
    assert full_loss(model) < 0.1
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("s_init", ["auto", 1e-8])
def test_a_base_that_moves_hardly_a_weight_is_told_of(dtype, s_init):
    """torch's fused SGD leaves vectors of 16 bits where they are, on a CPU (2.13); another version may not."""
    x = torch.ones(64, dtype=dtype, requires_grad=True)
    x.grad = torch.ones_like(x)
    SGD([x], lr=0.1, fused=True).step()
    if (x != 1).all():
        pytest.skip("this version of torch moves them")
    model = mlp(dtype)
    optimizer = mechanize(SGD, s_init=s_init)(model.parameters(), lr=1.0, fused=True)
    with pytest.warns(UserWarning, match=r"lost in rounding.*Remedy: .*fused=False") as heard:
        train(model, optimizer, 30)
    assert len(heard) == 1


def test_a_frozen_group_is_not_taken_for_rounding():
    model = mlp()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    optimizer = mechanize(SGD, **AUTO)(groups, lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 30)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda p: p.grad.fill_(torch.nan), "because a gradient is not finite.*look for inf or nan there"),
        (
            lambda p: p.grad.fill_(1e30),
            "because a square overflows: all numbers are finite.*scale the data or the loss down",
        ),
        (lambda p: p.data.fill_(torch.inf), "because a weight is not finite.*look for inf or nan there"),
    ],
    ids=["gradient", "square", "weight"],
)
def test_what_is_said_of_skipped_steps_is_so(spoil, reason):
    p = torch.ones(3, requires_grad=True)
    optimizer = mechanize(SGD, **AUTO)([p], lr=1.0)
    for t in range(60):
        p.grad = torch.ones(3)
        if t >= 5:
            spoil(p)
        if t == 54:
            with pytest.warns(UserWarning, match=reason):
                optimizer.step()
        else:
            optimizer.step()
    assert optimizer.skipped_steps == 55
