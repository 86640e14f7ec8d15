"""Optimizers of other packages, mechanized: they train, resume to the bit, and stay what they were.

Run as a script, this file is the new process that resumes: `test_third_party_bases.py DIRECTORY NAME...`.
"""

import copy
import io
import os
import pickle
import shutil
import subprocess
import sys
import sysconfig
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path

import pytest
import pytorch_optimizer
import torch
import torchao.optim
from pytorch_optimizer.optimizer.utils.graft import SGDGraft
from pytorch_optimizer.optimizer.utils.partition import BlockPartitioner, PreConditionerType
from pytorch_optimizer.optimizer.utils.preconditioner import PreConditioner

from helpers import assert_identical, environment_of_tests, stored_of
from mechanic_pytorch import Mechanic, is_mechanized, mechanize
from problems import full_loss, loss_of, mlp, train

STEPS = 12
pytestmark = pytest.mark.filterwarnings("ignore:.*an average of its own:UserWarning")  # of ScheduleFree...


def wide():
    """torchao keeps the state of a parameter in few bits from 4,096 weights on: the first layer's, not the others'."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))


def one_matrix():
    """One parameter of 4,096 weights, for which torchao compiles one program; digits are 10 of its 64 outputs."""
    torch.manual_seed(0)
    return torch.nn.Linear(64, 64, bias=False)


@dataclass
class Case:
    base: type
    options: dict = field(default_factory=dict)
    model: object = mlp
    compiled: bool = False
    classes: tuple = ()  # what the plain base keeps in its state beside tensors and plain values

    def build(self, **options):
        model = self.model()
        return model, mechanize(self.base)(model.parameters(), lr=1.0, **self.options, **options)

    def stance(self):
        """Whether torchao's step is compiled, as for its users, or runs at once, which needs no compiler."""
        return nullcontext() if self.compiled else torch.compiler.set_stance("force_eager")

    def load(self, file):
        with torch.serialization.safe_globals(list(self.classes)):
            return torch.load(file, weights_only=True)


CASES = {
    "Lion": Case(pytorch_optimizer.Lion),
    "Lion_decay": Case(pytorch_optimizer.Lion, {"weight_decay": 0.01}),
    "Adan": Case(pytorch_optimizer.Adan),
    "SOAP": Case(pytorch_optimizer.SOAP),
    "Shampoo": Case(pytorch_optimizer.Shampoo),
    "ScalableShampoo": Case(
        pytorch_optimizer.ScalableShampoo,
        # By default it preconditions from step 1,000 on.
        {"start_preconditioning_step": 5, "preconditioning_compute_steps": 5},
        # The plain base needs these too: its state holds objects, which weights_only=True refuses to make unasked.
        classes=(PreConditioner, BlockPartitioner, PreConditionerType, SGDGraft),
    ),
    "ScheduleFreeAdamW": Case(pytorch_optimizer.ScheduleFreeAdamW),
    "ScheduleFreeSGD": Case(pytorch_optimizer.ScheduleFreeSGD),
    "AdamW8bit": Case(torchao.optim.AdamW8bit, model=wide),
    "AdamW4bit": Case(torchao.optim.AdamW4bit, model=wide),
    "AdamWFp8": Case(torchao.optim.AdamWFp8, model=wide),
}
COMPILED = {"AdamW8bit_compiled": Case(torchao.optim.AdamW8bit, model=one_matrix, compiled=True)}
TORCHAO = [name for name, case in CASES.items() if case.base.__module__.startswith("torchao")]


def everything(model, optimizer, losses):
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}


def train_save_and_train(name, case, directory):
    """Train half, save, train to the end; return where that leads."""
    with case.stance():
        model, optimizer = case.build()
        losses = train(model, optimizer, STEPS)
        torch.save(everything(model, optimizer, losses), directory / f"{name}.pt")
        return everything(model, optimizer, train(model, optimizer, STEPS, first=STEPS))


def resume_in_a_new_process(directory, names):
    subprocess.run([sys.executable, __file__, str(directory), *names], check=True, env=environment_of_tests())


