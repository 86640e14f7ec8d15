"""`torch.compile(optimizer.step)`: one graph, compiled once, that does what the uncompiled step does."""

import copy
import shutil

import pytest
import torch

from helpers import Graphs, assert_identical, count_a_skipped_step, stored_of
from mechanic_pytorch import mechanize, patched
from problems import loss_of, mlp

# torch's own compiler imports what torch itself calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

BASES = {
    "SGD": (torch.optim.SGD, {}),
    "SGD_momentum": (torch.optim.SGD, {"momentum": 0.9, "foreach": True}),
    "SGD_fused": (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    "AdamW": (torch.optim.AdamW, {"foreach": False}),
    "AdamW_foreach": (torch.optim.AdamW, {"foreach": True}),
    "AdamW_fused": (torch.optim.AdamW, {"fused": True}),
    "RMSprop": (torch.optim.RMSprop, {}),
}


@pytest.fixture(autouse=True)
def from_scratch():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train_while_lr_falls(model, optimizer, steps, first=0, step=None):
    """Train while a schedule changes the lr at every step."""
    for t in range(first, first + steps):
        for group in optimizer.param_groups:
            group["lr"] = 1.0 / (1 + t)
        optimizer.zero_grad()
        loss_of(model, t).backward()
        (step or optimizer.step)()


def model_and_optimizer(name, dtype=torch.float32, **mechanic_options):
    base, options = BASES[name]
    model = mlp(dtype)
    return model, mechanize(base, **{"s_init": 1e-3, **mechanic_options})(model.parameters(), lr=1.0, **options)


def assert_same_run(model, optimizer, twin, other, **tolerance):
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, **tolerance)
        torch.testing.assert_close(stored_of(optimizer, p), stored_of(other, q), **tolerance)
    torch.testing.assert_close(optimizer.scale, other.scale, **tolerance)


@pytest.mark.parametrize("name", BASES)
def test_one_graph_for_all_steps_after_the_first_also_for_one_that_is_skipped(name):
    """The first step creates state and is not compiled. Whether a gradient is finite is not asked of the host."""
    (model, optimizer), (twin, other) = (model_and_optimizer(name, torch.float64) for _ in range(2))
    graphs = Graphs()
    step = torch.compile(optimizer.step, backend=graphs)
    train_while_lr_falls(model, optimizer, 3, step=step)
    compiled, runs = graphs.compiled, graphs.runs
    train_while_lr_falls(model, optimizer, 20, first=3, step=step)
    assert graphs.compiled == compiled, "a new lr, a new scale, and nothing is compiled again"
    assert graphs.runs == runs + 20, "one graph a step"
    train_while_lr_falls(twin, other, 23)
    assert optimizer.scale > 1e-3
    if name.startswith("Adam") or "fused" in name:  # Adam is made capturable, the lr a tensor: both count in float32
        assert_same_run(model, optimizer, twin, other, rtol=1e-4, atol=1e-5)
    else:
        assert_same_run(model, optimizer, twin, other, rtol=1e-9, atol=1e-12)
    loss_of(model, 23).backward()
    next(model.parameters()).grad.view(-1)[0] = float("nan")
    before = copy.deepcopy([list(model.parameters()), optimizer.state_dict()])
    step()
    assert graphs.runs == runs + 21
    count_a_skipped_step(before[1])
    assert_identical([list(model.parameters()), optimizer.state_dict()], before)


def test_what_a_skipped_step_adds_to_the_state_is_zero():
    """The base creates a buffer at a step whose gradient is not finite, because its momentum was turned on."""
    model, optimizer = model_and_optimizer("SGD")
    step = torch.compile(optimizer.step, backend="eager")
    train_while_lr_falls(model, optimizer, 3, step=step)
    optimizer.param_groups[0]["momentum"] = 0.9
    for p in model.parameters():
        p.grad.fill_(float("nan"))
    step()
    assert optimizer.skipped_steps == 1
    assert not any(optimizer.state[p]["momentum_buffer"].any() for p in model.parameters())
    train_while_lr_falls(model, optimizer, 3, first=3, step=step)
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("lr", [1.0, torch.tensor(1.0)], ids=["float", "tensor"])
@pytest.mark.parametrize(
    ("name", "s_init"), [*((name, "auto") for name in BASES), ("SGD", 1e-8), ("AdamW_fused", 1e-8)]
)
def test_a_step_is_one_graph_without_a_break(name, s_init, lr):
    """From the second step on, and with "auto" from the third: the second reads the first scale."""
    first = 2 if s_init == "auto" else 1
    base, options = BASES[name]
    if isinstance(lr, torch.Tensor) and options.get("foreach"):
        options = {**options, "foreach": False}  # torch wants capturable=True for that, and a GPU for capturable
    model, lr = mlp(torch.float32), copy.deepcopy(lr)  # it is written into
    optimizer = mechanize(base, s_init=s_init)(model.parameters(), lr=lr, **options)
    graphs = Graphs()
    step = torch.compile(optimizer.step, backend=graphs, fullgraph=True)
    for t in range(first + 7):
        optimizer.zero_grad()
        loss_of(model, t).backward()
        (step if t >= first else optimizer.step)()
        optimizer.param_groups[0]["lr"] *= 0.9
    assert graphs.runs == 7
    assert graphs.compiled == (1 if isinstance(lr, torch.Tensor) else 2), "a float is taken for a constant once"


