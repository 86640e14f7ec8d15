"""Mechanized optimizers in configuration files and in tools that ship code: by name, by signature, by cloudpickle."""

import ast
import dataclasses
import importlib
import inspect
import json
import pickle
import pydoc
import re
import sys
import textwrap

import cloudpickle
import hydra.utils
import jsonargparse
import lightning.fabric
import lightning.pytorch
import omegaconf
import pytest
import pytorch_optimizer
import torch
from lightning.pytorch.cli import LightningCLI

import mechanic_pytorch.optim
from mechanic_pytorch import is_mechanized, mechanize
from mechanic_pytorch.telemetry import read_out
from problems import loss_of, mlp, train

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


@pytest.fixture
def in_a_new_process(forks, tmp_path):
    """Return a function that runs code which imports what tests import."""

    def run(code, *arguments):
        script = tmp_path / "code.py"
        script.write_text(f"import sys; sys.path[:] = {sys.path}\n{textwrap.dedent(code)}", encoding="utf-8")
        done = forks.run([script, *arguments], tmp_path)
        assert done.returncode == 0, done.stderr

    return run


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


def test_the_name_resolves_in_a_new_process(in_a_new_process):
    code = f"import pydoc; from mechanic_pytorch import Mechanic; assert issubclass(pydoc.locate({NAME!r}), Mechanic)"
    in_a_new_process(code)


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD, torch.optim.LBFGS])
def test_the_signature_is_that_of_the_base_and_the_options(base):
    """Tools learn from it which options there are, their types and their defaults."""
    for ours, theirs in [(mechanize(base), base), (mechanize(base).__init__, base.__init__)]:
        parameters = list(inspect.signature(ours).parameters.values())
        count = len(inspect.signature(theirs).parameters)
        of_base = inspect.signature(theirs).parameters.values()
        assert parameters[:count] == [p.replace(default=1.0) if p.name == "lr" else p for p in of_base]
        assert [(p.name, p.default) for p in parameters[count:]] == [
            (f"mechanic_{option.name}", option.default)
            for option in dataclasses.fields(mechanize(base).mechanic_config)
        ]
    assert inspect.signature(mechanize(base, max_lr=0.1)).parameters["mechanic_max_lr"].default == 0.1


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


# --- options of mechanize, with those of the base ---------------------------------------------------------------------

FLAT = {"mechanic_s_init": "auto", "mechanic_betas": [0.9, 0.99], "mechanic_max_lr": 0.01, "mechanic_per_group": True}
THE_CLASS = mechanize(torch.optim.AdamW, s_init="auto", betas=(0.9, 0.99), max_lr=0.01, per_group=True)


