"""Arithmetic on a tuner's numbers: tensors and what is quicker on a CPU say the same."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.counting import Operations
from mechanic_pytorch import _auto, _numbers, mechanize
from mechanic_pytorch._config import TunerState
from mechanic_pytorch._numbers import quick, tensors
from problems import loss_of, mlp, train

ANY = st.floats() | st.sampled_from([0.0, -0.0, 1.0, math.inf, -math.inf, math.nan])
ROWS = st.integers(1, 3)


def float64(numbers, *shape):
    return torch.tensor(numbers, dtype=torch.float64).reshape(shape)


def moderate(numbers):
    """Finite ones: torch's own lerp makes inf or NaN of others, depending on how many there are."""
    return _numbers.minimum(_numbers.maximum(numbers, -1e100), 1e100)


FUNCTIONS = {
    "where": lambda a, b, c: _numbers.where(a > b, b, c),
    "where, plain numbers": lambda a, b, c: _numbers.where(a > b, 1.0, c),
    "maximum": lambda a, b, c: _numbers.maximum(a, b),
    "maximum, a plain number": lambda a, b, c: _numbers.maximum(a, 1.0),
    "minimum": lambda a, b, c: _numbers.minimum(a, b),
    "minimum, a plain number": lambda a, b, c: _numbers.minimum(a, 1.0),
    "sqrt": lambda a, b, c: _numbers.sqrt(abs(a)),
    "lerp": lambda a, b, c: _numbers.lerp(*map(moderate, (a, b)), _numbers.minimum(abs(c), 1.0)),
    "stack": lambda a, b, c: _numbers.stack([a, b, c]),
    "columns": lambda a, b, c: _numbers.columns(_numbers.stack([a, b, c]))[1],
    "column": lambda a, b, c: _numbers.column(a) * _numbers.stack([a, b, c]),
    "zeros_like": lambda a, b, c: _numbers.zeros_like(a),
    "constants": lambda a, b, c: _numbers.constants((0.9, 0.99), like=a) * _numbers.column(b),
    "tiny, epsilon": lambda a, b, c: a * _numbers.tiny(a) + _numbers.epsilon(b),
    "0/0": lambda a, b, c: _numbers.where(a > b, 0.0, 0.0) / _numbers.minimum(_numbers.maximum(a, 0.0), 0.0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@given(rows=ROWS, data=st.data())
def test_each_function_means_the_same(name, rows, data):
    numbers = [float64(data.draw(st.lists(ANY, min_size=rows, max_size=rows)), rows) for _ in range(3)]
    function = _numbers.unwarned(FUNCTIONS[name])
    slow, fast = function(*numbers), function(*map(quick, numbers))
    assert not isinstance(fast, torch.Tensor | float) or isinstance(fast, np.float64), "it is quick still"
    torch.testing.assert_close(tensors(fast, rows).expand_as(slow), slow, rtol=1e-12, atol=0.0, equal_nan=True)


@given(st.lists(st.lists(ANY, min_size=2, max_size=2), min_size=1, max_size=3))
def test_all_finite(vectors):
    numbers = [float64(vector, 1, 2) for vector in vectors]
    assert bool(_numbers.all_finite([*map(quick, numbers)])) == bool(_numbers.all_finite(numbers))


@pytest.mark.parametrize("rows", [1, 3])
def test_there_and_back_again(rows):
    """Named tuples are taken apart; the memory is shared; what is no tensor stays."""
    state = TunerState(*torch.randn(4, rows, 6, dtype=torch.float64))
    bet = _auto.Bet(state, state, state.reward, None, state.reward[:, 0], 1.0)
    there = quick(bet)
    assert isinstance(there.old.scales, np.ndarray)
    assert there.lr == 1.0
    back = tensors(there, rows)
    torch.testing.assert_close(back, bet)
    back.old.scales.add_(1)
    torch.testing.assert_close(back.old.scales, state.scales)


def trained(steps=60, **options):
    torch.manual_seed(0)
    model = mlp(torch.float64)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.5}]
    optimizer = mechanize(torch.optim.SGD, **options)(groups, lr=1.0, momentum=0.9)
    for t in range(steps):
        for group, lr in zip(optimizer.param_groups, (1.0, 0.5), strict=True):
            group["lr"] = 0.0 if t == 40 else lr * (0.97 if t > 30 else 1.0) ** (t - 30)
        loss_of(model, t).backward()
        if t in (0, 20):
            model[0].weight.grad[0, 0] = torch.inf
        optimizer.step()
        optimizer.zero_grad()
    return [*model.parameters()], [optimizer.mechanic_tuner.state, optimizer.state_dict()["param_groups"]]


@pytest.mark.parametrize("options", [{}, {"per_group": True}, {"max_lr": 0.01}, {"per_group": True, "max_lr": 0.01}])
def test_a_run_on_tensors_is_the_same(options, monkeypatch):
    """As on a GPU: schedules, groups, bounds, skipped steps and an lr of 0 included."""
    weights, tuner = trained(**options)
    monkeypatch.setattr(_numbers, "numpy", None)
    expected_weights, expected = trained(**options)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(tuner, expected, rtol=1e-6, atol=1e-12)


def test_a_step_makes_few_operations_on_a_cpu(monkeypatch):
    """Most of what the rules cost there; and a tensor of one number costs as much as one of a thousand."""
    model = mlp()
    optimizer = mechanize(torch.optim.AdamW)(model.parameters(), lr=1.0, fused=True)
    train(model, optimizer, 3)
    loss_of(model, 3).backward()
    made = []
    for arrays in (_numbers.numpy, None):
        monkeypatch.setattr(_numbers, "numpy", arrays)
        with Operations() as counted:
            optimizer.step()
        made.append(sum(counted.count.values()))
    assert made[0] < made[1] - 200


def test_numpy_may_be_missing():
    code = (
        "import sys; sys.modules['numpy'] = None\n"
        "import torch, mechanic_pytorch\n"
        "p = torch.ones(3, requires_grad=True)\n"
        "optimizer = mechanic_pytorch.optim.SGD([p], lr=1.0)\n"
        "for _ in range(30): p.grad = p.detach().clone(); optimizer.step()\n"
        "assert p.norm() < 1\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
