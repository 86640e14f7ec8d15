"""A resumed run is the uninterrupted run, bit for bit; other checkpoints load as their users expect."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import cloudpickle
import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis.strategies import data, integers, sampled_from
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from bases import CASES
from helpers import PUBLISHED, assert_identical, compensation_of, slot_of, stored_of
from mechanic_pytorch import mechanize
from mechanic_pytorch._auto import Memory
from mechanic_pytorch._buckets import REFERENCE
from mechanic_pytorch.telemetry import read_out
from problems import full_loss, layers, mlp, train

STEPS = 12


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Every case half trained and saved, then trained to the end here, and resumed by one new process."""
    torch.use_deterministic_algorithms(True)  # as the worker does; this comes before the fixture of single tests
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


@pytest.mark.xdist_group("resume")  # one xdist worker: all are resumed once
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
    with pytest.raises(ValueError, match=r"^MechanizedAdagrad: .* must hold 'mechanic_reference' for each.* Remedy: "):
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
    optimizer = mechanize(torch.optim.SGD, **PUBLISHED)(model.parameters(), lr=1.0)
    train(model, optimizer, STEPS)
    torch.save(optimizer.state_dict(), tmp_path / "checkpoint.pt")

    twin = mlp(saved).to(loaded)
    twin.load_state_dict(model.state_dict())
    other = mechanize(torch.optim.SGD, **PUBLISHED)(twin.parameters(), lr=1.0)
    other.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        delta = stored_of(optimizer, p)
        assert delta.dtype == torch.float32
        assert torch.equal(stored_of(other, q).double(), delta.double())
    assert read_out(other).scales == read_out(optimizer).scales
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
        assert stored_of(optimizer, model[0].weight).dtype == (
            torch.float64 if dtype == torch.float64 else torch.float32
        )
    assert full_loss(model) < 0.5


@pytest.mark.parametrize("name", ["SGD_momentum", "AdamW", "AdamW_fused", "AdamW_published", "Adagrad"])
def test_a_plain_checkpoint_starts_the_tuner_afresh(name):
    case = CASES[name]
    model = case.model()
    plain = case.base(model.parameters(), lr=0.01, **case.options)
    train(model, plain, STEPS)
    optimizer = mechanize(case.base, **case.mechanic)(model.parameters(), lr=1.0, **case.options)
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
    assert stored_of(optimizer, model[0].weight) is None


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
    with pytest.raises(ValueError, match=r"must hold 6 numbers in .* Got .*\(2,\)\. Remedy: .* the betas "):
        optimizer.load_state_dict(saved.state_dict())
    assert_identical(optimizer.state_dict(), before)
    assert not optimizer._optimizer_load_state_dict_pre_hooks


def test_a_checkpoint_of_a_number_is_refused_with_the_calls_that_load_it():
    """Which number it was saved with, it does not say; nobody who has not chosen one expects a run with another."""
    model, twin = mlp(), mlp()
    saved = mechanize(torch.optim.AdamW, s_init=1e-8)(model.parameters(), lr=1.0)
    train(model, saved, STEPS)
    twin.load_state_dict(model.state_dict())
    checkpoint = copy.deepcopy(saved.state_dict())
    optimizer = mechanize(torch.optim.AdamW)(twin.parameters(), lr=1.0)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"^MechanizedAdamW: .*Got a number in it and 'auto' here\.") as refused:
        optimizer.load_state_dict(checkpoint)
    assert_identical(optimizer.state_dict(), before)

    calls = "such as mechanize(AdamW, s_init=1e-8)", 'load_state_dict(..., tuner="fresh")'
    assert all(call in str(refused.value) for call in calls)
    optimizer.load_state_dict(checkpoint, tuner="fresh")
    assert optimizer.scale == 0
    assert optimizer.state[next(twin.parameters())]["step"] == STEPS
    optimizer = mechanize(torch.optim.AdamW, s_init=1e-8)(twin.parameters(), lr=1.0)
    optimizer.load_state_dict(checkpoint)
    assert train(twin, optimizer, STEPS, first=STEPS) == train(model, saved, STEPS, first=STEPS)

    other = mechanize(torch.optim.AdamW)(mlp().parameters(), lr=1.0)
    with pytest.raises(ValueError, match=r"Got 'auto' in it and a number here\. .* mechanize\(AdamW\); or keep"):
        optimizer.load_state_dict(other.state_dict())


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


@pytest.mark.parametrize("name", ["AdamW_bfloat16", "AdamW_bfloat16_published"])
def test_hooks_of_the_user_see_and_change_what_is_loaded(name):
    case = CASES[name]
    model, optimizer = case.build()
    train(model, optimizer, STEPS)

    def double(optimizer, state_dict):
        key = slot_of(optimizer)
        state = {i: {**s, key: 2 * s[key]} for i, s in state_dict["state"].items()}
        return {**state_dict, "state": state}

    twin, other = case.build()
    other.register_load_state_dict_pre_hook(double)
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(stored_of(other, q), 2 * stored_of(optimizer, p))


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