def test_the_object_is_of_the_class_that_mechanize_makes():
    params = list(mlp().parameters())
    optimizer = mechanize(torch.optim.AdamW)(params, **OPTIONS, **FLAT)
    assert type(optimizer) is THE_CLASS
    assert list(optimizer.param_groups[0]["betas"]) == OPTIONS["betas"], "Adam's own"
    assert type(pickle.loads(pickle.dumps(optimizer))) is THE_CLASS
    again = mechanize(torch.optim.AdamW, max_lr=0.01, eps=1e-6)(params, lr=1.0, mechanic_eps=1e-8, mechanic_s_decay=0)
    assert type(again) is mechanize(torch.optim.AdamW, max_lr=0.01, s_decay=0.0), "what is not given is the class's"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mechanic_max_lr": -1}, ValueError, r"mechanize: max_lr must be None or a finite number > 0\. Got -1"),
        (
            {"mechanic_maxlr": 1},
            TypeError,
            r"'mechanic_maxlr' is no option of mechanize\. Remedy: pass one of .*_max_lr",
        ),
        ({"s_init": "auto"}, TypeError, r"pass it as mechanic_s_init, or to mechanize\(AdamW, s_init='auto'\)"),
        ({"learning_rate": 1}, TypeError, "unexpected keyword argument 'learning_rate'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_mistakes_are_refused_with_the_place_of_the_option(options, error, message):
    with pytest.raises(error, match=message):
        mechanize(torch.optim.AdamW)([torch.zeros(1, requires_grad=True)], lr=1.0, **options)


def test_a_class_that_is_derived_says_where_its_options_belong():
    class Derived(mechanize(torch.optim.AdamW)):
        pass

    params = [torch.zeros(1, requires_grad=True)]
    assert type(Derived(params, lr=1.0)) is Derived
    with pytest.raises(TypeError, match=r"Got max_lr\. Remedy: derive it from mechanize\(AdamW, \.\.\.\)"):
        Derived(params, lr=1.0, mechanic_s_decay=0.01, mechanic_max_lr=0.1)


# What is imitated of the following three was read in their repositories; `docs/trainers.md` has the commits.


def by_sd_scripts(params):
    """As kohya's sd-scripts and musubi-tuner read `--optimizer_type` and `--optimizer_args`."""
    arguments = ["weight_decay=0.1", "betas=(0.8,0.99)", *(f"{key}={value!r}" for key, value in FLAT.items())]
    options = {key: ast.literal_eval(value) for key, value in (argument.split("=") for argument in arguments)}
    assert not NAME.lower().endswith(("8bit", "schedulefree"))  # names that they take for those of other packages
    cls = by_importlib(NAME)
    optimizer = cls(params, lr=1.0, **options)
    assert by_importlib(f"{cls.__module__}.{cls.__name__}") is cls, "the name that they write into what they save"
    assert not hasattr(optimizer, "train"), "they would call it"
    return optimizer


def by_litgpt(params, fused=False):
    """As litgpt instantiates an optimizer from `class_path` and `init_args`: it adds what the signature has."""
    config = {"class_path": NAME, "init_args": {**OPTIONS, **FLAT}}
    added = {"fused": fused, "fused_backward": True}
    taken = inspect.signature(by_importlib(NAME)).parameters
    config["init_args"].update({key: value for key, value in added.items() if key in taken})
    return instantiate_class(params, config)


def by_torchtune(params):
    """As torchtune instantiates `_component_` of a configuration in YAML; its recipes pass `params` by name."""
    config = omegaconf.OmegaConf.create({"_component_": NAME, **OPTIONS, **FLAT})
    options = omegaconf.OmegaConf.to_container(config, resolve=True)
    return by_importlib(options.pop("_component_"))(params=params, **options)


def by_hydra(params):
    return hydra.utils.instantiate({"_target_": NAME, **OPTIONS, **FLAT}, params)


def by_jsonargparse(params):
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in {**OPTIONS, **FLAT}.items()}
    arguments = [f"--optimizer.{key}={value}" for key, value in values.items()]
    config = new_parser().parse_args([f"--optimizer={NAME}", *arguments])
    written = new_parser().parse_string(new_parser().dump(config))
    return instantiate_class(params, written.optimizer.as_dict())


@pytest.mark.parametrize("tool", [by_sd_scripts, by_litgpt, by_torchtune, by_hydra, by_jsonargparse])
def test_a_tool_passes_options(tool):
    optimizer = tool(mlp().parameters())
    assert type(optimizer) is THE_CLASS
    assert optimizer.defaults["weight_decay"] == 0.1


def test_litgpt_trains_through_fabric():
    """Whose wrapper derives a class of ours, and whose learning rate litgpt sets at each step, from the default."""

    def run(wrap):
        model = mlp()
        optimizer = by_litgpt(model.parameters(), fused=True)
        model, stepped, backward = wrap(model, optimizer)
        losses = []
        for step in range(STEPS):
            for group in stepped.param_groups:
                group["lr"] = optimizer.defaults["lr"] * (1 - step / STEPS)
            stepped.zero_grad()
            loss = loss_of(model, step)
            backward(loss)
            stepped.step()
            losses.append(loss.item())
        return losses, stepped

    fabric = lightning.fabric.Fabric(accelerator="cpu", devices=1)
    plain, optimizer = run(lambda model, optimizer: (model, optimizer, torch.Tensor.backward))
    through, wrapped = run(
        lambda model, optimizer: (fabric.setup_module(model), fabric.setup_optimizers(optimizer), fabric.backward)
    )
    assert through == plain
    assert wrapped.optimizer is not wrapped
    assert read_out(wrapped) == read_out(wrapped.optimizer) == read_out(optimizer)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jsonargparse, about how Lightning calls it
