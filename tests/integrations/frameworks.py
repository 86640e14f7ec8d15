"""What runs in the two processes of test_frameworks.py: one small model, trained by the loop of one framework.

Each trains three epochs of four steps, from step FIRST on: 0 starts a new run, which saves after each epoch; another
number resumes in a new process from what that run saved. The outcome of each process is written to DIRECTORY.
"""

import os
import warnings

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.utils.data import DataLoader, Dataset

import layouts
from mechanic_pytorch import mechanize
from mechanic_pytorch.telemetry import read_out

PACKAGES = ["accelerate", "deepspeed", "lightning", "torch.distributed.fsdp", "transformers.trainer"]
EPOCHS, EPOCH_STEPS, STEPS, SHARE = 3, 4, 12, 4  # two processes take four samples each
OPTIONS = {"s_decay": 0.1, "s_init": 1e-4}
BASE = {"lr": 1.0, "weight_decay": 0.0}  # the Trainer decays some parameters only


class Samples(Dataset):
    """One epoch."""

    x = torch.randn(EPOCH_STEPS * 2 * SHARE, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        x = self.x[i]
        return {"x": x, "y": x.sum(0, keepdim=True) + x[:1] * x[1:2]}


def error(model, x, y):
    dtype = next(model.parameters()).dtype
    return (model(x.to(dtype)) - y.to(dtype)).square().mean()


def decay(step):
    return 1 - step / STEPS


def outcome(model, optimizer):
    weights = {name.replace("_fsdp_wrapped_module.", ""): layouts.whole(p) for name, p in model.named_parameters()}
    steps = read_out(optimizer).steps
    return {"weights": weights, "scale": optimizer.scale.clone(), "steps": steps}


def one_process(dtype=torch.float64):
    """Train without any framework: what all of them must equal."""
    model = layouts.build(dtype=dtype)
    optimizer = mechanize(torch.optim.AdamW, **OPTIONS)(model.parameters(), **BASE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
    for _ in range(EPOCHS):
        for batch in DataLoader(Samples(), batch_size=2 * SHARE):
            optimizer.zero_grad()
            error(model, **batch).backward()
            optimizer.step()
            schedule.step()
    return outcome(model, optimizer)


# --- Accelerate -------------------------------------------------------------------------------------------------------


def accelerate_ddp(directory, first, plugin=None):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False, fsdp_plugin=plugin)
    model = layouts.build()
    optimizer = mechanize(torch.optim.AdamW, **OPTIONS)(model.parameters(), **BASE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
    loader = DataLoader(Samples(), batch_size=SHARE)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    if first:
        accelerator.load_state(directory / str(first))
    for epoch in range(first // EPOCH_STEPS, EPOCHS):
        for batch in loader:
            with accelerator.accumulate(model):
                optimizer.zero_grad()
                accelerator.backward(error(model, **batch))
                optimizer.step()
                schedule.step()
        if not first:
            accelerator.save_state(directory / str((epoch + 1) * EPOCH_STEPS))
    return outcome(accelerator.unwrap_model(model), optimizer.optimizer)


def accelerate_fsdp2(directory, first):
    """Accelerate ignores FSDP on CPU, so it is told that it has GPUs; all that follows is what it does there."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        state_dict_type="SHARDED_STATE_DICT",
    )
    return accelerate_ddp(directory, first, plugin)


# --- Lightning --------------------------------------------------------------------------------------------------------


def lightning(directory, first, strategy, prepare, process_group=None, precision="64-true"):
    from lightning import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = layouts.build()

        def configure_model(self):
            self.net = prepare(self)

        def training_step(self, batch, _):
            return error(self.net, **batch)

        def configure_optimizers(self):
            cls = mechanize(torch.optim.AdamW, **OPTIONS, process_group=process_group and dist.group.WORLD)
            optimizer = cls(self.parameters(), **BASE)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module = Module()
    saved = ModelCheckpoint(directory, filename="{step}", save_top_k=-1)
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=2,
        precision=precision,
        max_epochs=EPOCHS,
        use_distributed_sampler=False,
        callbacks=[] if first else [saved],
        enable_checkpointing=not first,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rank = int(os.environ["RANK"])
    loader = DataLoader(Samples(), batch_size=SHARE, sampler=range(rank, len(Samples()), 2))
    trainer.fit(module, loader, ckpt_path=str(directory / f"step={first}.ckpt") if first else None)
    assert trainer.global_step == STEPS
    if isinstance(module.net, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(module.net):
            return outcome(module.net.module, trainer.optimizers[0])
    return outcome(module.net, trainer.optimizers[0])


def lightning_ddp(directory, first):
    from lightning.pytorch.strategies import DDPStrategy

    return lightning(directory, first, DDPStrategy(process_group_backend="gloo"), lambda module: module.net)


def lightning_fsdp2(directory, first, **options):
    from lightning.pytorch.strategies import ModelParallelStrategy

    def prepare(module):
        for layer in (*module.net[:2], module.net):
            fully_shard(layer, mesh=module.device_mesh["data_parallel"])
        return module.net

    return lightning(directory, first, ModelParallelStrategy(2, 1, **options), prepare, precision=None)


def lightning_fsdp2_full(directory, first):
    return lightning_fsdp2(directory, first, save_distributed_checkpoint=False)


def lightning_fsdp1(directory, first):
    """Lightning refuses exactly its own class on CPU, and cannot tell FSDP to wrap there, so the module does.

    Only with sharded checkpoints: torch itself crashes on CPU when it gathers a plain AdamW's state.
    """
    from lightning.pytorch.strategies import FSDPStrategy

    class OnCPU(FSDPStrategy):
        pass

    def prepare(module):
        policy = ModuleWrapPolicy({layouts.Block})
        cpu = torch.device("cpu")
        return FullyShardedDataParallel(module.net, auto_wrap_policy=policy, device_id=cpu, use_orig_params=True)

    strategy = OnCPU(process_group_backend="gloo", state_dict_type="sharded")
    return lightning(directory, first, strategy, prepare, process_group=True, precision=None)


# --- Hugging Face Trainer ---------------------------------------------------------------------------------------------


def trainer(directory, first):
    from transformers import Trainer, TrainingArguments

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = layouts.build()

        def forward(self, x, y):
            return {"loss": error(self.net, x, y)}

    arguments = TrainingArguments(
        directory,
        use_cpu=True,
        per_device_train_batch_size=SHARE,
        max_steps=STEPS,
        train_sampling_strategy="sequential",
        lr_scheduler_type="linear",
        max_grad_norm=0.0,
        save_strategy="no" if first else "steps",
        save_steps=EPOCH_STEPS,
        report_to=[],
        disable_tqdm=True,
    )
    cls = mechanize(torch.optim.AdamW, **OPTIONS)
    optimizer = cls, BASE
    run = Trainer(Model(), arguments, train_dataset=Samples(), optimizer_cls_and_kwargs=optimizer)
    run.train(resume_from_checkpoint=str(directory / f"checkpoint-{first}") if first else None)
    assert run.state.global_step == STEPS
    return outcome(run.model.net, run.optimizer.optimizer)


# --- DeepSpeed --------------------------------------------------------------------------------------------------------


def deepspeed_engine(stage, named=True, bf16=False):
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # for inference; it would be compiled for a minute
    deepspeed.init_distributed("gloo")
    config = {
        "train_batch_size": 2 * SHARE,
        "train_micro_batch_size_per_gpu": SHARE,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
        "gradient_clipping": 0.0,
    }
    model = layouts.build(dtype=torch.float32)
    cls = mechanize(torch.optim.AdamW, **OPTIONS, process_group=dist.group.WORLD if named else None)
    return deepspeed.initialize(model=model, optimizer=cls(model.parameters(), **BASE), config=config)[0]


def deepspeed_run(directory, first, stage, **options):
    engine = deepspeed_engine(stage, **options)
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    if first:
        engine.load_checkpoint(directory, tag=str(first))
    rank = int(os.environ["RANK"])
    loader = DataLoader(Samples(), batch_size=SHARE, sampler=range(rank, len(Samples()), 2))
    for epoch in range(first // EPOCH_STEPS, EPOCHS):
        for i, batch in enumerate(loader):
            optimizer.param_groups[0]["lr"] = decay(epoch * EPOCH_STEPS + i)
            engine.backward(error(engine, **batch))
            engine.step()
        if not first:
            engine.save_checkpoint(directory, tag=str((epoch + 1) * EPOCH_STEPS))
    return outcome(engine.module, optimizer)


def deepspeed_zero0(directory, first):
    return deepspeed_run(directory, first, 0, named=False)


def deepspeed_zero1(directory, first):
    return deepspeed_run(directory, first, 1)


def deepspeed_zero2(directory, first):
    return deepspeed_run(directory, first, 2)


def deepspeed_zero1_bf16(directory, first):
    return deepspeed_run(directory, first, 1, bf16=True)


def message_of(function, *arguments):
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)


def refused(directory, first):
    """Return the errors of what would be silently wrong: parts whose group is not named, and ZeRO-3."""
    fsdp1 = FullyShardedDataParallel(layouts.build(), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = mechanize(torch.optim.SGD)(fsdp1.parameters(), lr=1.0)
    fsdp1(Samples.x).sum().backward()

    def train(stage, named):
        engine = deepspeed_engine(stage, named)
        engine.backward(engine(Samples.x.float()).sum())
        engine.step()

    return [message_of(optimizer.step), message_of(train, 1, False), message_of(train, 3, True)]


FRAMEWORKS = {
    "accelerate": [accelerate_ddp, accelerate_fsdp2],
    "lightning": [lightning_ddp, lightning_fsdp2, lightning_fsdp2_full, lightning_fsdp1],
    "trainer": [trainer],
    "deepspeed": [deepspeed_zero0, deepspeed_zero1, deepspeed_zero2, deepspeed_zero1_bf16],
    "refusals": [refused],
}


def main(framework, directory, first):
    warnings.simplefilter("ignore")  # theirs; ours are tested elsewhere
    torch.set_num_threads(1)
    if framework == "refusals":
        dist.init_process_group("gloo")
    results = {run.__name__: run(directory / run.__name__, first) for run in FRAMEWORKS[framework]}
    torch.save(results, directory / f"{framework}-{first}-{os.environ['RANK']}.pt")
    dist.barrier()
    dist.destroy_process_group()
