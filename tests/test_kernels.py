"""THE equivalence test: every kernel equals the reference, on every dtype and awkward shape."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechanic_pytorch import kernels
from mechanic_pytorch._buckets import accumulator_dtype

# One table for all comparisons: sums are added in another order, moves are rounded at most once differently.
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-14},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 1e-5, "atol": 1e-6},
    torch.float16: {"rtol": 1e-5, "atol": 1e-6},
}
DTYPES = list(TOLERANCE)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
OTHERS = [name for name in kernels.KERNELS if name != "for_loop"]


def shapes():
    """Tensors that break careless kernels."""
    yield torch.empty(0)
    yield torch.empty(())
    yield torch.empty(1)
    yield torch.empty(7)
    yield torch.empty(3, 0, 2)
    yield torch.empty(33, 17)
    yield torch.empty(17, 33).t()  # dense, not contiguous
    yield torch.empty(40, 6)[::2, 1:4]  # not dense
    yield torch.empty(2, 3, 5, 4).to(memory_format=torch.channels_last)
    yield torch.empty(2, 3, 2, 5, 4).to(memory_format=torch.channels_last_3d)
    yield torch.empty(70_001)  # no multiple of any block size


def problem(dtype, device, seed=0):
    """Return parameters before and after a base step, gradients, deltas and compensations."""
    torch.manual_seed(seed)
    wide = accumulator_dtype(dtype)

    def like(template, dtype, size=1.0):
        new = torch.empty_strided(template.size(), template.stride(), dtype=dtype, device=device)
        return new.copy_(size * torch.randn(template.shape, dtype=torch.float64))

    templates = list(shapes())
    exact = [like(t, wide) for t in templates]
    before = [like(t, dtype).copy_(x) for t, x in zip(templates, exact, strict=True)]
    params = [x.clone(memory_format=torch.preserve_format).add_(like(x, dtype, 0.1)) for x in before]
    grads = [like(t, dtype) for t in templates]
    grads[-1] = grads[-1].flip(0)  # same shape, its own layout
    deltas = [like(t, wide) for t in templates]
    compensations = None
    if dtype.itemsize < 4:
        compensations = [(x - b).to(torch.bfloat16) for x, b in zip(exact, before, strict=True)]
        compensations[5][3:5] = 1.0  # as left behind by weights that somebody has overwritten
    return params, before, grads, deltas, compensations


def assert_all_close(actual, expected, dtype):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **TOLERANCE[dtype], equal_nan=False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_measure_equals_the_reference(name, dtype, device):
    _, params, grads, deltas, _ = problem(dtype, device)
    copies = [torch.empty_like(x) for x in params]
    actual = kernels.KERNELS[name].measure(params, grads, deltas, copies)
    assert all(torch.equal(x, c) for x, c in zip(params, copies, strict=True))
    assert torch.equal(kernels.KERNELS[name].measure(params, grads, deltas), actual)
    expected = kernels.KERNELS["for_loop"].measure(params, grads, deltas)
    assert actual.shape == (4,)
    assert actual.dtype == accumulator_dtype(dtype)
    # The products cancel; their error is relative to the norms that bound them.
    norm = expected[2:].sqrt().prod().item() + expected[3].item()
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype]["rtol"], atol=norm * TOLERANCE[dtype]["atol"])


@pytest.mark.parametrize("part", [None, 0.6])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_move_equals_the_reference(name, dtype, device, part):
    results = []
    for kernel in (kernels.KERNELS[name], kernels.KERNELS["for_loop"]):
        params, before, _, deltas, compensations = problem(dtype, device)
        copies = [b.clone() for b in before]
        numbers = (0.3, 0.5) if part is None else (0.3, 0.5, part)
        scales = (torch.tensor(s, dtype=deltas[0].dtype, device=device) for s in numbers)
        kernel.move(params, before, deltas, compensations, *scales)
        assert all(torch.equal(b, c) for b, c in zip(before, copies, strict=True)), "`before` must not change"
        results.append((params, deltas, compensations))
    (params, deltas, compensations), (ref_params, ref_deltas, ref_compensations) = results
    assert_all_close(deltas, ref_deltas, dtype)
    if compensations is None:
        assert_all_close(params, ref_params, dtype)
    else:  # a value next to a rounding boundary may fall on either side; with what rounding took, both are the same
        total = [p.float() + c.float() for p, c in zip(params, compensations, strict=True)]
        ref_total = [p.float() + c.float() for p, c in zip(ref_params, ref_compensations, strict=True)]
        for a, e in zip(total, ref_total, strict=True):
            torch.testing.assert_close(a, e, rtol=2e-5, atol=2e-5)  # 8 + 8 bits of bfloat16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_one_tensor_at_a_time_is_the_same(name, dtype):
    """Kernels that treat small tensors together must not mistake one of them for a copy."""
    kernel, scales = kernels.KERNELS[name], [torch.tensor(s, dtype=accumulator_dtype(dtype)) for s in (0.3, 0.5)]
    params, before, grads, deltas, compensations = problem(dtype, "cpu")
    ref_params, _, _, ref_deltas, ref_compensations = problem(dtype, "cpu")
    kernels.KERNELS["for_loop"].move(ref_params, before, ref_deltas, ref_compensations, *scales)
    for i in range(len(params)):
        copies = [t.clone() for t in (params[i], grads[i], deltas[i])]
        kernel.measure(params[i : i + 1], grads[i : i + 1], deltas[i : i + 1])
        assert all(torch.equal(a, b) for a, b in zip(copies, (params[i], grads[i], deltas[i]), strict=True))
        chosen = None if compensations is None else compensations[i : i + 1]
        start = before[i].clone()
        kernel.move(params[i : i + 1], before[i : i + 1], deltas[i : i + 1], chosen, *scales)
        assert torch.equal(before[i], start)
    assert_all_close(deltas, ref_deltas, dtype)
    if compensations is None:
        assert_all_close(params, ref_params, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", kernels.KERNELS)
def test_move_is_the_formula_of_the_paper(name, dtype):
    """With x = x_ref + old * delta before, x = x_ref + new * (delta + update) after."""
    params, before, _, deltas, _ = problem(dtype, "cpu")
    old, new = torch.tensor(0.3, dtype=dtype), torch.tensor(0.5, dtype=dtype)
    x_ref = [b.double() - old.double() * d.double() for b, d in zip(before, deltas, strict=True)]
    delta = [d.double() + (x.double() - b.double()) for x, b, d in zip(params, before, deltas, strict=True)]
    kernels.KERNELS[name].move(params, before, deltas, None, old, new)
    assert_all_close([d.double() for d in deltas], delta, dtype)
    assert_all_close(
        [p.double() for p in params], [r + new.double() * d for r, d in zip(x_ref, delta, strict=True)], dtype
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", kernels.KERNELS)
def test_a_plain_step_is_that_of_the_base_scaled(name, dtype):
    """And what is kept goes a part of the way to where the weights were."""
    params, before, _, references, _ = problem(dtype, "cpu")
    old, new, part = (torch.tensor(number, dtype=dtype) for number in (7.0, 0.5, 0.3))
    steps = [b.double() + 0.5 * (x.double() - b.double()) for x, b in zip(params, before, strict=True)]
    nearer = [r.double() + part.double() * (b.double() - r.double()) for r, b in zip(references, before, strict=True)]
    kernels.KERNELS[name].move(params, before, references, None, old, new, part)
    assert_all_close([p.double() for p in params], steps, dtype)
    assert_all_close([r.double() for r in references], nearer, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", kernels.KERNELS)
def test_plain_sums_are_of_the_way_gone(name, dtype):
    """That is x + compensation - x_ref: what rounding took has been gone, too."""
    params, _, grads, references, compensations = problem(dtype, "cpu")
    saved = [r.clone() for r in references]
    ways = [x.double() - r.double() for x, r in zip(params, references, strict=True)]
    if compensations is not None:
        ways = [way + c.double() for way, c in zip(ways, compensations, strict=True)]
    copies = [torch.empty_like(x) for x in params]
    actual = kernels.KERNELS[name].measure(params, grads, references, copies, compensations, True)
    assert all(map(torch.equal, [*references, *copies], [*saved, *params]))
    expected = kernels.KERNELS["for_loop"].measure([x.double() for x in params], [g.double() for g in grads], ways)
    atol = TOLERANCE[dtype]["atol"] * (expected[2:].sqrt().prod().item() + expected[3].item())
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[dtype]["rtol"], atol=atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", kernels.KERNELS)
def test_compensation_keeps_what_rounding_takes(name, dtype):
    """Moves far below the spacing of the weights (4e-3 in bfloat16) arrive where exact arithmetic does."""
    x = torch.linspace(0.5, 1.5, 50).to(dtype)
    start, exact = x.double(), x.double()
    delta, compensation = torch.zeros(50), torch.zeros(50, dtype=torch.bfloat16)
    for _ in range(300):
        before, scale = x.clone(), 6e-5 * torch.rand(())
        x += 1.0  # the base's update, which the scale makes small
        exact += scale.double() * (x.double() - before.double())
        kernels.KERNELS[name].move([x], [before], [delta], [compensation], torch.zeros(()), scale)
        delta.zero_()
    assert (exact - start).min() > 8e-3
    # Weight and compensation have 8 significant bits each: 300 roundings of at most 8e-6, at random.
    assert (x.double() + compensation.double() - exact).abs().max() < 4e-4


@pytest.mark.parametrize("name", kernels.KERNELS)
def test_compensation_of_an_overwritten_weight_is_dropped(name):
    x, delta = torch.tensor([1.0, 0.0], dtype=torch.bfloat16), torch.zeros(2)
    compensation = torch.tensor([2**-10, 2**-10], dtype=torch.bfloat16)  # plausible for 1, impossible for 0
    zero = torch.zeros(())
    kernels.KERNELS[name].move([x], [x.clone()], [delta], [compensation], zero, zero)
    assert x.tolist() == [1.0, 0.0]
    assert compensation.tolist() == [2**-10, 0.0]


@pytest.mark.parametrize("name", kernels.KERNELS)
def test_a_weight_that_does_not_move_keeps_its_compensation_to_the_bit(name):
    """Half a spacing may round either way; doing so again must not swap weight and compensation."""
    x, delta = torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16), torch.ones(2)
    compensation = torch.tensor([2**-8, 2**-8], dtype=torch.bfloat16)
    scale = torch.tensor(0.5)
    kernels.KERNELS[name].move([x], [x.clone()], [delta], [compensation], scale, scale)
    assert x.tolist() == [1.0, 1.0078125]
    assert compensation.tolist() == [2**-8, 2**-8]


@given(cuts=st.lists(st.integers(0, 11), max_size=4), name=st.sampled_from(sorted(kernels.KERNELS)))
def test_measure_is_additive_over_any_partition(cuts, name):
    """What makes sharding a sum of four numbers."""
    _, params, grads, deltas, _ = problem(torch.float64, "cpu")
    measure = kernels.KERNELS[name].measure
    bounds = [0, *sorted(cuts), len(params)]
    parts = [measure(params[a:b], grads[a:b], deltas[a:b]) for a, b in itertools.pairwise(bounds) if a < b]
    torch.testing.assert_close(sum(parts), measure(params, grads, deltas), rtol=1e-9, atol=1e-9)


def test_mixed_gradient_dtype():
    """A gradient may be kept in another dtype than its parameter."""
    x, delta = torch.randn(9).bfloat16(), torch.randn(9)
    g = torch.randn(9)
    sums = [kernels.KERNELS[name].measure([x], [g], [delta]) for name in ("for_loop", *OTHERS)]
    expected = torch.stack([(delta * g).sum(), (delta * x).sum(), (g * g).sum(), (x.float() ** 2).sum()])
    for actual in sums:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_the_environment_can_force_a_kernel(monkeypatch):
    for name in ("for_loop", *OTHERS):
        monkeypatch.setenv("MECHANIC_KERNEL", name)
        assert kernels.select(torch.device("cpu")) is kernels.KERNELS[name]
    monkeypatch.delenv("MECHANIC_KERNEL")
    assert kernels.select(torch.device("cpu")) is kernels.KERNELS["blocks"]
    monkeypatch.setattr(kernels, "missing_for_triton", lambda device: "something")
    assert kernels.select(torch.device("cuda")) is kernels.KERNELS["foreach"]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert kernels.select(torch.device("cpu")) is kernels.KERNELS["foreach"]


def test_an_unknown_kernel_is_refused():
    code = (
        "import torch, mechanic_pytorch.optim as o; p = torch.ones(1, requires_grad=True); "
        "p.sum().backward(); o.SGD([p]).step()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MECHANIC_KERNEL": "fastest"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert (
        "MECHANIC_KERNEL must be one of ['blocks', 'for_loop', 'foreach', 'triton']. Got 'fastest'. Remedy:"
        in done.stderr
    )
