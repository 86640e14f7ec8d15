"""`patched`: whoever builds an optimizer of torch inside it gets a mechanized one; afterwards torch is as it was."""

import copy
import gc
import inspect
import pickle
import threading
from abc import ABC
from importlib import import_module

import pytest
import torch
from torch.optim import Adam as AdamImportedBefore
from torch.optim.adamw import AdamW as AdamWOfItsFile

from mechanic_pytorch import is_mechanized, mechanize, patched
from problems import mlp, train

OPTIMIZERS = sorted(
    name
    for name, value in vars(torch.optim).items()
    if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
)
SUITABLE = [name for name in OPTIMIZERS if name != "LBFGS"]


class Theirs(torch.optim.SGD):
    """A subclass of a torch optimizer that is not torch's."""


class Fragile(torch.optim.Optimizer):
    """An optimizer that cannot be mechanized, because it checks its own class."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def add_param_group(self, param_group):
        if type(self) is not Fragile:
            self.was_tried = True
            raise TypeError("only Fragile itself")
        super().add_param_group(param_group)


def weights():
    return [torch.zeros(3, 3, requires_grad=True)]


def snapshot():
    """Return all that a class of torch.optim consists of."""
    classes = [torch.optim.Optimizer, *(getattr(torch.optim, name) for name in OPTIMIZERS)]
    return [(cls, type(cls), cls.__bases__, dict(vars(cls))) for cls in classes]


@pytest.fixture(autouse=True)
def torch_is_afterwards_as_it_was():
    torch.optim.SGD(weights())  # torch wraps `step` of a class when the first instance is made
    for name in OPTIMIZERS:
        getattr(torch.optim, name)(weights())
    before, module = snapshot(), dict(vars(torch.optim))
    yield
    assert snapshot() == before
    assert dict(vars(torch.optim)) == module
    for name in OPTIMIZERS:
        optimizer = getattr(torch.optim, name)(weights(), lr=0.1)
        assert type(optimizer) is getattr(torch.optim, name)


# --- what is mechanized -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUITABLE)
def test_every_optimizer_of_torch_is_mechanized_and_still_an_instance_of_its_class(name):
    cls = getattr(torch.optim, name)
    with patched() as built:
        optimizer = cls(weights(), lr=0.1)
    assert is_mechanized(optimizer)
    assert isinstance(optimizer, cls)
    assert type(optimizer) is mechanize(cls, s_init="auto")
    assert [(one.base, one.optimizer, one.is_mechanized, one.reason) for one in built] == [(cls, optimizer, True, None)]


def test_it_makes_no_difference_how_the_class_was_got_hold_of():
    def imported_inside():
        from torch.optim import Adam

        return Adam

    ways = [
        lambda: torch.optim.Adam,
        lambda: AdamImportedBefore,
        lambda: AdamWOfItsFile,
        lambda: getattr(torch.optim, "Adam"),  # noqa: B009
        lambda: vars(import_module("torch.optim.adam"))["Adam"],
        imported_inside,
    ]
    with patched() as built:
        optimizers = [way()(weights(), lr=1e-3) for way in ways]
    assert all(map(is_mechanized, optimizers))
    assert [one.optimizer for one in built] == optimizers


def test_a_class_looks_the_same_inside():
    signature, doc = inspect.signature(torch.optim.AdamW), torch.optim.AdamW.__doc__
    with patched():
        assert inspect.signature(torch.optim.AdamW) == signature
        assert inspect.signature(torch.optim.Optimizer.__init__).parameters.keys() == {"self", "params", "defaults"}
        assert torch.optim.AdamW.__doc__ == doc


def test_training_is_that_of_the_mechanized_class():
    with patched(s_decay=0.1) as built:
        model = mlp()
        losses = train(model, torch.optim.AdamW(model.parameters(), lr=0.3), 30)
    other = mlp()
    optimizer = mechanize(torch.optim.AdamW, s_init="auto", s_decay=0.1)(other.parameters(), lr=0.3)
    assert losses == train(other, optimizer, 30)
    assert built[0].learned_lr() == optimizer.learned_lr()
    assert (built[0].steps, built[0].skipped_steps) == (30, 0)


def test_parameters_may_be_generators_and_named():
    model = mlp()
    with patched():
        plain = torch.optim.SGD(model.parameters(), lr=0.1)
        groups = torch.optim.SGD([{"params": model.parameters()}], lr=0.1)
        named = torch.optim.SGD(model.named_parameters(), lr=0.1)
    for optimizer in (plain, groups, named):
        assert is_mechanized(optimizer)
        assert optimizer.param_groups[0]["params"] == list(model.parameters())
    assert named.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]


# --- what is left as it is --------------------------------------------------------------------------------------------


def test_optimizers_of_others_and_subclasses_are_left_alone_unless_named():
    for include in ([], [Theirs], ["Theirs"], [f"{__name__}.Theirs"]):
        with patched(include=include) as built:
            optimizer = Theirs(weights(), lr=0.1)
        assert is_mechanized(optimizer) == built[0].is_mechanized == bool(include)
        assert (built[0].reason is None) == bool(include)
    with (
        pytest.warns(UserWarning, match="elsewhere.Theirs has no effect"),
        patched(include=["elsewhere.Theirs"]) as built,
    ):
        assert type(Theirs(weights(), lr=0.1)) is Theirs
    assert f"include {__name__}.Theirs" in built[0].reason


def test_a_class_may_be_named_by_any_path_that_leads_to_it():
    reason = "a package whose classes live deeper than they are used, and are abstract first and optimizers second"
    lion = pytest.importorskip("pytorch_optimizer", reason=reason).Lion
    assert lion.__module__ != "pytorch_optimizer"
    assert lion.__mro__.index(ABC) < lion.__mro__.index(torch.optim.Optimizer)
    with patched(include=["pytorch_optimizer.Lion"]):
        model = mlp()
        optimizer = lion(model.parameters(), lr=1.0)
    assert isinstance(optimizer, mechanize(lion, s_init="auto"))
    assert type(pickle.loads(pickle.dumps(optimizer))) is mechanize(lion, s_init="auto")
    assert copy.deepcopy(optimizer).state_dict().keys() == optimizer.state_dict().keys()
    other = mlp()
    assert train(model, optimizer, 10) == train(other, mechanize(lion, s_init="auto")(other.parameters(), lr=1.0), 10)


def test_a_name_that_nothing_built_bears_is_warned_about_at_the_end_with_the_closest_one():
    hint = f"^patched: exclude {__name__}.Their has no effect, .* Did you mean {__name__}.Theirs?"
    with pytest.warns(UserWarning, match=hint) as caught, patched(exclude=[f"{__name__}.Their", "Adam"]):
        Theirs(weights(), lr=0.1)
    assert len(caught) == 1, "a name that exists is no mistake, though it is not built"
    assert caught[0].filename == __file__
    with pytest.raises(RuntimeError, match="of the script"), patched(exclude=["no.Such"]):
        raise RuntimeError("of the script")


def test_excluded_classes_stay_plain():
    with patched(exclude=["SGD", torch.optim.Adam, "torch.optim.AdamW"], include=["SGD"]) as built:
        for name in ("SGD", "Adam", "AdamW"):
            assert type(getattr(torch.optim, name)(weights(), lr=0.1)) is getattr(torch.optim, name)
        assert is_mechanized(torch.optim.RMSprop(weights()))
    assert [one.reason for one in built] == ["it was excluded"] * 3 + [None]


def test_lbfgs_is_mechanized_only_if_named():
    with patched() as built:
        assert type(torch.optim.LBFGS(weights())) is torch.optim.LBFGS
    assert "owns its steps" in built[0].reason
    with patched(include=["LBFGS"]):
        assert is_mechanized(torch.optim.LBFGS(weights(), max_iter=1))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_an_optimizer_of_a_single_number_is_left_plain(shape):
    """As that of SAC's entropy coefficient, whose loss is linear in it: its lr was 1e9 after 200 steps."""
    with patched(base_lr=1.0) as built:
        number = torch.zeros(shape, requires_grad=True)
        optimizer = torch.optim.Adam((p for p in [number]), lr=3e-4)
        network = torch.optim.Adam([torch.zeros(2, requires_grad=True)], lr=3e-4)
    assert type(optimizer) is torch.optim.Adam
    assert [group["lr"] for group in optimizer.param_groups] == [3e-4]
    assert is_mechanized(network)
    assert built[0].reason.startswith("it trains a single number")
    for _ in range(200):
        number.grad = torch.ones(shape)
        optimizer.step()
    assert -0.061 < number.item() < -0.059
    with patched(include=["Adam"]):
        assert is_mechanized(torch.optim.Adam([number]))


