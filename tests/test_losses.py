"""The loss of a training loop that does not tell it: what `backward()` was called on since the last step."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from benchmarks.counting import Operations
from mechanic_pytorch.scripts.losses import Losses
from mechanic_pytorch.scripts.report import Record
from problems import mlp, train


def losses_of(train):
    """Return what is seen at each step of a training that gets a function for its steps."""
    losses, seen = Losses(), []
    before = torch.autograd.backward
    with losses.watching():
        train(lambda: seen.append(losses.at_step()))
    assert torch.autograd.backward is before
    return [None if loss is None else float(loss) for loss in seen]


def number(value):
    return torch.tensor(float(value), requires_grad=True)


def test_it_is_the_one_of_each_step():
    def train(step):
        for value in (3, 2):
            (2 * number(value)).backward()
            step()
        torch.autograd.backward([number(4), number(5)])
        step()

    assert losses_of(train) == [6, 4, 9]


def test_parts_add_up_and_optimizers_that_step_after_one_backward_have_the_same():
    def train(step):
        for value in (1, 2):
            (number(value) / 2).backward()
        step()
        step()
        number(7).backward()
        step()

    assert losses_of(train) == [1.5, 1.5, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_kept_as_it_was_and_in_a_precision_that_can_be_added_up(dtype):
    def train(step):
        for _ in range(3):
            loss = (number(1).to(dtype) * 257).reshape(1)
            loss.backward()
            with torch.no_grad():
                loss.zero_()
        step()

    (loss,) = losses_of(train)
    assert loss == 3 * float(torch.tensor(257.0).to(dtype))


def test_what_a_grad_scaler_scales_counts_as_it_was():
    def train(step):
        for is_enabled in (True, False):
            scaler = torch.amp.GradScaler("cpu", enabled=is_enabled)
            x = number(3)
            scaler.scale(x.square()).backward()
            assert float(x.grad) == (6 * 65536 if is_enabled else 6)
            step()

    assert losses_of(train) == [9, 9]


def test_a_backward_that_is_no_loss_does_not_count():
    def train(step):
        x = torch.ones(3, requires_grad=True)
        x.backward(torch.ones(3))
        number(2).backward(torch.tensor(5.0))
        step()
        checkpoint(lambda y: y.sum().reshape(1), x, use_reentrant=True).sum().backward()  # calls it within
        step()
        y = number(4)
        y.register_hook(lambda gradient: number(7).backward())
        y.backward()
        step()

    assert losses_of(train) == [None, 3, 4]


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_compiled_forward_changes_nothing(is_compiled):
    def train(step):
        def loss(x):
            return x.square().sum()

        compiled = torch.compile(loss, backend="eager") if is_compiled else loss
        compiled(torch.ones(3, requires_grad=True)).backward()
        step()

    assert losses_of(train) == [3]


def test_a_backward_in_compiled_code_still_works():
    x = torch.ones(3, requires_grad=True)

    def train(step):
        torch.compile(lambda: (x * x).sum().backward(), backend="eager")()
        step()

    losses_of(train)
    assert x.grad.tolist() == [2, 2, 2]


def test_a_plain_run_that_is_watched_reads_nothing_from_the_device_and_ends_at_the_same_weights():
    weights, reads, seen = [], [], []
    for is_watched in (False, True):
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        losses = Losses()
        record = Record(optimizer, 100, losses) if is_watched else None
        with Operations() as operations:
            if record:
                with losses.watching():
                    seen = train(model, optimizer, 5)
            else:
                train(model, optimizer, 5)
        weights.append([p.detach().clone() for p in model.parameters()])
        reads.append(operations.host_reads)
    assert reads[0] == reads[1]
    assert all(map(torch.equal, *weights))
    rows, kept = record.read()
    assert kept == list(enumerate(seen, 1))
    assert [row.effective_lr for row in rows] == [[0.01]] * 5
