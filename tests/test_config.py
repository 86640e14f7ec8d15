"""Every bad option is refused when the class is made, by name, rule, value and remedy."""

import inspect
import math
from dataclasses import fields

import pytest
import torch

import mechanic_pytorch
from mechanic_pytorch import Mechanic, mechanize
from mechanic_pytorch._config import Config

BAD = [
    ({"s_init": 0.0}, ValueError, "s_init must be 'auto' or a finite number > 0. Got 0.0."),
    ({"s_init": -1e-8}, ValueError, "s_init must be 'auto' or a finite number > 0. Got -1e-08."),
    ({"s_init": math.inf}, ValueError, "s_init must be 'auto' or a finite number > 0. Got inf."),
    ({"s_init": math.nan}, ValueError, "s_init must be 'auto' or a finite number > 0. Got nan."),
    ({"s_init": "Auto"}, TypeError, "s_init must be 'auto' or a finite number > 0. Got 'Auto'."),
    ({"s_init": True}, TypeError, "s_init must be 'auto' or a finite number > 0. Got True."),
    ({"betas": ()}, ValueError, "betas must be a non-empty sequence of numbers in [0, 1). Got ()."),
    ({"betas": 0.9}, TypeError, "betas must be a non-empty sequence of numbers in [0, 1). Got 0.9."),
    ({"betas": "0.9"}, TypeError, "betas must be a non-empty sequence of numbers in [0, 1). Got '0.9'."),
    ({"betas": (0.9, 1.0)}, ValueError, "betas[1] must be in [0, 1). Got 1.0."),
    ({"betas": (1.5,)}, ValueError, "betas[0] must be in [0, 1). Got 1.5."),
    ({"betas": (-0.1,)}, ValueError, "betas[0] must be in [0, 1). Got -0.1."),
    ({"betas": (math.nan,)}, ValueError, "betas[0] must be in [0, 1). Got nan."),
    ({"betas": ("0.9",)}, TypeError, "betas[0] must be in [0, 1). Got '0.9'."),
    ({"s_decay": -0.01}, ValueError, "s_decay must be a finite number >= 0. Got -0.01."),
    ({"s_decay": None}, TypeError, "s_decay must be a finite number >= 0. Got None."),
    ({"eps": -1e-8}, ValueError, "eps must be a finite number >= 0. Got -1e-08."),
    ({"eps": math.inf}, ValueError, "eps must be a finite number >= 0. Got inf."),
    ({"max_lr": 0.0}, ValueError, "max_lr must be None or a finite number > 0. Got 0.0."),
    ({"max_lr": math.inf}, ValueError, "max_lr must be None or a finite number > 0. Got inf."),
    ({"max_lr": "0.1"}, TypeError, "max_lr must be None or a finite number > 0. Got '0.1'."),
    ({"store_delta": "yes"}, TypeError, "store_delta must be True or False. Got 'yes'."),
    ({"per_group": None}, TypeError, "per_group must be True or False. Got None."),
    ({"process_group": 3}, TypeError, "process_group must be a torch.distributed.ProcessGroup, or None. Got 3."),
    ({"skip_nonfinite": None}, TypeError, "skip_nonfinite must be True or False. Got None."),
    ({"log_func": 3}, TypeError, "log_func must be a function of one dict, or None. Got 3."),
    ({"log_every": -1}, ValueError, "log_every must be an integer >= 0. Got -1."),
    ({"log_every": 1.5}, TypeError, "log_every must be an integer >= 0. Got 1.5."),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error) as caught:
        mechanize(torch.optim.SGD, **options)
    assert str(caught.value).startswith(f"mechanize: {message} Remedy: ")


@pytest.mark.parametrize(
    "base",
    [torch.optim.SGD([torch.zeros(1)]), torch.nn.Linear, "AdamW", None, torch.optim.Optimizer],
    ids=["instance", "module", "name", "None", "Optimizer"],
)
def test_only_optimizer_classes_are_mechanized(base):
    with pytest.raises(
        TypeError, match=r"^mechanize: Base must be a subclass of torch\.optim\.Optimizer\. Got .*Remedy"
    ):
        mechanize(base)


def test_a_mechanized_class_is_not_mechanized_again():
    once = mechanize(torch.optim.SGD)
    for base in (once, Mechanic, type("Mine", (once,), {})):
        with pytest.raises(TypeError, match=r"^mechanize: Base must not be mechanized already\. Got .*Remedy"):
            mechanize(base)


def test_options_that_mean_the_same_give_the_same_class():
    import numpy as np

    cls = mechanize(torch.optim.SGD, s_decay=0.0, betas=(0.9, 0.999))
    assert mechanize(torch.optim.SGD, s_decay=0, betas=[0.9, 0.999]) is cls
    assert mechanize(torch.optim.SGD, s_decay=np.float64(0), betas=np.array([0.9, 0.999])) is cls
    assert mechanize(torch.optim.SGD, betas=(0.9, 0.999)) is not cls


def test_a_callable_need_not_be_hashable():
    class Log(list):
        def __call__(self, data):
            self.append(data)

    log = Log()
    assert mechanize(torch.optim.SGD, log_func=log) is mechanize(torch.optim.SGD, log_func=log)


def test_the_signature_and_the_declared_options_agree():
    options = list(inspect.signature(mechanize).parameters.values())[1:]
    assert [(option.name, option.default) for option in options] == [(f.name, f.default) for f in fields(Config)]
    documented = inspect.getdoc(mechanize)
    assert all(f"\n    {option.name}: " in documented for option in options)


def test_processes_need_not_agree_only_in_options_that_change_no_step():
    names = {option.name for option in fields(Config)}
    assert names - Config().shared().keys() == {"store_delta", "log_func", "log_every", "process_group"}


def test_parameters_go_to_the_class():
    with pytest.raises(TypeError, match=r"Remedy: parameters go to the class.*mechanize\(SGD\)\(model\.parameters"):
        mechanize(torch.optim.SGD, torch.nn.Linear(2, 1).parameters())


@pytest.mark.parametrize(("name", "remedy"), [("adamw", r"did you mean AdamW\?"), ("Lion", r"package\.Lion")])
def test_a_wrong_name_has_a_remedy(name, remedy):
    with pytest.raises(AttributeError, match=f"torch.optim has no such optimizer. Remedy: .*{remedy}"):
        getattr(mechanic_pytorch.optim, name)


@pytest.mark.parametrize("given", [None, {}, {"weight": 1.0}])
def test_what_is_no_checkpoint_is_refused(given):
    optimizer = mechanize(torch.optim.SGD)([torch.zeros(1, requires_grad=True)], lr=1.0)
    with pytest.raises(ValueError, match=r"Remedy: pass what optimizer\.state_dict\(\) returned"):
        optimizer.load_state_dict(given)
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_an_optimizer_shows_its_options_and_its_effective_lr():
    p = torch.ones(3, requires_grad=True)
    optimizer = mechanize(torch.optim.SGD, s_init="auto", max_lr=0.5)([p], lr=1.0)
    for _ in range(20):
        p.grad = p.detach().clone()
        optimizer.step()
    shown = repr(optimizer)
    assert "Options of mechanize: s_init='auto', max_lr=0.5\n" in shown
    assert f"    effective lr: {optimizer.effective_lr()[0]:.3g}\n" in shown
    assert "mechanic_" not in shown
