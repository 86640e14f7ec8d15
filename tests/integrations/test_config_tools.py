"""Mechanized optimizers in configuration files and in tools that ship code: by name, by signature, by cloudpickle."""

import importlib
import inspect
import pickle
import pydoc
import re
import subprocess
import sys

import cloudpickle
import hydra.utils
import jsonargparse
import pytest
import torch

from helpers import environment_of_tests
from mechanic_pytorch import is_mechanized, mechanize
from problems import mlp, train

STEPS = 30
NAME = "mechanic_pytorch.optim.AdamW"
OPTIONS = {"lr": 1.0, "weight_decay": 0.1, "betas": [0.8, 0.99]}


def losses_of(build):
    """Train with the optimizer that `build` makes of the parameters."""
    model = mlp()
    optimizer = build(model.parameters())
    assert is_mechanized(optimizer)
    assert type(optimizer) is mechanize(torch.optim.AdamW)
    return train(model, optimizer, STEPS)


@pytest.fixture(scope="module")
def expected():
    """What every configured optimizer must do: its options have arrived if its losses are these, to the bit."""
    losses = losses_of(lambda params: mechanize(torch.optim.AdamW)(params, **OPTIONS))
    assert losses != losses_of(lambda params: mechanize(torch.optim.AdamW)(params, lr=1.0))
    return losses


def in_a_new_process(code, *arguments):
    command = [sys.executable, "-W", "error::DeprecationWarning", "-c", code, *map(str, arguments)]
    return subprocess.run(command, check=True, env=environment_of_tests())


# --- names ------------------------------------------------------------------------------------------------------------


def by_importlib(name):
    module, attribute = name.rsplit(".", 1)
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("resolve", [pydoc.locate, by_importlib, hydra.utils.get_class])
def test_the_name_resolves_to_the_mechanized_class(resolve):
    assert resolve(NAME) is mechanize(torch.optim.AdamW)
    assert resolve("mechanic_pytorch.optim.SGD") is mechanize(torch.optim.SGD)


@pytest.mark.parametrize("name", ["mechanic_pytorch.optim.AdamWW", "mechanic_pytorch.optim.lr_scheduler"])
def test_a_wrong_name_is_told_as_wrong(name):
    assert pydoc.locate(name) is None
    with pytest.raises(AttributeError, match=r"torch\.optim has no such optimizer"):
        by_importlib(name)
    with pytest.raises(ImportError, match=re.escape(name)):
        hydra.utils.get_class(name)


def test_the_name_resolves_in_a_new_process():
    code = f"import pydoc; from mechanic_pytorch import Mechanic; assert issubclass(pydoc.locate({NAME!r}), Mechanic)"
    in_a_new_process(code)


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD, torch.optim.LBFGS])
def test_the_signature_is_that_of_the_base(base):
    """Tools learn from it which options there are, their types and their defaults."""
    assert inspect.signature(mechanize(base)) == inspect.signature(base)
    assert inspect.signature(mechanize(base).__init__) == inspect.signature(base.__init__)
    assert inspect.getfullargspec(mechanize(base)) == inspect.getfullargspec(base)


def test_the_class_can_be_found_by_the_name_it_bears():
    """LightningCLI's `add_optimizer_args(SomeClass)` writes that name down and imports it again."""
    cls = mechanize(torch.optim.AdamW)
    assert by_importlib(f"{cls.__module__}.{cls.__qualname__}") is cls


def test_the_name_that_a_class_bears_never_means_another_class():
    """Else a tool that imports by that name would drop the options without a word."""
    for cls in (mechanize(torch.optim.AdamW, s_decay=0.0), mechanize(type("SGD", (torch.optim.AdamW,), {}))):
        try:
            found = by_importlib(f"{cls.__module__}.{cls.__qualname__}")
        except AttributeError:
            continue  # no name is fine
        assert found is cls


# --- hydra ------------------------------------------------------------------------------------------------------------


def test_hydra_instantiates(expected):
    config = {"_target_": NAME, **OPTIONS}
    assert losses_of(lambda params: hydra.utils.instantiate(config, params)) == expected
    assert losses_of(lambda params: hydra.utils.instantiate(config, params=params)) == expected


def test_hydra_makes_a_partial(expected):
    partial = hydra.utils.instantiate({"_target_": NAME, "_partial_": True, **OPTIONS})
    assert losses_of(lambda params: partial(params=params)) == expected


def test_hydra_calls_mechanize_itself():
    """With options of Mechanic's own: `mechanize` is a function of a class, and both have names."""
    config = {
        "_target_": "mechanic_pytorch.mechanize",
        "Base": {"_target_": "hydra.utils.get_class", "path": "torch.optim.AdamW"},
        "s_decay": 0.0,
        "betas": [0.9, 0.999],
    }
    assert hydra.utils.instantiate(config) is mechanize(torch.optim.AdamW, s_decay=0.0, betas=(0.9, 0.999))


# --- jsonargparse, LightningCLI's parser ------------------------------------------------------------------------------


