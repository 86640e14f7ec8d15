"""A kernel that fails costs speed, and nothing else. Here it runs in Triton's interpreter, or is broken on purpose."""

import warnings

import pytest
import torch

from kernel_problems import DTYPES, problem
from mechanic_pytorch import kernels, mechanize
from mechanic_pytorch.kernels import blocks, for_loop, foreach
from mechanic_pytorch.kernels.arguments import Scales
from mechanic_pytorch.kernels.checked import Checked
from mechanic_pytorch.telemetry import read_out
from problems import loss_of, mlp

BASES = {
    "AdamW_fused": (torch.optim.AdamW, {"fused": True, "weight_decay": 0.1}),
    "SGD_fused": (torch.optim.SGD, {"fused": True, "momentum": 0.9, "nesterov": True}),
    "AdamW": (torch.optim.AdamW, {}),
}


class Kernel:
    """The kernel for CPUs, or what a test puts in the place of one of its functions."""

    def __init__(self, **functions):
        vars(self).update({name: getattr(blocks, name) for name in ("measure", "move", "step_and_move", "can_step")})
        vars(self).update(functions)


def broken(name, how):
    """Return one whose function leaves a single number of the result wrong, or raises."""

    def function(*args):
        if how == "raises":
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore of it")
        result = getattr(blocks, name)(*args)
        if name == "measure":
            return result * torch.tensor([1.0, 1.0, 1.01, 1.0], dtype=result.dtype)
        params, kept = args[name == "step_and_move"], args[2 + (name == "step_and_move")]
        target = {"params": params, "stored": kept, "states": args[0].states[-1] if name == "step_and_move" else kept}
        target[how][0].view(-1)[-1] += target[how][0].abs().max()
        return result

    return Kernel(**{name: function})


