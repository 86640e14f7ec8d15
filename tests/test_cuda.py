"""What only a GPU can show: that a step never makes the host wait, and that a CUDA graph can hold it."""

import warnings
from contextlib import contextmanager

import pytest
import torch

import problems
from mechanic_pytorch import kernels, mechanize
from mechanic_pytorch.telemetry import Trace, read_out
from problems import mlp

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BASES = {
    "SGD_fused": (torch.optim.SGD, {"fused": True, "momentum": 0.9}),
    "AdamW_fused": (torch.optim.AdamW, {"fused": True, "capturable": True}),
    "AdamW_capturable": (torch.optim.AdamW, {"foreach": True, "capturable": True}),
}


@contextmanager
def syncs_are_errors():
    """Let every operation raise for which the host would wait."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls this mode a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def model_and_optimizer(name, **mechanic_options):
    torch.manual_seed(0)
    base, options = BASES[name]
    model = mlp(torch.float32).cuda()
    optimizer = mechanize(base, s_init=1e-3, **mechanic_options)(model.parameters(), lr=1.0, **options)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    return model, optimizer


def gradients(model, steps):
    """Return gradients that point away from 0, with noise, and do not depend on where the weights have gone."""
    torch.manual_seed(1)
    return [[p.detach() + torch.randn_like(p) for p in model.parameters()] for _ in range(steps)]


def set_gradients(model, values):
    for p, value in zip(model.parameters(), values, strict=True):
        p.grad.copy_(value)


@pytest.mark.parametrize("name", BASES)
def test_a_step_never_waits_for_the_gpu(name):
    model, optimizer = model_and_optimizer(name, skip_nonfinite=name.endswith("fused"))
    for values in gradients(model, 3):
        set_gradients(model, values)
        optimizer.step()
    with syncs_are_errors():
        optimizer.step()


def test_a_trace_never_waits_for_the_gpu_and_a_read_out_is_one_copy():
    model, optimizer = model_and_optimizer("AdamW_fused")
    trace = Trace(optimizer)
    for values in gradients(model, 3):
        set_gradients(model, values)
        optimizer.step()
    with syncs_are_errors():
        optimizer.step()
    assert [row.steps for row in trace.read()] == [1, 2, 3, 4]
    assert trace.read()[-1] == read_out(optimizer)
    for read in (trace.read, lambda: read_out(optimizer)):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            read()
        assert sum("DtoH" in event.name for event in profile.events()) == 1


@pytest.mark.parametrize("kernel", ["triton", "foreach"])
@pytest.mark.parametrize("name", BASES)
def test_a_cuda_graph_replays_the_whole_step(name, kernel, monkeypatch):
    if kernel == "triton" and (missing := kernels.missing_for_triton(torch.device("cuda"))):
        pytest.skip(f"needs {missing}")
    monkeypatch.setenv("MECHANIC_KERNEL", kernel)
    (model, optimizer), (twin, other) = model_and_optimizer(name), model_and_optimizer(name)
    values = gradients(model, 12)
    values[8][0].view(-1)[0] = float("nan")  # a step to be skipped
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for t in range(4):
            set_gradients(model, values[t])
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for t in range(4, 12):
        set_gradients(model, values[t])
        graph.replay()
    for t in range(12):
        set_gradients(twin, values[t])
        other.step()
    assert optimizer.skipped_steps == other.skipped_steps == 1
    assert optimizer.scale > 1e-3
    torch.testing.assert_close(optimizer.scale, other.scale)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
        for key, value in optimizer.state[p].items():
            torch.testing.assert_close(value, other.state[q][key])


@pytest.mark.parametrize("s_init", [1e-3, "auto"])
def test_two_optimizers_on_two_streams(s_init):
    """What a kernel keeps for later must not cross from one stream to another."""
    runs = []
    for streams in (2, 1):
        streams = [torch.cuda.Stream() if streams == 2 else torch.cuda.current_stream() for _ in range(2)]
        torch.manual_seed(0)
        params = [torch.randn(300_000, device="cuda", requires_grad=True) for _ in range(2)]
        optimizers = [mechanize(torch.optim.AdamW, s_init=s_init)([p], lr=1.0, fused=True) for p in params]
        torch.cuda.synchronize()
        for _ in range(10):
            for p, optimizer, stream in zip(params, optimizers, streams, strict=True):
                with torch.cuda.stream(stream):
                    p.grad = 2 * p.detach()
                    optimizer.step()
        torch.cuda.synchronize()
        runs.append((params, [optimizer.scale for optimizer in optimizers]))
    assert runs[0][1][0] > 1e-5
    for a, b in zip(*runs, strict=True):
        assert all(map(torch.equal, a, b))


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # the scaler skips the first step
@pytest.mark.parametrize("s_init", [1e-8, "auto"])
@pytest.mark.parametrize("name", BASES)
def test_float16_autocast_with_a_scaler_trains(name, s_init):
    base, options = BASES[name]
    torch.manual_seed(0)
    model, scaler = mlp(torch.float32).cuda(), torch.amp.GradScaler("cuda", init_scale=2.0**24)  # it overflows at first
    optimizer = mechanize(base, s_init=s_init)(model.parameters(), lr=1.0, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    images, labels = problems.IMAGES.cuda(), problems.LABELS.cuda()
    for _ in range(300):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
    assert scaler.get_scale() < 2.0**24
    assert optimizer.scale > 0
    assert loss < 0.2
    assert read_out(optimizer).kernels == {"cuda:0": "triton"}


def test_parameters_on_two_devices():
    """Each has the kernel of its device; the tuner is one."""
    params = [torch.ones(5, device=device).requires_grad_() for device in ("cuda", "cpu")]
    twins = [torch.ones(5).requires_grad_() for _ in params]
    optimizers = [mechanize(torch.optim.SGD, s_init=1e-3)(list_, lr=1.0) for list_ in (params, twins)]
    for _ in range(5):
        for optimizer in optimizers:
            for p in optimizer.param_groups[0]["params"]:
                p.grad = 2 * p.detach()
            optimizer.step()
    assert optimizers[0].scale > 1e-3
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p.cpu(), q)
