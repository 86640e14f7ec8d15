"""Closures, and what is left behind when something raises."""

import copy

import pytest
import torch
from torch.nn import functional as F

from bases import CASES
from helpers import assert_identical
from mechanic_pytorch import kernels, mechanize
from mechanic_pytorch.telemetry import read_out
from problems import IMAGES, LABELS, closure_of, full_loss, loss_of, mlp, train


def snapshot(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


@pytest.mark.parametrize("name", ["SGD_momentum", "AdamW", "AdamW_fused"])
def test_a_closure_changes_nothing(name):
    runs = []
    for closure in (False, True):
        model, optimizer = CASES[name].build()
        runs.append((train(model, optimizer, 20, closure=closure), model.state_dict(), optimizer.state_dict()))
    assert_identical(runs[1], runs[0])


@pytest.mark.parametrize("surrounding", [torch.no_grad, torch.enable_grad])
def test_evaluated_once_with_autograd_on(surrounding):
    model, optimizer = CASES["AdamW"].build()
    calls = []
    closure = closure_of(model, optimizer, 0, before=lambda: calls.append(torch.is_grad_enabled()))
    with surrounding():
        mode = torch.is_grad_enabled()
        loss = optimizer.step(closure)
        assert torch.is_grad_enabled() == mode
    assert calls == [True]
    assert loss.item() == loss_of(mlp(), 0).item()


def test_lbfgs_gets_the_evaluations_that_it_asks_for():
    """The first step of Mechanic moves nothing, so the plain base evaluates as often as the mechanized one."""
    counts = []
    for wrap in (lambda base: base, mechanize):
        model = mlp()
        optimizer = wrap(torch.optim.LBFGS)(model.parameters(), lr=1.0, max_iter=5, line_search_fn="strong_wolfe")
        calls = []
        optimizer.step(closure_of(model, optimizer, 0, lambda calls=calls: calls.append(torch.is_grad_enabled())))
        counts.append(calls)
    assert counts[0] == counts[1] == [True] * len(counts[0])
    assert len(counts[0]) > 1


@pytest.mark.parametrize("s_init", [1e-8, "auto"])
def test_lbfgs_trains_or_is_refused(s_init):
    """Its defaults are 20 iterations a step and no line search: from there it ran to 1e17 and beyond."""
    kind = mechanize(torch.optim.LBFGS, s_init=s_init)
    with pytest.raises(ValueError, match=r"Got line_search_fn=None and max_iter=20\. Remedy: max_iter=1; or"):
        kind(mlp().parameters())
    model = mlp()
    optimizer = kind(model.parameters(), max_iter=1)
    for _ in range(100):
        optimizer.step(lambda: full_gradient(model, optimizer))
    assert full_loss(model) < 0.1


def full_gradient(model, optimizer):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(IMAGES), LABELS)
    loss.backward()
    return loss


def test_lbfgs_without_a_closure_says_what_the_plain_one_says():
    model, optimizer = CASES["LBFGS"].build()
    loss_of(model, 0).backward()
    before = snapshot(model, optimizer)
    with pytest.raises(TypeError, match="closure"):
        optimizer.step()
    assert_identical(snapshot(model, optimizer), before)


class DeliberateError(Exception):
    pass


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("trained", [0, 3])
@pytest.mark.parametrize(
    ("name", "when"), [("SGD_closure", 1), ("AdamW_fused", 1), ("LBFGS", 1), ("LBFGS", 2), ("LBFGS", 3)]
)
def test_an_exception_in_the_closure_leaves_everything_as_it_was(name, trained, when, grad):
    """At the first evaluation, or at a later one: LBFGS is then in the middle of its line search."""
    case = CASES[name]
    model, optimizer = case.build()
    train(model, optimizer, trained, closure=True)
    before, calls = snapshot(model, optimizer), []

    def fail():
        calls.append(None)
        if len(calls) == when:
            raise DeliberateError

    closure = closure_of(model, optimizer, trained, before=fail)
    with torch.set_grad_enabled(grad):
        with pytest.raises(DeliberateError):
            optimizer.step(closure)
        assert torch.is_grad_enabled() == grad
    assert_identical(snapshot(model, optimizer), before)
    # Training goes on as if nothing had happened.
    twin, other = case.build()
    train(twin, other, trained, closure=True)
    assert train(model, optimizer, 3, first=trained, closure=True) == train(twin, other, 3, trained, closure=True)


