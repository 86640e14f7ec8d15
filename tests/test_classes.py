"""The classes that `mechanize` makes, and the small public methods."""

import copy
import logging
import pickle
import subprocess
import sys
from abc import ABC
from importlib import metadata
from inspect import signature

import pytest
import torch

import mechanic_pytorch
import mechanic_pytorch.optim
from helpers import stored_of
from mechanic_pytorch import Mechanic, is_mechanized, mechanize
from problems import loss_of, mlp, train


class Abstract(ABC, torch.optim.SGD):
    """A base with a metaclass of its own, as several packages have."""


class Mine(mechanize(torch.optim.SGD, s_decay=0.5)):
    """A user's own subclass of a mechanized class."""


CLASSES = {
    "default": mechanize(torch.optim.AdamW),
    "options": mechanize(torch.optim.SGD, s_decay=0.0, betas=(0.999, 0.999999)),
    "metaclass": mechanize(Abstract),
    "subclass": Mine,
}


def test_the_code_of_the_first_readme_runs_unchanged():
    model = mlp()
    optimizer = mechanize(torch.optim.SGD)(model.parameters(), lr=1.0)
    optimizer = mechanize(torch.optim.SGD, s_decay=0.0, betas=(0.999, 0.999999), store_delta=False)(
        model.parameters(), lr=0.01
    )
    train(model, optimizer, 2)
    assert set(mechanic_pytorch.__all__) == {"Mechanic", "is_mechanized", "mechanize", "optim", "patched"}
    names = ["Base", "s_decay", "betas", "s_init", "eps", "store_delta", "log_func", "log_every"]
    defaults = [0.01, (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999), "auto", 1e-8, False, None, 0]
    parameters = list(signature(mechanize).parameters.values())
    assert [p.name for p in parameters[: len(names)]] == names
    assert [p.default for p in parameters[1 : len(names)]] == defaults


def test_a_mechanized_class_is_its_base_and_more():
    cls = mechanize(torch.optim.AdamW)
    assert issubclass(cls, torch.optim.AdamW)
    assert issubclass(cls, Mechanic)
    assert cls.__name__ == "MechanizedAdamW"
    assert "learned learning-rate scale" in cls.__doc__
    assert torch.optim.AdamW.__doc__ in cls.__doc__
    theirs = list(signature(torch.optim.AdamW).parameters.values())
    ours = list(signature(cls).parameters.values())[: len(theirs)]
    assert ours == [p.replace(default=1.0) if p.name == "lr" else p for p in theirs]
    assert cls is mechanize(torch.optim.AdamW)
    assert cls is not mechanize(torch.optim.AdamW, s_decay=0.0)
    optimizer = cls(mlp().parameters(), lr=1.0)
    assert is_mechanized(optimizer)
    assert not is_mechanized(torch.optim.AdamW(mlp().parameters()))
    assert not is_mechanized(cls)
    assert optimizer.defaults == torch.optim.AdamW(mlp().parameters(), lr=1.0).defaults


@pytest.mark.parametrize("name", sorted({"Adafactor", "AdamW", "LBFGS", "Muon", "SGD"} & set(dir(torch.optim))))
def test_an_lr_that_is_not_given_is_1_whatever_the_base_has(name):
    cls = mechanize(getattr(torch.optim, name), **({"s_init": "auto"} if name == "AdamW" else {}))
    options = {"max_iter": 1} if name == "LBFGS" else {}

    def lrs(*args, **kwargs):
        return [group["lr"] for group in cls(*args, **kwargs, **options).param_groups]

    def params():
        return [torch.ones(3, 3, requires_grad=True)]

    assert lrs(params()) == lrs(params=params()) == lrs(params(), mechanic_s_decay=0.0) == [1.0]
    assert lrs(params(), 0.5) == lrs(params(), lr=0.5) == [0.5]
    if name != "LBFGS":  # which has one group
        assert lrs([{"params": params()}, {"params": params(), "lr": 0.1}]) == [1.0, 0.1]
    assert "If lr is not given, it is 1.0." in cls.__doc__


def test_a_base_whose_lr_has_no_default_still_asks_for_one():
    class Asks(torch.optim.SGD):
        def __init__(self, params, lr):
            super().__init__(params, lr)

    class Rules(torch.optim.SGD):  # as an Adafactor whose lr follows a rule of its own
        def __init__(self, params, lr=None):
            super().__init__(params, 0.3 if lr is None else lr)

    with pytest.raises(TypeError, match="lr"):
        mechanize(Asks)([torch.ones(3, requires_grad=True)])
    assert mechanize(Rules)([torch.ones(3, requires_grad=True)]).param_groups[0]["lr"] == 0.3


