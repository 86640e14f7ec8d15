"""`learned_lr()`: the largest effective lr of a run."""

import copy

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from mechanic_pytorch import mechanize
from problems import full_loss, loss_of, mlp, train


def groups(model):
    return [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.1}]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("tensor", [False, True])
def test_it_is_the_largest_effective_lr_so_far(fused, tensor):
    model = mlp(torch.float64)
    lr = torch.tensor(1.0) if tensor else 1.0
    optimizer = mechanize(torch.optim.AdamW, s_init=1e-3)(groups(model), lr=lr, fused=fused, foreach=False)
    schedule = CosineAnnealingLR(optimizer, 40)
    seen = []
    for t in range(40):
        optimizer.zero_grad()
        loss_of(model, t).backward()
        optimizer.step()
        seen.append(optimizer.effective_lr())
        schedule.step()
        peaks = [max(lrs) for lrs in zip(*seen, strict=True)]
        assert optimizer.learned_lr() == pytest.approx(peaks, rel=1e-6)
    assert seen[-1][0] < 0.1 * peaks[0], "lr has gone to 0, where nothing could be read off"
    assert peaks[0] == pytest.approx(10 * peaks[1])


def test_it_stays_over_a_resume_and_a_skipped_step_and_not_over_a_reset():
    model = mlp()
    optimizer = mechanize(torch.optim.SGD, s_init=1e-3)(model.parameters(), lr=1.0, fused=True)
    train(model, optimizer, 20)
    learned = optimizer.learned_lr()
    assert learned[0] > 1e-3
    other = mlp()
    resumed = mechanize(torch.optim.SGD, s_init=1e-3)(other.parameters(), lr=1.0, fused=True)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.learned_lr() == learned
    optimizer.param_groups[0]["lr"] = 1e3
    loss_of(model, 20).backward()
    model[0].weight.grad[0, 0] = torch.nan
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 1.0
    assert optimizer.learned_lr() == learned
    optimizer.reset()
    assert optimizer.learned_lr() == [0.0]


def test_a_schedule_by_hand_that_ends_at_zero():
    model = mlp()
    optimizer = mechanize(torch.optim.SGD, s_init=1e-3)(model.parameters(), lr=1.0)
    train(model, optimizer, 10)
    learned = optimizer.learned_lr()
    optimizer.param_groups[0]["lr"] = 0.0
    assert optimizer.learned_lr() == learned != [0.0]


def end(make):
    """Train a model with a schedule; return its optimizer and its loss."""
    model = mlp()
    optimizer = make(model.parameters())
    train(model, optimizer, 300, scheduler=CosineAnnealingLR(optimizer, 300))
    return optimizer, full_loss(model)


def test_a_run_of_the_plain_base_with_it_ends_alike():
    mechanized, loss = end(lambda params: mechanize(torch.optim.SGD, s_init="auto")(params, lr=1.0, momentum=0.9))
    (lr,) = mechanized.learned_lr()
    _, plain = end(lambda params: torch.optim.SGD(params, lr=lr, momentum=0.9))
    _, less = end(lambda params: torch.optim.SGD(params, lr=lr / 100, momentum=0.9))
    assert plain < 1.5 * loss < less