@pytest.mark.parametrize("grad", [True, False])
def test_an_exception_in_the_base_leaves_parameters_and_state_as_they_were(grad):
    """torch's Adam refuses sparse gradients, after it has begun to fill the state of the parameters before them."""
    dense, sparse = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, 2))
    optimizer = mechanize(torch.optim.Adam)([dense, sparse], lr=1.0)
    dense.grad, sparse.grad = torch.ones(3), torch.ones(3, 2).to_sparse(1)
    with torch.set_grad_enabled(grad):
        with pytest.raises(RuntimeError, match="does not support sparse gradients"):
            optimizer.step()
        assert torch.is_grad_enabled() == grad
    assert not optimizer.state
    assert dense.tolist() == [1.0] * 3
    assert read_out(optimizer).steps == 0
    assert not hasattr(optimizer, "found_inf")


class Half(torch.optim.SGD):
    """Steps, and then fails on demand: the parameters have moved by then."""

    fail = None

    def step(self, closure=None):
        super().step(closure)
        if self.fail:
            raise self.fail


@pytest.mark.parametrize("error", [DeliberateError, KeyboardInterrupt])
def test_an_exception_after_the_base_has_moved_puts_the_parameters_back(error):
    model = mlp()
    optimizer = mechanize(Half, s_init=1e-3)(model.parameters(), lr=1.0)
    train(model, optimizer, 5)
    before = snapshot(model, optimizer)
    optimizer.fail = error
    with pytest.raises(error):
        train(model, optimizer, 1)
    assert_identical(snapshot(model, optimizer), before)


def test_an_exception_while_moving_puts_the_parameters_back(monkeypatch):
    model = mlp()
    optimizer = mechanize(torch.optim.SGD, s_init=1e-3)(model.parameters(), lr=1.0)
    train(model, optimizer, 5)
    kernel = kernels.select(next(model.parameters()).device)
    before = snapshot(model, optimizer)

    def out_of_memory(*_):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(kernel, "move", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            train(model, optimizer, 1)
    assert_identical(snapshot(model, optimizer), before)


def test_an_exception_in_log_func_comes_after_a_complete_step():
    def fail(data):
        raise DeliberateError

    model, twin = mlp(), mlp()
    optimizer = mechanize(torch.optim.SGD, log_func=fail, log_every=1)(model.parameters(), lr=1.0)
    with pytest.raises(DeliberateError):
        train(model, optimizer, 1)
    other = mechanize(torch.optim.SGD)(twin.parameters(), lr=1.0)
    train(twin, other, 1)
    assert_identical(snapshot(model, optimizer), snapshot(twin, other))


def test_a_scaler_that_hands_over_found_inf_finds_it_again():
    model, optimizer = CASES["AdamW_fused"].build()
    train(model, optimizer, 2)
    found_inf = torch.zeros(())
    optimizer.found_inf = found_inf
    train(model, optimizer, 1)
    assert optimizer.found_inf is found_inf


class Twice(torch.optim.Optimizer):
    """Evaluates the closure twice, as sharpness-aware bases do."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            losses = [closure(), closure()]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"])
        return losses[1]


@pytest.mark.parametrize("base", [torch.optim.SGD, Twice, torch.optim.LBFGS])
@pytest.mark.parametrize("s_init", ["auto", 1e-4])
def test_the_lr_in_a_closure_a_hook_and_a_log_is_the_users(base, s_init):
    """Only the base finds another one, also where it evaluates the closure more than once."""
    seen = []
    model = mlp()
    options = {"max_iter": 4, "line_search_fn": "strong_wolfe"} if base is torch.optim.LBFGS else {}
    logged = mechanize(base, s_init=s_init, log_every=1, log_func=lambda data: see())
    optimizer = logged(model.parameters(), lr=1e-3, **options)

    def see(*args):
        seen.append(optimizer.param_groups[0]["lr"])

    optimizer.register_step_pre_hook(see)
    optimizer.register_step_post_hook(see)
    for _ in range(5):
        optimizer.step(closure_of(model, optimizer, 0, before=see))
    assert seen == [1e-3] * len(seen)
    assert len(seen) >= 20


@pytest.mark.parametrize("base", [torch.optim.SGD, Twice, torch.optim.LBFGS])
def test_an_lr_that_a_closure_sets_stays(base):
    model, calls = mlp(), []
    options = {"max_iter": 4, "line_search_fn": "strong_wolfe"} if base is torch.optim.LBFGS else {}
    optimizer = mechanize(base, s_init="auto")(model.parameters(), lr=1e-3, **options)

    def set_lr():
        calls.append(None)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 / (1 + len(calls))

    for _ in range(4):
        optimizer.step(closure_of(model, optimizer, 0, before=set_lr))
        assert optimizer.param_groups[0]["lr"] == 1e-3 / (1 + len(calls))