def test_the_version_is_that_of_the_distribution():
    assert mechanic_pytorch.__version__ == metadata.version("mechanic-pytorch")


@pytest.mark.parametrize("name", CLASSES)
def test_classes_and_instances_pickle(name):
    cls = CLASSES[name]
    assert pickle.loads(pickle.dumps(cls)) is cls
    assert copy.deepcopy(cls) is cls
    optimizer = cls(mlp().parameters(), lr=1.0)
    assert type(pickle.loads(pickle.dumps(optimizer))) is cls


def test_classes_pickle_into_a_new_process(tmp_path):
    file = tmp_path / "class.pickle"
    file.write_bytes(pickle.dumps((mechanize(torch.optim.SGD, s_decay=0.5), mechanize(torch.optim.AdamW))))
    code = (
        "import pickle, sys, torch\n"
        "sgd, adamw = pickle.load(open(sys.argv[1], 'rb'))\n"
        "from mechanic_pytorch import mechanize\n"
        "assert sgd is mechanize(torch.optim.SGD, s_decay=0.5) and adamw is mechanize(torch.optim.AdamW)\n"
    )
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning", "-c", code, str(file)], check=True)


def test_classes_are_not_kept_alive():
    import gc
    import weakref

    cls = weakref.ref(mechanize(torch.optim.SGD, log_func=lambda data: None))
    gc.collect()
    assert cls() is None


@pytest.mark.parametrize("name", dir(mechanic_pytorch.optim))
def test_optim_names_every_optimizer(name):
    assert getattr(mechanic_pytorch.optim, name) is mechanize(getattr(torch.optim, name))


@pytest.mark.parametrize("name", ["Nonsense", "Optimizer", "lr_scheduler", "_functional"])
def test_optim_names_nothing_else(name):
    with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
        getattr(mechanic_pytorch.optim, name)


def test_scale_is_a_device_tensor():
    model = mlp()
    optimizer = mechanize(torch.optim.SGD, s_init=1e-3)(model.parameters(), lr=1.0)
    assert optimizer.scale.shape == ()
    assert optimizer.scale.item() == 0
    train(model, optimizer, 1)
    assert optimizer.scale.item() == 0
    train(model, optimizer, 1, first=1)
    assert optimizer.scale.item() == pytest.approx(1e-3, rel=1e-4)


def test_effective_lr_is_the_lr_of_an_equal_plain_step():
    """Once the scale stands still, one mechanized step is one plain step at that learning rate."""
    p = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = mechanize(torch.optim.SGD, s_init=0.1, betas=(0.9,))([p], lr=0.5)
    for _ in range(400):
        p.grad = torch.full_like(p, 1e-3)
        optimizer.step()
    lrs = optimizer.effective_lr()
    assert isinstance(lrs, list)
    assert isinstance(lrs[0], float)
    q = p.detach().clone().requires_grad_()
    p.grad = q.grad = torch.full_like(p, 1e-3)
    delta, scale = stored_of(optimizer, p).clone(), optimizer.scale
    optimizer.step()
    torch.optim.SGD([q], lr=lrs[0]).step()
    torch.testing.assert_close(p - (optimizer.scale - scale) * (delta - 0.5e-3), q, rtol=1e-12, atol=0)


def test_reset_starts_anew_from_the_current_weights():
    model = mlp()
    optimizer = mechanize(torch.optim.SGD, s_init=1e-3)(model.parameters(), lr=1.0)
    train(model, optimizer, 30)
    weights = [p.detach().clone() for p in model.parameters()]
    optimizer.reset()
    assert optimizer.scale == 0
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    twin = copy.deepcopy(model)
    other = mechanize(torch.optim.SGD, s_init=1e-3)(twin.parameters(), lr=1.0)
    assert train(model, optimizer, 30, first=30) == train(twin, other, 30, first=30)
    assert torch.equal(optimizer.scale, other.scale)


def test_reset_keeps_the_base_state():
    model = mlp()
    optimizer = mechanize(torch.optim.AdamW)(model.parameters(), lr=1.0)
    train(model, optimizer, 3)
    exp_avg = optimizer.state[model[0].weight]["exp_avg"].clone()
    optimizer.reset()
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], exp_avg)
    assert set(optimizer.state[model[0].weight]) == {"step", "exp_avg", "exp_avg_sq"}


def test_log_func():
    logged = []
    model = mlp()
    optimizer = mechanize(torch.optim.SGD, s_init=1e-3, log_func=logged.append, log_every=3)(model.parameters(), lr=1.0)
    train(model, optimizer, 7)
    assert [data["iter_count"] for data in logged] == [3, 6]
    assert all(type(data["s"]) is float and set(data) == {"iter_count", "s"} for data in logged)
    assert logged[0]["s"] > 0
    other = type(optimizer)(mlp().parameters(), lr=1.0)
    other.load_state_dict(optimizer.state_dict())
    train(model, other, 0)
    loss_of(model, 0)
    for p in other.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    other.step()
    other.step()
    assert logged[-1]["iter_count"] == 9  # the count goes on


