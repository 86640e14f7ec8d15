"""An error or an interrupt (Ctrl-C) anywhere in a step: afterwards it is as if the step had not been asked for."""

import contextlib
import copy
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import assert_identical, stored_of
from mechanic_pytorch import _buckets, _fused, kernels, mechanic, mechanize
from mechanic_pytorch._tuner import Tuner
from mechanic_pytorch.telemetry import read_out
from problems import full_loss, layers, mlp, train

OPTIONS = {
    "auto": {"s_init": "auto"},
    "number": {"s_init": 1e-4},
    "auto, per group": {"s_init": "auto", "per_group": True},
    "number, per group": {"s_init": 1e-4, "per_group": True},
}


class Flaky(torch.optim.AdamW):
    """Raises once, at the call that is asked for, before its own step or after it."""

    when, calls = (0, "before"), 0

    def step(self, closure=None):
        self.calls += 1
        for moment in ("before", "after"):
            if moment == "after":
                super().step(closure)
            if self.when == (self.calls, moment):
                raise KeyboardInterrupt


def model_and_optimizer(base, options, **base_options):
    model = mlp()
    groups = [{"params": params} for params in layers(model)]
    return model, mechanize(base, **options)(groups, lr=1.0, **base_options)


def ours(model, optimizer):
    """Return the weights, and all that the tuner keeps."""
    state = optimizer.state_dict()
    kept = {i: {k: v for k, v in s.items() if k in _buckets.PER_PARAMETER} for i, s in state["state"].items()}
    return copy.deepcopy([model.state_dict(), {i: s for i, s in kept.items() if s}, state["param_groups"]])


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("when", [1, 2, 3, 4, 5, 30])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_base_that_raises_leaves_weights_and_tuner_as_they_were(options, when, moment):
    """The moments of Adam are its own: one that raises after its step has counted the gradient."""
    model, optimizer = model_and_optimizer(Flaky, OPTIONS[options])
    optimizer.when = (when, moment)
    train(model, optimizer, when - 1)
    before = ours(model, optimizer)
    with pytest.raises(KeyboardInterrupt):
        train(model, optimizer, 1, first=when - 1)
    after = ours(model, optimizer)
    assert_identical(after[:2], before[:2])
    if when > 2:  # until then, the factor of lr is being chosen
        assert_identical(after[2], before[2])
    train(model, optimizer, 80, first=when)
    assert full_loss(model) < 0.7
    assert (optimizer.scale > 1e-3).all()


POINTS = {
    "kernel": (kernels, "select"),
    "sums": (_buckets, "sum_over_processes"),
    "tune": (mechanic, "tune"),
    "bet": (Tuner, "bet"),
    "move": (_buckets.Work, "move"),
    "fused": (_fused.OnePass, "move"),
}


