"""Where other implementations agree with ours, and one test for each difference in docs/deviations.md.

Version 0.0.1 of this package's name lives in .venv/peers, where `make test` puts it. A test of a difference checks both
sides: that ours follows its rule, and that 0.0.1 or optax follows the rule that the page says it has.
"""

import importlib.util
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import torch

import oracle
from helpers import PUBLISHED, stored_of
from mechanic_pytorch import _auto, mechanize
from mechanic_pytorch._config import Config, TuneParams, TunerState
from mechanic_pytorch.mechanic import tune
from mechanic_pytorch.telemetry import read_out

jax.config.update("jax_enable_x64", True)

ROOT = Path(__file__).parents[1]
BETAS = tuple(1.0 - 0.1**k for k in range(1, 7))  # as optax computes its own
LETTERS = {"m": "max_product", "v": "sum_squared_products", "r": "reward", "s": "scales"}  # of the paper, and our names


# --- one problem, fed to every side -----------------------------------------------------------------------------------

_rng = np.random.default_rng(0)
_SHAPES = [(4, 3), (5,)]
CURVATURE = [np.exp(_rng.uniform(-2, 0, shape)) for shape in _SHAPES]
TARGET = [_rng.standard_normal(shape) for shape in _SHAPES]
START = [_rng.standard_normal(shape) for shape in _SHAPES]


def gradient(x):
    return [c * (xi - target) for c, xi, target in zip(CURVATURE, x, TARGET, strict=True)]


def loss(x):
    return sum(np.sum(c * (xi - target) ** 2) for c, xi, target in zip(CURVATURE, x, TARGET, strict=True)) / 2


def start_params(dtype=torch.float64):
    return [torch.tensor(x).to(dtype).requires_grad_() for x in START]


def arrays(tensors):
    return [t.detach().double().numpy().copy() for t in tensors]


def steps(params, optimizer, count, sign=1.0):
    for _ in range(count):
        for p, g in zip(params, gradient(arrays(params)), strict=True):
            p.grad = torch.tensor(sign * g).to(p.dtype)
        optimizer.step()


def inner(a, b):
    return sum(np.sum(ai * bi) for ai, bi in zip(a, b, strict=True))


def decayed_product(delta, g, s_decay, scale, x, eps=0.0):
    """h, with the decay term taken at x."""
    return inner(delta, g) + s_decay * scale * np.sqrt(inner(g, g)) * inner(delta, x) / (np.sqrt(inner(x, x)) + eps)


def assert_arrays_close(actual, expected, rtol=1e-11):
    """Compare lists of arrays; the tolerance is relative to the largest entry of each."""
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


# --- ours, 0.0.1 and optax --------------------------------------------------------------------------------------------


def ours(dtype=torch.float64, base=torch.optim.SGD, lr=1.0, base_options=None, **options):
    params = start_params(dtype)
    return params, mechanize(base, **{**PUBLISHED, **options})(params, lr=lr, **(base_options or {}))


def tuner(optimizer):
    return {letter: np.array(getattr(read_out(optimizer), name)[0]) for letter, name in LETTERS.items()}


def deltas(params, optimizer):
    return arrays(stored_of(optimizer, p) for p in params)


class Old:
    """Version 0.0.1 on the common problem, with its state under our names."""

    def __init__(self, dtype=torch.float64, base=torch.optim.SGD, lr=1.0, base_options=None, **options):
        path = ROOT / ".venv/peers/mechanic_pytorch/mechanic.py"
        if not path.exists():
            pytest.fail(f"{path.relative_to(ROOT)} is missing, version 0.0.1 to compare with: run `make test`")
        spec = importlib.util.spec_from_file_location("mechanic_pytorch_0_0_1", path)
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.params = start_params(dtype)
        self.optimizer = self.module.mechanize(base, **options)(self.params, lr=lr, **(base_options or {}))

    @property
    def state(self):
        return self.optimizer.state["_mechanic"]

    @property
    def scale(self):
        return self.state["s"].sum().item()

    def deltas(self):
        return arrays(self.state[p]["delta"] for p in self.params)

    def steps(self, count, sign=1.0):
        steps(self.params, self.optimizer, count, sign)