def new_parser():
    """As LightningCLI does: `LightningArgumentParser.add_optimizer_args((Optimizer,))`."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action=jsonargparse.ActionConfigFile)
    kwargs = {"instantiate": False, "fail_untyped": False, "skip": {"params"}}
    parser.add_subclass_arguments((torch.optim.Optimizer,), "optimizer", **kwargs)
    return parser


def instantiate_class(params, init):
    """As LightningCLI does, in `lightning.pytorch.cli.instantiate_class`."""
    module, name = init["class_path"].rsplit(".", 1)
    return getattr(__import__(module, fromlist=[name]), name)(params, **init["init_args"])


YAML = f"""
optimizer:
  class_path: {NAME}
  init_args:
    lr: 1.0
    weight_decay: 0.1
    betas: [0.8, 0.99]
"""


def test_jsonargparse_reads_a_configuration_and_writes_one_that_it_reads(expected, tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(YAML)
    parser = new_parser()
    config = parser.parse_args([f"--config={first}"])
    assert config.optimizer.class_path == NAME
    assert config.optimizer.init_args.lr == 1.0
    assert config.optimizer.init_args.eps == 1e-8  # not in the file: the base's default
    assert losses_of(lambda params: instantiate_class(params, config.optimizer.as_dict())) == expected

    second.write_text(parser.dump(config))
    assert f"class_path: {NAME}" in second.read_text()
    again = new_parser().parse_args([f"--config={second}"])
    assert again.optimizer == config.optimizer
    assert losses_of(lambda params: instantiate_class(params, again.optimizer.as_dict())) == expected


def test_jsonargparse_reads_the_command_line(expected):
    arguments = [f"--optimizer={NAME}", "--optimizer.lr=1.0", "--optimizer.weight_decay=0.1"]
    config = new_parser().parse_args([*arguments, "--optimizer.betas=[0.8, 0.99]"])
    assert losses_of(lambda params: instantiate_class(params, config.optimizer.as_dict())) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([f"--optimizer={NAME}", "--optimizer.learning_rate=1.0"], "'learning_rate' is not accepted"),
        ([f"--optimizer={NAME}", "--optimizer.amsgrad=perhaps"], "perhaps"),
        (["--optimizer=mechanic_pytorch.optim.AdamWW"], "torch.optim has no such optimizer"),
    ],
    ids=["option", "value", "class"],
)
def test_jsonargparse_refuses_mistakes(arguments, message):
    with pytest.raises(jsonargparse.ArgumentError, match=message):
        new_parser().parse_args(arguments)


def test_the_short_name_still_means_the_plain_class():
    """jsonargparse lets `AdamW` stand for the one subclass of that name: ours must not be a second one."""
    code = f"""if True:
        import mechanic_pytorch.optim
        import jsonargparse, torch
        cls = {NAME}
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments((torch.optim.Optimizer,), "optimizer", skip={{"params"}})
        class_path = parser.parse_args(["--optimizer=AdamW"]).optimizer.class_path
        assert class_path == "torch.optim.AdamW", class_path
    """
    in_a_new_process(code)  # other tests make classes of that name here


# --- cloudpickle, by which joblib, Ray and Dask ship code -------------------------------------------------------------

MECHANIZED = {
    "default": mechanize(torch.optim.AdamW),
    "options": mechanize(torch.optim.AdamW, s_decay=0.0, betas=(0.9, 0.999)),
}


@pytest.mark.parametrize("name", MECHANIZED)
def test_cloudpickle_takes_class_and_instance_to_a_new_process(name, tmp_path):
    """The class as the call that makes it, as pickle does: it is the one that `mechanize` returns there."""
    cls = MECHANIZED[name]
    model = mlp()
    optimizer = cls(model.parameters(), lr=1.0)
    train(model, optimizer, STEPS)
    (tmp_path / "there.pickle").write_bytes(cloudpickle.dumps((cls, model, optimizer)))
    code = """if True:
        import pickle, sys, torch
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        with open(sys.argv[1], "rb") as file:
            cls, model, optimizer = pickle.load(file)  # with nothing of ours imported before

        from mechanic_pytorch import Mechanic, is_mechanized, mechanize
        from problems import train
        config = cls.mechanic_config
        assert cls is mechanize(torch.optim.AdamW, s_decay=config.s_decay, betas=config.betas)
        assert pickle.loads(pickle.dumps(cls)) is cls
        assert issubclass(cls, Mechanic) and issubclass(cls, torch.optim.AdamW)
        assert type(optimizer) is cls and is_mechanized(optimizer)
        losses = train(model, optimizer, int(sys.argv[3]), first=int(sys.argv[3]))

        import cloudpickle
        with open(sys.argv[2], "wb") as file:
            cloudpickle.dump((cls, cls.mechanic_config, losses, optimizer.scale), file)
    """
    in_a_new_process(code, tmp_path / "there.pickle", tmp_path / "back.pickle", STEPS)
    cls_back, config, losses, scale = pickle.loads((tmp_path / "back.pickle").read_bytes())
    assert config == cls.mechanic_config
    assert issubclass(cls_back, torch.optim.AdamW)
    assert losses == train(model, optimizer, STEPS, first=STEPS)
    assert torch.equal(scale, optimizer.scale)
