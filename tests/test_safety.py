"""The tuner throws no good model away (`benchmarks/safety.py` in small), and what should rest does, to the bit."""

import pytest
import torch

from benchmarks import safety
from mechanic_pytorch import mechanize
from problems import IMAGES, LABELS, loss_of, mlp, train

# "auto" against the plain base at the best lr for the very row, two seeds: 0.95 and 2.3 where they were chosen. They
# were 1.85 and 11.7 before the steps were plain ones.
MEAN_FINAL, WORST_SPIKE = 1.1, 2.5
DISTURBED_FACTOR, DISTURBED_MORE = 2.0, 0.05  # final loss: that much of the plain one's, and that much above

# A poor scale is to show in losses here, not in a warning.
pytestmark = pytest.mark.filterwarnings("ignore:Mechanized:UserWarning")

AdamW, SGD = torch.optim.AdamW, torch.optim.SGD


@pytest.fixture(scope="module")
def quick():
    return {row: safety.compare(row) for row in safety.QUICK}


@pytest.mark.xdist_group("safety")
def test_losses_end_near_those_of_the_tuned_base(quick):
    ratios = {safety.text_of(row): run.final for row, run in quick.items()}
    assert sum(ratios.values()) / len(ratios) <= MEAN_FINAL, ratios


@pytest.mark.xdist_group("safety")
def test_losses_do_not_climb_late(quick):
    spikes = {safety.text_of(row): run.spike for row, run in quick.items()}
    assert max(spikes.values()) <= WORST_SPIKE, spikes


@pytest.mark.xdist_group("safety")
def test_schedules_that_reach_zero_stop_every_weight(quick):
    moved = {safety.text_of(row): run.moved for row, run in quick.items()}
    assert set(moved.values()) == {0.0}, moved


@pytest.mark.parametrize("base", safety.DISTURBED, ids=["AdamW", "momentum"])
@pytest.mark.parametrize(
    "disturbance",
    [
        pytest.param("weights clamped to ±0.2", id="clamped"),
        pytest.param("rows of the first layer at unit norm", id="unit rows"),
        pytest.param("rows of both layers at most at unit norm", id="max norm"),
        pytest.param("one noisy batch at 200", id="noisy batch"),
        pytest.param("an average copied back every 50 steps", id="averaged back"),
        pytest.param("noise of norm 10 in every gradient, cosine", id="noise"),
    ],
)
def test_disturbances_do_no_more_harm_than_to_the_tuned_base(disturbance, base):
    def loss(rate):
        return safety.disturbed(disturbance, base, rate, seeds=[0])

    (ours, _), ((plain, _), _) = loss(safety.AUTO), safety.tuned(loss)
    assert ours <= DISTURBED_FACTOR * plain + DISTURBED_MORE


@pytest.mark.parametrize("seed", [1, 3])
def test_a_search_that_noise_has_ended_begins_again(seed):
    """Where each later search raised the floor by less, these seeds ended at 2.0 and 2.1, of 2.3 at the start."""
    assert safety.train_disturbed("noise of norm 10 in every gradient, cosine", "AdamW", seed, safety.AUTO) < 1.2


@pytest.mark.parametrize("base", safety.DISTURBED, ids=["AdamW", "momentum"])
def test_no_spike_at_a_constant_lr(base):
    """On all the data at once, long after there is nothing left to learn: the loss was 4.3 again after 0.003."""
    model, late = mlp(), []
    optimizer = safety.build(base, model.parameters(), safety.AUTO)
    for t in range(400):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(IMAGES), LABELS)
        loss.backward()
        optimizer.step()
        if t >= 150:
            late.append(loss.item())
    assert max(late) < 0.5
    assert late[-1] < 0.01


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize(
    ("base", "schedule", "most"),
    [
        ("AdamW", "linear", 3.0),
        ("AdamW", "warm-up for a half, linear", 3.0),
        ("SGD, momentum", "linear", 5.0),
        ("SGD, momentum", "warm-up for a half, linear", 5.0),
    ],
)
def test_noise_alone_does_not_carry_the_weights_away(base, schedule, most, seed):
    """They were 76 and 1,200 times as long at the end with Adam, 550 and 81,000 times with momentum."""
    assert safety.growth_on_noise(base, schedule, seed, safety.AUTO) < most


@pytest.mark.parametrize("per_group", [False, True])
@pytest.mark.parametrize(
    ("base", "options"),
    [
        (AdamW, {"weight_decay": 0.0}),
        (AdamW, {"weight_decay": 0.1}),
        (AdamW, {"weight_decay": 0.1, "fused": True}),
        (SGD, {}),
    ],
    ids=["AdamW", "AdamW with decay", "AdamW fused", "SGD"],
)
def test_a_group_at_lr_zero_rests_to_the_bit(base, options, per_group):
    model = mlp()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    optimizer = mechanize(base, s_init="auto", per_group=per_group)(groups, lr=1.0, **options)
    train(model, optimizer, 50)
    optimizer.param_groups[0]["lr"] = 0.0
    kept, other = [p.detach().clone() for p in model[0].parameters()], model[2].weight.detach().clone()
    for t in range(50, 100):
        train(model, optimizer, 1, first=t)
        assert all(map(torch.equal, model[0].parameters(), kept)), f"moved in step {t}"
    assert not torch.equal(model[2].weight, other)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rows", [slice(0, 8), slice(None)], ids=["some rows", "all rows"])
def test_rows_without_gradient_rest_to_the_bit_under_sgd(rows, fused):
    model = mlp()
    optimizer = mechanize(SGD, s_init="auto")(model.parameters(), lr=1.0, fused=fused)
    train(model, optimizer, 50)
    kept, other = (layer.weight.detach().clone() for layer in (model[0], model[2]))
    for t in range(50, 100):
        optimizer.zero_grad()
        loss_of(model, t).backward()
        model[0].weight.grad[rows] = 0.0
        optimizer.step()
        assert torch.equal(model[0].weight[rows], kept[rows]), f"moved in step {t}"
    assert not torch.equal(model[2].weight, other)


@pytest.mark.parametrize("factor", [0.5, 0.6])
@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
def test_an_lr_that_falls_below_all_rounding(base, factor):
    """It ended no search, and the scale made up for it: until no checkpoint loaded, and then until it was infinite."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 20, generator=generator)
    y = torch.sin(x @ torch.randn(20, 1, generator=generator)) + 0.1 * torch.randn(512, 1, generator=generator)
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    optimizer = mechanize(base)(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, factor)
    for t in range(160):
        i = torch.randint(512, (64,), generator=generator)
        optimizer.zero_grad()
        (model(x[i]) - y[i]).square().mean().backward()
        optimizer.step()
        schedule.step()
        if t in (90, 120, 150):
            optimizer.load_state_dict(optimizer.state_dict())
    assert torch.isfinite(torch.nn.utils.parameters_to_vector(model.parameters())).all()
