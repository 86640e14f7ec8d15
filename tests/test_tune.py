"""The recurrence alone, against the oracle and its own properties."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import PUBLISHED
from mechanic_pytorch._config import Config, TunerState
from mechanic_pytorch.mechanic import tune
from oracle import Oracle

products = st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=40)


def fresh(config, dtype=torch.float64):
    return TunerState(*torch.zeros(4, len(config.betas), dtype=dtype))


def dots(h, delta_x=0.0, g_squared=1.0, x_squared=1.0):
    return torch.tensor([h, delta_x, g_squared, x_squared], dtype=torch.float64)


def states_after(config, hs):
    states = [fresh(config)]
    for h in hs:
        states.append(tune(states[-1], dots(h), config.tune_params))
    return states


@given(products)
def test_scale_reward_and_maximum_are_never_negative(hs):
    for state in states_after(Config(**PUBLISHED), hs):
        assert all((vector >= 0).all() for vector in state)


@given(products, st.permutations(range(6)))
def test_the_order_of_betas_does_not_matter(hs, order):
    config = Config(**PUBLISHED)
    permuted = Config(betas=tuple(config.betas[i] for i in order), **PUBLISHED)
    for a, b in zip(states_after(config, hs), states_after(permuted, hs), strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x[list(order)], y, rtol=1e-12, atol=0)


@given(st.lists(st.floats(1e-3, 1e3) | st.floats(-1e3, -1e-3), min_size=1, max_size=40), st.integers(-20, 20))
def test_the_unit_of_the_objective_does_not_matter(hs, exponent):
    """Multiplying every h by a power of two, exact in floating point, leaves s as it is when eps is 0."""
    config = Config(eps=0.0, **PUBLISHED)
    for a, b in zip(states_after(config, hs), states_after(config, [math.ldexp(h, exponent) for h in hs]), strict=True):
        assert torch.equal(a.scales, b.scales)


@given(products, st.floats(0.0, 1.0))
def test_a_smaller_loss_weight_gives_no_smaller_scale(hs, loss_weight):
    params = Config(**PUBLISHED).tune_params
    lenient = params._replace(loss_weight=loss_weight)
    for state, h in zip(states_after(Config(**PUBLISHED), hs), hs, strict=False):
        assert (tune(state, dots(h), lenient).scales >= tune(state, dots(h), params).scales).all()


@given(products)
def test_tune_does_not_change_its_argument(hs):
    config = Config(**PUBLISHED)
    state = states_after(config, hs)[-1]
    copies = [vector.clone() for vector in state]
    tune(state, dots(1.0), config.tune_params)
    assert all(torch.equal(a, b) for a, b in zip(state, copies, strict=True))


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_nothing_has_happened_without_a_product(eps):
    config = Config(eps=eps, **PUBLISHED)
    assert all((vector == 0).all() for vector in tune(fresh(config), dots(0.0), config.tune_params))


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_first_product_gives_the_initial_scale(eps):
    config = Config(eps=eps, s_init=1e-5)
    state = tune(fresh(config), dots(-3.0), config.tune_params)
    assert state.scales.sum().item() == pytest.approx(1e-5, rel=1e-8)


def test_zero_parameters_take_no_decay():
    config = Config(s_decay=1.0, **PUBLISHED)
    state = tune(fresh(config), dots(-1.0), config.tune_params)
    assert torch.equal(
        tune(state, dots(-1.0, x_squared=0.0), config.tune_params).scales,
        tune(state, dots(-1.0), config.tune_params).scales,
    )


@pytest.mark.parametrize("s_decay", [0.0, 0.01, 1.0])
def test_tune_equals_the_oracle_on_one_weight(s_decay):
    """The oracle on one weight: its own h is handed to `tune` through the four sums."""
    rng = np.random.default_rng(0)
    config = Config(s_decay=s_decay, s_init=1e-3)
    oracle = Oracle([np.array([2.0])], lambda x, g: [-0.1 * gi for gi in g], s_decay=s_decay, s_init=1e-3)
    state = fresh(config)
    for _ in range(200):
        g = oracle.x[0] + 0.3 * rng.standard_normal(1)
        x, delta = oracle.x[0], oracle.delta[0]
        sums = torch.tensor(np.concatenate([delta * g, delta * x, g * g, x * x]))
        state = tune(state, sums, config.tune_params)
        oracle.step([g])
        for mine, theirs in zip(state, (oracle.m, oracle.v, oracle.r, oracle.s), strict=True):
            np.testing.assert_allclose(mine.numpy(), theirs, rtol=1e-12)
