"""`MechanicPlugin`, called as axolotl calls plugins, with the real Hugging Face Trainer that axolotl's is derived from.

axolotl itself is not here. What is imitated of it was read in its repository at commit 067b021c8, of July 2026;
`docs/trainers.md` says what was run of axolotl itself.
"""

import importlib
import subprocess
import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from mechanic_pytorch import mechanize

NAME = "mechanic_pytorch.integrations.axolotl.MechanicPlugin"
CONFIG = {"optimizer": "adamw_torch", "learning_rate": 1e-5, "weight_decay": 0.1, "adam_beta2": 0.95}
OPTIONS = {"mechanic_max_lr": 0.5, "mechanic_betas": [0.9, 0.99]}
ROW = torch.arange(8) % 16


class AxolotlTrainer(Trainer):
    """Builds three groups, as axolotl's does when embeddings have an lr of their own."""

    embedding_lr = None

    def create_optimizer(self, model=None):
        if self.embedding_lr is None and self.optimizer_cls_and_kwargs is None:
            return super().create_optimizer(model)
        cls, arguments = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)
        of_kind = {True: [], False: []}
        for name, p in self.model.named_parameters():
            of_kind["wte" in name].append(p)
        lr = self.embedding_lr or arguments["lr"]
        groups = [
            {"params": of_kind[False], "weight_decay": self.args.weight_decay, "lr": arguments["lr"]},
            {"params": of_kind[True], "weight_decay": 0.0, "lr": lr},
        ]
        self.optimizer = cls(groups, **arguments)
        return self.optimizer


def trainer_of(directory, config, plugin=None, given=None, kind=AxolotlTrainer):
    """Go through the stations at which axolotl calls a plugin, in its order."""
    if plugin is not None:
        plugin.register(config)
        assert plugin.get_input_args() is None
    validated = {key: value for key, value in config.items() if not key.startswith("mechanic_")}  # by pydantic, there
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    arguments = TrainingArguments(
        directory,
        optim=validated["optimizer"],
        learning_rate=validated["learning_rate"],
        weight_decay=validated["weight_decay"],
        adam_beta2=validated["adam_beta2"],
        lr_scheduler_type="cosine",
        max_steps=30,
        logging_steps=10,
        use_cpu=True,
        per_device_train_batch_size=4,
        save_strategy="no",
        report_to=[],
    )
    callbacks = plugin.add_callbacks_pre_trainer(cfg=validated, model=model) if plugin is not None else []
    data = [{"input_ids": ROW, "labels": ROW}] * 16
    run = kind(model, arguments, train_dataset=data, callbacks=callbacks, optimizer_cls_and_kwargs=given)
    if plugin is not None:
        plugin.post_trainer_create(validated, run)
    return run


