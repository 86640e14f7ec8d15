"""THE equivalence test: every kernel equals the reference, on every dtype and awkward shape."""

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernel_problems import (
    DTYPES,
    HALF,
    RULES,
    TOLERANCE,
    TRITON_DEVICE,
    accumulator_of,
    assert_all_close,
    problem,
    step_problem,
)
from mechanic_pytorch import kernels, mechanize
from mechanic_pytorch.kernels import for_loop
from mechanic_pytorch.kernels.arguments import Scales

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PLACES = [(name, device) for name in kernels.KERNELS if name != "triton" for device in DEVICES]
PLACES.append(("triton", TRITON_DEVICE))
every_kernel_but_the_reference = pytest.mark.parametrize(
    "kernel", [place for place in PLACES if place[0] != "for_loop"], ids="-".join, indirect=True
)


@pytest.fixture(params=PLACES, ids="-".join)
def kernel(request):
    """Each kernel on each device that it runs on, which is where tensors are then made."""
    name, device = request.param
    with torch.device(device):
        yield request.getfixturevalue("triton_kernel") if name == "triton" else kernels.KERNELS[name]


def scales(dtype, *numbers):
    """Return them as kernels take them, on the device of the `kernel`."""
    return Scales(*(torch.tensor(number, dtype=accumulator_of(dtype)) for number in numbers))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_kernel_but_the_reference
def test_measure_equals_the_reference(kernel, dtype):
    _, params, grads, deltas, _ = problem(dtype)
    copies = [torch.empty_like(x) for x in params]
    actual = kernel.measure(params, grads, deltas, copies)
    assert all(torch.equal(x, c) for x, c in zip(params, copies, strict=True))
    assert torch.equal(kernel.measure(params, grads, deltas), actual)
    expected = for_loop.measure(params, grads, deltas)
    assert actual.shape == (4,)
    assert actual.dtype == accumulator_of(dtype)
    # The products cancel; their error is relative to the norms that bound them.
    norm = expected[2:].sqrt().prod().item() + expected[3].item()
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype]["rtol"], atol=norm * TOLERANCE[dtype]["atol"])


