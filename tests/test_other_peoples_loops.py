"""What other people's training loops do to an optimizer, as public reports tell, works with a mechanized one."""

import copy
from collections import defaultdict
from functools import partial
from statistics import fmean, median

import pytest
import torch
from torch.nn import functional as F
from torch.optim import SGD, AdamW, lr_scheduler
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, OneCycleLR
from torch.optim.swa_utils import SWALR

import problems
from mechanic_pytorch import is_mechanized, mechanize
from problems import full_loss, layers, loss_of, mlp, train

BASES = {"AdamW": (AdamW, {}), "AdamW_fused": (AdamW, {"fused": True}), "SGD": (SGD, {"momentum": 0.9})}
bases = pytest.mark.parametrize("name", BASES)
starts = pytest.mark.parametrize("start", ["auto", 1e-8])


class Plain(float):
    """The lr of a plain base, in the place of `s_init`."""


def third_party(name):
    return getattr(pytest.importorskip("pytorch_optimizer", reason="users need not have it"), name)


def optimizer_of(params, name, start, **mechanic_options):
    base, options = BASES.get(name) or (third_party(name), {})
    if isinstance(start, Plain):
        return base(params, lr=start, **options)
    return mechanize(base, s_init=start, **mechanic_options)(params, lr=1.0, **options)


def groups_of(model):
    return [{"params": params} for params in layers(model)]


@starts
@bases
@pytest.mark.parametrize(("trained", "dtype", "per_group"), [(0, "float32", False), (20, "bfloat16", True)])
def test_steps_that_are_taken_back_leave_no_trace(trained, dtype, per_group, name, start):
    """Range tests: davidtvs/pytorch-lr-finder #1 and #11, fastai/fastai #3013, Lightning-AI/pytorch-lightning #3340.

    As `LRFinder` makes them: the states are copied, lr rises from 1e-5 to 10, and the copies are loaded. Likewise back
    to the best checkpoint: awslabs/sockeye #164, paiml/entrenar #292.
    """
    model, runs = mlp(getattr(torch, dtype)), []
    optimizer = optimizer_of(groups_of(model), name, start, per_group=per_group)
    train(model, optimizer, trained)
    kept = copy.deepcopy([model.state_dict(), optimizer.state_dict()])

    def take_back():
        model.load_state_dict(kept[0])
        optimizer.load_state_dict(copy.deepcopy(kept[1]))  # torch shares the tensors of what it loads

    for way in ("undisturbed", "rolled back", "tested"):
        if way == "tested":
            for group in optimizer.param_groups:
                group["lr"] = 1e-5
            train(model, optimizer, 20, first=500, scheduler=lr_scheduler.ExponentialLR(optimizer, 2.0))
        if way != "undisturbed":
            take_back()
        runs.append((train(model, optimizer, 12, first=trained), full_loss(model), optimizer.effective_lr()))
    assert runs[0] == runs[1] == runs[2]


def as_horovod(optimizer):
    """Horovod's way: the methods of a wrapper in a class made from the optimizer's own, built from its groups."""
    methods = {
        "__init__": lambda self, params: super(self.__class__, self).__init__(params),
        "step": lambda self, closure=None: super(self.__class__, self).step(closure),
    }
    return type(optimizer.__class__.__name__, (optimizer.__class__,), methods)(optimizer.param_groups)


def initialized_again(optimizer):
    optimizer.__init__(optimizer.param_groups)
    return optimizer


def group_optimizers(optimizer):
    """TorchRL's way: one optimizer from the groups of several."""
    parts = [type(optimizer)([group]) for group in optimizer.param_groups]
    return type(optimizer)([group for part in parts for group in part.param_groups])