@pytest.fixture
def plugin(monkeypatch):
    """The plugin as axolotl loads it: by name, and with axolotl's base class."""
    base = type(sys)("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {"get_input_args": lambda self: None})
    monkeypatch.setitem(sys.modules, "axolotl", type(sys)("axolotl"))
    monkeypatch.setitem(sys.modules, "axolotl.integrations", type(sys)("axolotl.integrations"))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    module, _, name = NAME.rpartition(".")
    monkeypatch.delitem(sys.modules, module, raising=False)
    made = getattr(importlib.import_module(module), name)()
    assert isinstance(made, base.BasePlugin)
    yield made
    sys.modules.pop(module)  # the next import has the real one, or none


def groups_of(optimizer):
    """Return what the trainer had to say about the groups: whose weights, and its own options."""
    ours = ("params", "initial_lr")
    return [
        ([p.shape for p in group["params"]], {k: v for k, v in group.items() if k not in ours and "mechanic" not in k})
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("embedding_lr", [None, 2e-5], ids=["groups of transformers", "groups of axolotl"])
def test_the_trainer_keeps_its_groups_and_the_base_of_the_configuration(plugin, tmp_path, embedding_lr):
    runs = trainer_of(tmp_path, CONFIG), trainer_of(tmp_path, {**CONFIG, **OPTIONS}, plugin)
    for run in runs:
        run.embedding_lr = embedding_lr
    plain, ours = (run.create_optimizer() for run in runs)
    assert type(plain) is torch.optim.AdamW
    assert type(ours) is mechanize(torch.optim.AdamW, s_init="auto", max_lr=0.5, betas=(0.9, 0.99))
    assert groups_of(ours) == groups_of(plain)
    assert len(ours.param_groups) == 2
    assert [group["weight_decay"] for group in ours.param_groups] == [0.1, 0.0]
    assert ours.param_groups[1]["lr"] == (embedding_lr or 1e-5)
    assert ours.param_groups[0]["betas"] == (0.9, 0.95)


def test_it_trains_as_the_trainer_does_that_is_given_the_class(plugin, tmp_path, capsys):
    ours = trainer_of(tmp_path, {**CONFIG, **OPTIONS}, plugin)
    ours.train()
    cls = mechanize(torch.optim.AdamW, s_init="auto", max_lr=0.5, betas=(0.9, 0.99))
    given = cls, {"lr": 1e-5, "betas": (0.9, 0.95), "eps": 1e-8}
    expected = trainer_of(tmp_path, CONFIG, given=given, kind=Trainer)
    expected.train()
    for (name, p), q in zip(ours.model.named_parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    logged = [row for row in ours.state.log_history if "learning_rate" in row]
    assert len(logged) == 3
    assert all(row["effective_lr"] > row["learning_rate"] for row in logged)
    assert capsys.readouterr().out.count("'effective_lr'") == 3, "our callback comes before what prints"


def test_an_optimizer_that_axolotl_names_itself_is_mechanized(plugin, tmp_path):
    """For its own names it gives the trainer class and arguments."""
    given = torch.optim.NAdam, {"lr": 1e-5, "weight_decay": 0.1}
    optimizer = trainer_of(tmp_path, CONFIG, plugin, given).create_optimizer()
    assert type(optimizer) is mechanize(torch.optim.NAdam, s_init="auto")
    assert given[1] == {"lr": 1e-5, "weight_decay": 0.1}, "what axolotl holds is not changed"


def test_what_is_no_class_is_refused(plugin, tmp_path):
    def factory(model, **arguments):
        """As for "muon"."""

    with pytest.raises(TypeError, match=r"mechanize: Base must be a subclass of torch.optim.Optimizer. Got <function"):
        trainer_of(tmp_path, CONFIG, plugin, (factory, {}))


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"mechanic_maxlr": 1}, TypeError, "'mechanic_maxlr' is no option of mechanize. Remedy: pass one of"),
        (
            {"mechanic_max_lr": "1e-2"},
            TypeError,
            "max_lr must be None or a finite number > 0. Got '1e-2'",
        ),  # 1e-2 in YAML
    ],
    ids=["name", "value"],
)
def test_a_mistake_is_refused_before_a_model_is_loaded(plugin, option, error, message):
    with pytest.raises(error, match=message):
        plugin.register({**CONFIG, **option})


def test_the_option_that_is_not_given_is_auto(plugin, tmp_path):
    optimizer = trainer_of(tmp_path, {**CONFIG, "mechanic_s_init": 1e-6}, plugin).create_optimizer()
    assert type(optimizer) is mechanize(torch.optim.AdamW, s_init=1e-6)
    optimizer = trainer_of(tmp_path, CONFIG, plugin).create_optimizer()
    assert type(optimizer) is mechanize(torch.optim.AdamW, s_init="auto")


def test_the_module_can_be_imported_without_axolotl():
    """For its documentation; in a new process."""
    code = "import sys; sys.modules['axolotl'] = None\nimport mechanic_pytorch.integrations.axolotl"
    subprocess.run([sys.executable, "-c", code], check=True)
