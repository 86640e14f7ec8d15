"""bitsandbytes' optimizers with 8-bit states, on its CPU backend: they train, and resume bit for bit."""

import pickle

import pytest
import torch

from mechanic_pytorch import mechanize
from problems import loss_of, train

bitsandbytes = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
PAGED = ["PagedAdamW8bit", "PagedLion8bit", "PagedAdamW"]
NAMES = ["AdamW8bit", "Adam8bit", "Lion8bit", "SGD8bit", "AdEMAMix8bit", *PAGED]
# On a CPU, paged ones are like the others, and say so.
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def build(name, s_init):
    """Return a network with enough weights (4096) for 8 bits, and its optimizer."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 10))
    options = {"momentum": 0.9} if name == "SGD8bit" else {}
    return model, mechanize(getattr(bitsandbytes.optim, name), s_init=s_init)(model.parameters(), lr=1.0, **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("s_init", ["auto", 1e-8])
def test_they_train_with_states_in_8_bits(name, s_init):
    model, optimizer = build(name, s_init)
    before = loss_of(model, 0).item()
    train(model, optimizer, 100)
    assert loss_of(model, 0).item() < before / 4
    assert 1e-4 < optimizer.learned_lr()[0] < 1
    assert optimizer.state[model[0].weight]["state1"].dtype == (torch.uint8 if "8bit" in name else torch.float32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("s_init", ["auto", 1e-8])
def test_they_resume_bit_for_bit(name, s_init):
    model, optimizer = build(name, s_init)
    train(model, optimizer, 10)
    twin, other = build(name, s_init)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    assert train(twin, other, 10, first=10) == train(model, optimizer, 10, first=10)
    assert torch.equal(other.scale, optimizer.scale)


def test_a_bad_gradient_is_skipped_whole():
    model, optimizer = build("AdamW8bit", "auto")
    train(model, optimizer, 3)
    state = optimizer.state[model[0].weight]
    before = [model[0].weight.detach().clone(), state["state1"].clone(), state["step"]]
    for p in model.parameters():
        p.grad = torch.full_like(p, float("inf"))
    optimizer.step()
    assert torch.equal(before[0], model[0].weight)
    assert torch.equal(before[1], state["state1"])
    assert before[2] == state["step"]
    assert optimizer.skipped_steps == 1