@starts
@bases
@pytest.mark.parametrize("rebuilt", [as_horovod, initialized_again, group_optimizers])
def test_an_optimizer_rebuilt_from_its_groups_is_a_new_one(rebuilt, name, start):
    """horovod/horovod #1284 and #1354, determined-ai/determined #5162, pytorch/rl #2577."""
    model = mlp()
    optimizer = optimizer_of(groups_of(model), name, start)
    train(model, optimizer, 20)
    twin, optimizer = copy.deepcopy(model), rebuilt(optimizer)
    assert is_mechanized(optimizer)
    assert train(model, optimizer, 20) == train(twin, optimizer_of(groups_of(twin), name, start), 20)
    assert optimizer.effective_lr() == [float(optimizer.scale)] * 2 != [0.0, 0.0]


@bases
def test_older_weights_written_through_data(name):
    """radixark/miles #2572: the state is kept, and compensations and sums do not bring the newer weights back."""
    model = mlp(torch.bfloat16)
    optimizer, weights = optimizer_of(model.parameters(), name, "auto"), []
    for t in (0, 40):
        train(model, optimizer, 40, first=t)
        weights.append([p.detach().clone() for p in model.parameters()])
    for p, older in zip(model.parameters(), weights[0], strict=True):
        p.data.copy_(older)
    train(model, optimizer, 1, first=80)
    for p, older, newer in zip(model.parameters(), *weights, strict=True):
        assert 0 < torch.dist(p, older) < 0.5 * torch.dist(newer, older)


@starts
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_channels_last_in_the_middle(name, start):
    """pytorch/pytorch #106951 and #126585, clovaai/AdamP #17: state of the old layout meets weights of the new one."""
    runs = []
    for then in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        parts = torch.nn.Unflatten(1, (1, 8, 8)), torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 8, 3)
        model = torch.nn.Sequential(*parts, torch.nn.Flatten(), torch.nn.Linear(128, 10)).double()
        optimizer = optimizer_of(model.parameters(), name, start)
        for t, memory_format in enumerate((torch.contiguous_format, then, torch.contiguous_format)):
            model.to(memory_format=memory_format)
            assert model[3].weight.is_contiguous(memory_format=memory_format)
            train(model, optimizer, 15, first=15 * t)
        runs.append([*model.parameters(), optimizer.scale])
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-12)


# --- runs that end near those of the plain base -----------------------------------------------------------------------


def ends_at(start, name, steps=200, wrap=lambda o: o, schedule=lambda o: None, after=lambda t, optimizer: None, seed=0):
    """Train, calling `after` with each step; return the loss over all images."""
    model = mlp(seed=seed)
    optimizer = optimizer_of(model.parameters(), name, start)
    wrapped, scheduler = wrap(optimizer), schedule(optimizer)
    for t in range(steps):
        train(model, wrapped, 1, first=t, scheduler=scheduler)
        after(t, optimizer)
    return full_loss(model)


def in_the_mean(start, name):
    """The mean of three runs: single ones of Ranger have 0.06 to 0.16 in six seeds, the plain ones 0.05 to 0.06."""
    return fmean(ends_at(start, name, seed=seed) for seed in range(3))


def forget(t, optimizer):
    """What is kept is the scale."""
    before = float(optimizer.scale) if is_mechanized(optimizer) else None
    if t == 99:
        optimizer.state = defaultdict(dict)
        optimizer.param_groups[0]["params"] = list(optimizer.param_groups[0]["params"])
    elif t == 149:
        optimizer.state.clear()
    assert before is None or optimizer.scale == before


def pruned(start, name):
    """Of all states 1 % is kept, twice; an update is then a hundred times as long as ever. The median of three runs."""

    def prune(t, optimizer, seed):
        generator = torch.Generator().manual_seed(1000 * seed + t)
        for value in [value for state in optimizer.state.values() for value in state.values()]:
            if t in (99, 199) and value.dim():
                value.mul_(torch.rand(value.shape, generator=generator) > 0.99)

    return median(ends_at(start, name, 300, after=partial(prune, seed=seed)) for seed in range(3))


def halfway_back(t, optimizer):
    """Lookahead: every fifth step, halfway to where the weights were. The copy lies in the base's state."""
    for p in optimizer.param_groups[0]["params"]:
        slow = optimizer.state[p].setdefault("slow_buffer", p.detach().clone())
        if t % 5 == 4:
            p.data.copy_(slow.lerp_(p.data, 0.5))


