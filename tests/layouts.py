"""What runs in the processes of test_distributed.py: one small model in every layout that PyTorch has."""

import copy
import traceback
import warnings
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from benchmarks.counting import Operations
from helpers import stored_of
from mechanic_pytorch import mechanize
from mechanic_pytorch.distributed import sum_over_processes

STEPS, BATCH = 15, 8
BASES = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"foreach": False}),  # tensor parallelism mixes DTensors and plain tensors
    "adamw_fused": (torch.optim.AdamW, {"fused": True}),
    "muon": (torch.optim.Muon, {}),
}


class Block(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.norm = nn.LayerNorm(6) if bias else nn.Identity()
        self.up, self.down = nn.Linear(6, 8, bias=bias), nn.Linear(8, 6, bias=bias)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def build(bias=True, dtype=torch.float64):
    """Return a model whose tensors have 6, 8, 3 and 1 rows: uneven and empty shards among 2 and 4 processes."""
    torch.manual_seed(0)
    return nn.Sequential(Block(bias), Block(bias), nn.Linear(6, 3, bias=bias), nn.Linear(3, 1, bias=bias)).to(dtype)


def loss_of(model, t, part=slice(None), dtype=None):
    x = torch.randn(BATCH, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
    y = x.sum(1, keepdim=True) + x[:, :1] * x[:, 1:2]
    dtype = dtype or next(model.parameters()).dtype
    x, y = (tensor.to(dtype)[part] for tensor in (x, y))
    return (model(x) - y).square().mean()


def share_of(rank, size):
    return slice(rank * BATCH // size, (rank + 1) * BATCH // size)


def whole(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


# --- layouts: each returns the model, its optimizer, this process's share of a batch, and how to see whole weights ----


common = {"s_init": 1e-4, "s_decay": 0.1}  # options of all of them; `changed` changes them


@contextmanager
def changed(**options):
    before = dict(common)
    common.update(options)
    yield
    common.clear()
    common.update(before)


def groups(model, params):
    """Return the parameters in two groups, if each is to have a scale: those of the first block, and the others."""
    params = list(params)
    if not common.get("per_group"):
        return params
    body = {id(p) for p in getattr(model, "module", model)[0].parameters()}
    first = [p for p in params if id(p) in body]
    return [{"params": first, "lr": 0.5}, {"params": [p for p in params if id(p) not in body]}]


def setup(model, params, base, part=slice(None), process_group=None, weights=None, lr=1.0, **options):
    cls, kwargs = BASES[base]
    mechanized = mechanize(cls, process_group=process_group, **common, **options)
    optimizer = mechanized(groups(model, params), lr=lr, **kwargs)
    weights = weights or (lambda: {name: whole(p) for name, p in model.named_parameters()})
    return SimpleNamespace(model=model, optimizer=optimizer, part=part, weights=weights)


def single(base, rank=0, size=1, dtype=torch.float64, **options):
    model = build(base != "muon", dtype)
    return setup(model, model.parameters(), base, **options)


def ddp(base, rank, size):
    model = DistributedDataParallel(build(base != "muon"))
    weights = lambda: {name: whole(p) for name, p in model.module.named_parameters()}  # noqa: E731
    return setup(model, model.parameters(), base, share_of(rank, size), weights=weights)


def shard(model, mesh=None, **options):
    for layer in (*model[:2], model):
        fully_shard(layer, mesh=mesh, **options)
    return model


def fsdp2(base, rank, size, dtype=torch.float64, policy=None, **options):
    model = shard(build(base != "muon", dtype), **({"mp_policy": policy} if policy else {}))
    return setup(model, model.parameters(), base, share_of(rank, size), **options)


def tied(model):
    """Let the blocks share a weight."""
    model[1].up.weight = model[0].up.weight
    return model


def single_tied(base, rank=0, size=1):
    model = tied(build(base != "muon"))
    return setup(model, model.parameters(), base)


def fsdp2_tied_flat(base, rank, size):
    model = tied(build(base != "muon"))
    fully_shard(model)
    return setup(model, model.parameters(), base, share_of(rank, size))


def fsdp2_tied_nested(base, rank, size):
    """Both blocks belong to the same call of `fully_shard`: torch's rule for weights that are shared."""
    model = tied(build(base != "muon"))
    fully_shard(model[2])
    fully_shard(model)
    return setup(model, model.parameters(), base, share_of(rank, size))


def hsdp(base, rank, size):
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    model = shard(build(base != "muon"), mesh)
    return setup(model, model.parameters(), base, share_of(rank, size))


def tensor_parallel(model, mesh):
    for block in model[:2]:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def tp(base, rank, size):
    model = tensor_parallel(build(base != "muon"), init_device_mesh("cpu", (size,)))
    return setup(model, model.parameters(), base)


def sequence_parallel(base, rank, size):
    """The norms work on a part of the batch each; their replicated weights are counted once."""
    mesh = init_device_mesh("cpu", (size,))
    model = build()
    for block in model[:2]:
        plan = {
            "norm": SequenceParallel(sequence_dim=0),
            "up": ColwiseParallel(input_layouts=Shard(0)),
            "down": RowwiseParallel(output_layouts=Shard(0)),
        }
        parallelize_module(block, mesh, plan)
    enter = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(0), use_local_output=True)
    leave = PrepareModuleOutput(output_layouts=Shard(0), desired_output_layouts=Replicate(), use_local_output=True)
    parallelize_module(model[0], mesh, enter)
    parallelize_module(model[1], mesh, leave)
    return setup(model, model.parameters(), base)


def fsdp2_tp(base, rank, size):
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "tp"))
    model = shard(tensor_parallel(build(base != "muon"), mesh["tp"]), mesh["dp"])
    return setup(model, model.parameters(), base, share_of(mesh["dp"].get_local_rank(), 2))


def fsdp1(base, rank, size):
    model = FullyShardedDataParallel(build(), use_orig_params=True, device_id=torch.device("cpu"))

    def weights():
        with FullyShardedDataParallel.summon_full_params(model):
            return {name: whole(p) for name, p in model.module.named_parameters()}

    return setup(model, model.parameters(), base, share_of(rank, size), dist.group.WORLD, weights)


def zero(base, rank, size):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns at import, which the processes tolerate

    model = DistributedDataParallel(build(base != "muon"))
    cls, kwargs = BASES[base]
    mechanized = mechanize(cls, process_group=dist.group.WORLD, **common)
    optimizer = ZeroRedundancyOptimizer(groups(model, model.parameters()), mechanized, lr=1.0, **kwargs)
    weights = lambda: {name: whole(p) for name, p in model.module.named_parameters()}  # noqa: E731
    return SimpleNamespace(model=model, optimizer=optimizer, part=share_of(rank, size), weights=weights)


def owners(base, rank, size):
    """As with pipeline stages: each process optimizes parameters that the others do not have."""
    model = build(base != "muon")
    mine = [p for i, p in enumerate(model.parameters()) if i % size == rank]
    run = setup(model, mine, base, process_group=dist.group.WORLD)

    def bring_the_others(*_):
        for i, p in enumerate(model.parameters()):
            dist.broadcast(p.detach(), i % size)

    run.optimizer.register_step_post_hook(bring_the_others)
    return run


def train(run, steps=STEPS, first=0, after_backward=lambda t: None):
    for t in range(first, first + steps):
        run.model.zero_grad()
        loss_of(run.model, t, run.part).backward()
        after_backward(t)
        run.optimizer.step()
    return run


def outcome(run):
    optimizer = getattr(run.optimizer, "optim", run.optimizer)  # ZeRO's inner one
    return {"weights": run.weights(), "scale": optimizer.scale.clone(), "skipped": optimizer.skipped_steps}


# --- jobs: what is measured in every process --------------------------------------------------------------------------


def trajectory(layout, base, rank, size):
    return outcome(train(globals()[layout](base, rank, size)))


def auto_start(layout, base, rank=0, size=1):
    with changed(s_init="auto"):
        return outcome(train(globals()[layout](base, rank, size)))


def per_group(layout, base, s_init, rank=0, size=1):
    """A scale for each of two groups, of which the first has no gradient at some steps, in no process."""
    with changed(per_group=True, s_init=s_init):
        run = globals()[layout](base, rank, size)

        def drop(t):
            if t % 5 == 3 or t == 0:
                for p in run.optimizer.param_groups[0]["params"]:
                    p.grad = None

        return outcome(train(run, after_backward=drop))


def collectives(layout, base, rank, size):
    """Calls and host reads of a step, after the first ones, and the sizes of what is reduced."""
    with changed(per_group=base.endswith("per_group")):
        run = train(globals()[layout](base.removesuffix(" per_group"), rank, size), 3)
    loss_of(run.model, 3, run.part).backward()
    sizes, original = [], dist.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        with CommDebugMode() as calls:
            run.optimizer.step()
    finally:
        dist.all_reduce = original
    counts = {str(key): count for key, count in calls.get_comm_counts().items()}
    loss_of(run.model, 3, run.part).backward()
    with Operations() as operations:
        run.optimizer.step()
    return {"counts": counts, "sizes": sizes, "host_reads": operations.host_reads}


def missing_gradient(layout, rank, size):
    """At some steps one process has no gradient at all."""
    run = globals()[layout]("sgd", rank, size)

    def drop(t):
        if t % 3 == 1 and rank == 1:
            run.optimizer.zero_grad()

    return outcome(train(run, 12, after_backward=drop))


def empty_process(rank, size):
    """One process has all parameters, the other none, as happens to small models under ZeRO."""
    model = build(dtype=torch.float32)
    params = list(model.parameters()) if rank == 0 else [{"params": []}]
    return outcome(train(setup(model, params, "sgd", process_group=dist.group.WORLD), 12))


def one_bad_rank(layout, base, rank, size):
    """The gradients of one process are not finite, at the first step and at a later one; then training goes on."""
    run = globals()[layout](base, rank, size)

    def poison(t):
        if t in (0, 5) and rank == 1:
            p = next(p for group in run.optimizer.param_groups for p in group["params"] if p.grad is not None)
            grad = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            grad.view(-1)[0] = float("nan")

    return outcome(train(run, 12, after_backward=poison))


def frozen(layout, base, rank=0, size=1):
    """Ten steps, ten frozen ones with a bad gradient in one process, ten steps."""
    run = train(globals()[layout](base, rank, size), 10)
    run.optimizer.freeze_scale()

    def poison(t):
        if t == 15 and rank == size - 1:
            p = next(p for group in run.optimizer.param_groups for p in group["params"] if p.grad is not None)
            (p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad).view(-1)[0] = float("nan")

    train(run, 10, first=10, after_backward=poison)
    run.optimizer.unfreeze_scale()
    return outcome(train(run, 10, first=20))


def sums_of_others(rank, size):
    """Add up over two groups, in which one process has a number each and the other has none."""
    groups = [(dist.new_group(range(size)),) for _ in range(2)]
    one = torch.ones(1)
    partial = {(): one} | (dict.fromkeys(groups, one) if rank else {})
    return sum_over_processes(partial, groups).tolist(), one.tolist()


def one_overflow(rank, size):
    """A fused base, whose `GradScaler` has found an overflow in one process alone."""
    run = fsdp2("adamw_fused", rank, size)

    def overflow(t):
        run.optimizer.found_inf = torch.tensor(float(t == 5 and rank == 1))

    return outcome(train(run, 12, after_backward=overflow))


def accumulated(layout, rank, size):
    """Two halves of each batch, one synchronisation; gradients clipped by their global norm."""
    run = globals()[layout]("sgd", rank, size)
    n = (run.part.stop or BATCH) - (run.part.start or 0)
    middle = (run.part.start or 0) + n // 2
    halves = slice(run.part.start or 0, middle), slice(middle, run.part.stop or BATCH)
    for t in range(20):
        run.model.zero_grad()
        for i, part in enumerate(halves):
            if layout == "fsdp2":
                run.model.set_requires_gradient_sync(i == 1)
            with run.model.no_sync() if layout == "ddp" and i == 0 else torch.enable_grad():
                (loss_of(run.model, t, part) / 2).backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.5)
        run.optimizer.step()
    return outcome(run)