# The base makes its first steps by itself.
@pytest.mark.parametrize(("point", "when"), [(p, t) for p in POINTS for t in (1, 2, 3, 5) if p != "fused" or t > 2])
@pytest.mark.parametrize("options", ["auto", "number, per group"])
def test_whatever_part_of_a_step_raises_weights_and_sums_are_as_they_were(options, point, when, monkeypatch):
    """The part begins with an error: what came before it is undone."""
    model, optimizer = model_and_optimizer(torch.optim.AdamW, OPTIONS[options], fused=point == "fused")
    train(model, optimizer, when - 1)
    before = ours(model, optimizer)
    place, name = POINTS[point]
    with monkeypatch.context() as broken:

        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        broken.setattr(place, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(model, optimizer, 1, first=when - 1)
    after = ours(model, optimizer)
    assert_identical(after[0], before[0])
    assert_identical(after[1], before[1])
    train(model, optimizer, 80, first=when - 1)
    assert full_loss(model) < 0.7
    assert (optimizer.scale > 1e-3).all()


@pytest.mark.parametrize("when", [1, 2, 3, 5])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_step_whose_weights_have_moved_is_finished(options, when, monkeypatch):
    """An interrupt while it is written down: the step is made, to the bit, and the error comes all the same."""
    runs = []
    for is_interrupted in (False, True):
        model, optimizer = model_and_optimizer(torch.optim.AdamW, OPTIONS[options])
        train(model, optimizer, when - 1)
        with monkeypatch.context() as broken:
            if is_interrupted:
                store, calls = _buckets.Work.store, []

                def interrupted(*args, store=store, calls=calls):
                    calls.append(None)
                    store(*args)
                    if len(calls) == 1:
                        raise KeyboardInterrupt

                broken.setattr(_buckets.Work, "store", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    train(model, optimizer, 1, first=when - 1)
            else:
                train(model, optimizer, 1, first=when - 1)
        train(model, optimizer, 3, first=when)
        runs.append([model.state_dict(), optimizer.state_dict()])
    assert_identical(runs[1], runs[0])


class At(TorchDispatchMode):
    """Raises at the so-manieth operation of a block; what is a view counts for nothing."""

    def __init__(self, when):
        super().__init__()
        self.when, self.count = when, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.count += 1
            if self.count == self.when:
                raise KeyboardInterrupt
        return function(*args, **(kwargs or {}))


def before_step(number, options):
    """Return two parameters with gradients, and an optimizer that has made all steps before this one."""
    torch.manual_seed(0)
    params = [torch.randn(5, requires_grad=True), torch.randn(3, 2, requires_grad=True)]
    optimizer = mechanize(torch.optim.SGD, **options)([{"params": [p]} for p in params], lr=1.0, foreach=True)
    for t in range(number):
        for i, p in enumerate(params):
            p.grad = (i + 1) * (p.detach() - 1)
        if t < number - 1:
            optimizer.step()
    return params, optimizer


@pytest.mark.filterwarnings("ignore:Mechanized:UserWarning")
@pytest.mark.parametrize("when", [1, 2, 3])
@pytest.mark.parametrize("options", [{"s_init": "auto"}, {"s_init": 1e-4, "per_group": True}], ids=str)
def test_an_interrupt_at_any_operation_leaves_a_step_that_was_made_or_was_not(options, when):
    """Asked for again if it was not made, it ends where it would have, to the bit.

    SGD has no momentum here, which would hold the gradient twice. While weights are moved, Algorithm 1 adds to its
    sums, too, which may then be a step ahead.
    """

    def state():
        saved = optimizer.state_dict()
        return copy.deepcopy([[p.detach() for p in params], saved["param_groups"], saved["state"]])

    params, optimizer = before_step(when, options)
    before = [p.detach().clone() for p in params]
    with At(0) as mode:
        optimizer.step()
    expected, ahead = state(), []
    for number in range(when, mode.count + 1, 3):  # each of the steps takes a third of them
        params, optimizer = before_step(when, options)
        with At(number), contextlib.suppress(KeyboardInterrupt):
            optimizer.step()
        if read_out(optimizer).steps < when:
            assert_identical([p.detach() for p in params], before)
            optimizer.step()
        try:
            assert_identical(state(), expected)
        except AssertionError:
            ahead.append(number)
    assert len(ahead) <= (0 if options["s_init"] == "auto" else 7), f"of {mode.count} operations"


def test_the_way_of_a_resting_parameter_is_put_back_too(monkeypatch):
    """Where the search begins again, it is forgotten: with the rest of the step, or not at all."""
    torch.manual_seed(0)
    first, second = torch.randn(5, requires_grad=True), torch.randn(3, requires_grad=True)
    optimizer = mechanize(torch.optim.SGD, s_init="auto")([first, second], lr=1.0)
    for _ in range(30):
        first.grad = 0.1 * (first.detach() - 3)
        optimizer.step()
    first.grad, second.grad = None, 100 * (second.detach() - 3)
    before = copy.deepcopy(optimizer.state[first])

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(_buckets.Work, "move", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    assert_identical(optimizer.state[first], before)
    assert second not in optimizer.state
    scale = float(optimizer.scale)
    optimizer.step()
    assert float(optimizer.scale) < 0.1 * scale, "it begins again"
    assert torch.equal(stored_of(optimizer, first), first.detach())


def test_a_warning_that_is_made_an_error_comes_after_the_step():
    """Of a hundred weights, rounding leaves all but five where they are."""
    p = torch.full((100,), 1.0).index_fill(0, torch.arange(5), 1e-12).requires_grad_()
    optimizer = mechanize(torch.optim.SGD, s_init=1e-3)([p], lr=1e-9)
    p.grad = torch.ones(100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="lost in rounding"):
            optimizer.step()
        assert read_out(optimizer).steps == 1
        assert stored_of(optimizer, p).count_nonzero() == 5
        optimizer.step()
    assert read_out(optimizer).steps == 2
