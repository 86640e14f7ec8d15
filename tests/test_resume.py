"""A resumed run is the uninterrupted run, bit for bit; other checkpoints load as their users expect."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import cloudpickle
import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from bases import CASES
from mechanic_pytorch import mechanize
from problems import full_loss, mlp, train

STEPS = 12


def assert_identical(actual, expected, where="root"):
    """Compare nested state bit for bit, types and dtypes included."""
    assert type(actual) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype, where
        assert torch.equal(actual, expected), where
    elif isinstance(expected, dict):
        assert list(actual) == list(expected) or set(actual) == set(expected), where
        for key in expected:
            assert_identical(actual[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), where
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_identical(a, e, f"{where}[{i}]")
    else:
        assert actual == expected, where


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Every case half trained and saved, then trained to the end here, and resumed by one new process."""
    directory = tmp_path_factory.mktemp("checkpoints")
    uninterrupted = {}
    for name, case in CASES.items():
        model, optimizer = case.build()
        train(model, optimizer, STEPS, closure=case.closure)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, directory / f"{name}.pt")
        losses = train(model, optimizer, STEPS, first=STEPS, closure=case.closure)
        uninterrupted[name] = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
    worker = Path(__file__).with_name("resume_worker.py")
    subprocess.run([sys.executable, str(worker), str(directory), str(STEPS), *CASES], check=True)
    return directory, uninterrupted


@pytest.mark.parametrize("name", CASES)
def test_resume_in_a_new_process_is_bit_exact(name, resumed):
    directory, uninterrupted = resumed
    assert_identical(torch.load(directory / f"{name}.resumed.pt", weights_only=True), uninterrupted[name])


# torch materialises state by a dummy step without closure and with dense zero gradients, which these refuse.
NO_DUMMY_STEP = {"LBFGS": TypeError, "SparseAdam": RuntimeError}


@pytest.mark.parametrize("name", NO_DUMMY_STEP)
def test_what_distributed_checkpoint_cannot_do_with_the_plain_base_either(name):
    case = CASES[name]
    model = case.model()
    with pytest.raises(NO_DUMMY_STEP[name]):
        get_state_dict(model, case.base(model.parameters(), **case.options))


@pytest.mark.parametrize("name", ["Adagrad", "Adagrad_fused"])
def test_a_checkpoint_that_lost_its_sums_is_refused(name):
    """Adagrad has state from the start, so torch takes no dummy step, and a flattened checkpoint loses what is new."""
    case, options = CASES[name], StateDictOptions(flatten_optimizer_state_dict=True)
    model, optimizer = case.build()
    train(model, optimizer, STEPS)
    _, saved = get_state_dict(model, optimizer, options=options)
    model_of_other = case.model()
    other = type(optimizer)(model_of_other.parameters(), lr=1.0, **case.options)
    with pytest.raises(ValueError, match=r"^MechanizedAdagrad: .* must hold the sums of updates.* Remedy: "):
        set_state_dict(
            model_of_other,
            other,
            model_state_dict=model.state_dict(),
            optim_state_dict=saved,
            options=options,
        )
    assert other.scale == 0


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("name", [name for name in CASES if name not in NO_DUMMY_STEP])
def test_distributed_checkpoint_state_dict_round_trip(name, flatten, tmp_path):
    """get_state_dict and set_state_dict name states by parameter and take a dummy step to materialise them."""
    if flatten and name.startswith("Adagrad"):
        pytest.skip("refused: see test_a_checkpoint_that_lost_its_sums_is_refused")
    case, options = CASES[name], StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = case.build()
    train(model, optimizer, STEPS)
    saved_model, saved_optimizer = get_state_dict(model, optimizer, options=options)
    torch.save({"model": saved_model, "optimizer": saved_optimizer}, tmp_path / "checkpoint.pt")
    losses = train(model, optimizer, STEPS, first=STEPS)

    twin, twin_optimizer = case.build()
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    set_state_dict(
        twin,
        twin_optimizer,
        model_state_dict=checkpoint["model"],
        optim_state_dict=checkpoint["optimizer"],
        options=options,
    )
    assert train(twin, twin_optimizer, STEPS, first=STEPS) == losses
    assert_identical(twin_optimizer.state_dict()["state"], optimizer.state_dict()["state"])
    assert torch.equal(twin_optimizer.scale, optimizer.scale)