def test_logging_by_default(caplog):
    model = mlp()
    optimizer = mechanize(torch.optim.SGD, log_every=2)(model.parameters(), lr=1.0)
    with caplog.at_level(logging.INFO, logger="mechanic_pytorch"):
        train(model, optimizer, 4)
    assert [record.name for record in caplog.records] == ["mechanic_pytorch"] * 2
    assert caplog.records[1].message == f"iter_count=4 s={float(optimizer.scale):.6e}"


def test_silent_unless_asked(caplog):
    model = mlp()
    with caplog.at_level(logging.DEBUG):
        train(model, mechanize(torch.optim.SGD)(model.parameters(), lr=1.0), 4)
    assert not caplog.records


def test_repr_and_state_dict_are_plain():
    optimizer = mechanize(torch.optim.SGD)(mlp().parameters(), lr=1.0)
    assert repr(optimizer).startswith("MechanizedSGD (")
    for group in optimizer.state_dict()["param_groups"]:
        ours = [value for key, value in group.items() if key.startswith("mechanic_")]
        assert all(isinstance(value, torch.Tensor | float) for value in ours)


def test_reading_the_scale_in_inference_mode_leaves_no_trace():
    model = mlp(torch.float64)
    optimizer = mechanize(torch.optim.SGD)(model.parameters(), lr=1.0)
    with torch.inference_mode():
        optimizer.effective_lr()
    train(model, optimizer, 3)
    with torch.inference_mode():
        assert optimizer.effective_lr() == [float(optimizer.scale)]
    train(model, optimizer, 3, first=3)


def test_built_under_the_meta_device():
    with torch.device("meta"):
        model = mlp()
        optimizer = mechanize(torch.optim.SGD)(model.parameters(), lr=1.0)
    weights = mlp().state_dict()
    for p, value in zip(model.parameters(), weights.values(), strict=True):
        torch.utils.swap_tensors(p, torch.nn.Parameter(value))
    train(model, optimizer, 3)
    assert optimizer.scale > 0


def test_groups_taken_over_from_another_optimizer_bring_no_tuner():
    model = mlp()
    first = mechanize(torch.optim.SGD)(model.parameters(), lr=1.0)
    train(model, first, 30)
    scale = float(first.scale)
    second = mechanize(torch.optim.SGD, betas=(0.9,))(first.param_groups)
    assert second.scale == 0
    train(model, second, 3)
    assert float(first.scale) == scale > 0


def test_an_empty_log_is_a_log():
    class Log(list):
        def __call__(self, data):
            self.append(data)

    model, log, other = mlp(), Log(), Log()
    assert mechanize(torch.optim.SGD, log_func=log, log_every=1) is not mechanize(
        torch.optim.SGD, log_func=other, log_every=1
    )
    train(model, mechanize(torch.optim.SGD, log_func=log, log_every=1)(model.parameters(), lr=1.0), 2)
    assert len(log) == 2
    assert not other


def test_reset_starts_the_log_again():
    model, log = mlp(), []
    optimizer = mechanize(torch.optim.SGD, log_func=log.append, log_every=1)(model.parameters(), lr=1.0)
    train(model, optimizer, 2)
    optimizer.reset()
    train(model, optimizer, 1)
    assert [data["iter_count"] for data in log] == [1, 2, 1]


def test_many_threads_get_one_class():
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    for i in range(30):
        barrier = Barrier(8)

        def make(_, i=i, barrier=barrier):
            barrier.wait()
            return mechanize(torch.optim.SGD, s_decay=0.1 + i / 1000)

        with ThreadPoolExecutor(8) as pool:
            assert len(set(pool.map(make, range(8)))) == 1


def test_the_step_is_that_of_the_next_class_in_the_order_of_python():
    steps = []

    class Noisy(torch.optim.SGD):
        def step(self, closure=None):
            steps.append(self)
            return super().step(closure)

    class Both(mechanize(torch.optim.SGD), Noisy):
        pass

    model = mlp()
    optimizer = Both(model.parameters(), lr=1.0)
    train(model, optimizer, 3)
    assert steps == [optimizer] * 3


def test_an_optimizer_of_shapes_alone_can_be_shown():
    p = torch.zeros(3, device="meta", requires_grad=True)
    optimizer = mechanize(torch.optim.SGD)([p], lr=1.0)
    p.grad = torch.zeros(3, device="meta")
    optimizer.step()
    assert "effective lr: unknown" in repr(optimizer)
