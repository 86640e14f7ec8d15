"""Warnings about training that has not started: where they come, and that they come nowhere else."""

import io
import re
import warnings

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.counting import Operations
from helpers import PUBLISHED
from mechanic_pytorch import _watch, mechanize, patched
from mechanic_pytorch._watch import FIRST_CHECK as STEPS
from mechanic_pytorch.scripts import report
from problems import IMAGES, LABELS, loss_of, mlp, train


def one_warning(caught):
    assert len(caught) == 1
    return str(caught[0].message)


@pytest.mark.parametrize("s_init", [1e-8, "auto"])
@pytest.mark.parametrize("reason", ["zero gradients", "no gradients", "lr 0"])
def test_training_that_does_not_start(reason, s_init):
    model = mlp()
    optimizer = mechanize(torch.optim.SGD, s_init=s_init)(model.parameters(), lr=0.0 if reason == "lr 0" else 1.0)

    def run(steps):
        for t in range(steps):
            if reason == "lr 0":
                loss_of(model, t).backward()
            elif reason == "zero gradients":
                (0.0 * sum(p.sum() for p in model.parameters())).backward()
            optimizer.step()
            optimizer.zero_grad()

    run(STEPS - 1)  # warnings are errors here
    with pytest.warns(UserWarning, match="Remedy: make sure that lr is not 0") as caught:
        run(1)
    assert "MechanizedSGD: training has not started: after 500 steps the scale is 0e+00" in one_warning(caught)
    assert caught[0].filename == __file__
    run(STEPS)  # once


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("lr", [1e-8, 1e-6])
def test_a_tiny_lr_with_a_number_for_a_start(base, lr):
    model = mlp()
    optimizer = mechanize(base, **PUBLISHED)(model.parameters(), lr=lr)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, STEPS)
    messages = [str(warning.message) for warning in caught if "lost in rounding" not in str(warning.message)]
    assert len(messages) == 1, "beside that of a base that moves no weight, which is tested elsewhere"
    assert re.search(r'the scale is held back.* Remedy: pass s_init="auto", or lr=1\.0', messages[0])


HEALTHY = {
    "mlp": (mlp, loss_of),
    "logistic regression": (lambda: torch.nn.Linear(64, 10), loss_of),
    "one image a batch": (mlp, lambda model, t: loss_of(model, t, 1)),
    "regression": (
        lambda: torch.nn.Linear(64, 1),
        lambda model, t: F.mse_loss(model(IMAGES[t % 50 :: 50])[:, 0], LABELS[t % 50 :: 50].float()),
    ),
}


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize(
    ("base", "s_init"), [(torch.optim.AdamW, 1e-8), (torch.optim.SGD, 1e-8), (torch.optim.SGD, "auto")]
)
def test_quiet_where_training_starts(name, base, s_init):
    make, loss = HEALTHY[name]
    torch.manual_seed(0)
    model = make()
    optimizer = mechanize(base, s_init=s_init)(model.parameters(), lr=1.0)
    schedule = LambdaLR(optimizer, lambda t: min(1.0, t / 200))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in range(STEPS):
            optimizer.zero_grad()
            loss(model, t).backward()
            optimizer.step()
            schedule.step()


@pytest.mark.parametrize("fused", [True, False])
def test_it_reads_after_500_steps_and_1000_and_after_a_reset_again_and_frozen_steps_do_not_count(fused):
    p = torch.ones(3, requires_grad=True)
    optimizer = mechanize(torch.optim.SGD, s_init=1e-3)([p], lr=1e-3, fused=fused)
    usual = 0 if fused else 1  # whether to skip

    def reads(steps, factor=1.0):
        """Return at which of so many steps the host reads more from the device than usual."""
        found = []
        for t in range(1, steps + 1):
            p.grad = factor * p.detach()
            with Operations() as operations:
                optimizer.step()
            if operations.host_reads > usual:
                found.append(t)
        return found

    beginning = reads(20)
    assert max(beginning) <= 2
    optimizer.freeze_scale()
    assert reads(30) == []
    assert reads(30, factor=torch.nan) == []
    optimizer.unfreeze_scale()
    assert reads(2 * STEPS - 20) == [STEPS - 20, 2 * STEPS - 20]
    optimizer.reset()
    assert [t for t in reads(STEPS) if t > 2] == [STEPS]