def test_the_dummy_step_of_distributed_checkpoint_leaves_no_trace():
    """`get_state_dict` on a new optimizer steps it with zero gradients and lr 0; training then goes as without."""
    runs = []
    for materialise in (False, True):
        model, optimizer = CASES["SGD_momentum"].build()
        if materialise:
            get_state_dict(model, optimizer)
        runs.append((train(model, optimizer, 2 * STEPS), float(optimizer.scale)))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_sums_survive_loading_into_another_dtype(saved, loaded, tmp_path):
    model = mlp(saved)
    optimizer = mechanize(torch.optim.SGD)(model.parameters(), lr=1.0)
    train(model, optimizer, STEPS)
    torch.save(optimizer.state_dict(), tmp_path / "checkpoint.pt")

    twin = mlp(saved).to(loaded)
    twin.load_state_dict(model.state_dict())
    other = mechanize(torch.optim.SGD)(twin.parameters(), lr=1.0)
    other.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        delta = optimizer.state[p]["mechanic_delta"]
        assert delta.dtype == torch.float32
        assert torch.equal(other.state[q]["mechanic_delta"].double(), delta.double())
    for theirs, mine in zip(other.param_groups, optimizer.param_groups, strict=True):
        assert torch.equal(theirs["mechanic_scales"].double(), mine["mechanic_scales"].double())
    before = full_loss(twin)
    train(twin, other, 150, first=STEPS)
    assert full_loss(twin) < 0.5 * before


def test_the_model_may_be_cast_under_a_running_optimizer():
    model, optimizer = CASES["SGD"].build()
    train(model, optimizer, STEPS)
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        model.to(dtype)
        scale = optimizer.scale
        assert scale > 0
        train(model, optimizer, 40)
        assert optimizer.state[model[0].weight]["mechanic_delta"].dtype == (
            torch.float64 if dtype == torch.float64 else torch.float32
        )
    assert full_loss(model) < 0.5


@pytest.mark.parametrize("name", ["SGD_momentum", "AdamW", "AdamW_fused", "Adagrad"])
def test_a_plain_checkpoint_starts_the_tuner_afresh(name):
    case = CASES[name]
    model = case.model()
    plain = case.base(model.parameters(), lr=0.01, **case.options)
    train(model, plain, STEPS)
    optimizer = mechanize(case.base)(model.parameters(), lr=1.0, **case.options)
    train(copy.deepcopy(model), optimizer, 0)
    optimizer.load_state_dict(plain.state_dict())
    assert float(optimizer.scale) == 0
    for key, value in plain.state[model[0].weight].items():
        assert torch.equal(torch.as_tensor(optimizer.state[model[0].weight][key]), torch.as_tensor(value))
    before = full_loss(model)
    train(model, optimizer, 200, first=STEPS)
    assert full_loss(model) < 0.5 * before


def test_a_plain_checkpoint_replaces_a_tuner_that_has_learned():
    model, optimizer = CASES["AdamW"].build()
    train(model, optimizer, 60)
    assert float(optimizer.scale) > 1e-6
    plain = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer.load_state_dict(plain.state_dict())
    assert float(optimizer.scale) == 0
    assert "mechanic_delta" not in optimizer.state[model[0].weight]


def test_a_mechanized_checkpoint_loads_into_the_plain_base():
    model, optimizer = CASES["AdamW"].build()
    train(model, optimizer, 60)
    plain = torch.optim.AdamW(model.parameters(), lr=0.01)
    plain.load_state_dict(optimizer.state_dict())
    for group, lr in zip(plain.param_groups, optimizer.effective_lr(), strict=True):
        group["lr"] = lr
    train(model, plain, 60)
    assert full_loss(model) < 0.5


def test_another_number_of_betas_is_refused_and_changes_nothing():
    model = mlp()
    saved = mechanize(torch.optim.AdamW, betas=(0.9, 0.999))(model.parameters(), lr=0.5)
    train(model, saved, STEPS)
    optimizer = mechanize(torch.optim.AdamW)(model.parameters(), lr=1.0)
    train(model, optimizer, STEPS)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"^MechanizedAdamW: .* as many betas .* Got 2 .* and 6 here\. Remedy: "):
        optimizer.load_state_dict(saved.state_dict())
    assert_identical(optimizer.state_dict(), before)
    assert not optimizer._optimizer_load_state_dict_pre_hooks


def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing():
    model, optimizer = CASES["AdamW"].build()
    train(model, optimizer, STEPS)
    before = copy.deepcopy(optimizer.state_dict())
    other = mechanize(torch.optim.AdamW)(torch.nn.Linear(2, 2).parameters(), lr=1.0)
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(other.state_dict())
    assert_identical(optimizer.state_dict(), before)


def test_two_optimizers_never_share_what_was_loaded():
    model, optimizer = CASES["SGD"].build()
    train(model, optimizer, STEPS)
    _, other = CASES["SGD"].build()
    other.load_state_dict(optimizer.state_dict())
    before = copy.deepcopy(other.state_dict())
    train(model, optimizer, STEPS, first=STEPS)
    assert_identical(other.state_dict(), before)


