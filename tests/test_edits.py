"""What users do to their weights between steps stays done; things that watch weights see them."""

import pytest
import torch
from torch.nn.utils import parametrizations, prune

from helpers import stored_of
from mechanic_pytorch import mechanize
from problems import full_loss, loss_of, mlp, train


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("store_delta", [False, True])
def test_one_further_step_starts_from_the_edited_weights(dtype, store_delta):
    model = mlp(dtype)
    optimizer = mechanize(torch.optim.SGD, s_init=1e-3, store_delta=store_delta)(model.parameters(), lr=1.0)
    train(model, optimizer, 20)
    with torch.no_grad():
        for p in model.parameters():
            p.uniform_(-0.1, 0.1)
        model[0].weight[:, ::2] = 0.0
    edited = [p.detach().clone() for p in model.parameters()]
    old_delta = [stored_of(optimizer, p).clone() for p in model.parameters()]
    old_scale = optimizer.scale
    train(model, optimizer, 1, first=20)
    for p, start, old in zip(model.parameters(), edited, old_delta, strict=True):
        new = optimizer.scale.double() * stored_of(optimizer, p).double()
        move = new - old_scale.double() * old.double()
        expected = start.double() + move
        # bfloat16: two thirds of a spacing that the compensation may still hold of the old weight, and rounding.
        spacing = 1.2 * 2**-7 if dtype == torch.bfloat16 else 4 * torch.finfo(dtype).eps
        error = (p.detach().double() - expected).abs()
        assert (error <= spacing * (torch.maximum(start.double().abs(), expected.abs()) + new.abs())).all()
        assert move.abs().max() > 1e-5


def test_weights_that_are_clamped_after_each_step_still_train():
    """A weight constraint holds, and training works within it."""
    model = mlp()
    optimizer = mechanize(torch.optim.AdamW, s_init="auto")(model.parameters(), lr=1.0)
    for t in range(300):
        train(model, optimizer, 1, first=t)
        with torch.no_grad():
            for p in model.parameters():
                p.clamp_(-0.5, 0.5)
    assert max(p.abs().max() for p in model.parameters()) <= 0.5
    assert full_loss(model) < 0.3


def test_load_state_dict_on_the_model_after_some_steps():
    """Loading the best weights so far, and going on, goes on from them."""
    model = mlp()
    optimizer = mechanize(torch.optim.AdamW)(model.parameters(), lr=1.0)
    train(model, optimizer, 200)
    best, loss = {key: value.clone() for key, value in model.state_dict().items()}, full_loss(model)
    train(model, optimizer, 30, first=200)
    model.load_state_dict(best)
    assert full_loss(model) == loss
    train(model, optimizer, 1, first=230)
    assert full_loss(model) < 2 * loss + 0.1


def test_training_goes_on_after_pruning():
    model = mlp()
    optimizer = mechanize(torch.optim.SGD)(model.parameters(), lr=1.0)
    train(model, optimizer, 100)
    prune.l1_unstructured(model[0], "weight", amount=0.5)  # weight becomes weight_orig * mask
    train(model, optimizer, 100, first=100)
    assert (model[0].weight == 0).float().mean() >= 0.5
    assert full_loss(model) < 0.4


def test_weights_that_are_masked_after_every_step_stay_zero():
    """A mask applied to the weights after every step, bfloat16 with its compensations included."""
    model = mlp(torch.bfloat16)
    mask = torch.rand_like(model[0].weight) < 0.5
    optimizer = mechanize(torch.optim.AdamW)(model.parameters(), lr=1.0)
    for t in range(200):
        train(model, optimizer, 1, first=t)
        with torch.no_grad():
            model[0].weight *= mask
    assert (model[0].weight[~mask] == 0).all()
    assert full_loss(model) < 0.3


def test_a_model_with_weight_normalization_trains():
    model = mlp()
    parametrizations.weight_norm(model[0])
    optimizer = mechanize(torch.optim.AdamW)(model.parameters(), lr=1.0)
    train(model, optimizer, 200)
    assert full_loss(model) < 0.3


@pytest.mark.parametrize("average", ["ema", "mean"])
def test_averaged_model_beside_it(average):
    model = mlp()
    optimizer = mechanize(torch.optim.AdamW)(model.parameters(), lr=1.0)
    options = {"multi_avg_fn": torch.optim.swa_utils.get_ema_multi_avg_fn(0.95)} if average == "ema" else {}
    averaged = torch.optim.swa_utils.AveragedModel(model, **options)
    for t in range(200):
        train(model, optimizer, 1, first=t)
        if average == "ema" or t >= 150:
            averaged.update_parameters(model)
    assert full_loss(averaged) < 0.3
    undisturbed = mlp()
    train(undisturbed, mechanize(torch.optim.AdamW)(undisturbed.parameters(), lr=1.0), 200)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), undisturbed.parameters(), strict=True))


def test_evaluation_with_other_weights_in_between():
    """Swapping averaged weights in for evaluation and back, as many trainers do, leaves no trace."""
    runs = []
    for swap in (False, True):
        model = mlp()
        optimizer = mechanize(torch.optim.AdamW)(model.parameters(), lr=1.0)
        losses = []
        for t in range(40):
            losses += train(model, optimizer, 1, first=t)
            if swap:
                kept = {key: value.clone() for key, value in model.state_dict().items()}
                with torch.no_grad():
                    for p in model.parameters():
                        p.zero_()
                loss_of(model, t)
                model.load_state_dict(kept)
        runs.append(losses)
    assert runs[0] == runs[1]
