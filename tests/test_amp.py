"""Mixed precision: `GradScaler`, with bases that leave unscaling to it and with bases that do it themselves."""

import copy

import pytest
import torch
from torch.nn import functional as F

from bases import CASES
from device import DEVICE
from helpers import assert_identical, forget_counts
from mechanic_pytorch import mechanize
from problems import batch, full_loss, mlp

NAMES = ["SGD_momentum", "SGD_fused", "AdamW", "AdamW_fused", "Adagrad_fused"]


def scaled_step(model, optimizer, scaler, t, overflow=False, unscale=False, clip=None):
    optimizer.zero_grad()
    images, labels = batch(t)
    with torch.autocast(DEVICE or "cpu", torch.bfloat16):
        loss = F.cross_entropy(model(images), labels)
    scaler.scale(loss).backward()
    if overflow:
        model[0].weight.grad[0, 0] = float("inf")
    if unscale or clip:
        scaler.unscale_(optimizer)
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()
    return loss.item()


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_scale_does_not_matter(name, unscale):
    """Powers of two are exact: with any of them the run is that without a scaler, to the bit."""
    runs = []
    for init_scale in (None, 1.0, 1024.0, 65536.0):
        model, optimizer = CASES[name].build()
        enabled = init_scale is not None
        scaler = torch.amp.GradScaler(DEVICE or "cpu", init_scale=init_scale or 1.0, enabled=enabled)
        losses = [scaled_step(model, optimizer, scaler, t, unscale=unscale and enabled) for t in range(60)]
        runs.append((losses, float(optimizer.scale)))
    assert runs[0][1] > 1e-5
    assert runs[0] == runs[1] == runs[2] == runs[3]


@pytest.mark.parametrize("name", NAMES)
def test_overflow_skips_the_step_and_lowers_the_loss_scale(name):
    for t_overflow in (0, 5):
        model, optimizer = CASES[name].build()
        scaler = torch.amp.GradScaler(DEVICE or "cpu", init_scale=1024.0)
        for t in range(t_overflow):
            scaled_step(model, optimizer, scaler, t)
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        scaled_step(model, optimizer, scaler, t_overflow, overflow=True)
        assert scaler.get_scale() == 512.0
        after = model.state_dict(), optimizer.state_dict()
        for state in (before[1], after[1]):  # a plain scaler does not even call step
            forget_counts(state)
        assert_identical(after, before)
        assert not hasattr(optimizer, "found_inf")
        assert not hasattr(optimizer, "grad_scale")


@pytest.mark.parametrize("name", NAMES)
def test_trains_with_a_scaler_that_overflows_at_first(name):
    model, optimizer = CASES[name].build()
    scaler = torch.amp.GradScaler(DEVICE or "cpu", init_scale=2.0**15, growth_interval=20)
    for t in range(250):
        scaled_step(model, optimizer, scaler, t, overflow=t < 5 or t % 50 == 0, clip=1.0 if t % 2 else None)
    assert full_loss(model) < 0.4
    assert torch.isfinite(optimizer.scale)


@pytest.mark.parametrize("trained", [0, 3])
def test_the_scaler_has_the_last_word(trained):
    """It may have seen an overflow that somebody has since cleaned out of the gradients."""
    model, optimizer = CASES["AdamW_fused"].build()
    scaler = torch.amp.GradScaler(DEVICE or "cpu", init_scale=1024.0)
    for t in range(trained):
        scaled_step(model, optimizer, scaler, t)
    before = copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    scaler.scale(F.cross_entropy(model(batch(9)[0]), batch(9)[1])).backward()
    model[0].weight.grad[0, 0] = float("inf")
    scaler.unscale_(optimizer)
    model[0].weight.grad.nan_to_num_(posinf=0.0)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert_identical(model.state_dict(), before)
    assert optimizer.skipped_steps == 1


def test_the_scaler_sees_whether_the_base_unscales():
    """The attribute that `GradScaler` asks for is that of the base."""
    for name in NAMES:
        if name == "Adagrad_fused" and torch.cuda.is_available():
            continue  # there torch takes it for one that unscales when its parameters are on CPUs alone
        case = CASES[name]
        _, optimizer = case.build()
        plain = case.base(mlp().parameters(), lr=1.0, **case.options)
        attribute = "_step_supports_amp_scaling"
        assert getattr(optimizer, attribute, False) == getattr(plain, attribute, False) == ("fused" in name)


def test_groups_that_are_not_all_fused_are_still_safe():
    """`found_inf` is handed to the base only if every group looks at it."""
    model = mlp()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "fused": False, "foreach": False}]
    optimizer = mechanize(torch.optim.AdamW)(groups, lr=1.0, fused=True)
    for t in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(batch(t)[0]), batch(t)[1]).backward()
        if t == 1:
            model[0].weight.grad[0, 0] = float("nan")
        optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(p.isfinite().all() for p in model.parameters())