def test_what_mechanize_refuses_stays_plain_and_works():
    for params in (weights(), iter(weights()), [{"params": iter(weights()), "lr": 0.5}]):
        with patched() as built:
            optimizer = torch.optim.SGD(params, lr=0.1, differentiable=True)
        assert type(optimizer) is torch.optim.SGD
        assert "differentiable must be False" in built[0].reason
        assert len(optimizer.param_groups[0]["params"]) == 1
        assert not any(key.startswith("mechanic_") for key in optimizer.param_groups[0])
        assert vars(optimizer).keys() == vars(torch.optim.SGD(weights())).keys()
    with patched() as built:  # the second group is refused when the first one has been taken
        optimizer = torch.optim.SGD([{"params": weights()}, {"params": weights(), "differentiable": True}], lr=0.1)
    assert type(optimizer) is torch.optim.SGD
    assert not any(key.startswith("mechanic_") for key in optimizer.param_groups[0])
    with patched(include=[Fragile]) as built:
        optimizer = Fragile(weights(), 0.1)
    assert type(optimizer) is Fragile
    assert not hasattr(optimizer, "was_tried")
    assert built[0].reason == "only Fragile itself"


def test_what_is_mechanized_already_stays_as_it_is():
    cls = mechanize(torch.optim.SGD, s_decay=0.5)
    with patched() as built:
        assert type(cls(weights(), lr=0.1)) is cls
    assert [(one.base, one.is_mechanized, one.reason) for one in built] == [
        (torch.optim.SGD, True, "it is mechanized already")
    ]