def train_with(monkeypatch, kernel, base="AdamW_fused", steps=6, dtype=torch.float32, **options):
    """Return the trained weights, the optimizer and the messages of all warnings."""
    monkeypatch.setitem(kernels.KERNELS, "blocks", kernel)
    model = mlp(dtype)
    base, base_options = BASES[base]
    optimizer = mechanize(base, **{"s_init": 1e-3, **options})(model.parameters(), lr=1.0, **base_options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(steps):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            optimizer.step()
    return list(model.parameters()), optimizer, [str(w.message) for w in caught]


@pytest.mark.parametrize("s_init", [1e-3, "auto"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", BASES)
def test_a_good_kernel_is_used(base, dtype, s_init, monkeypatch):
    if dtype == torch.float16:
        pytest.skip("Adam's default eps is 0 in float16")
    if base == "SGD_fused" and dtype == torch.bfloat16:
        pytest.skip("torch's own function is wrong there: of 1000 weights it moves 8 (2.13, on CPU)")
    checked = Checked("quick", Kernel, foreach)
    expected, _, _ = train_with(monkeypatch, blocks, base, dtype=dtype, s_init=s_init)
    actual, optimizer, messages = train_with(monkeypatch, checked, base, dtype=dtype, s_init=s_init)
    assert not [m for m in messages if "quick" in m]
    assert all(map(torch.equal, actual, expected)), "the check touches nothing"
    assert read_out(optimizer).kernels == {"cpu": "quick"}


@pytest.mark.parametrize("lr", [1.0, 0.7, 1e-3])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-3, 1e4])
@pytest.mark.parametrize("shapes", [[(1,)], [(1,), (0,), (3, 5)]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("base", ["AdamW_fused", "SGD_fused"])
def test_a_good_kernel_is_used_for_any_numbers(base, dtype, shapes, size, lr, monkeypatch):
    """Also where weights are 0 and nothing has been kept yet, squares underflow, or an lr has no short binary form."""
    checked = Checked("quick", Kernel, foreach)
    monkeypatch.setitem(kernels.KERNELS, "blocks", checked)
    params = [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    kind, options = BASES[base]
    optimizer = mechanize(kind, s_init=1e-3)(params, lr=lr, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mechanized.* lost in rounding")
        for _ in range(4):
            for p in params:
                p.grad = size * torch.randn_like(p)
            optimizer.step()
    assert not checked.failures


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *[("measure", how) for how in ("raises", "sums")],
        *[("move", how) for how in ("raises", "params", "stored")],
        *[("step_and_move", how) for how in ("raises", "params", "stored", "states")],
    ],
)
@pytest.mark.parametrize("s_init", [1e-3, "auto"])
@pytest.mark.parametrize("base", ["AdamW_fused", "SGD_fused"])
def test_a_broken_kernel_is_noticed_and_the_run_is_that_of_the_other(base, s_init, name, how, monkeypatch):
    checked = Checked("quick", lambda: broken(name, how), foreach)
    torch.manual_seed(3)
    actual, optimizer, messages = train_with(monkeypatch, checked, base, s_init=s_init)
    (message,) = messages
    assert "the kernel 'quick' cannot be trusted on cpu" in message
    assert "Remedy" in message
    assert "\n" not in message
    reason = read_out(optimizer).kernels["cpu"]
    assert reason.startswith(f"foreach, because quick failed: {name}: ")
    assert ("Failed to find C compiler" in reason) == (how == "raises")
    expected, _, _ = train_with(monkeypatch, foreach, base, s_init=s_init)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_a_kernel_that_cannot_be_imported_is_not_used(monkeypatch):
    def load():
        raise ImportError("triton was built for another torch")

    (_, optimizer, (message,)) = train_with(monkeypatch, Checked("quick", load, foreach))
    assert "built for another torch" in message
    assert read_out(optimizer).kernels["cpu"].startswith("foreach, because quick failed: measure: ImportError")
    resumed = Checked("quick", load, foreach)
    monkeypatch.setitem(kernels.KERNELS, "blocks", resumed)
    with pytest.warns(UserWarning, match="built for another torch"):
        optimizer.step()


def test_running_out_of_memory_is_not_the_kernels_fault(monkeypatch):
    def function(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    checked = Checked("quick", lambda: Kernel(measure=function), foreach)
    with pytest.raises(torch.OutOfMemoryError):
        train_with(monkeypatch, checked)
    assert not checked.failures


def test_each_variant_is_checked_once_and_then_nothing_is_read():
    calls = []

    class Counted:
        def __getattr__(self, name):
            return lambda *args: calls.append(name) or getattr(foreach, name)(*args)

    checked = Checked("quick", lambda: for_loop, Counted())
    for dtype in (torch.float32, torch.bfloat16):
        for _ in range(3):
            params, before, grads, kept, compensations = problem(dtype)
            scale = torch.tensor(0.5)
            checked.measure(params, grads, kept)
            checked.move(params, before, kept, compensations, Scales(scale, scale))
            checked.move(params, before, kept, compensations, Scales(scale, scale, scale))
    assert calls == 2 * ["measure", "move", "move"]


def test_a_graph_that_is_captured_holds_no_comparison(monkeypatch):
    """A kernel that was compared before is used there, another one is not."""
    _, params, grads, kept, _ = problem(torch.float32)
    known, unknown = Checked("quick", lambda: for_loop, foreach), Checked("quick", lambda: pytest.fail("used"), foreach)
    known.measure(params, grads, kept)
    monkeypatch.setattr("mechanic_pytorch.kernels.checked.is_capturing", lambda: True)
    assert torch.equal(known.measure(params, grads, kept), for_loop.measure(params, grads, kept))
    assert torch.equal(unknown.measure(params, grads, kept), foreach.measure(params, grads, kept))
    assert not unknown.failures


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_check_agrees_on_awkward_tensors_and_changes_none(dtype):
    """Also where most numbers are 0, infinite or very large."""
    params, before, grads, kept, compensations = problem(dtype)
    for tensors in (kept, grads):
        tensors[-1].zero_()
    grads[5][0] = float("nan")
    grads[-1][::2] = float("inf")
    before[-1][7] = torch.finfo(dtype).max / 4
    checked, scale = Checked("quick", lambda: for_loop, foreach), torch.tensor(0.5)
    saved = [t.clone() for t in [*params, *grads, *kept, *(compensations or [])]]
    checked._chosen(("move",), [params, before, kept, compensations], lambda kernel, *few: [few[0][-1], *few[2]])
    for a, b in zip([*params, *grads, *kept, *(compensations or [])], saved, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    checked.measure(params, grads, kept, None, compensations, True)
    checked.move(params, before, kept, compensations, Scales(scale, scale))
    assert not checked.failures
