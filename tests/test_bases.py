"""Every optimizer of torch.optim works as a base."""

import functools
import pickle
from inspect import signature

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

import mechanic_pytorch.optim
from bases import CASES
from device import DEVICE
from helpers import PUBLISHED, slot_of, stored_of
from mechanic_pytorch import is_mechanized, kernels, mechanize
from mechanic_pytorch._torch import has_memory
from problems import IMAGES, LABELS, full_loss, mlp, train

STOCHASTIC = [name for name in CASES if name != "LBFGS"]


def test_the_table_names_every_optimizer_of_torch():
    assert {case.base.__name__ for case in CASES.values()} == set(dir(mechanic_pytorch.optim))


@pytest.mark.parametrize("options", [{}, PUBLISHED], ids=str)
@pytest.mark.parametrize("name", [name for name in STOCHASTIC if not name.endswith("_published")])
def test_trains_at_lr_1(name, options):
    case = CASES[name]
    model, optimizer = case.build(**options)
    assert is_mechanized(optimizer)
    assert isinstance(optimizer, case.base)
    start = full_loss(model)
    train(model, optimizer, 200, closure=case.closure)
    assert start > 2.2
    assert full_loss(model) < case.bar
    assert optimizer.skipped_steps == 0


def test_lbfgs_trains_on_the_full_batch():
    """Its steps are made for the deterministic case: on mini-batches the plain LBFGS does not train either."""
    model, optimizer = CASES["LBFGS"].build()
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = F.cross_entropy(model(IMAGES), LABELS)
        loss.backward()
        return loss

    for _ in range(60):
        loss = optimizer.step(closure)
    assert loss.item() < 0.5
    assert all(calls)


@pytest.mark.parametrize("name", [name for name in STOCHASTIC if name != "SGD_closure"])
def test_maximizes_when_asked_to(name):
    """Maximizing f and minimizing -f are the same run, to the bit."""
    case = CASES[name]
    if "maximize" not in signature(case.base).parameters:
        pytest.skip(f"{case.base.__name__} has no option maximize")
    weights, scales = [], []
    for maximize in (False, True):
        model = case.model()
        optimizer = mechanize(case.base)(model.parameters(), lr=1.0, maximize=maximize, **case.options)
        for t in range(40):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(IMAGES[t::40].to(next(model.parameters()).dtype)).double(), LABELS[t::40])
            (-loss if maximize else loss).backward()
            optimizer.step()
        weights.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
        scales.append(optimizer.scale)
    assert scales[0] > 1e-8
    assert torch.equal(scales[0], scales[1])
    assert torch.equal(weights[0], weights[1])


@pytest.mark.parametrize(
    "flags", [{"capturable": True}, {"foreach": True}, {"fused": True}, {"fused": True, "amsgrad": True}]
)
def test_flags_do_not_change_the_result(flags):
    if flags.get("capturable") and not DEVICE:
        pytest.skip("torch's AdamW itself refuses capturable on CPU tensors: `make gpu` runs this")
    results = []
    for options in (flags, {"amsgrad": flags.get("amsgrad", False), "foreach": False}):
        model = mlp(torch.float64)
        optimizer = mechanize(torch.optim.AdamW)(model.parameters(), lr=1.0, **options)
        train(model, optimizer, 30)
        results.append(torch.nn.utils.parameters_to_vector(model.parameters()))
    # With capturable=True torch counts steps, and raises its betas to that power, in float32.
    rtol, atol = (1e-4, 1e-7) if flags.get("capturable") else (1e-8, 1e-10)
    torch.testing.assert_close(*results, rtol=rtol, atol=atol)


def test_tensor_learning_rate():
    results = []
    for lr in (1.0, torch.tensor(1.0)):
        model = mlp()
        optimizer = mechanize(torch.optim.AdamW)(model.parameters(), lr=lr, foreach=False)
        train(model, optimizer, 30)
        results.append(torch.nn.utils.parameters_to_vector(model.parameters()))
        assert optimizer.effective_lr() == [float(optimizer.scale)]
    torch.testing.assert_close(*results)


def test_differentiable_is_refused():
    with pytest.raises(ValueError, match=r"^MechanizedSGD: differentiable must be False\. Got True\. Remedy: "):
        mechanize(torch.optim.SGD)(mlp().parameters(), lr=1.0, differentiable=True)
    optimizer = mechanize(torch.optim.SGD)(mlp().parameters(), lr=1.0)
    with pytest.raises(ValueError, match="differentiable"):
        optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "differentiable": True})
    assert len(optimizer.param_groups) == 1


class Accumulating(torch.optim.AdamW):
    """Makes a step at every fourth call only, and has no state before the first."""

    calls = 0

    def step(self, closure=None):
        self.calls += 1
        return super().step(closure) if self.calls % 4 == 0 else None


@pytest.mark.parametrize("options", [{}, PUBLISHED], ids=str)
def test_a_base_that_starts_later(options):
    model = mlp()
    optimizer = mechanize(Accumulating, **options)(model.parameters(), lr=1.0)
    train(model, optimizer, 2)
    assert set(optimizer.state[model[0].weight]) == {slot_of(optimizer)}
    twin = mlp()
    other = mechanize(Accumulating, **options)(twin.parameters(), lr=1.0)
    other.load_state_dict(optimizer.state_dict())
    pickle.loads(pickle.dumps(optimizer))
    train(model, optimizer, 600, first=2)
    assert set(optimizer.state[model[0].weight]) == {"step", "exp_avg", "exp_avg_sq", slot_of(optimizer)}
    assert full_loss(model) < 0.5


