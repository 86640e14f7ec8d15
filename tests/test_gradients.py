"""Gradients are read, never written; sparse, complex and non-finite ones are dealt with."""

import copy

import pytest
import torch

from bases import CASES
from device import DEVICE
from helpers import assert_identical, count_a_skipped_step, stored_of
from mechanic_pytorch import mechanize
from problems import SparseClassifier, full_loss, loss_of, mlp, train


@pytest.mark.parametrize("name", ["SGD_momentum", "AdamW", "AdamW_fused", "Adagrad"])
def test_gradients_are_not_modified(name):
    model, optimizer = CASES[name].build(s_decay=1.0)
    for t in range(5):
        optimizer.zero_grad()
        loss_of(model, t).backward()
        kept = [(p.grad, p.grad.clone()) for p in model.parameters()]
        optimizer.step()
        for p, (grad, value) in zip(model.parameters(), kept, strict=True):
            assert p.grad is grad
            assert torch.equal(grad, value)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # torch's Adagrad
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adagrad])
def test_sparse_gradients_equal_dense_ones(base):
    runs = []
    for sparse in (True, False):
        model = SparseClassifier(sparse).double()
        optimizer = mechanize(base, s_init=1e-4)(model.parameters(), lr=1.0)
        losses = train(model, optimizer, 30)
        assert model.table.weight.grad.is_sparse == sparse
        runs.append((torch.tensor(losses), optimizer.scale, model.table.weight.detach()))
    # A GPU adds up the gradients of a row in any order, and Adagrad makes full steps of what is nearly 0.
    rtol, atol = (1e-6, 1e-7) if DEVICE else (1e-9, 1e-12)
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def test_a_sparse_gradient_with_repeated_rows():
    """Rows may occur several times in an uncoalesced gradient; its norm is that of their sum."""
    runs = []
    for sparse in (True, False):
        p = torch.nn.Parameter(torch.ones(4, 2, dtype=torch.float64))
        optimizer = mechanize(torch.optim.SGD, s_decay=1.0, s_init=0.1)([p], lr=1.0)
        for _ in range(4):
            g = torch.sparse_coo_tensor(
                [[1, 1, 3]], torch.ones(3, 2, dtype=torch.float64), (4, 2), check_invariants=True
            )
            p.grad = g if sparse else g.to_dense()
            optimizer.step()
        runs.append(p.detach())
    torch.testing.assert_close(*runs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_parameters_equal_their_real_view(base, dtype):
    torch.manual_seed(0)
    start, target = torch.randn(2, 5, dtype=dtype)
    runs = []
    for complex_ in (True, False):
        p = (start.clone() if complex_ else torch.view_as_real(start).clone()).requires_grad_()
        optimizer = mechanize(base, s_decay=0.1, s_init=1e-3)([p], lr=1.0)
        for _ in range(30):
            optimizer.zero_grad()
            x = p if complex_ else torch.view_as_complex(p)
            (x - target).abs().square().sum().backward()
            optimizer.step()
        delta = stored_of(optimizer, p)
        assert delta.dtype == p.dtype
        p = p.detach()
        runs.append((torch.view_as_real(p) if complex_ else p, optimizer.scale))
    assert runs[0][1] > 1e-3
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)


def poison(model, value):
    """Put one bad number into one gradient."""
    list(model.parameters())[-1].grad.view(-1)[3] = value


@pytest.mark.parametrize("trained", [0, 5])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    [
        "SGD",
        "SGD_momentum",
        "SGD_fused",
        "AdamW",
        "AdamW_fused",
        "AdamW_bfloat16",
        "AdamW_bfloat16_fused",
        "Adagrad_fused",
    ],
)
def test_a_step_with_a_bad_gradient_is_skipped_whole(name, value, trained):
    """Weights, base state and tuner are then as if the step had never been asked for."""
    model, optimizer = CASES[name].build()
    train(model, optimizer, trained)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    count_a_skipped_step(before[1])
    optimizer.zero_grad()
    loss_of(model, trained).backward()
    poison(model, value)
    optimizer.step()
    assert_identical((model.state_dict(), optimizer.state_dict()), before)
    assert optimizer.skipped_steps == 1

    twin, other = CASES[name].build()
    train(twin, other, trained)
    assert train(model, optimizer, 5, first=trained) == train(twin, other, 5, first=trained)
    assert torch.equal(optimizer.scale, other.scale)


def test_a_bad_gradient_in_a_closure_is_skipped_too():
    model, optimizer = CASES["SGD_closure"].build()
    train(model, optimizer, 3, closure=True)
    before = copy.deepcopy(model.state_dict())

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 3)
        loss.backward()
        poison(model, float("nan"))
        return loss

    assert optimizer.step(closure).item() == loss_of(model, 3).item()
    assert_identical(model.state_dict(), before)
    assert optimizer.skipped_steps == 1


def test_skipped_steps_survive_a_checkpoint():
    model, optimizer = CASES["SGD"].build()
    loss_of(model, 0).backward()
    poison(model, float("nan"))
    optimizer.step()
    _, other = CASES["SGD"].build()
    other.load_state_dict(optimizer.state_dict())
    assert other.skipped_steps == 1


def test_turned_off_the_base_sees_the_gradient_and_the_tuner_stays_finite():
    model = mlp()
    optimizer = mechanize(torch.optim.SGD, skip_nonfinite=False)(model.parameters(), lr=1.0)
    train(model, optimizer, 20)
    scale = optimizer.scale
    loss_of(model, 20).backward()
    poison(model, float("nan"))
    optimizer.step()
    assert torch.equal(optimizer.scale, scale)
    assert optimizer.skipped_steps == 1
    assert model[2].bias.isnan().sum() == 1  # what the plain base does


def test_training_goes_on_after_many_bad_steps():
    model, optimizer = CASES["AdamW"].build()
    for t in range(200):
        optimizer.zero_grad()
        loss_of(model, t).backward()
        if t % 5 == 0:
            poison(model, float("inf"))
        optimizer.step()
    assert optimizer.skipped_steps == 40
    assert full_loss(model) < 0.3


def test_warns_once_when_nothing_but_skipping_happens():
    model, optimizer = CASES["SGD"].build()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    loss_of(model, 0).backward()
    for _ in range(49):
        optimizer.step()
    with pytest.warns(UserWarning, match=r"^MechanizedSGD: the last 50 steps were skipped.* Remedy: "):
        optimizer.step()
    for _ in range(60):
        optimizer.step()
    assert optimizer.skipped_steps == 110


@pytest.mark.parametrize("name", ["AdamW", "AdamW_published"])
def test_reset_repairs_a_sum_that_is_not_finite(name):
    """A base can make NaN of a finite gradient: Adam does in float16, where its eps is 0."""
    model, optimizer = CASES[name].build()
    train(model, optimizer, 3)
    stored_of(optimizer, model[0].weight)[0, 0] = float("nan")
    train(model, optimizer, 3, first=3)
    assert optimizer.skipped_steps == 3
    optimizer.reset()
    train(model, optimizer, 150, first=6)
    assert optimizer.skipped_steps == 0
    assert full_loss(model) < 0.5