def test_hooks_of_the_user_see_and_change_what_is_loaded():
    model, optimizer = CASES["AdamW_bfloat16"].build()
    train(model, optimizer, STEPS)

    def double(optimizer, state_dict):
        state = {i: {**s, "mechanic_delta": 2 * s["mechanic_delta"]} for i, s in state_dict["state"].items()}
        return {**state_dict, "state": state}

    twin, other = CASES["AdamW_bfloat16"].build()
    other.register_load_state_dict_pre_hook(double)
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(other.state[q]["mechanic_delta"], 2 * optimizer.state[p]["mechanic_delta"])


@pytest.mark.parametrize("name", [name for name in CASES if name != "LBFGS"])
def test_deepcopy_gives_an_independent_twin(name):
    if name == "Adafactor" and torch.cuda.is_available():
        pytest.skip("torch's own Adafactor cannot step where there is a GPU, once it was copied (2.11)")
    case = CASES[name]
    model, optimizer = case.build()
    train(model, optimizer, STEPS)
    twin, other = copy.deepcopy((model, optimizer))
    assert type(other) is type(optimizer)
    losses = train(model, optimizer, STEPS, first=STEPS)
    assert train(twin, other, STEPS, first=STEPS) == losses
    assert_identical(other.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("module", [pickle, cloudpickle])
def test_optimizers_pickle(module):
    model, optimizer = CASES["AdamW"].build(s_decay=0.5)
    train(model, optimizer, STEPS)
    twin, other = pickle.loads(module.dumps((model, optimizer)))
    losses = train(model, optimizer, STEPS, first=STEPS)
    assert train(twin, other, STEPS, first=STEPS) == losses
    assert_identical(other.state_dict(), optimizer.state_dict())


class LoadsByItself(torch.optim.SGD):
    """As bitsandbytes' optimizers: an argument of its own, and no call of torch's `load_state_dict`."""

    def load_state_dict(self, state_dict, move_to_device=True):
        state_dict = copy.deepcopy(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        pairs = zip(state_dict["param_groups"], self.param_groups, strict=True)
        groups = [{**new, "params": old["params"]} for new, old in pairs]
        self.__setstate__({"state": {params[i]: s for i, s in state_dict["state"].items()}, "param_groups": groups})


def test_a_base_that_loads_by_itself():
    runs = []
    for resume in (False, True):
        model = mlp()
        optimizer = mechanize(LoadsByItself)(model.parameters(), lr=1.0)
        train(model, optimizer, STEPS)
        if resume:
            saved = optimizer.state_dict()
            optimizer = mechanize(LoadsByItself)(model.parameters(), lr=1.0)
            optimizer.load_state_dict(saved, move_to_device=False)
        runs.append(train(model, optimizer, STEPS, first=STEPS))
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved["state"].update(_mechanic={"s": torch.zeros(6)}), "Got one of version 0.0.1"),
        (lambda saved: saved["param_groups"][0].update(differentiable=True), "differentiable must be False"),
    ],
    ids=["0.0.1", "differentiable"],
)
def test_what_cannot_be_resumed_is_refused_and_changes_nothing(change, message):
    model, optimizer = CASES["AdamW"].build()
    train(model, optimizer, STEPS)
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_identical(optimizer.state_dict(), before)


def test_state_of_a_replaced_parameter_is_refused_by_name():
    p, q = torch.ones(3, requires_grad=True), torch.ones(5, requires_grad=True)
    optimizer = mechanize(torch.optim.SGD)([p], lr=1.0)
    p.grad, q.grad = torch.ones(3), torch.ones(5)
    optimizer.step()
    optimizer.param_groups[0]["params"] = [q]
    optimizer.state[q] = optimizer.state.pop(p)
    with pytest.raises(ValueError, match=r"must have the shape of its parameter, \(5,\)\. Got \(3,\)\. Remedy: "):
        optimizer.step()


def test_a_cast_to_float32_drops_the_compensation():
    model, optimizer = CASES["AdamW_bfloat16"].build()
    train(model, optimizer, 2)
    assert "mechanic_compensation" in optimizer.state[model[0].weight]
    model.float()
    optimizer.reset()
    assert "mechanic_compensation" not in optimizer.state[model[0].weight]
    model.bfloat16()
    train(model, optimizer, 1)
    model.float()
    for state in optimizer.state.values():
        state["exp_avg"], state["exp_avg_sq"] = state["exp_avg"].float(), state["exp_avg_sq"].float()
    train(model, optimizer, 1)
    assert "mechanic_compensation" not in optimizer.state[model[0].weight]