def test_the_real_lightning_cli_passes_options(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])  # it warns of other arguments

    class Module(lightning.pytorch.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

    arguments = [f"--optimizer={NAME}", "--optimizer.lr=1.0", "--optimizer.mechanic_s_init=auto"]
    cli = LightningCLI(Module, run=False, save_config_callback=None, seed_everything_default=False, args=arguments)
    built = cli.model.configure_optimizers()
    assert type(built) is mechanize(torch.optim.AdamW, s_init="auto")


class Mine(mechanize(torch.optim.AdamW, s_init="auto", betas=(0.9, 0.99))):
    """A class of a user's, which passes on what it does not know."""

    def __init__(self, params, lr: float = 1.0, mine: int = 0, **rest):
        super().__init__(params, lr=lr, **rest)
        self.mine = mine


@pytest.mark.parametrize("keeps", [False, True])
def test_jsonargparse_builds_a_class_that_is_derived_from_a_mechanized_one(keeps):
    """It passes every option in the signature, with its default."""
    arguments = [f"--optimizer={__name__}.Mine", "--optimizer.mine=3", *["--optimizer.mechanic_max_lr=1"] * (not keeps)]
    config = new_parser().parse_args(arguments).optimizer.as_dict()
    assert config["init_args"]["mechanic_s_init"] == "auto"
    if keeps:
        built = instantiate_class(mlp().parameters(), config)
        assert (type(built), built.mine, built.mechanic_config) == (Mine, 3, Mine.mechanic_config)
    else:
        with pytest.raises(TypeError, match=r"Got max_lr\. Remedy: derive it"):
            instantiate_class(mlp().parameters(), config)


THIRD_PARTY = "mechanic_pytorch.optim.pytorch_optimizer.Lion"


@pytest.mark.parametrize("resolve", [pydoc.locate, by_importlib, hydra.utils.get_class])
def test_any_optimizer_is_found_by_its_dotted_name(resolve):
    assert resolve(THIRD_PARTY) is mechanize(pytorch_optimizer.Lion)
    assert resolve("mechanic_pytorch.optim.torch.optim.SGD") is mechanize(torch.optim.SGD)
    assert mechanic_pytorch.optim.AdamW is mechanize(torch.optim.AdamW), "a module named torch in there hides nothing"


def test_jsonargparse_finds_a_third_party_optimizer():
    arguments = [f"--optimizer={THIRD_PARTY}", "--optimizer.lr=1.0", "--optimizer.mechanic_s_init=auto"]
    config = new_parser().parse_args(arguments)
    optimizer = instantiate_class(mlp().parameters(), config.optimizer.as_dict())
    assert type(optimizer) is mechanize(pytorch_optimizer.Lion, s_init="auto")


@pytest.mark.parametrize("name", ["pytorch_optimizer.Lionn", "pytorch_optimizer.load_optimizer", "not_there.Lion"])
def test_a_wrong_dotted_name_is_told_as_wrong(name):
    with pytest.raises((AttributeError, ModuleNotFoundError), match=name.rpartition(".")[2] + "|not_there"):
        by_importlib(f"mechanic_pytorch.optim.{name}")


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


def test_the_short_name_still_means_the_plain_class(in_a_new_process):
    """jsonargparse lets `AdamW` stand for the one subclass of that name: ours must not be a second one."""
    code = f"""
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
def test_cloudpickle_takes_class_and_instance_to_a_new_process(name, tmp_path, in_a_new_process):
    """The class as the call that makes it, as pickle does: it is the one that `mechanize` returns there."""
    cls = MECHANIZED[name]
    model = mlp()
    optimizer = cls(model.parameters(), lr=1.0)
    train(model, optimizer, STEPS)
    (tmp_path / "there.pickle").write_bytes(cloudpickle.dumps((cls, model, optimizer)))
    code = """
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