def resume(directory, names):
    """What the new process does."""
    for name in names:
        case = {**CASES, **COMPILED}[name]
        checkpoint = case.load(directory / f"{name}.pt")
        with case.stance():
            model, optimizer = case.build()
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            losses = train(model, optimizer, STEPS, first=STEPS)
        torch.save(everything(model, optimizer, losses), directory / f"{name}.resumed.pt")


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints")
    uninterrupted = {name: train_save_and_train(name, case, directory) for name, case in CASES.items()}
    resume_in_a_new_process(directory, CASES)
    return directory, uninterrupted


@pytest.mark.parametrize("s_init", ["auto", 1e-8])
@pytest.mark.parametrize("name", CASES)
def test_it_trains_from_any_of_these_bases(name, s_init):
    """Measured after 200 steps from a loss of 2.3: 0.03 (SOAP) to 0.20 (ScheduleFreeSGD, in train mode)."""
    with CASES[name].stance():
        model, optimizer = CASES[name].build(mechanic_s_init=s_init)
        start = full_loss(model)
        train(model, optimizer, 200)
    assert full_loss(model) < 0.25 * start
    assert optimizer.scale > 0


@pytest.mark.xdist_group("third-party bases")  # one xdist worker: all are resumed once
@pytest.mark.parametrize("name", CASES)
def test_resume_in_a_new_process_is_bit_exact(name, resumed):
    directory, uninterrupted = resumed
    actual = CASES[name].load(directory / f"{name}.resumed.pt")
    assert_identical(actual, uninterrupted[name])


@pytest.mark.parametrize("name", CASES)
def test_is_mechanized_and_still_its_base(name):
    case = CASES[name]
    cls = mechanize(case.base)
    assert issubclass(cls, Mechanic)
    assert cls.__name__ == f"Mechanized{case.base.__name__}"
    parameters = signature(cls).parameters.items()
    of_base = {key: parameter for key, parameter in parameters if not key.startswith("mechanic_")}
    theirs = dict(signature(case.base).parameters)
    if isinstance(theirs["lr"].default, float):
        theirs["lr"] = theirs["lr"].replace(default=1.0)
    assert of_base == theirs
    assert isinstance(cls, type(case.base))  # ABCMeta, in pytorch_optimizer
    assert pickle.loads(pickle.dumps(cls)) is cls
    _, optimizer = case.build()
    assert is_mechanized(optimizer)
    assert isinstance(optimizer, case.base)
    assert type(pickle.loads(pickle.dumps(optimizer))) is cls


@pytest.mark.parametrize("name", CASES)
def test_deepcopy_works_exactly_where_it_does_for_the_plain_base(name):
    """It works for no base here today. torch's `Optimizer.__getstate__` keeps param_groups, state and defaults: the
    copy lacks the other attributes, which pytorch_optimizer reads in step. torchao's tensors have no clone.
    """
    case = CASES[name]
    outcomes = []
    with case.stance():
        for cls in (case.base, mechanize(case.base)):
            model = case.model()
            optimizer = cls(model.parameters(), lr=1.0, **case.options)
            train(model, optimizer, STEPS)
            try:
                twin, other = copy.deepcopy((model, optimizer))
                losses = train(twin, other, STEPS, first=STEPS)
            except (AttributeError, NotImplementedError) as error:
                outcomes.append((type(error), str(error).replace(cls.__name__, case.base.__name__)))
            else:
                assert train(model, optimizer, STEPS, first=STEPS) == losses
                assert_identical(other.state_dict(), optimizer.state_dict())
                outcomes.append("an independent twin")
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("name", [name for name in CASES if name not in TORCHAO])  # which has no such option
def test_maximizes_when_asked_to(name):
    """Maximizing f and minimizing -f are the same run, to the bit. These bases keep the option on the optimizer."""
    weights, scales = [], []
    for maximize in (False, True):
        model, optimizer = CASES[name].build(maximize=maximize)
        assert optimizer.maximize is maximize
        assert not any("maximize" in group for group in optimizer.param_groups)
        start = full_loss(model)
        for t in range(200):
            optimizer.zero_grad()
            loss = loss_of(model, t)
            (-loss if maximize else loss).backward()
            optimizer.step()
        assert full_loss(model) < 0.25 * start
        weights.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
        scales.append(optimizer.scale)
    if name == "Adan":
        return  # The plain base itself is not exact: it stores the first gradient before it has turned its sign.
    assert torch.equal(scales[0], scales[1])
    assert torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("base", [pytorch_optimizer.SOAP, pytorch_optimizer.RAdam, pytorch_optimizer.ADOPT])