@pytest.mark.parametrize("name", ["SGD", "AdamW_fused"])
def test_no_graph_break_once_a_gpu_is_in_use(name, monkeypatch):
    """Whether a CUDA graph records is a question that breaks the compiler's own graph, on a GPU."""

    def is_capturing():
        torch._dynamo.graph_break()
        return False

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", is_capturing)
    test_a_step_is_one_graph_without_a_break(name, "auto", 1.0)


@pytest.mark.parametrize("name", ["SGD_momentum", "AdamW_fused"])
def test_a_start_without_units_is_compiled_once_known(name):
    (model, optimizer), (twin, other) = (model_and_optimizer(name, torch.float64, s_init="auto") for _ in range(2))
    graphs = Graphs()
    step = torch.compile(optimizer.step, backend=graphs)
    train_while_lr_falls(model, optimizer, 4, step=step)
    compiled, runs = graphs.compiled, graphs.runs
    train_while_lr_falls(model, optimizer, 20, first=4, step=step)
    assert graphs.compiled == compiled
    assert graphs.runs == runs + 20
    train_while_lr_falls(twin, other, 24)
    assert optimizer.scale > 1e-3
    assert_same_run(model, optimizer, twin, other, rtol=1e-4, atol=1e-5)


def test_a_compiled_step_in_bfloat16_is_the_uncompiled_one():
    (model, optimizer), (twin, other) = (model_and_optimizer("SGD_momentum", torch.bfloat16) for _ in range(2))
    train_while_lr_falls(model, optimizer, 12, step=torch.compile(optimizer.step, backend=Graphs()))
    train_while_lr_falls(twin, other, 12)
    assert_same_run(model, optimizer, twin, other, rtol=2e-2, atol=2e-3)


class DefaultBackend(Graphs):
    """What `torch.compile` takes if nothing is said, counted."""

    def __call__(self, graph, inputs):
        return super().__call__(torch._dynamo.lookup_backend("inductor")(graph, inputs), inputs)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor compiles C++ on CPU")
@pytest.mark.parametrize(("name", "s_init"), [("AdamW", 1e-3), ("AdamW_fused", "auto"), ("SGD_fused", 1e-3)])
def test_the_default_backend_gives_the_same_up_to_rounding(name, s_init):
    """It fuses and reorders. A float lr it compiles in, as it does with plain bases; a tensor is never looked at."""
    base, options = BASES[name]
    runs, graphs = [], DefaultBackend()
    for compiled in (True, False):
        model = mlp()
        optimizer = mechanize(base, s_init=s_init)(model.parameters(), lr=torch.tensor(1.0), **options)
        step = torch.compile(optimizer.step, backend=graphs, fullgraph=True) if compiled else optimizer.step
        for t in range(12):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            (optimizer.step if t < 2 else step)()
            optimizer.param_groups[0]["lr"].fill_(1.0 / (2 + t))
        runs.append((model, optimizer))
    assert (graphs.compiled, graphs.runs) == (1, 10)
    assert_same_run(*runs[0], *runs[1], rtol=1e-3, atol=1e-5)


def test_an_optimizer_that_was_patched_in_is_one_graph_too():
    graphs = Graphs()
    with patched() as built:
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=True)
        train_while_lr_falls(model, optimizer, 2)
        step = torch.compile(optimizer.step, backend=graphs, fullgraph=True)
        train_while_lr_falls(model, optimizer, 6, first=2, step=step)
    assert graphs.compiled == 2, "as without it: a float is taken for a constant once"
    assert built[0].steps == 8