def form(value):
    return (value.dtype, tuple(value.shape)) if isinstance(value, torch.Tensor) else type(value)


@pytest.mark.parametrize("s_init", [1e-3, "auto"])
def test_what_a_checkpoint_holds(s_init):
    """Saved runs rely on these names, dtypes and shapes. `docs/how-it-works.md` says what they mean."""
    model = mlp(torch.bfloat16)
    groups = [{"params": params} for params in layers(model)]
    optimizer = mechanize(torch.optim.SGD, s_init=s_init, betas=(0.9, 0.99))(groups, lr=1.0)
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    first, second = ({key: form(value) for key, value in group.items()} for group in saved["param_groups"])
    vectors = "max_product", "sum_squared_products", "reward", "scales"
    expected = {f"mechanic_{name}": (torch.float64, (2,)) for name in vectors}
    expected |= {"mechanic_lr_sums": (torch.float64, (3,)), "mechanic_frozen_scale": float}
    expected |= dict.fromkeys(("mechanic_steps", "mechanic_skipped_steps"), (torch.int64, ()))
    if s_init == "auto":
        expected |= {"mechanic_unit": (torch.float64, (len(Memory._fields),))}
        expected |= dict.fromkeys(("mechanic_lr_factor", "mechanic_lr_limit"), float)
    assert first == expected | second, "a single tuner is in the first group alone"
    slot = "mechanic_reference" if s_init == "auto" else "mechanic_delta"
    for state, p in zip(saved["state"].values(), model.parameters(), strict=True):
        kept = {slot: (torch.float32, tuple(p.shape)), "mechanic_compensation": (torch.bfloat16, tuple(p.shape))}
        assert {key: form(value) for key, value in state.items()} == kept


def spoiled(draw, saved):
    """Break one thing in a checkpoint, and return what."""
    groups = [group for group in saved["param_groups"] if "mechanic_scales" in group]
    group, slots = draw(sampled_from(groups)), [s for s in saved["state"].values() if REFERENCE in s]
    keys = sorted(key for key in group if key.startswith("mechanic_"))
    tensors = [key for key in keys if isinstance(group[key], torch.Tensor)]
    what = draw(sampled_from(["lose", "cut", "fill", "number", "shape of slot", "fill slot", "lose slot", "kind"]))
    worse = draw(sampled_from([torch.nan, torch.inf, -torch.inf, 1e30, -1.0]))
    key = draw(sampled_from(keys))
    if what == "lose":
        del group[key]
    elif what == "kind":
        group[key] = draw(sampled_from([None, "1", [1.0], torch.ones(2, 2)]))
    elif what == "cut":
        key = draw(sampled_from([key for key in tensors if group[key].ndim]))
        group[key] = group[key][:-1]
    elif what == "fill":
        key = draw(sampled_from([key for key in tensors if group[key].is_floating_point()]))
        if worse == 1e30:
            key = "mechanic_scales"
        group[key][draw(integers(0, len(group[key]) - 1))] = worse
    elif what == "number":
        key = draw(sampled_from([key for key in keys if key not in tensors]))
        group[key] = -torch.inf if worse == 1e30 or key == "mechanic_lr_limit" else worse
    elif what == "shape of slot":
        slot = draw(sampled_from(slots))
        slot[REFERENCE] = slot[REFERENCE].flatten()[:-1]
    elif what == "fill slot":
        draw(sampled_from(slots))[REFERENCE].view(-1)[0] = 1e30 if worse == -1 else worse
    else:
        del draw(sampled_from(slots))[REFERENCE]
    return what, key, worse