def mixed_precision(rank, size):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return outcome(train(fsdp2("adamw", rank, size, torch.float32, policy)))


def mixed_precision_by_hand(size):
    """The same in one process: forward and backward in bfloat16, the mean of the processes' gradients in float32."""
    run = single("adamw", dtype=torch.float32)
    weights = dict(run.model.named_parameters())

    for t in range(STEPS):
        gradients = []
        for rank in range(size):
            low = {name: p.detach().bfloat16().requires_grad_() for name, p in weights.items()}

            def model(x, low=low):
                return torch.func.functional_call(run.model, low, x.bfloat16())

            loss = loss_of(model, t, share_of(rank, size), torch.float32)
            gradients.append(torch.autograd.grad(loss, list(low.values())))
        for p, parts in zip(weights.values(), zip(*gradients, strict=True), strict=True):
            p.grad = torch.stack([part.float() for part in parts]).mean(0)
        run.optimizer.step()
    return outcome(run)


def mismatch(name, rank, size):
    options = {
        "s_init": {"s_init": 1e-4 * (rank + 1)},
        "betas": {"betas": (0.9, 0.99)[: rank + 1]},
        "the number of scales": {"per_group": True},
    }[name]
    model = shard(build())
    groups = [{"params": model.parameters()}] + [{"params": []}] * rank
    optimizer = mechanize(torch.optim.SGD, **options)(groups, lr=1.0)
    loss_of(model, 0).backward()
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)