@pytest.fixture
def float64_default():
    """0.0.1 keeps its tuner in torch's default dtype, whatever the parameters are."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Optax:
    """optax.contrib.mechanize, put into the state of a running float64 optimizer of ours."""

    def __init__(self, params, optimizer, base, s_decay, s_init, eps=1e-30):
        transformation = optax.contrib.mechanize(base, s_decay, eps, s_init)
        self.update = jax.jit(transformation.update)
        self.x = [jnp.array(x) for x in arrays(params)]
        state = transformation.init(self.x)
        memory, taken = [optimizer.state[p] for p in params], jnp.int32(read_out(optimizer).steps)
        names = {"momentum_buffer": "trace", "exp_avg": "mu", "exp_avg_sq": "nu"}
        values = {
            name: [jnp.array(x) for x in arrays(m[key] for m in memory)]
            for key, name in names.items()
            if key in memory[0]
        }
        if "mu" in values:
            values["count"] = taken
        base_state = optax.tree.set(state.base_optimizer_state, **values) if values else state.base_optimizer_state
        start = [jnp.array(x) for x in START]
        vectors = {letter: jnp.array(value) for letter, value in tuner(optimizer).items()}
        self.state = state._replace(base_optimizer_state=base_state, count=taken, x0=start, **vectors)

    def steps(self, count, sign=1.0):
        for _ in range(count):
            g = [jnp.array(sign * gi) for gi in gradient([np.asarray(x) for x in self.x])]
            updates, self.state = self.update(g, self.state, self.x)
            self.x = optax.apply_updates(self.x, updates)


def fresh_optax(s_init=1e-8, eps=1e-8, s_decay=0.01, dtype=jnp.float64):
    params = [jnp.array(x, dtype=dtype) for x in START]
    transformation = optax.contrib.mechanize(optax.sgd(1.0), s_decay, eps, s_init)
    return params, jax.jit(transformation.update), transformation.init(params)


# --- agreement --------------------------------------------------------------------------------------------------------

BASES = {
    "sgd": (torch.optim.SGD, {}, lambda: optax.sgd(1.0), 15, 10),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}, lambda: optax.sgd(1.0, momentum=0.9), 10, 5),
    "adamw": (torch.optim.AdamW, {}, lambda: optax.adamw(1.0, weight_decay=0.01), 15, 10),
}


@pytest.mark.parametrize("s_decay", [0.0, 1.0])
@pytest.mark.parametrize("name", BASES)
def test_optax_agrees_at_steps_where_it_does_not_clip(name, s_decay):
    """From the same state, for several steps, with an eps that vanishes beside everything that it is added to."""
    base, base_options, optax_base, first, count = BASES[name]
    options = {"s_decay": s_decay, "s_init": 1e-3, "eps": 1e-30}
    params, optimizer = ours(base=base, base_options=base_options, betas=BETAS, **options)
    steps(params, optimizer, first)
    theirs = Optax(params, optimizer, optax_base(), **options)
    before = arrays(params)
    for _ in range(count):
        x, state = arrays(params), tuner(optimizer)
        h = decayed_product(deltas(params, optimizer), gradient(x), s_decay, state["s"].sum(), x)
        assert abs(h) <= state["m"].min(), "optax would clip here"
        steps(params, optimizer, 1)
        theirs.steps(1)
        # Float64 rounding alone; delta, rebuilt by optax, loses about one digit to it.
        assert_arrays_close([np.asarray(x) for x in theirs.x], arrays(params))
        for letter, value in tuner(optimizer).items():
            np.testing.assert_allclose(np.asarray(getattr(theirs.state, letter)), value, rtol=1e-11)
    assert all(np.abs(a - b).max() > 0.05 for a, b in zip(arrays(params), before, strict=True)), "nothing happened"


@pytest.mark.parametrize("name", BASES)
@pytest.mark.usefixtures("float64_default")
def test_version_0_0_1_agrees_from_its_own_start_without_decay(name):
    """Given its m = 1e-6 at the start, ours takes the same path; 0.0.1 itself is not touched."""
    base, base_options, *_ = BASES[name]
    params, optimizer = ours(base=base, base_options=base_options, s_decay=0.0)
    optimizer.mechanic_tuner.state.max_product.fill_(1e-6)
    old = Old(base=base, base_options=base_options, s_decay=0.0, store_delta=True)
    for _ in range(50):
        steps(params, optimizer, 1)
        old.steps(1)
        # Rounding alone: at most 1e-14 here. Later the steps near the edge of stability amplify it.
        assert_arrays_close(arrays(params), arrays(old.params), rtol=1e-12)
        for letter, key in {"m": "max_product", "v": "sum_squared_products", "r": "reward", "s": "s"}.items():
            np.testing.assert_allclose(tuner(optimizer)[letter], old.state[key].numpy(), rtol=1e-12)
        assert_arrays_close(deltas(params, optimizer), old.deltas(), rtol=1e-12)
    assert loss(arrays(params)) < 0.2 * loss(START), "nothing happened"


# --- the rule of the tuner --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64_default")
def test_decay_term_is_taken_where_the_gradient_is():
    options = {"s_decay": 1.0, "betas": (0.0, 0.9, 0.99), "s_init": 1e-2}  # m of beta = 0 is |h|
    params, optimizer = ours(**options)
    reference = oracle.Oracle(START, oracle.sgd(1.0), **options)
    old = Old(store_delta=True, **options)
    steps(params, optimizer, 8)
    old.steps(8)
    for _ in range(8):
        reference.step(gradient(reference.x))

    def rules(before, after, x, scale, eps):
        x_moved = [xi + b - a for xi, a, b in zip(x, before, after, strict=True)]
        return [abs(decayed_product(before, gradient(x), 1.0, scale, y, eps)) for y in (x, x_moved)]

    x, before, scale = arrays(params), deltas(params, optimizer), optimizer.scale.item()
    steps(params, optimizer, 1)
    reference.step(gradient(reference.x))
    at_x, at_x_moved = rules(before, deltas(params, optimizer), x, scale, 0.0)
    np.testing.assert_allclose(tuner(optimizer)["m"][0], at_x, rtol=1e-12)
    assert_arrays_close(arrays(params), reference.x)
    assert abs(at_x_moved / at_x - 1) > 1e-3

    x, before, scale = arrays(old.params), old.deltas(), old.scale
    old.steps(1)
    at_x, at_x_moved = rules(before, old.deltas(), x, scale, 1e-8)
    np.testing.assert_allclose(old.state["max_product"][0].item(), at_x_moved, rtol=1e-12)
    assert abs(at_x_moved / at_x - 1) > 1e-3


def test_m_takes_the_absolute_value_of_h():
    """While training improves h is negative, so that max(beta * m, h) would stay 0, and the scale with it."""
    params, optimizer = ours(s_init=1e-3)
    x = arrays(params)
    steps(params, optimizer, 1)
    assert_arrays_close(arrays(params), x, rtol=0)
    h = inner(deltas(params, optimizer), gradient(x))
    steps(params, optimizer, 1)
    assert h < 0
    np.testing.assert_allclose(tuner(optimizer)["m"], -h)
    assert optimizer.scale > 0


@pytest.mark.parametrize("s_init", [1e-8, 1e-3])
def test_first_scale_is_zero_and_the_second_is_s_init(s_init):
    params, optimizer = ours(s_init=s_init)
    scales = []
    for _ in range(2):
        steps(params, optimizer, 1)
        scales.append(optimizer.scale.item())
        if len(scales) == 1:
            assert_arrays_close(arrays(params), START, rtol=0)
    assert scales[0] == 0
    np.testing.assert_allclose(scales[1], s_init, rtol=1e-8)  # eps / |h|
    assert all((np.abs(x - x0) > 0).all() for x, x0 in zip(arrays(params), START, strict=True))

    old = Old(s_init=s_init)
    old.steps(1)
    np.testing.assert_allclose(old.scale, 1e-6 / 1e-8 * np.mean(BETAS) * s_init, rtol=1e-5)  # 98 times s_init
    assert all((np.abs(x - x0) > 0).all() for x, x0 in zip(arrays(old.params), START, strict=True))

    x, update, state = fresh_optax(s_init)
    updates, state = update([jnp.array(g) for g in gradient(START)], state, x)
    np.testing.assert_allclose(np.asarray(state.m), 1e-8)  # its eps
    np.testing.assert_allclose(np.sum(state.s), s_init)
    assert_arrays_close(updates, [-s_init * g for g in gradient(START)], rtol=1e-6)


@pytest.mark.parametrize("loss_weight", [1.0, 0.25])
def test_what_a_loss_counts(loss_weight):
    """A gain of 3, then a loss of 2: Algorithm 1 takes all of it back, a weight of 0.25 a quarter of it."""
    assert (Config(**PUBLISHED).tune_params.loss_weight, _auto.LOSS_WEIGHT_MOVING) == (1.0, 0.5)
    numbers = TuneParams((1.0,), s_decay=0.0, s_init=1e-8, eps=0.0, loss_weight=loss_weight)
    state = TunerState(*torch.tensor([[1.0], [1.0], [0.0], [1.0]]))  # a scale of 1
    state = tune(state, torch.tensor([-3.0, 0.0, 1.0, 1.0]), numbers)
    assert state.reward.item() == 3.0
    state = tune(state._replace(scales=torch.ones(1)), torch.tensor([2.0, 0.0, 1.0, 1.0]), numbers)
    assert state.reward.item() == 3.0 - 2.0 * loss_weight


@pytest.mark.parametrize("s_init", [1e-8, "auto"])
def test_what_a_scale_that_falls_takes_back(s_init):
    """Algorithm 1 takes the weights back along all they have learned; "auto" makes a plain step at the new scale."""
    p = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = mechanize(torch.optim.SGD, s_init=s_init)([p], lr=1.0)
    for t in range(24):
        before, old = p.detach().clone(), optimizer.scale.item()
        p.grad = torch.full_like(p, 1.0 if t == 23 else -1.0)
        optimizer.step()
    fall, moved = old - optimizer.scale.item(), before - p.detach()
    assert fall > 0, "the last gradient must make the scale fall"
    if s_init == "auto":
        torch.testing.assert_close(moved, optimizer.scale * torch.ones_like(p))
    else:
        torch.testing.assert_close(moved, fall * torch.full_like(p, 23.0) + optimizer.scale * torch.ones_like(p))


def test_eps_is_added_to_the_root_of_v_and_nowhere_else():
    options = {"s_decay": 1.0, "s_init": 1e-3, "eps": 0.5}
    params, optimizer = ours(betas=BETAS, **options)
    steps(params, optimizer, 8)
    theirs = Optax(params, optimizer, optax.sgd(1.0), **options)
    theirs.state = theirs.state._replace(m=jnp.zeros(6))  # so that this step decides it
    x, delta, state = arrays(params), deltas(params, optimizer), tuner(optimizer)
    h = decayed_product(delta, gradient(x), 1.0, state["s"].sum(), x)
    assert abs(h) > state["m"].max(), "so that this step decides it"
    steps(params, optimizer, 1)
    new = tuner(optimizer)
    np.testing.assert_allclose(new["m"], abs(h), rtol=1e-12)
    wealth = 1e-3 / 6 * new["m"] + new["r"]
    np.testing.assert_allclose(new["s"], wealth / (np.sqrt(new["v"]) + 0.5), rtol=1e-12)

    theirs.steps(1)
    rebuilt = [(xi - x0) / (state["s"].sum() + 0.5) for xi, x0 in zip(x, START, strict=True)]
    h = decayed_product(rebuilt, gradient(x), 1.0, state["s"].sum(), x, eps=0.5)
    np.testing.assert_allclose(np.asarray(theirs.state.m), abs(h) + 0.5, rtol=1e-11)


def test_h_is_not_clipped():
    """In the first steps |h| grows from step to step: optax cuts each to the largest one before."""
    options = {"s_decay": 0.01, "s_init": 1e-3, "eps": 1e-30}
    params, optimizer = ours(betas=BETAS, **options)
    steps(params, optimizer, 5)
    theirs = Optax(params, optimizer, optax.sgd(1.0), **options)
    x, state = arrays(params), tuner(optimizer)
    h = decayed_product(deltas(params, optimizer), gradient(x), 0.01, state["s"].sum(), x)
    steps(params, optimizer, 1)
    theirs.steps(1)
    np.testing.assert_allclose(tuner(optimizer)["r"], BETAS * state["r"] - state["s"] * h, rtol=1e-11)
    clipped = np.clip(h, -state["m"], state["m"])
    np.testing.assert_allclose(np.asarray(theirs.state.r), BETAS * state["r"] - state["s"] * clipped, rtol=1e-11)
    assert abs(h) > 1.1 * state["m"].max()
    for letter in "mv":
        np.testing.assert_allclose(np.asarray(getattr(theirs.state, letter)), tuner(optimizer)[letter], rtol=1e-11)


def test_reward_is_clamped_in_the_state():
    """After a loss greater than the reward, a bettor of ours starts from 0 and one of optax from its debt."""
    options = {"s_decay": 0.0, "s_init": 1e-3, "eps": 1e-30}
    params, optimizer = ours(betas=BETAS, **options)
    steps(params, optimizer, 15)
    optimizer.mechanic_tuner.state.reward.zero_()
    theirs = Optax(params, optimizer, optax.sgd(1.0), **options)
    debt = []
    for sign in (-1.0, 0.1):  # a gradient that says "too far", then a small one that says "not far enough"
        before = tuner(optimizer)
        h = sign * inner(deltas(params, optimizer), gradient(arrays(params)))
        assert abs(h) <= before["m"].min(), "optax would clip here"
        steps(params, optimizer, 1, sign)
        theirs.steps(1, sign)
        np.testing.assert_allclose(tuner(optimizer)["r"], np.maximum(0, BETAS * before["r"] - before["s"] * h))
        debt.append(np.asarray(theirs.state.r) - tuner(optimizer)["r"])
        if sign < 0:  # at this step the clamp comes in time for s
            assert_arrays_close([np.asarray(x) for x in theirs.x], arrays(params))
            assert (tuner(optimizer)["r"] == 0).all()
    assert (debt[0] < 0).all()
    np.testing.assert_allclose(debt[1], BETAS * debt[0], rtol=1e-9)


def test_eps_zero_starts():
    """0/0 counts as 0: nothing is known yet, so nothing is bet."""
    params, optimizer = ours(eps=0.0)
    steps(params, optimizer, 1)
    assert optimizer.scale == 0
    steps(params, optimizer, 99)
    assert loss(arrays(params)) < 0.2 * loss(START)

    for store_delta in (False, True):
        old = Old(eps=0.0, store_delta=store_delta)
        old.steps(2)
        assert all(np.isnan(x).all() for x in arrays(old.params))
    x, update, state = fresh_optax(eps=0.0)
    updates, _ = update([jnp.array(g) for g in gradient(START)], state, x)
    assert all(np.isnan(u).all() for u in updates)


def test_defaults_are_those_of_0_0_1_but_for_the_start():
    """Names, order and values; what is new comes after them and by keyword only."""
    assert inspect.signature(mechanize).parameters["s_init"].default == "auto"
    new = inspect.signature(mechanize).parameters.values()
    old = inspect.signature(Old().module.mechanize).parameters.values()
    defaults = {p.name: p.default for p in new if p.kind is not p.KEYWORD_ONLY} | PUBLISHED
    assert [*defaults.items()] == [(p.name, p.default) for p in old]
    theirs = inspect.signature(optax.contrib.mechanize).parameters
    defaults = {name: theirs[name].default for name in ("weight_decay", "eps", "s_init", "num_betas")}
    assert defaults == {"weight_decay": 1e-2, "eps": 1e-8, "s_init": 1e-6, "num_betas": 6}


# --- precision --------------------------------------------------------------------------------------------------------


def test_tuner_state_is_float64_whatever_the_parameters_are():
    """A step with a zero gradient turns m = 1 into the betas that are really used."""
    for default in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(default)
        try:
            for dtype in (torch.bfloat16, torch.float64):
                params, optimizer = ours(dtype)
                optimizer.mechanic_tuner.state.max_product.fill_(1.0)
                steps(params, optimizer, 1, sign=0.0)
                (m,) = optimizer.mechanic_tuner.state.max_product
                assert m.dtype == torch.float64
                np.testing.assert_allclose(m.numpy(), BETAS, rtol=1e-7)
                assert (m < 1).all()
            old = Old(torch.bfloat16)
            old.steps(1, sign=0.0)
            old.state["max_product"].fill_(1.0)
            old.steps(1, sign=0.0)
            assert old.state["max_product"].dtype == default  # float64 parameters do not change that
            assert (old.state["max_product"] == 1).sum() == (4 if default == torch.bfloat16 else 0)
        finally:
            torch.set_default_dtype(torch.float32)

    x, update, state = fresh_optax(dtype=jnp.bfloat16)
    _, state = update([0 * xi for xi in x], state._replace(m=jnp.ones(6, jnp.bfloat16)), x)
    assert all(getattr(state, letter).dtype == jnp.bfloat16 for letter in "mvrs")
    assert (np.asarray(state.m) == 1).tolist() == [False, False, True, True, True, True]


def test_inner_products_are_not_rounded_to_the_parameters_dtype():
    options = {"s_decay": 0.0, "betas": (0.0, 0.9, 0.99), "s_init": 1e-2}  # m of beta = 0 is |h|
    params, optimizer = ours(torch.bfloat16, **options)
    old = Old(torch.bfloat16, store_delta=True, **options)

    def largest_error(params, optimizer, read_deltas, read_h):
        steps(params, optimizer, 1)
        errors = []
        for _ in range(10):
            before = read_deltas()
            steps(params, optimizer, 1)
            exact = inner(before, arrays(p.grad for p in params))
            errors.append(abs(read_h().item() / abs(exact) - 1))
        return max(errors)

    assert largest_error(params, optimizer, lambda: deltas(params, optimizer), lambda: tuner(optimizer)["m"][0]) < 1e-6
    assert largest_error(old.params, old.optimizer, old.deltas, lambda: old.state["max_product"][0]) > 1e-3


def test_delta_is_kept_not_rebuilt():
    """Rebuilt by a division by S + eps, and compared at the second step, where v is h squared."""
    gradients = [gradient(START)]
    params, optimizer = ours(s_decay=0.0)
    steps(params, optimizer, 2)
    np.testing.assert_allclose(tuner(optimizer)["v"], inner(gradients[0], gradients[0]) ** 2, rtol=1e-12)

    x, update, state = fresh_optax(s_init=1e-8, s_decay=0.0)
    for _ in range(2):
        g = [jnp.array(gi) for gi in gradient([np.asarray(xi) for xi in x])]
        updates, state = update(g, state, x)
        x = optax.apply_updates(x, updates)
    # S = s_init = eps: half of delta is lost, and with it three quarters of v. 1e-7: x - x0 has 8 digits here.
    np.testing.assert_allclose(np.asarray(state.v), (inner(gradients[0], gradients[0]) / 2) ** 2, rtol=1e-6)

    old = Old(s_decay=0.0)
    old.steps(1)
    lost = old.scale / (old.scale + 1e-8)
    old.steps(1)
    h = lost * inner(gradients[0], gradients[0])
    np.testing.assert_allclose(old.state["sum_squared_products"].numpy(), h**2, rtol=1e-5)  # a float32 tuner
    assert lost < 0.991


@pytest.mark.parametrize(("dtype", "lr"), [(torch.float32, 1e-4), (torch.bfloat16, 1.0)], ids=str)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_starts_where_a_rebuilt_delta_is_lost_in_rounding(base, dtype, lr):
    params, optimizer = ours(dtype, base, lr)
    steps(params, optimizer, 200)
    assert loss(arrays(params)) < 0.3 * loss(START)
    old = Old(dtype, base, lr)
    before = arrays(old.params)
    old.steps(200)
    assert_arrays_close(arrays(old.params), before, rtol=1e-6)


@pytest.mark.usefixtures("float64_default")
def test_a_rebuilt_delta_cannot_start_from_zero():
    """Ours starts from m = s = 0, as the paper does. 0.0.1, with its delta rebuilt, could not."""
    params, optimizer = ours()
    assert all((vector == 0).all() for vector in tuner(optimizer).values())
    steps(params, optimizer, 50)
    assert loss(arrays(params)) < 0.9 * loss(START)

    old = Old()
    old.steps(1)
    with torch.no_grad():
        for p, x in zip(old.params, START, strict=True):
            p.copy_(torch.tensor(x))
    old.state["max_product"].zero_()
    old.state["s"].zero_()
    old.steps(50)
    assert old.scale == 0
    assert_arrays_close(arrays(old.params), START, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_store_delta_changes_nothing(dtype):
    runs = []
    for store_delta in (False, True):
        params, optimizer = ours(dtype, torch.optim.AdamW, store_delta=store_delta)
        steps(params, optimizer, 100)
        runs.append([*params, optimizer.scale])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert loss(arrays(params)) < 0.5 * loss(START)
    pair = Old(dtype, torch.optim.AdamW, store_delta=False), Old(dtype, torch.optim.AdamW, store_delta=True)
    for old in pair:
        old.steps(100)
    assert not any(torch.equal(a, b) for a, b in zip(pair[0].params, pair[1].params, strict=True))


# --- what users do ----------------------------------------------------------------------------------------------------


def test_maximize_reaches_the_tuner():
    """The objective is minus the loss."""
    params, optimizer = ours(base_options={"maximize": True})
    steps(params, optimizer, 100, sign=-1.0)
    twin, other = ours()
    steps(twin, other, 100)
    assert_arrays_close(arrays(params), arrays(twin), rtol=0)
    assert loss(arrays(params)) < 0.2 * loss(START)
    for store_delta in (False, True):
        old = Old(base_options={"maximize": True}, store_delta=store_delta)
        old.steps(1, sign=-1.0)
        first = old.scale
        old.steps(99, sign=-1.0)
        assert old.scale < 0.01 * first
        assert_arrays_close(arrays(old.params), START, rtol=1e-6)


def pause(params, optimizer, count):
    """Step with a gradient for the first parameter only."""
    for _ in range(count):
        first, second = params
        first.grad, second.grad = torch.tensor(gradient(arrays(params))[0]).to(first.dtype), None
        optimizer.step()


def test_parameter_without_gradient_takes_no_part():
    """The others move as if it were not there: their norms and products are those of the sums."""
    runs = []
    for both in (True, False):
        params = start_params()
        optimizer = mechanize(torch.optim.SGD, s_decay=1.0, s_init=1e-3)(params if both else params[:1], lr=1.0)
        pause(params, optimizer, 40)
        assert_arrays_close(arrays(params[1:]), START[1:], rtol=0)
        runs.append((arrays(params[:1]), tuner(optimizer)))
    assert_arrays_close(runs[0][0], runs[1][0], rtol=0)
    np.testing.assert_equal(runs[0][1], runs[1][1])
    assert np.abs(runs[0][0][0] - START[0]).max() > 0.1

    old = Old(s_decay=1.0, s_init=1e-3, store_delta=True)  # the same rule
    pause(old.params, old.optimizer, 40)
    assert_arrays_close(arrays(old.params[1:]), START[1:], rtol=0)


def test_parameter_that_returns_goes_on_from_where_it_is():
    """Its reference point becomes x - S * delta with the S of the step before its return."""
    params, optimizer = ours(s_init=1e-4)
    steps(params, optimizer, 5)
    scale_at_pause, x = optimizer.scale.item(), arrays(params)[1]
    pause(params, optimizer, 15)
    old_scale, old_delta = optimizer.scale.item(), deltas(params, optimizer)[1]
    assert old_scale > 20 * scale_at_pause
    assert_arrays_close(arrays(params[1:]), [x], rtol=0)
    steps(params, optimizer, 1)
    new_scale, new_delta = optimizer.scale.item(), deltas(params, optimizer)[1]
    move = new_scale * new_delta - old_scale * old_delta
    assert_arrays_close(arrays(params[1:]), [x + move], rtol=1e-14)
    # No update was lost or added.
    assert_arrays_close([new_delta - old_delta], [-gradient([START[0], x])[1]], rtol=1e-12)
    # It would have jumped: back to the line from its first reference point, of which it has gone a small part.
    assert np.abs(START[1] + new_scale * new_delta - x - move).max() > 0.1


@pytest.mark.usefixtures("float64_default")
def test_parameter_that_returns_jumps_or_loses_its_delta_in_0_0_1():
    """What `test_parameter_that_returns_goes_on_from_where_it_is` compares with."""
    kept, rebuilt = Old(s_init=1e-6, store_delta=True), Old(s_init=1e-6)
    for old in (kept, rebuilt):
        old.steps(5)
        x, scale_at_pause = arrays(old.params)[1], old.scale
        delta = old.deltas()[1] if old is kept else (x - START[1]) / scale_at_pause
        pause(old.params, old.optimizer, 15)
        assert_arrays_close(arrays(old.params[1:]), [x], rtol=0)
        old_scale, before = old.scale, delta
        assert old_scale > 20 * scale_at_pause
        old.steps(1)
        update = -gradient([START[0], x])[1]
        if old is rebuilt:  # shortened in proportion to the growth of the scale
            before = (x - START[1]) / (old_scale + 1e-8)
            assert np.abs(before).max() < 0.1 * np.abs(delta).max()
        after = START[1] + old.scale * (before + update)
        assert_arrays_close(arrays(old.params[1:]), [after], rtol=1e-12)
        if old is kept:
            assert np.abs(after - x).max() > 5 * old.scale * np.abs(update).max()


def test_step_without_any_gradient_does_nothing():
    params, optimizer = ours()
    steps(params, optimizer, 5)
    x, state = arrays(params), tuner(optimizer)
    optimizer.zero_grad()
    optimizer.step()
    assert_arrays_close(arrays(params), x, rtol=0)
    np.testing.assert_equal(tuner(optimizer), state)
    old = Old()
    with pytest.raises(TypeError), torch.enable_grad():  # it leaves autograd off
        old.optimizer.step()


@pytest.mark.usefixtures("float64_default")
def test_weights_edited_between_steps_stay_edited():
    """Each side is moved away by 1.0 after 25 steps and then makes one step."""
    options = {"s_decay": 0.0, "s_init": 1e-3, "eps": 1e-30}

    def edit(params):
        with torch.no_grad():
            for p in params:
                p += 1.0
        return arrays(params)

    def line(scale, delta):
        return [x0 + scale * d for x0, d in zip(START, delta, strict=True)]

    params, optimizer = ours(betas=BETAS, **options)
    steps(params, optimizer, 25)
    theirs = Optax(params, optimizer, optax.sgd(1.0), **options)
    edited, old_scale, old_delta = edit(params), optimizer.scale.item(), deltas(params, optimizer)
    steps(params, optimizer, 1)
    before, after = line(old_scale, old_delta), line(optimizer.scale.item(), deltas(params, optimizer))
    assert_arrays_close(arrays(params), [x + b - a for x, a, b in zip(edited, before, after, strict=True)])

    # optax takes the edit for a part of delta and rescales it.
    theirs.x = [jnp.array(x) for x in edited]
    theirs.steps(1)
    rebuilt = [(x - x0) / old_scale - g for x, x0, g in zip(edited, START, gradient(edited), strict=True)]
    assert_arrays_close([np.asarray(x) for x in theirs.x], line(float(theirs.state.s.sum()), rebuilt))
    assert abs(float(theirs.state.s.sum()) / old_scale - 1) > 0.05

    # 0.0.1 does the same, or with store_delta=True puts the weights back.
    rebuilding, keeping = Old(s_decay=0.0), Old(s_decay=0.0, store_delta=True)
    for old in (rebuilding, keeping):
        old.steps(25)
        edited, old_scale = edit(old.params), old.scale
        old.steps(1)
        if old is rebuilding:
            parts = zip(edited, START, gradient(edited), strict=True)
            rebuilt = [(x - x0) / (old_scale + 1e-8) - g for x, x0, g in parts]
            assert_arrays_close(arrays(old.params), line(old.scale, rebuilt))
            assert abs(old.scale / old_scale - 1) > 0.05
        else:
            assert_arrays_close(arrays(old.params), line(old.scale, old.deltas()))
            assert all((np.abs(x - y) > 0.9).all() for x, y in zip(arrays(old.params), edited, strict=True))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_step_with_a_nonfinite_gradient_is_skipped(bad):
    params, optimizer = ours()
    twin, other = ours()
    old = Old()
    for p, o in ((params, optimizer), (old.params, old.optimizer)):
        steps(p, o, 20)
        for q, g in zip(p, gradient(arrays(p)), strict=True):
            q.grad = torch.tensor(g)
        p[1].grad[2] = bad
        o.step()
        steps(p, o, 60)
    steps(twin, other, 80)
    assert_arrays_close(arrays(params), arrays(twin), rtol=0)
    assert optimizer.skipped_steps == 1
    assert all(np.isnan(x).all() for x in arrays(old.params))

    params, optimizer = ours(betas=BETAS)
    steps(params, optimizer, 20)
    theirs = Optax(params, optimizer, optax.sgd(1.0), 0.01, 1e-8, 1e-8)
    first, second = (jnp.array(g) for g in gradient(arrays(params)))
    updates, theirs.state = theirs.update([first, second.at[2].set(bad)], theirs.state, theirs.x)
    theirs.x = optax.apply_updates(theirs.x, updates)
    theirs.steps(5)
    assert all(np.isnan(x).all() for x in theirs.x)


def test_closure_is_evaluated_with_autograd():
    def closure():
        optimizer.zero_grad()
        value = sum(p.square().sum() for p in params)
        value.backward()
        return value

    params, optimizer = ours(s_init=1e-3)
    losses = [optimizer.step(closure).item() for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]
    old = Old()
    params, optimizer = old.params, old.optimizer
    with pytest.raises(RuntimeError, match="does not require grad"), torch.enable_grad():
        optimizer.step(closure)


def test_checkpoint_carries_the_tuner():
    params, optimizer = ours()
    steps(params, optimizer, 30)
    copies = [p.detach().clone().requires_grad_() for p in params]
    resumed = mechanize(torch.optim.SGD, **PUBLISHED)(copies, lr=1.0)
    resumed.load_state_dict(optimizer.state_dict())
    steps(params, optimizer, 20)
    steps(copies, resumed, 20)
    assert_arrays_close(arrays(copies), arrays(params), rtol=0)
    assert loss(arrays(params)) < 0.9 * loss(START)

    old, other = Old(), Old()
    old.steps(30)
    other.optimizer.load_state_dict(old.optimizer.state_dict())
    with pytest.raises(KeyError), torch.enable_grad():  # the references are filed under the other run's tensors
        other.steps(1)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_every_difference_has_a_test_and_every_test_is_cited(request):
    text = (ROOT / "docs/deviations.md").read_text(encoding="utf-8")
    differences = text.split("## The differences\n")[1].split("\n## ")[0].split("\n### ")[1:]
    assert len(differences) > 10
    cited = [re.findall(r"`(test_\w+)`", each.partition("**Test")[2]) for each in differences]
    assert all(cited), "each difference ends with the name of its test"
    tests = {name for name in globals() if name.startswith("test_")} - {request.function.__name__}
    assert set(re.findall(r"`(test_\w+)`", text)) == tests
