"""Trainers whose optimizers stand in a closed list, under `patched`, as `mechanic run` has it.

Each is imitated in the few lines by which it builds, steps and saves its optimizer. They were read in its repository;
`docs/trainers.md` has the commits.
"""

import copy

import pytest
import pytorch_optimizer
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from helpers import assert_identical
from mechanic_pytorch import is_mechanized, mechanize, patched
from problems import loss_of, mlp, train

STEPS = 20

# --- torchtitan -------------------------------------------------------------------------------------------------------

BY_NAME = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}  # made before `patched` begins


def torchtitan(model):
    """Return its optimizer: groups by patterns of names, which the groups also hold."""
    options = {"fused": True, "foreach": False, "lr": 8e-4, "betas": (0.9, 0.95), "eps": 1e-8}
    groups = []
    for kind, decay in (("bias", 0.0), ("weight", 0.1)):
        names, params = zip(*[(name, p) for name, p in model.named_parameters() if kind in name], strict=True)
        groups.append({"params": list(params), "param_names": list(names), "weight_decay": decay, **options})
    return BY_NAME["AdamW"](groups)


def make_state(optimizer):
    """A step with zero gradients at lr 0, so that there is state to save, or to load into."""
    if optimizer.state:
        return
    lrs = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step(closure=None)
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)


def flat_state(optimizer):
    """A checkpoint with names for numbers: of each parameter its state, and the options of its group."""
    make_state(optimizer)
    saved, flat = optimizer.state_dict(), {}
    for group in saved["param_groups"]:
        for i, name in zip(group["params"], group["param_names"], strict=True):
            flat |= {f"state.{name}.{key}": value for key, value in saved["state"][i].items()}
            flat |= {f"group.{name}.{key}": group[key] for key in group.keys() - {"params", "param_names"}}
    return flat


def load_flat_state(optimizer, flat):
    """Only what the optimizer itself has by now is asked of the checkpoint."""
    make_state(optimizer)
    state, groups, i = {}, [], 0
    for group in optimizer.param_groups:
        first = group["param_names"][0]
        options = {key: flat[f"group.{first}.{key}"] for key in group.keys() - {"params", "param_names"}}
        groups.append({"params": [], **options})
        for name, p in zip(group["param_names"], group["params"], strict=True):
            groups[-1]["params"].append(i)
            state[i] = {key: flat[f"state.{name}.{key}"] for key in optimizer.state[p]}
            i += 1
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def test_torchtitan_trains_and_resumes_to_the_bit():
    with patched() as built:
        model = mlp()
        optimizer = torchtitan(model)
        train(model, optimizer, STEPS)
        weights, flat = copy.deepcopy((model.state_dict(), flat_state(optimizer)))
        losses = train(model, optimizer, STEPS, first=STEPS)

        again = mlp(seed=1)
        resumed = torchtitan(again)
        again.load_state_dict(weights)
        load_flat_state(resumed, flat)
        assert train(again, resumed, STEPS, first=STEPS) == losses
    assert [(one.base, one.steps) for one in built] == [(torch.optim.AdamW, 2 * STEPS)] * 2
    assert_identical(resumed.state_dict(), optimizer.state_dict())
    assert optimizer.effective_lr()[0] > 8e-4


def test_a_container_that_calls_mechanized_optimizers_is_reported_as_such():
    """That of torchtitan is an optimizer, too, and holds all parameters."""

    class OptimizersContainer(torch.optim.Optimizer):
        def __init__(self, optimizers):
            self.optimizers = optimizers
            super().__init__([p for each in optimizers for group in each.param_groups for p in group["params"]], {})

        def step(self, closure=None):
            for each in self.optimizers:
                each.step()

    model = mlp()
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) is wanted] for wanted in (True, False))
    with patched() as built:
        parts = [torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(vectors, lr=1e-3)]
        losses = train(model, OptimizersContainer(parts), 60)
    assert losses[-1] < losses[0] / 2
    assert [one.is_mechanized for one in built] == [True, True, False]
    assert built[2].reason == "its parameters belong to mechanized optimizers: Muon, AdamW"
    with patched(exclude=["Muon"]) as built:
        parts = [torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(vectors, lr=1e-3)]
        other = OptimizersContainer(parts)
    assert "it is not one of torch.optim; include" in built[2].reason, "part of it is plain"
    assert not is_mechanized(other)