@pytest.mark.parametrize("follow", [None, 0.6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_kernel_but_the_reference
def test_move_equals_the_reference(kernel, dtype, follow):
    results = []
    for each in (kernel, for_loop):
        params, before, _, deltas, compensations = problem(dtype)
        copies = [b.clone() for b in before]
        numbers = (0.3, 0.5) if follow is None else (0.3, 0.5, follow)
        squared = each.move(params, before, deltas, compensations, scales(dtype, *numbers))
        assert (squared is None) == (follow is None)
        assert all(torch.equal(b, c) for b, c in zip(before, copies, strict=True)), "`before` must not change"
        results.append((params, deltas, compensations, squared))
    (params, deltas, compensations, squared), (ref_params, ref_deltas, ref_compensations, ref_squared) = results
    if follow is not None:
        torch.testing.assert_close(squared, ref_squared, rtol=1e-5, atol=0.0)
    assert_all_close(deltas, ref_deltas, dtype)
    if compensations is None:
        assert_all_close(params, ref_params, dtype)
    else:  # a value next to a rounding boundary may fall on either side; with what rounding took, both are the same
        total = [p.float() + c.float() for p, c in zip(params, compensations, strict=True)]
        ref_total = [p.float() + c.float() for p, c in zip(ref_params, ref_compensations, strict=True)]
        for a, e in zip(total, ref_total, strict=True):
            torch.testing.assert_close(a, e, rtol=2e-5, atol=2e-5)  # 8 + 8 bits of bfloat16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_kernel_but_the_reference
def test_one_tensor_at_a_time_is_the_same(kernel, dtype):
    """Kernels that treat small tensors together must not mistake one of them for a copy."""
    numbers = scales(dtype, 0.3, 0.5)
    params, before, grads, deltas, compensations = problem(dtype)
    ref_params, _, _, ref_deltas, ref_compensations = problem(dtype)
    for_loop.move(ref_params, before, ref_deltas, ref_compensations, numbers)
    for i in range(len(params)):
        copies = [t.clone() for t in (params[i], grads[i], deltas[i])]
        kernel.measure(params[i : i + 1], grads[i : i + 1], deltas[i : i + 1])
        assert all(torch.equal(a, b) for a, b in zip(copies, (params[i], grads[i], deltas[i]), strict=True))
        chosen = None if compensations is None else compensations[i : i + 1]
        start = before[i].clone()
        kernel.move(params[i : i + 1], before[i : i + 1], deltas[i : i + 1], chosen, numbers)
        assert torch.equal(before[i], start)
    assert_all_close(deltas, ref_deltas, dtype)
    if compensations is None:
        assert_all_close(params, ref_params, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_move_is_the_formula_of_the_paper(kernel, dtype):
    """With x = x_ref + old * delta before, x = x_ref + new * (delta + update) after."""
    params, before, _, deltas, _ = problem(dtype)
    old, new = torch.tensor(0.3, dtype=dtype), torch.tensor(0.5, dtype=dtype)
    x_ref = [b.double() - old.double() * d.double() for b, d in zip(before, deltas, strict=True)]
    delta = [d.double() + (x.double() - b.double()) for x, b, d in zip(params, before, deltas, strict=True)]
    kernel.move(params, before, deltas, None, Scales(old, new))
    assert_all_close([d.double() for d in deltas], delta, dtype)
    assert_all_close(
        [p.double() for p in params], [r + new.double() * d for r, d in zip(x_ref, delta, strict=True)], dtype
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_plain_step_is_that_of_the_base_scaled(kernel, dtype):
    """And what is kept goes a part of the way to where the weights were. The update's square is returned."""
    params, before, _, references, _ = problem(dtype)
    numbers = scales(dtype, 7.0, 0.5, 0.3)
    steps = [b.double() + 0.5 * (x.double() - b.double()) for x, b in zip(params, before, strict=True)]
    follow = numbers.follow.double()
    nearer = [r.double() + follow * (b.double() - r.double()) for r, b in zip(references, before, strict=True)]
    expected = sum((x.double() - b.double()).square().sum() for x, b in zip(params, before, strict=True))
    squared = kernel.move(params, before, references, None, numbers)
    torch.testing.assert_close(squared.double(), expected, rtol=1e-5, atol=0.0)
    assert_all_close([p.double() for p in params], steps, dtype)
    assert_all_close([r.double() for r in references], nearer, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_sums_are_of_the_way_gone(kernel, dtype):
    """That is x + compensation - x_ref: what rounding took has been gone, too."""
    params, _, grads, references, compensations = problem(dtype)
    saved = [r.clone() for r in references]
    ways = [x.double() - r.double() for x, r in zip(params, references, strict=True)]
    if compensations is not None:
        ways = [way + c.double() for way, c in zip(ways, compensations, strict=True)]
    copies = [torch.empty_like(x) for x in params]
    actual = kernel.measure(params, grads, references, copies, compensations, True)
    assert all(map(torch.equal, [*references, *copies], [*saved, *params]))
    expected = for_loop.measure([x.double() for x in params], [g.double() for g in grads], ways)
    atol = TOLERANCE[dtype]["atol"] * (expected[2:].sqrt().prod().item() + expected[3].item())
    expected = torch.cat([expected, sum(way.square().sum() for way in ways).reshape(1)])
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[dtype]["rtol"], atol=atol)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_multiplied_before_they_are_squared(kernel, dtype, plain):
    _, params, grads, stored, _ = problem(dtype)
    expected = kernel.measure(params, grads, stored, None, None, plain)
    # As a loss in 32 bits has them; none of their squares is finite.
    wide = [g.to(accumulator_of(dtype)) for g in grads]
    scale = torch.tensor(2.0**80, dtype=accumulator_of(dtype))
    actual = kernel.measure(params, [g * scale for g in wide], stored, None, None, plain, scale.reciprocal())
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_compensation_keeps_what_rounding_takes(kernel, dtype):
    """Moves far below the spacing of the weights (4e-3 in bfloat16) arrive where exact arithmetic does."""
    x = torch.linspace(0.5, 1.5, 50).to(dtype)
    start, exact = x.double(), x.double()
    delta, compensation = torch.zeros(50), torch.zeros(50, dtype=torch.bfloat16)
    for _ in range(300):
        before, scale = x.clone(), 6e-5 * torch.rand(())
        x += 1.0  # the base's update, which the scale makes small
        exact += scale.double() * (x.double() - before.double())
        kernel.move([x], [before], [delta], [compensation], Scales(torch.zeros(()), scale))
        delta.zero_()
    assert (exact - start).min() > 8e-3
    # Weight and compensation have 8 significant bits each: 300 roundings of at most 8e-6, at random.
    assert (x.double() + compensation.double() - exact).abs().max() < 4e-4


def test_compensation_of_an_overwritten_weight_is_dropped(kernel):
    x, delta = torch.tensor([1.0, 0.0], dtype=torch.bfloat16), torch.zeros(2)
    compensation = torch.tensor([2**-10, 2**-10], dtype=torch.bfloat16)  # plausible for 1, impossible for 0
    zero = torch.zeros(())
    kernel.move([x], [x.clone()], [delta], [compensation], Scales(zero, zero))
    assert x.tolist() == [1.0, 0.0]
    assert compensation.tolist() == [2**-10, 0.0]


def test_a_weight_that_does_not_move_keeps_its_compensation_to_the_bit(kernel):
    """Half a spacing may round either way; doing so again must not swap weight and compensation."""
    x, delta = torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16), torch.ones(2)
    compensation = torch.tensor([2**-8, 2**-8], dtype=torch.bfloat16)
    scale = torch.tensor(0.5)
    kernel.move([x], [x.clone()], [delta], [compensation], Scales(scale, scale))
    assert x.tolist() == [1.0, 1.0078125]
    assert compensation.tolist() == [2**-8, 2**-8]


@given(cuts=st.lists(st.integers(0, 11), max_size=4), name=st.sampled_from(sorted(kernels.KERNELS)))
def test_measure_is_additive_over_any_partition(cuts, name):
    """What makes sharding a sum of four numbers."""
    _, params, grads, deltas, _ = problem(torch.float64)
    measure = kernels.KERNELS[name].measure
    bounds = [0, *sorted(cuts), len(params)]
    parts = [measure(params[a:b], grads[a:b], deltas[a:b]) for a, b in itertools.pairwise(bounds) if a < b]
    torch.testing.assert_close(sum(parts), measure(params, grads, deltas), rtol=1e-9, atol=1e-9)


def test_a_gradient_may_have_another_dtype_than_its_parameter(kernel):
    x, g, delta = torch.randn(9).bfloat16(), torch.randn(9), torch.randn(9)
    expected = torch.stack([(delta * g).sum(), (delta * x).sum(), (g * g).sum(), (x.float() ** 2).sum()])
    torch.testing.assert_close(kernel.measure([x], [g], [delta]), expected, rtol=1e-5, atol=1e-5)


def test_the_environment_can_force_a_kernel(monkeypatch):
    for name in kernels.KERNELS.keys() - {"triton"}:
        monkeypatch.setenv("MECHANIC_KERNEL", name)
        assert kernels.select(torch.device("cpu")) is kernels.KERNELS[name]
    monkeypatch.delenv("MECHANIC_KERNEL")
    assert kernels.select(torch.device("cpu")) is kernels.KERNELS["blocks"]
    monkeypatch.setattr(kernels, "missing_for_triton", lambda device: "something")
    assert kernels.select(torch.device("cuda")) is kernels.KERNELS["foreach"]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert kernels.select(torch.device("cpu")) is kernels.KERNELS["foreach"]


def test_an_unknown_kernel_is_refused(monkeypatch):
    monkeypatch.setenv("MECHANIC_KERNEL", "fastest")
    p = torch.ones(1, requires_grad=True)
    p.sum().backward()
    names = re.escape(str(sorted({*kernels.KERNELS, "triton"})))
    with pytest.raises(ValueError, match=f"MECHANIC_KERNEL must be one of {names}. Got 'fastest'. Remedy:"):
        mechanize(torch.optim.SGD)([p], lr=1.0).step()


@pytest.mark.parametrize("scaler", [(None, None), (4.0, 0.0), (None, 1.0)], ids=["no scaler", "scaled", "skipped"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_what_a_compiler_traces_is_the_rule_of_torchs_own_function(name, dtype, scaler):
    if dtype in HALF and name.startswith("sgd") and not torch.cuda.is_available():
        pytest.skip("torch's own function is wrong there: of 1000 weights it moves 8 (2.13, on CPU)")
    options = [None if number is None else torch.tensor(number, device=TRITON_DEVICE) for number in scaler]
    (traced, *mine, _, _), (rule, *theirs, _, _) = (step_problem(name, dtype, *options) for _ in range(2))
    traced.apply_traced(*mine)
    rule.apply(*theirs, rule.states, range(len(theirs[0])))
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype in HALF else {"rtol": 1e-5, "atol": 1e-6}  # lr may be in float32
    torch.testing.assert_close([*mine[0], *traced.states], [*theirs[0], *rule.states], **close)