def test_copies_and_pickles_are_of_the_class_that_they_were():
    plain = torch.optim.SGD(weights(), lr=0.1)
    with patched() as built:
        mechanized = torch.optim.SGD(weights(), lr=0.1)
        for optimizer in (plain, mechanized):
            for again in (copy.copy(optimizer), copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
                assert type(again) is type(optimizer)
    assert len(built) == 1
    assert type(pickle.loads(pickle.dumps(mechanized))) is type(mechanized)


def test_an_error_of_the_code_is_the_error_without_us_and_nothing_is_listed():
    cases = [
        (torch.optim.SGD, lambda: ([], {"lr": 0.1})),
        (torch.optim.SGD, lambda: (torch.zeros(3), {"lr": 0.1})),
        (torch.optim.SGD, lambda: (weights(), {"lr": -1.0})),
        (torch.optim.SGD, lambda: (iter([1.0]), {})),
        (torch.optim.SGD, lambda: (1, {})),
        (torch.optim.Adam, lambda: (weights(), {"no_such_option": 1})),
    ]
    for cls, arguments in cases:
        errors = []
        for context in (patched(exclude=[cls]), patched()):
            params, options = arguments()
            with context as built, pytest.raises((TypeError, ValueError)) as caught:
                cls(params, **options)
            assert not built
            errors.append((caught.type, str(caught.value), caught.value.__context__))
        assert errors[0] == errors[1]
        assert errors[1][2] is None


# --- the context ------------------------------------------------------------------------------------------------------


def test_plain_optimizers_work_after_an_exception_inside():
    def script():
        torch.optim.SGD(weights(), lr=0.1)
        raise RuntimeError("of the script")

    with pytest.raises(RuntimeError, match="of the script"), patched():
        script()
    assert type(torch.optim.SGD(weights(), lr=0.1)) is torch.optim.SGD


def test_an_optimizer_goes_on_after_the_context():
    with patched() as built:
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = train(model, optimizer, 40)
    assert losses[-1] < losses[0] / 2
    assert built[0].steps == 40


def test_the_context_entered_last_decides_and_all_of_them_list():
    with patched(s_decay=0.1) as outer:
        first = torch.optim.SGD(weights())
        with patched(s_decay=0.2, exclude=["Adam"]) as inner:
            second, plain = torch.optim.SGD(weights()), torch.optim.Adam(weights())
        third = torch.optim.Adam(weights())
    assert [o.mechanic_config.s_decay for o in (first, second, third)] == [0.1, 0.2, 0.1]
    assert type(plain) is torch.optim.Adam
    assert [one.optimizer for one in outer] == [first, second, plain, third]
    assert [one.optimizer for one in inner] == [second, plain]


def test_it_holds_for_all_threads_until_the_last_one_leaves():
    entered, left, types = threading.Event(), threading.Event(), []

    def other():
        with patched(s_decay=0.2):
            entered.set()
            assert left.wait(20)
            types.append(type(torch.optim.SGD(weights())))

    thread = threading.Thread(target=other)
    with patched(s_decay=0.1):
        thread.start()
        assert entered.wait(20)
    left.set()
    thread.join()
    assert types == [mechanize(torch.optim.SGD, s_init="auto", s_decay=0.2)]


def test_many_threads_may_build_at_once():
    with patched() as built:
        threads = [threading.Thread(target=lambda: torch.optim.SGD(weights(), lr=0.1)) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [one.is_mechanized for one in built] == [True] * 16


def test_a_patch_of_others_made_inside_survives_and_ours_sleeps_below_it():
    calls, init = [], torch.optim.Optimizer.__init__
    with patched():
        ours = torch.optim.Optimizer.__init__

        def theirs(self, *args):
            calls.append(self)
            ours(self, *args)

        torch.optim.Optimizer.__init__ = theirs
    try:
        assert type(torch.optim.SGD(weights())) is torch.optim.SGD
        with patched() as built:
            assert is_mechanized(torch.optim.SGD(weights()))
        assert len(built) == 1
        assert len(calls) == 2
    finally:
        torch.optim.Optimizer.__init__ = init


# --- the learning rate ------------------------------------------------------------------------------------------------


def test_base_lr_replaces_the_lr_of_every_group_in_proportion():
    a, b, c, d = (weights() for _ in range(4))
    with patched(base_lr=1.0) as built:
        optimizer = torch.optim.AdamW([{"params": a}, {"params": b, "lr": 0.05}], lr=0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.25]
    optimizer.add_param_group({"params": c})
    optimizer.add_param_group({"params": d, "lr": 0.1})
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.25, 1.0, 0.5]
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for p in (a, b, c, d):
        p[0].grad = torch.ones(3, 3)
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.125, 0.5, 0.25]
    optimizer.step()
    assert built[0].script_lrs == [0.2, 0.05, 0.2, 0.1]
    assert copy.deepcopy(optimizer).state_dict().keys() == optimizer.state_dict().keys()