# --- LLaMA-Factory ----------------------------------------------------------------------------------------------------


def test_llama_factory(tmp_path):
    """Its trainers derive from the Hugging Face Trainer, and build what is in no list of theirs as that one does."""

    def one_of_its_own():
        """Galore, apollo, loraplus, badam, adam_mini or muon, if the configuration asks for it."""

    class LlamaFactoryTrainer(Trainer):
        def create_optimizer(self, *args, **kwargs):
            if self.optimizer is None:
                self.optimizer = one_of_its_own()
            return super().create_optimizer(*args, **kwargs)

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    row = torch.arange(8) % 16
    arguments = TrainingArguments(tmp_path, use_cpu=True, max_steps=STEPS, save_strategy="no", disable_tqdm=True)
    with patched() as built:
        trainer = LlamaFactoryTrainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row}] * 16)
        trainer.train()
    (one,) = built
    assert (one.base, one.steps, one.script_lrs) == (torch.optim.AdamW, STEPS, [5e-5, 5e-5])
    assert one.learned_lr()[0] > 5e-5


# --- diffusion-pipe ---------------------------------------------------------------------------------------------------


def diffusion_pipe(model, kind, **options):
    """Return its optimizer: torch's or pytorch_optimizer's by name, in two groups, because vectors are not decayed."""
    torchs = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    cls = torchs[kind.lower()] if kind.lower() in torchs else getattr(pytorch_optimizer, kind)
    vectors, others = ([p for p in model.parameters() if (p.ndim == 1) is wanted] for wanted in (True, False))
    return cls([{"params": others}, {"params": vectors, "weight_decay": 0}], **options)


@pytest.mark.parametrize(("kind", "include"), [("adamw", ()), ("sgd", ()), ("Lion", ["pytorch_optimizer.Lion"])])
def test_diffusion_pipe(kind, include):
    with patched(include=include) as built:
        model = mlp()
        optimizer = diffusion_pipe(model, kind, lr=2e-5, weight_decay=0.01)
        losses = train(model, optimizer, 60)
    (one,) = built
    assert one.is_mechanized
    assert one.steps == 60
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0]
    assert losses[-1] < losses[0] / 2


def test_a_name_of_pytorch_optimizer_is_left_plain_unless_it_is_included():
    with patched() as built:
        assert not is_mechanized(diffusion_pipe(mlp(), "Lion", lr=2e-5))
    assert "include pytorch_optimizer" in built[0].reason


# --- lists of classes: SimpleTuner, ai-toolkit, OneTrainer ------------------------------------------------------------


def test_a_class_in_a_list_is_mechanized_as_it_is_built():
    choices = {"torch-adamw": {"default_settings": {"weight_decay": 1e-2}, "class": torch.optim.AdamW}}
    chosen = choices["torch-adamw"]
    model = mlp()
    with patched() as built:
        optimizer = chosen["class"](model.parameters(), lr=1e-4, **chosen["default_settings"])
    assert type(optimizer) is mechanize(torch.optim.AdamW, s_init="auto")
    assert len(built) == 1


def test_a_step_that_a_trainer_puts_in_place_of_ours_is_noticed():
    """OneTrainer does so for stochastic rounding, and for its fused backward pass."""
    model = mlp()
    with patched() as built:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        optimizer.step = lambda: None
        loss_of(model, 0).backward()
        optimizer.step()
    assert built[0].steps == 0