@pytest.mark.parametrize("per_group", [False, True])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data())
def test_a_spoiled_checkpoint_is_refused_and_changes_nothing(per_group, data):
    """Whatever is missing, misshapen or no number a run can have come to; and tuner="fresh" loads it all the same."""
    saved, optimizer = SPOILED[per_group] if per_group in SPOILED else SPOILED.setdefault(per_group, trained(per_group))
    saved, before = copy.deepcopy(saved), copy.deepcopy(optimizer.state_dict())
    note(spoiled(data.draw, saved))
    with pytest.raises(ValueError, match=r'Remedy: .*load_state_dict\(\.\.\., tuner="fresh"\)\.$'):
        optimizer.load_state_dict(saved)
    assert_identical(optimizer.state_dict(), before)
    other = copy.deepcopy(optimizer)
    other.load_state_dict(saved, tuner="fresh")
    assert not other.scale.any()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda group, state: group["mechanic_unit"].zero_(),
        lambda group, state: group["mechanic_unit"].add_(1e30),
        lambda group, state: group.update(mechanic_scales=group["mechanic_scales"] * (1 + 0j)),
        lambda group, state: group.update(mechanic_scales=group["mechanic_scales"].half()),
        lambda group, state: group.update(mechanic_steps=torch.tensor(torch.nan)),
        lambda group, state: group.update(mechanic_steps=torch.tensor(10.5)),
        lambda group, state: group.update(lr=torch.nan),
        lambda group, state: state.update({REFERENCE: state[REFERENCE].to_sparse()}),
        lambda group, state: state.update({REFERENCE: state[REFERENCE].long()}),
    ],
    ids=["no memory", "memory", "complex", "half", "nan steps", "part of a step", "lr", "sparse", "integers"],
)
@pytest.mark.parametrize("per_group", [False, True])
def test_what_no_run_can_have_come_to_is_refused(per_group, spoil):
    saved, optimizer = trained(per_group)
    before = copy.deepcopy(optimizer.state_dict())
    saved = copy.deepcopy(saved)
    spoil(saved["param_groups"][0], saved["state"][0])
    with pytest.raises(ValueError, match=r'Remedy: .*load_state_dict\(\.\.\., tuner="fresh"\)\.$'):
        optimizer.load_state_dict(saved)
    assert_identical(optimizer.state_dict(), before)


@pytest.mark.parametrize(
    "wrong",
    [{"state": []}, {"param_groups": [None]}, {"param_groups": [{"lr": 1.0}]}],
    ids=["a list of states", "no group", "no params"],
)
def test_what_is_no_checkpoint_at_all_is_refused(wrong):
    saved, optimizer = trained(False)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"Remedy: pass what optimizer.state_dict\(\) returned"):
        optimizer.load_state_dict({**saved, **wrong})
    assert_identical(optimizer.state_dict(), before)


SPOILED = {}


def trained(per_group):
    """Return a checkpoint, and another optimizer of the same kind."""
    optimizers = []
    for seed in (0, 1):
        model = mlp(seed=seed)
        groups = [{"params": params} for params in layers(model)]
        optimizers.append(mechanize(torch.optim.AdamW, s_init="auto", per_group=per_group)(groups, lr=1.0))
        train(model, optimizers[-1], 10)
    return optimizers[0].state_dict(), optimizers[1]


OTHER_OPTIONS = {
    "from a number to auto": ({"s_init": 1e-8}, {"s_init": "auto"}),
    "from auto to a number": ({"s_init": "auto"}, {"s_init": 1e-4}),
    "other betas": ({}, {"betas": (0.9, 0.99)}),
    "per group": ({"s_init": "auto"}, {"s_init": "auto", "per_group": True}),
    "one for all": ({"s_init": "auto", "per_group": True}, {"s_init": "auto"}),
}


@pytest.mark.parametrize("change", OTHER_OPTIONS)
def test_a_fresh_tuner_for_other_options(change):
    """The base goes on with what it had; the tuner is as at the start, also if this optimizer has learned already."""
    runs = []
    for options in OTHER_OPTIONS[change]:
        model = mlp()
        groups = [{"params": params} for params in layers(model)]
        runs.append((model, mechanize(torch.optim.AdamW, **options)(groups, lr=1.0)))
        train(*runs[-1], 30)
    (model, one), (other_model, other) = runs
    saved = one.state_dict()
    with pytest.raises(ValueError, match=r"tuner=\"fresh\""):
        other.load_state_dict(saved)
    other.load_state_dict(saved, tuner="fresh")
    other_model.load_state_dict(model.state_dict())
    assert not other.scale.any()
    assert not any(key.startswith("mechanic") for state in other.state.values() for key in state)
    for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
        assert_identical(other.state[q]["exp_avg"], one.state[p]["exp_avg"])
    before = full_loss(other_model)
    train(other_model, other, 100, first=30)
    assert full_loss(other_model) < before
    with pytest.raises(ValueError, match="tuner must be 'saved' or 'fresh'"):
        other.load_state_dict(saved, tuner="new")


def test_a_cast_to_float32_drops_the_compensation():
    model, optimizer = CASES["AdamW_bfloat16"].build()
    train(model, optimizer, 2)
    assert compensation_of(optimizer, model[0].weight) is not None
    model.float()
    optimizer.reset()
    assert compensation_of(optimizer, model[0].weight) is None
    model.bfloat16()
    train(model, optimizer, 1)
    model.float()
    for state in optimizer.state.values():
        state["exp_avg"], state["exp_avg_sq"] = state["exp_avg"].float(), state["exp_avg_sq"].float()
    train(model, optimizer, 1)
    assert compensation_of(optimizer, model[0].weight) is None