def test_a_step_that_copies_the_attributes_of_a_hooked_one_is_called():
    torch.optim.SGD([torch.zeros(1)])  # torch.optim.SGD.step is hooked from here on

    @functools.wraps(torch.optim.SGD.step)
    def step(self, closure=None):
        calls.append(self)
        return torch.optim.SGD.step(self, closure)

    calls, p = [], torch.ones(3, requires_grad=True)
    optimizer = mechanize(type("Decorated", (torch.optim.SGD,), {"step": step}))([p], lr=1.0)
    assert step.hooked
    p.grad = torch.ones(3)
    optimizer.step()
    assert len(calls) == 1


class WithoutRate(torch.optim.SGD):
    """Sets its learning rate by itself, as Adafactor of other packages does."""

    def __init__(self, params, lr=None):
        super().__init__(params, lr=1.0)
        self.param_groups[0]["lr"] = None

    def step(self, closure=None):
        self.param_groups[0]["lr"] = 1.0
        try:
            return super().step(closure)
        finally:
            self.param_groups[0]["lr"] = None


def test_a_base_without_learning_rate():
    model = mlp()
    optimizer = mechanize(WithoutRate)(model.parameters())
    train(model, optimizer, 20)
    assert optimizer.effective_lr() == [float(optimizer.scale)]


class Prodigy(torch.optim.SGD):
    """Named like an optimizer that learns a rate by itself."""


class OfThatFamily(Prodigy):
    pass


@pytest.mark.parametrize("base", [Prodigy, OfThatFamily])
def test_a_base_with_a_rate_of_its_own_is_warned_of_once(base):
    model = mlp()
    optimizer = mechanize(base)(model.parameters(), lr=1.0)
    with pytest.warns(
        UserWarning, match=rf"{base.__name__} has a rate, .* Remedy: use {base.__name__} as it is"
    ) as heard:
        train(model, optimizer, 5)
    assert len(heard) == 1


def test_parameters_on_a_manifold_are_warned_of_once():
    model = mlp()
    model[0].weight.manifold = "sphere"
    optimizer = mechanize(torch.optim.SGD)(model.parameters(), lr=1.0)
    with pytest.warns(UserWarning, match=r"manifold, which a rescaled step leaves.*Remedy: give them to SGD") as heard:
        train(model, optimizer, 5)
    assert len(heard) == 1


class OneOperationAtMost(torch.Tensor):
    """A weight of a class that implements hardly anything, as those of 8 bits do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch._foreach_sub or function is torch.empty_like:
            raise NotImplementedError(function)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_weights_without_arithmetic_are_refused_with_the_remedy():
    weight = torch.randn(3).as_subclass(OneOperationAtMost).requires_grad_()
    with pytest.raises(TypeError, match=r"Got OneOperationAtMost\. Remedy: give these parameters to a plain"):
        mechanize(torch.optim.SGD)([weight], lr=1.0)


def test_the_learned_lr_after_very_many_steps():
    """Sums of float32 would stand still at 2^24 steps, so that what is learned later would not count."""
    model = mlp()
    optimizer = mechanize(torch.optim.SGD, s_init=1e-3)(model.parameters(), lr=1.0)
    train(model, optimizer, 3)
    sums = optimizer.param_groups[0]["mechanic_lr_sums"]
    before = sums.copy_(torch.tensor([1e6, 1e8, 1.0])).clone()
    train(model, optimizer, 10, first=3)
    grown = sums - before
    assert grown[1] == 10
    assert grown[0] > 0


@pytest.mark.parametrize("options", [PUBLISHED, {}, {"per_group": True}], ids=str)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_weights_without_values(base, options):
    """On the device "meta", and among fake tensors, where memory is planned: steps run, and make all state."""

    def train(make):
        model = torch.nn.Linear(4, 3)
        optimizer = make(model.parameters(), lr=1.0)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
        return model, optimizer

    for context in (torch.device("meta"), FakeTensorMode()):
        with context:
            try:
                train(base)
            except RuntimeError as error:  # torch 2.11: AdamW reads its step count, if CUDA was built in
                assert "on meta tensors" in str(error)  # noqa: PT017
                continue
            model, optimizer = train(mechanize(base, **options))
        assert [stored_of(optimizer, p).shape for p in model.parameters()] == [(3, 4), (3,)]


def test_weights_without_memory_never_meet_a_kernel_that_reads_addresses(monkeypatch):
    monkeypatch.setenv("MECHANIC_KERNEL", "triton")
    with FakeTensorMode():
        p = torch.nn.Parameter(torch.ones(3))
        assert kernels.select(p.device, has_memory=has_memory(p)) is kernels.foreach


@pytest.mark.parametrize("s_init", ["auto", 1e-8])
def test_what_a_base_says_of_meta_tensors_is_said(s_init):
    messages = []
    for make in (torch.optim.Adam, mechanize(torch.optim.Adam, s_init=s_init)):
        p = torch.nn.Parameter(torch.ones(3, device="meta"))
        p.grad = torch.ones_like(p)
        with pytest.raises(RuntimeError) as error:
            make([p], lr=1.0, fused=True).step()
        messages.append(str(error.value))
    assert messages[0] == messages[1]