def test_base_lr_may_meet_a_tensor_and_zero():
    with patched(base_lr=1.0):
        tensor = torch.optim.Adam(weights(), lr=torch.tensor(0.25))
        zero = torch.optim.Adam(weights(), lr=0.0)
        torch.optim.SGD(weights(), lr=0.25, differentiable=True)
    assert torch.equal(tensor.param_groups[0]["lr"], torch.tensor(1.0))
    assert zero.param_groups[0]["lr"] == 0.0


def test_the_lr_of_the_code_is_kept_and_immaterial():
    ends = []
    for lr in (1e-4, 1.0):
        with patched() as built:
            model = mlp()
            optimizer = torch.optim.SGD(model.parameters(), lr=lr)
            ends.append(train(model, optimizer, 40)[-1])
        assert optimizer.param_groups[0]["lr"] == built[0].script_lrs[0] == lr
    assert ends[0] == pytest.approx(ends[1], rel=0.03)  # updates of 1e-6 are rounded to weights of 0.1


# --- the list ---------------------------------------------------------------------------------------------------------


def test_the_list_keeps_no_optimizer_alive_and_still_knows_what_it_learned():
    with patched() as built:
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)
        train(model, optimizer, 10)
        model[0].weight.grad.fill_(torch.nan)
        optimizer.step()
        learned = optimizer.learned_lr()
        del optimizer, model
        gc.collect()
    assert built[0].optimizer is None
    assert (built[0].steps, built[0].skipped_steps) == (11, 1)
    assert built[0].learned_lr() == learned
    assert learned[0] > 0


def test_a_plain_optimizer_in_the_list_has_learned_nothing():
    with patched(exclude=["SGD"]) as built:
        model = mlp()
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)
    assert (built[0].steps, built[0].learned_lr(), built[0].script_lrs) == (0, [], [0.1])


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"s_init": 0}, ValueError, "mechanize: s_init must be"),
        ({"no_such": 1}, TypeError, "no_such"),
        ({"base_lr": "keep"}, TypeError, r"patched: base_lr must be a finite number > 0, or None. Got 'keep'. Remedy:"),
        ({"base_lr": True}, TypeError, "Got True. Remedy:"),
        ({"base_lr": 0}, ValueError, "Got 0. Remedy:"),
        ({"base_lr": float("inf")}, ValueError, "Got inf. Remedy:"),
        ({"include": "SGD"}, TypeError, r"patched: include must hold optimizer classes or their names. Got 'SGD'. Rem"),
        ({"exclude": torch.optim.SGD}, TypeError, "patched: exclude must hold"),
        ({"exclude": [int]}, TypeError, "patched: exclude must hold"),
        ({"exclude": ["Adamm"]}, ValueError, r"Got 'Adamm'. Did you mean Adam or .*\? Remedy: 'AdamW', or"),
        ({"include": ["torch.optim.LBGFS"]}, ValueError, r"patched: include must name .*Did you mean LBFGS\?"),
        ({"include": ["torch.optim.adam.Theirs"]}, ValueError, "Got 'torch.optim.adam.Theirs'. Remedy:"),
    ],
)
def test_bad_options_are_refused_at_once(options, error, message):
    with pytest.raises(error, match=message):
        patched(**options)


def test_a_class_that_mechanize_made_is_no_name_to_include():
    class Lonely(torch.optim.SGD):  # a name that no other package makes: version 0.0.1 makes a MechanizedSGD, too
        pass

    made = mechanize(Lonely)
    with pytest.raises(ValueError, match=f"Got '{made.__name__}'.*Remedy:"):
        patched(include=[made.__name__])
