"""It starts: at any base learning rate, in any precision, and it says so where it cannot."""

import warnings
from functools import cache, partial
from statistics import fmean

import pytest
import torch

from helpers import PUBLISHED, compensation_of, stored_of
from mechanic_pytorch import mechanize
from problems import IMAGES, LABELS, full_loss, mlp, train


def accuracy(model):
    with torch.no_grad():
        return float((model(IMAGES.to(next(model.parameters()).dtype)).argmax(1) == LABELS).float().mean())


@cache
def trained_at(lr, dtype, steps=300, first=0, base=torch.optim.AdamW, **options):
    model = mlp(dtype)
    losses = train(model, mechanize(base)(model.parameters(), lr=lr, **options), steps, first)
    return losses, accuracy(model), full_loss(model)


@pytest.mark.parametrize("s_init", ["auto", 1e-8])
@pytest.mark.parametrize("exponent", range(-6, 7))
def test_learns_in_300_steps_at_any_base_learning_rate(exponent, s_init):
    """Ten classes: 10% by chance. With a number, which is absolute, the smaller the base lr, the later it starts."""
    _, acc, _ = trained_at(10.0**exponent, torch.float32, mechanic_s_init=s_init)
    assert acc > (0.95 if s_init == "auto" or exponent >= -2 else 0.5)


@pytest.mark.parametrize("s_init", ["auto", 1e-8])
@pytest.mark.parametrize("exponent", range(-6, 7))
def test_float32_makes_the_progress_of_float64(exponent, s_init):
    """Over the first 60 steps the two losses differ by at most 2% of the progress made so far."""
    float32, float64 = (
        trained_at(10.0**exponent, dtype, mechanic_s_init=s_init)[0][:60] for dtype in (torch.float32, torch.float64)
    )
    progress = float64[0] - min(float64)
    for a, b in zip(float32, float64, strict=True):
        assert abs(a - b) <= max(0.02 * progress, 1e-5)


BASES = {
    "adamw": (partial(trained_at, base=torch.optim.AdamW), 1.0),
    "momentum": (partial(trained_at, base=torch.optim.SGD, momentum=0.9), 1.0),
}


@pytest.mark.parametrize("name", BASES)
def test_bfloat16_parameters_learn_as_float32_ones_do(name):
    """In the mean of six orders of batches: a run amplifies each rounding, and processors round sums differently."""
    experiment, lr = BASES[name]

    def means(dtype):
        runs = [experiment(lr, dtype, first=1000 * k)[1:] for k in range(6)]
        return map(fmean, zip(*runs, strict=True))

    (acc, loss), (acc32, loss32) = means(torch.bfloat16), means(torch.float32)
    assert acc32 > 0.95
    assert acc > acc32 - 0.01
    assert loss < 1.25 * loss32


@pytest.mark.parametrize(
    ("base", "options"),
    [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {"eps": 1e-4}), (torch.optim.Adagrad, {"eps": 1e-4})],
    ids=["momentum", "adamw", "adagrad"],
)
def test_float16_parameters_learn_where_the_plain_base_can(base, options):
    """Adam's default eps, 1e-8, is 0 in float16: the plain base itself divides by zero then."""
    _, acc, _ = trained_at(1.0, torch.float16, base=base, **options)
    assert acc > 0.95


def test_warns_once_when_the_update_is_lost_in_rounding():
    model = mlp(torch.bfloat16)
    optimizer = mechanize(torch.optim.AdamW, **PUBLISHED)(model.parameters(), lr=1e-8)
    train(model, optimizer, 15)  # a base may need a few steps before it moves anything
    with pytest.warns(
        UserWarning, match=r"^MechanizedAdamW: .* lost in rounding.* Remedy: pass s_init=\"auto\", or a larger lr"
    ) as caught:
        train(model, optimizer, 1)
    assert len(caught) == 1
    assert caught[0].filename.endswith("problems.py")  # where the user's code calls step
    train(model, optimizer, 5)  # warnings are errors here


@pytest.mark.parametrize("lr", [1.0, 1e-6])
def test_does_not_warn_when_the_base_moves(lr):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained_at(lr, torch.float32, steps=2)


def test_does_not_warn_during_warm_up_from_zero_but_after_it():
    model = mlp(torch.bfloat16)
    optimizer = mechanize(torch.optim.AdamW, **PUBLISHED)(model.parameters(), lr=1e-12)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: t / 10)
    train(model, optimizer, 16, scheduler=scheduler)
    with pytest.warns(UserWarning, match="lost in rounding"):
        train(model, optimizer, 1, scheduler=scheduler)


def test_warns_at_once_when_most_of_the_update_is_lost():
    """Some weights are so small that they move; nine out of ten do not."""
    p = torch.full((100,), 1.0).index_fill(0, torch.arange(5), 1e-12).requires_grad_()
    optimizer = mechanize(torch.optim.SGD, **PUBLISHED)([p], lr=1e-9)
    p.grad = torch.ones(100)
    with pytest.warns(UserWarning, match="changed only 5 of 100 weights"):
        optimizer.step()


class Waiting(torch.optim.SGD):
    """Only looks at its first ten gradients, as SOAP and others do."""

    def step(self, closure=None):
        self.calls = getattr(self, "calls", 0) + 1
        return super().step(closure) if self.calls > 10 else None


def test_does_not_warn_about_a_base_that_waits():
    model = mlp()
    train(model, mechanize(Waiting)(model.parameters(), lr=0.1), 30)


def test_a_zero_gradient_is_no_reason_to_warn():
    p = torch.ones(3, requires_grad=True)
    optimizer = mechanize(torch.optim.SGD)([p], lr=1.0)
    for _ in range(3):
        p.grad = torch.zeros(3)
        optimizer.step()
    assert torch.equal(p, torch.ones(3))
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize(("s_init", "slot"), [(1e-8, "mechanic_delta"), ("auto", "mechanic_reference")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_tuner_does_not_follow_the_parameters_dtype(dtype, s_init, slot):
    model = mlp(dtype)
    optimizer = mechanize(torch.optim.SGD, s_init=s_init)(model.parameters(), lr=1.0)
    train(model, optimizer, 3)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert optimizer.scale.dtype == torch.float64
    for p in model.parameters():
        assert p.dtype == dtype
        assert stored_of(optimizer, p).dtype == expected
        assert (compensation_of(optimizer, p) is not None) == (dtype.itemsize < 4)