def lone(base, params, **options):
    return [mechanize(base, **options)([p], lr=1.0) for p in params]


@pytest.fixture
def never_said():
    _watch._lone.clear()
    yield
    _watch.said.clear()


@pytest.mark.usefixtures("never_said")
def test_an_optimizer_for_each_tensor_in_backward():
    """As torch's own function builds them; torchtune's and others' do the same by hand."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's, of its own import
        from torch.distributed.optim import _apply_optimizer_in_backward
    model = mlp()
    base = mechanize(torch.optim.AdamW, s_init="auto")
    _apply_optimizer_in_backward(base, model.parameters(), {"lr": 1.0})
    with pytest.warns(UserWarning, match=r"several mechanized optimizers hold one tensor each.* Remedy: ") as caught:
        loss_of(model, 0).backward()
    assert one_warning(caught).startswith("MechanizedAdamW: ")
    assert caught[0].filename == __file__
    for t in range(1, 5):
        loss_of(model, t).backward()  # once
    _apply_optimizer_in_backward(base, (another := mlp()).parameters(), {"lr": 1.0})
    loss_of(another, 0).backward()


@pytest.mark.usefixtures("never_said")
def test_the_report_of_a_script_repeats_it():
    params = [torch.zeros(3 + i, requires_grad=True) for i in range(_watch.MANY)]
    with patched() as built:
        optimizers = [torch.optim.AdamW([p], lr=1e-3) for p in params]
    with pytest.warns(UserWarning, match="hold one tensor each"):
        steps_in_turn(optimizers, params, 1)
    report.show(built, {}, console=Console(file=(shown := io.StringIO()), width=1000))
    assert f"mechanic: {_watch.MANY_LONE}" in shown.getvalue()


@pytest.mark.usefixtures("never_said")
def test_one_optimizer_in_backward_is_no_reason_to_warn():
    """Of a single tensor, as in prompt tuning, or of the whole model."""
    model, prompt = mlp(), torch.zeros(64, requires_grad=True)
    whole, single = mechanize(torch.optim.SGD)(model.parameters(), lr=1.0), lone(torch.optim.SGD, [prompt])[0]
    model[0].weight.register_post_accumulate_grad_hook(lambda _: whole.step())
    prompt.register_post_accumulate_grad_hook(lambda _: single.step())
    for t in range(3):
        F.cross_entropy(model(IMAGES[t : t + 32] + prompt), LABELS[t : t + 32]).backward()
    assert prompt.any()


def steps_in_turn(optimizers, params, steps):
    for _ in range(steps):
        for p, optimizer in zip(params, optimizers, strict=True):
            p.grad = torch.ones_like(p)
            optimizer.step()


@pytest.mark.usefixtures("never_said")
@pytest.mark.parametrize(("number", "sizes", "warns"), [(_watch.MANY, 2, 1), (_watch.MANY - 1, 2, 0), (20, 1, 0)])
def test_many_optimizers_of_one_tensor_that_step_together(number, sizes, warns):
    """As in torchao's CPUOffloadOptimizer, which needs a GPU: after backward, one step of each.

    Tensors of one shape are not those of a model, but of runs that are compared.
    """
    params = [torch.zeros(3 + i % sizes, requires_grad=True) for i in range(number)]
    optimizers = lone(torch.optim.SGD, params)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps_in_turn(optimizers, params, 3)
    assert len(caught) == warns
    assert not warns or "hold one tensor each" in one_warning(caught)


@pytest.mark.usefixtures("never_said")
def test_runs_one_after_another_are_no_reason_to_warn():
    params = [torch.zeros(3 + i, requires_grad=True) for i in range(3 * _watch.MANY)]
    optimizers = lone(torch.optim.SGD, params)
    for p, optimizer in zip(params, optimizers, strict=True):
        steps_in_turn([optimizer], [p], 3)


@pytest.mark.usefixtures("never_said")
def test_optimizers_that_are_gone_do_not_count():
    for i in range(3 * _watch.MANY):
        p = torch.zeros(3 + i, requires_grad=True)
        steps_in_turn(lone(torch.optim.SGD, [p]), [p], 1)