def noisy_labels(start, name):
    """Lr is divided by ten twice, as a plateau scheduler does; the effective lr follows."""
    generator, rates = torch.Generator().manual_seed(0), {}
    is_noisy = torch.rand(problems.LABELS.shape, generator=generator) < 0.2
    noise = torch.randint(10, problems.LABELS.shape, generator=generator)

    def note(t, optimizer):
        rates[t] = optimizer.effective_lr()[0] if is_mechanized(optimizer) else optimizer.param_groups[0]["lr"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(problems, "LABELS", torch.where(is_noisy, noise, problems.LABELS))
        loss = ends_at(start, name, 250, schedule=lambda o: lr_scheduler.MultiStepLR(o, [150, 200], 0.1), after=note)
    assert rates[248] < 0.03 * rates[148]
    return loss


def federated(inner, outer, rounds=20, steps=20):
    """Two workers from common weights, whose optimizers are kept; the outer one steps along the mean of their ways."""
    model, workers = mlp(), [mlp(), mlp()]
    optimizers, outer = [inner(worker.parameters()) for worker in workers], outer(model.parameters())
    for t in range(rounds):
        for i, worker in enumerate(workers):
            worker.load_state_dict(model.state_dict())
            train(worker, optimizers[i], steps, first=10_000 * i + steps * t)
        for p, *theirs in zip(*(m.parameters() for m in (model, *workers)), strict=True):
            p.grad = p.detach() - sum(theirs).detach() / len(theirs)
        outer.step()
    return full_loss(model)


def inner(start, name, **outer):
    return federated(lambda p: optimizer_of(p, name, start), lambda p: SGD(p, **outer))


def outer(start, name):
    return federated(lambda p: SGD(p, lr=0.03), lambda p: optimizer_of(p, name, start), rounds=40, steps=5)


def textual_inversion(start, name):
    """One new row of a table is learned; all others move, too, and are put back after each step."""
    generator = torch.Generator().manual_seed(0)
    table = torch.nn.Embedding.from_pretrained(torch.randn(30, 16, generator=generator), freeze=False)
    encoder, wanted = torch.randn(16, 16, generator=generator) / 4, torch.randn(16, generator=generator)
    optimizer, kept = optimizer_of(table.parameters(), name, start), table.weight.detach().clone()
    for _ in range(200):
        others = table(torch.randint(1, 30, (32, 3), generator=generator)).sum(1)
        optimizer.zero_grad()
        F.mse_loss(*(torch.tanh((others + row) @ encoder) for row in (table.weight[0], wanted))).backward()
        optimizer.step()
        table.weight.data[1:] = kept[1:]
    return F.mse_loss(table.weight[0], wanted).item()


def two_heads(start, name, times=None):
    """Two heads on one backbone, each with its optimizer; or both with one, and the second loss is much larger."""
    models = model, other = mlp(), mlp(seed=1)
    other[0] = model[0]
    alone, together = [m.parameters() for m in models], [[*model.parameters(), *other[2].parameters()]]
    optimizers = [optimizer_of(params, name, start) for params in (together if times else alone)]
    for t in range(300):
        optimizer = optimizers[t % len(optimizers)]
        optimizer.zero_grad()
        ((times or 1) ** (t % 2) * loss_of(models[t % 2], t)).backward()
        optimizer.step()
    return full_loss(model) + full_loss(other)


def in_turns(start, name, then="alone", turns=12, steps=50):
    """Three layers are trained in turns, one at a time; or each with all those before it."""
    torch.manual_seed(0)
    linear = [torch.nn.Linear(64, size) for size in (64, 64, 10)]
    model = torch.nn.Sequential(linear[0], torch.nn.ReLU(), linear[1], torch.nn.ReLU(), linear[2])
    optimizer = optimizer_of(model.parameters(), name, start)
    for turn in range(turns):
        for i, layer in enumerate(linear):
            layer.requires_grad_(i == turn % 3 or (then == "too" and i < turn))
        train(model, optimizer, steps, first=steps * turn)
    return full_loss(model)


RUNS = {  # the factor allowed, the base and a good lr for the plain one, what is run, and options
    # ContinualAI/avalanche #725 gives a new dict of states for each task, pytorch/pytorch #37410 clears the old one.
    "forget": (2, "AdamW_fused", 0.03, ends_at, {"after": forget}),
    "forget_SGD": (2, "SGD", 0.2, ends_at, {"after": forget}),
    # axolotl-ai-cloud/axolotl #1414, Guitaricet/relora #10. The plain base spikes, too.
    "prune": (4, "AdamW", 0.01, pruned, {}),
    # mgrankin/over9000 #8, wandb/senpai #432, lessw2020/Ranger-Deep-Learning-Optimizer #8 (with Lookahead inside).
    "Lookahead": (2, "AdamW", 0.06, ends_at, {"after": halfway_back}),
    "Lookahead_SGD": (2, "SGD", 0.4, ends_at, {"after": halfway_back}),
    "Lookahead_around": (2, "AdamW", 0.06, ends_at, {"wrap": lambda o: third_party("Lookahead")(o)}),
    "Ranger": (2, "Ranger", 0.1, in_the_mean, {}),
    # kohya-ss/sd-scripts #545, Lightning-AI/pytorch-lightning #11822 and #15916.
    "WarmRestarts": (2, "AdamW", 0.06, ends_at, {"schedule": lambda o: CosineAnnealingWarmRestarts(o, 30, 2)}),
    "OneCycleLR": (2, "AdamW", 0.06, ends_at, {"schedule": lambda o: OneCycleLR(o, o.param_groups[0]["lr"], 201)}),
    "SWALR": (2, "SGD", 0.2, ends_at, {"schedule": lambda o: SWALR(o, 0.2 * o.param_groups[0]["lr"], 100)}),
    # zylo117/Yet-Another-EfficientDet-Pytorch #309 and #328.
    "noisy_labels": (1.2, "SGD", 0.2, noisy_labels, {}),
    # meta-pytorch/torchft #76, TL-System/plato #412, LabeliaLabs/distributed-learning-contributivity #307.
    "FedAvg": (2, "AdamW", 0.03, inner, {"lr": 1.0}),
    "DiLoCo": (4, "AdamW", 0.01, inner, {"lr": 0.7, "momentum": 0.9, "nesterov": True}),
    "outer": (2, "SGD", 1.0, outer, {}),
    # huggingface/diffusers #855, WisconsinAIVision/YoLLaVA #2.
    "textual_inversion": (2, "AdamW", 0.03, textual_inversion, {}),
    # junyanz/pytorch-CycleGAN-and-pix2pix #177 and #538, wiseodd #15.
    "two_heads": (2, "AdamW", 0.03, two_heads, {}),
    "two_heads_of_one": (2, "AdamW", 0.03, two_heads, {"times": 100}),
    "two_heads_of_one_SGD": (3, "SGD", 0.003, two_heads, {"times": 100}),
    # OptimalScale/LMFlow #726; and what is frozen at first.
    "layers_in_turns": (4, "AdamW", 0.01, in_turns, {}),
    "layers_in_turns_SGD": (3, "SGD", 0.1, in_turns, {}),
    "layers_once": (1, "AdamW", 0.01, in_turns, {"turns": 3}),
    "layers_once_SGD": (1, "SGD", 0.03, in_turns, {"turns": 3}),
    "layers_added": (2, "AdamW", 0.03, in_turns, {"turns": 3, "then": "too"}),
    "layers_added_SGD": (2, "SGD", 0.03, in_turns, {"turns": 3, "then": "too"}),
}


@pytest.mark.parametrize("what", RUNS)
def test_ends_near_the_plain_base(what):
    factor, name, lr, run, options = RUNS[what]
    ours, plain = (run(start, name, **options) for start in ("auto", Plain(lr)))
    assert ours < factor * plain, f"{ours:.4f}, plain {plain:.4f}"