def test_no_warning_about_a_base_whose_first_steps_only_prepare(base):
    """They collect statistics for one step (SOAP, ADOPT) or five (RAdam) before the first update."""
    model = mlp()
    optimizer = mechanize(base)(model.parameters(), lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, STEPS)


# --- torchao ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TORCHAO)
def test_torchao_keeps_its_state_quantized_and_ours_exact(name):
    case = CASES[name]
    with case.stance():
        model, optimizer = case.build()
        train(model, optimizer, 2)
        other = case.build()[1]
        other.load_state_dict(optimizer.state_dict())
    for o, p in ((optimizer, model[0].weight), (other, other.param_groups[0]["params"][0])):
        assert type(o.state[p]["exp_avg"]).__name__.startswith("OptimState")
        assert stored_of(o, p).dtype == torch.float32
        assert type(stored_of(o, p)) is torch.Tensor


@pytest.mark.parametrize("name", TORCHAO)
def test_torchao_follows_a_scheduler(name):
    """Its lr is a tensor, and must stay one."""
    with CASES[name].stance():
        model, optimizer = CASES[name].build()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
        train(model, optimizer, 3, scheduler=scheduler)
    assert optimizer.param_groups[0]["lr"].item() == 0.125
    assert optimizer.scale > 0
    assert optimizer.effective_lr() == [0.125 * optimizer.scale.item()]


# torch and torchao warn of themselves, once per process, when a step is compiled for the first time.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:OptimState8bit does not implement _stable_hash_for_caching:UserWarning")
@pytest.mark.skipif(
    not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "g++"), "g++", "clang++", "cl")),
    reason="torchao compiles its step, which on the CPU needs a C++ compiler",
)
@pytest.mark.skipif(
    not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="torchao compiles its step, which on the CPU needs Python's headers (python3-dev)",
)
def test_torchao_compiled_trains_and_resumes_bit_exact(tmp_path):
    [(name, case)] = COMPILED.items()
    uninterrupted = train_save_and_train(name, case, tmp_path)
    resume_in_a_new_process(tmp_path, [name])
    assert_identical(case.load(tmp_path / f"{name}.resumed.pt"), uninterrupted)

    model, optimizer = case.build()
    start = full_loss(model)
    train(model, optimizer, 200)
    assert full_loss(model) < 0.25 * start


# --- schedule-free ----------------------------------------------------------------------------------------------------


def test_eval_mode_of_a_mechanized_schedule_free_base_is_useless():
    """A limit of ours, told in the documentation: z lives at the base's scale, the weights at the learned one."""
    model, optimizer = CASES["ScheduleFreeAdamW"].build()
    train(model, optimizer, 300)
    weights, loss = copy.deepcopy(model.state_dict()), full_loss(model)
    optimizer.eval()
    assert full_loss(model) > 100 * loss  # measured: 406 instead of 0.13
    optimizer.train()
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("base", "options"), [(torch.optim.SGD, {}), (torch.optim.AdamW, {"betas": (0.0, 0.999)})], ids=["SGD", "AdamW"]
)
def test_schedule_free_averaging_belongs_around_mechanic(base, options):
    """The other way round both do their work: Mechanic scales the steps of z, the wrapper averages."""

    def build():
        model = mlp()
        wrapper = pytorch_optimizer.ScheduleFreeWrapper(mechanize(base)(model.parameters(), lr=1.0, **options))
        wrapper.train()
        return model, wrapper

    model, optimizer = build()
    start = full_loss(model)
    train(model, optimizer, 100)
    checkpoint = io.BytesIO()
    torch.save(everything(model, optimizer, []), checkpoint)
    losses = train(model, optimizer, 200, first=100)

    twin, other = build()
    checkpoint = torch.load(io.BytesIO(checkpoint.getvalue()), weights_only=True)
    twin.load_state_dict(checkpoint["model"])
    other.load_state_dict(checkpoint["optimizer"])
    assert train(twin, other, 200, first=100) == losses
    assert_identical(other.state_dict(), optimizer.state_dict())

    # Measured: 0.08 and 0.04 after 300 steps, with weights of either mode.
    assert full_loss(model) < 0.1 * start
    optimizer.eval()
    assert full_loss(model) < 0.1 * start


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    resume(Path(sys.argv[1]), sys.argv[2:])
