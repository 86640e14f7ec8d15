"""Every optimizer of torch's own table of optimizer tests, with each of its option sets, mechanized.

What a later torch adds to its table is tested here without a change.
"""

import copy
import functools
import inspect
import pickle
import re
import sys
import types
import unittest

import hypothesis
import pytest
import torch

from helpers import assert_identical
from mechanic_pytorch import mechanize


def import_table():
    """Import it, and put back what that changes for other tests: how many examples, and whether flags can be set."""
    profile = hypothesis.settings.get_current_profile_name()
    with pytest.MonkeyPatch.context() as patch:
        # Not a dependency of ours: torch derives its TestCase from it, which the table does not use.
        patch.setitem(sys.modules, "expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))
        from torch.testing._internal import common_optimizers
    hypothesis.settings.load_profile(profile)
    vars(torch.backends)["__allow_nonbracketed_mutation_flag"] = True
    return common_optimizers


TABLE = import_table()
INFOS = {info.name: info for info in TABLE.optim_db}
# The default, 1e-8 times an lr of the table, which suits the plain base, is too small for so few steps.
TUNERS = {"auto": {"s_init": "auto"}, "number": {"s_init": 1e-4}, "per_group": {"s_init": "auto", "per_group": True}}
STEPS = {"auto": 24, "number": 42, "per_group": 24}
ALWAYS = {"LBFGS": {"line_search_fn": "strong_wolfe", "max_iter": 4}}  # it is refused without: docs/limits.md


def cases(condition=lambda info: True, tuners=TUNERS):
    return pytest.mark.parametrize(
        ("info", "options", "tuner"),
        [
            pytest.param(info, entry.kwargs, tuner, id=f"{info.name}-{entry.desc}-{tuner}")
            for info in TABLE.optim_db
            if condition(info)
            for entry in info.optim_inputs_func(device="cpu")
            for tuner in tuners
        ],
    )


@functools.cache
def least_squares(dtype):
    """Return where two matrices x start, and the A and B of the least squares |A x - B|^2 of each."""
    generator = torch.Generator().manual_seed(0)
    randn = functools.partial(torch.randn, dtype=dtype, generator=generator)
    starts = [randn(4, 3), randn(5, 2)]
    factors = [randn(20, len(x)) for x in starts]
    return starts, factors, [a @ (x + 0.05 * randn(x.shape)) for a, x in zip(factors, starts, strict=True)]


def lr_of(info, options):
    return options.get("lr", inspect.signature(info.optim_cls).parameters["lr"].default)


def params_and_optimizer(info, options, tuner, dtype=torch.float64, as_pairs=False):
    """Return the matrices and their optimizer, if possible with a parameter group and another lr for each."""
    starts = [torch.view_as_real(x) if as_pairs else x for x in least_squares(dtype)[0]]
    params = [x.clone().requires_grad_() for x in starts]
    groups = params
    if info.supports_param_groups:
        groups = [{"params": params[:1]}, {"params": params[1:], "lr": lr_of(info, options) / 2}]
    mechanized = info.optim_cls if tuner is None else mechanize(info.optim_cls, **TUNERS[tuner])
    return params, mechanized(groups, **{"lr": lr_of(info, options), **ALWAYS.get(info.name, {}), **options})


def evaluate(params, optimizer, leave_out=None, sparse=False):
    """Set the gradients, zero in one row if asked to; return the loss of each matrix. Pairs are complex numbers."""
    losses = []
    sign = -1 if optimizer.param_groups[0].get("maximize") else 1
    as_pairs = params[0].dim() == 3
    with torch.no_grad():
        for p, a, b in zip(params, *least_squares(torch.complex128 if as_pairs else params[0].dtype)[1:], strict=True):
            error = a @ (torch.view_as_complex(p) if as_pairs else p) - b
            losses.append(sign * error.abs().square().sum())
            grad = 2 * sign * (a.mH @ error)
            if leave_out is not None:
                grad[leave_out % len(grad)] = 0
            grad = grad.to_sparse(1) if sparse else grad
            p.grad = torch.view_as_real(grad) if as_pairs else grad
    return losses


def advance(both, info, steps, first=0, leave_out=False, sparse=False):
    params, optimizer = both
    sparse = sparse or info.only_supports_sparse_grads
    for t in range(first, first + steps):

        def closure(t=t):
            return sum(evaluate(params, optimizer, t if leave_out or sparse else None, sparse))

        if info.step_requires_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    return both


@cases()
def test_descends_and_resumes(info, options, tuner):
    """In float32, as the state of NAdam and ASGD is: torch casts it to the dtype of the parameters on loading."""
    params_and_optimizer(info, options, None)  # from then on torch fires the hooks in the step of the plain class, too
    params, optimizer = both = params_and_optimizer(info, options, tuner, torch.float32)
    start, fired = evaluate(*both), []
    steps = STEPS[tuner] + 10 * (info.name == "RAdam")  # whose first five updates are as long as the gradient
    optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    advance(both, info, steps - 10)
    resumed = params_and_optimizer(info, options, tuner, torch.float32)
    resumed[1].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        torch._foreach_copy_(resumed[0], params)
    # torch's own LBFGS cannot be copied either: see below.
    copies = [] if info.name == "LBFGS" else [pickle.loads(pickle.dumps(copy.deepcopy(both)))]
    advance(both, info, 2, first=steps - 10)
    for other in [resumed, *copies]:
        advance(other, info, 2, first=steps - 10)
        assert_identical([other[0], other[1].state_dict()], [params, optimizer.state_dict()])
    advance(both, info, 8, first=steps - 8)
    assert fired == ["pre", "post"] * steps
    assert optimizer.skipped_steps == 0
    for before, after in zip(start, evaluate(*both), strict=True):
        assert after.abs() < 0.8 * before.abs()
    if info.supports_param_groups and tuner != "per_group":
        first, second = optimizer.effective_lr()
        assert first == pytest.approx(2 * second)


def test_a_copy_of_a_plain_lbfgs_has_lost_its_parameters_too():
    with pytest.raises(AttributeError, match="_params"):
        advance(copy.deepcopy(params_and_optimizer(INFOS["LBFGS"], {}, None)), INFOS["LBFGS"], 1)


def assert_same_weights_and_scale(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(one[1].scale, other[1].scale, rtol=1e-8, atol=0.0)


@cases(tuners=["auto"])
def test_neither_foreach_nor_a_tensor_lr_changes_the_run(info, options, tuner):
    lr = float(lr_of(info, options))
    variants = [{"lr": lr}, {"lr": torch.tensor(lr, dtype=torch.float64)}]
    variants += [{"lr": lr, "foreach": True}] if "foreach" in info.supported_impls else []
    expected, *others = (advance(params_and_optimizer(info, {**options, **more}, tuner), info, 6) for more in variants)
    assert expected[1].scale > 0
    for other in others:
        assert_same_weights_and_scale(other, expected)


@cases(lambda info: info.supports_complex, tuners=["number", "per_group"])
def test_complex_numbers_are_pairs_of_real_ones(info, options, tuner):
    params, optimizer = advance(params_and_optimizer(info, options, tuner, torch.complex128), info, 4)
    pairs = advance(params_and_optimizer(info, options, tuner, torch.complex128, as_pairs=True), info, 4)
    assert (optimizer.scale > 0).all()
    assert_same_weights_and_scale(([torch.view_as_real(p) for p in params], optimizer), pairs)


@cases(lambda info: info.supports_sparse)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_gradients_are_the_same_as_dense_ones(info, options, tuner):
    def run(tuner, sparse=True):
        return advance(params_and_optimizer(info, options, tuner), info, 6, leave_out=True, sparse=sparse)

    if options.get("weight_decay"):
        with pytest.raises(RuntimeError) as plain:
            run(None)
        with pytest.raises(RuntimeError, match=re.escape(str(plain.value))):
            run(tuner)
    else:
        assert_same_weights_and_scale(run(tuner), run(tuner, sparse=False))


@cases(lambda info: "cpu" in info.supports_fused_on)
def test_fused_changes_nothing_but_heeds_found_inf_of_any_shape(info, options, tuner):
    params, optimizer = both = params_and_optimizer(info, {**options, "fused": True}, tuner)
    for t, shape in enumerate([(), (1,), (1, 1)] * 2):
        before = copy.deepcopy(params)
        optimizer.found_inf = torch.ones(shape)
        advance(both, info, 1)
        assert_identical(params, before)
        assert optimizer.skipped_steps == t + 1
        optimizer.found_inf = torch.zeros(shape)
        advance(both, info, 1)
        del optimizer.found_inf
    assert_same_weights_and_scale(both, advance(params_and_optimizer(info, options, tuner), info, 6))


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("info", TABLE.optim_db, ids=lambda info: info.name)
def test_raises_what_the_plain_base_raises(info, tuner):
    for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given, on_step = error.optimizer_error_input, error.error_on == TABLE.OptimizerErrorEnum.STEP_ERROR
        params = [torch.ones(2, 2, requires_grad=True)] if given.params is None else given.params
        for base in (info.optim_cls, mechanize(info.optim_cls, **TUNERS[tuner])):
            kwargs = {**ALWAYS.get(info.name, {}), **given.kwargs}
            step = base(params, **kwargs).step if on_step else functools.partial(base, params, **kwargs)
            with pytest.raises(error.error_type, match=error.error_regex):
                step()
    if "differentiable" in info.supported_impls:
        with pytest.raises(ValueError, match="differentiable must be False"):
            params_and_optimizer(info, {"differentiable": True}, tuner)
    if info.has_capturable_arg:
        for which in (None, tuner):
            with pytest.raises(AssertionError, match="If capturable=True"):
                advance(params_and_optimizer(info, {"capturable": True}, which), info, 1)


def test_auto_with_the_weight_decay_of_adafactor():
    """The decay is in proportion to lr, the updates are not: at lr 1 it would shrink the weights for good."""
    info, options = INFOS["Adafactor"], {"weight_decay": 0.1, "lr": 0.01}
    runs = [advance(params_and_optimizer(info, options, tuner), info, 100) for tuner in (None, "auto")]
    plain, auto = (sum(evaluate(*run)) for run in runs)
    assert auto < 10 * plain


def test_rounding_decides_nothing():
    """The first update of Adafactor is as long as the weights, at which some rule could turn."""
    info, weights = INFOS["Adafactor"], []
    for i in range(40):
        params, optimizer = params_and_optimizer(info, {}, "per_group")
        with torch.no_grad():
            torch._foreach_mul_(params, 1 + i * 2**-52)
        advance((params, optimizer), info, 3)
        weights.append(torch.cat([p.detach().flatten() for p in params]))
    torch.testing.assert_close(weights, weights[:1] * 40, rtol=1e-8, atol=1e-10)