def save(directory, dtype, per_group, rank, size):
    """Train, save, and train on: the last is what every resumed run must equal."""
    with changed(per_group=per_group):
        run = train(fsdp2("adamw", rank, size, dtype), 10)
    model, optimizer = get_state_dict(run.model, run.optimizer)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=directory)
    return outcome(train(run, 10, first=10))


def resume(directory, dtype, per_group, rank, size):
    with changed(per_group=per_group):
        run = fsdp2("adamw", rank, size, dtype) if size > 1 else single("adamw", dtype=dtype)
    model, optimizer = get_state_dict(run.model, run.optimizer)  # takes a dummy step
    state = {"model": model, "optimizer": optimizer}
    dcp.load(state, checkpoint_id=directory)
    set_state_dict(run.model, run.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    deltas = [stored_of(run.optimizer, p).dtype for p in run.optimizer.state]
    return {**outcome(train(run, 10, first=10)), "delta_dtypes": set(deltas)}


def full_state_dict(rank, size):
    """Gather to whole tensors on the CPU, and load them back into shards."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    run = train(fsdp2("adamw", rank, size), 10)
    model, optimizer = get_state_dict(run.model, run.optimizer, options=options)
    everywhere = copy.deepcopy([model, optimizer])  # what is on the CPU already is not copied by torch
    dist.broadcast_object_list(everywhere)
    twin = fsdp2("adamw", rank, size)
    options = StateDictOptions(full_state_dict=True)
    model, optimizer = everywhere
    set_state_dict(twin.model, twin.optimizer, model_state_dict=model, optim_state_dict=optimizer, options=options)
    return outcome(train(run, 10, first=10)), outcome(train(twin, 10, first=10))


def work(rank, size, store, out, jobs):
    """Do all jobs in this process and save what they return; an exception is a result, too."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch's own, about CPU; ours are tested elsewhere
    dist.init_process_group(
        "gloo", rank=rank, world_size=size, init_method=f"file://{store}", timeout=timedelta(seconds=60)
    )
    results = {}
    for job in jobs:
        function, *arguments = job
        try:
            results[job] = globals()[function](*arguments, rank, size)
        except Exception:
            results[job] = traceback.format_exc()
    torch.save(results, f"{out}/{rank}.pt")
    dist.destroy_process_group()
