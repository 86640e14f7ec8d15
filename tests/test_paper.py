"""Whole trajectories equal the float64 oracle of Algorithm 1."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from helpers import PUBLISHED, stored_of
from mechanic_pytorch import mechanize
from mechanic_pytorch.telemetry import read_out
from problems import noisy_quadratic

STEPS = 80

BASES = {
    "sgd": (torch.optim.SGD, {}, oracle.sgd, {}),
    "sgd_weight_decay": (torch.optim.SGD, {"weight_decay": 0.1}, oracle.sgd, {"weight_decay": 0.1}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}, oracle.sgd, {"momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {}, oracle.adamw, {}),
    "adamw_foreach": (torch.optim.AdamW, {"foreach": True}, oracle.adamw, {}),
    "adamw_fused": (torch.optim.AdamW, {"fused": True}, oracle.adamw, {}),
}


def compare(name, lr, seed=0, steps=STEPS, **options):
    base, base_options, oracle_base, oracle_options = BASES[name]
    start, gradients = noisy_quadratic(seed)
    params = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in start]
    ours = mechanize(base, **options)(params, lr=lr, **base_options)
    options.pop("store_delta", None)
    theirs = oracle.Oracle(start, oracle_base(lr, **oracle_options), **options)
    for t in range(steps):
        for p, g in zip(params, gradients([p.detach().numpy() for p in params], t), strict=True):
            p.grad = torch.tensor(g)
        ours.step()
        theirs.step(gradients(theirs.x, t))
    for p, x in zip(params, theirs.x, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-9, atol=1e-9 * np.abs(x).max())
    now = read_out(ours)
    vectors = [now.max_product, now.sum_squared_products, now.reward, now.scales]
    for (actual,), vector in zip(vectors, (theirs.m, theirs.v, theirs.r, theirs.s), strict=True):
        np.testing.assert_allclose(actual, vector, rtol=1e-9, atol=1e-9 * vector.max())
    for p, delta in zip(params, theirs.delta, strict=True):
        np.testing.assert_allclose(stored_of(ours, p).numpy(), delta, rtol=1e-9, atol=1e-12)
    assert any(np.abs(x - x0).max() > 1e-3 for x, x0 in zip(theirs.x, start, strict=True)), "the test must go somewhere"


@pytest.mark.parametrize("store_delta", [False, True])
@pytest.mark.parametrize("lr", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("s_decay", [0.0, 1.0])
@pytest.mark.parametrize("name", BASES)
def test_trajectory_equals_the_oracle(name, s_decay, lr, store_delta):
    compare(name, lr, s_decay=s_decay, store_delta=store_delta, s_init=1e-4)


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_the_options_of_0_0_1_equal_the_oracle(name):
    compare(name, 1.0, **PUBLISHED)


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from(["sgd", "adamw"]),
    seed=st.integers(0, 1000),
    lr=st.floats(1e-3, 50),
    s_decay=st.floats(0, 1),
    betas=st.lists(st.floats(0.0, 0.999999), min_size=1, max_size=4),
)
def test_any_options_equal_the_oracle(name, seed, lr, s_decay, betas):
    """Few steps from a large scale: options that make training unstable amplify any difference in rounding."""
    compare(name, lr, seed, steps=10, s_decay=s_decay, betas=betas, s_init=0.1, eps=1e-6)
