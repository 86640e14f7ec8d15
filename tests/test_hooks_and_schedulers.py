"""Hooks fire once, and every learning-rate scheduler works."""

import inspect
import warnings

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from mechanic_pytorch import mechanize
from problems import full_loss, loss_of, mlp, train

BASES = [torch.optim.SGD, torch.optim.AdamW, torch.optim.LBFGS]


def one_step(model, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize("before", ["nothing", "plain", "plain, then torch.compile", "torch.compile, then plain"])
@pytest.mark.parametrize("base", BASES)
def test_hooks_and_profiler_records_come_once_per_step(base, before):
    """torch wraps `Base.step` as soon as one plain `Base` exists; that wrapper must not fire a second time."""
    base = type(base.__name__, (base,), {})  # a class on which no earlier test has left that wrapper
    if before == "torch.compile, then plain":
        base.step = torch.compiler.disable(base.step)  # so does torch with LBFGS as soon as anything is compiled
    if before != "nothing":
        model = mlp()
        one_step(model, base(model.parameters(), lr=0.1))
    if before == "plain, then torch.compile":
        base.step = torch.compiler.disable(base.step)
    model = mlp()
    options = {"max_iter": 1} if issubclass(base, torch.optim.LBFGS) else {}
    optimizer = mechanize(base)(model.parameters(), lr=1.0, **options)
    fired = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: fired.append("pre")),
        optimizer.register_step_post_hook(lambda *_: fired.append("post")),
        register_optimizer_step_pre_hook(lambda *_: fired.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: fired.append("global post")),
    ]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        one_step(model, optimizer)
    for handle in handles:
        handle.remove()
    assert fired == ["global pre", "pre", "post", "global post"]
    records = [event.name for event in profile.events() if event.name.startswith("Optimizer.step")]
    assert records == [f"Optimizer.step#Mechanized{base.__name__}.step"]


def test_a_pre_hook_may_replace_the_closure():
    model = mlp()
    optimizer = mechanize(torch.optim.SGD)(model.parameters(), lr=1.0)
    optimizer.register_step_pre_hook(lambda *_: ((optimizer, lambda: torch.tensor(7.0)), {}))
    assert optimizer.step().item() == 7.0


def test_the_plain_base_is_left_as_it_was():
    before = dict(vars(torch.optim.RMSprop))
    model = mlp()
    train(model, mechanize(torch.optim.RMSprop)(model.parameters(), lr=1.0), 3)
    assert dict(vars(torch.optim.RMSprop)) == before


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: min(1.0, t / 20)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.99),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 100),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [100, 180]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 50),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 1e-3, total_iters=20),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.99),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 250),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 250),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 125),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0, step_size_up=50, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=251),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1, total_iters=20), lr_scheduler.ExponentialLR(o, 0.99)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LambdaLR(o, lambda t: t / 20), lr_scheduler.CosineAnnealingLR(o, 230)], milestones=[20]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=20),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.1, anneal_epochs=100),
}


def test_the_table_names_every_scheduler_of_torch():
    named = {name for name, value in vars(lr_scheduler).items() if inspect.isclass(value) and name.endswith("LR")}
    named = {name for name in named if issubclass(getattr(lr_scheduler, name), lr_scheduler.LRScheduler)}
    assert named <= {*SCHEDULERS, "LRScheduler"}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler(name):
    model = mlp()
    optimizer = mechanize(torch.optim.AdamW)(model.parameters(), lr=1.0)
    scheduler = SCHEDULERS[name](optimizer)
    lrs = []
    with warnings.catch_warnings():
        if name == "SequentialLR":  # torch's own call of its parts' step
            warnings.filterwarnings("ignore", "The epoch parameter in `scheduler.step\\(\\)`")
        for t in range(250):
            lrs.append(optimizer.param_groups[0]["lr"])
            (loss,) = train(model, optimizer, 1, first=t)
            scheduler.step(*([loss] if name == "ReduceLROnPlateau" else []))
    assert full_loss(model) < 0.5
    assert max(lrs) <= 1.0
    assert optimizer.effective_lr() == [optimizer.param_groups[0]["lr"] * float(optimizer.scale)]
    plain = torch.optim.AdamW(mlp().parameters(), lr=1.0)
    if name != "ReduceLROnPlateau":  # which depends on the losses
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = SCHEDULERS[name](plain)
            for lr in lrs:
                assert plain.param_groups[0]["lr"] == lr
                plain.step()
                expected.step()


def test_warm_up_from_zero_moves_nothing_at_first():
    model = mlp()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = mechanize(torch.optim.SGD, s_init=0.1)(model.parameters(), lr=1.0)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda t: float(t >= 3))
    train(model, optimizer, 3, scheduler=scheduler)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))
    assert float(optimizer.scale) == 0
    train(model, optimizer, 3, first=3, scheduler=scheduler)
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))
