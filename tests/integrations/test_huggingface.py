"""`MechanicCallback` in the real Trainer, against a loop without it."""

import re
import subprocess
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback

from mechanic_pytorch import is_mechanized, mechanize, telemetry
from mechanic_pytorch.integrations.huggingface import MechanicCallback

STEPS, BATCH = 12, 4
OPTIONS, LR, WEIGHT_DECAY = {"s_init": 1e-3}, 0.5, 0.1
X = torch.randn(STEPS * BATCH, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(4, 1).double()  # its bias is not decayed: two groups

    def forward(self, x):
        return {"loss": (self.net(x) - x.sum(1, keepdim=True)).square().mean()}


def trainer(directory, callbacks=(), cls=None, model=None, **options):
    options = {"logging_steps": 2, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, **options}
    arguments = TrainingArguments(
        directory,
        use_cpu=True,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        train_sampling_strategy="sequential",
        max_steps=STEPS,
        lr_scheduler_type="linear",
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=0.0,
        **options,
    )
    data = [{"x": x} for x in X]
    optimizer = (cls or mechanize(torch.optim.AdamW, **OPTIONS)), {"lr": LR}
    return Trainer(
        model or Model(),
        arguments,
        train_dataset=data,
        eval_dataset=data[:BATCH],
        callbacks=[MechanicCallback(), *callbacks],
        optimizer_cls_and_kwargs=optimizer,
    )


def expected():
    """Train without the Trainer; return the lr and the effective lr of each step."""
    model, rows = Model(), []
    groups = [
        {"params": [model.net.weight], "weight_decay": WEIGHT_DECAY},
        {"params": [model.net.bias], "weight_decay": 0.0},
    ]
    optimizer = mechanize(torch.optim.AdamW, **OPTIONS)(groups, lr=LR)
    for i, x in enumerate(X.split(BATCH)):
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - i / STEPS)
        optimizer.zero_grad()
        model(x)["loss"].backward()
        optimizer.step()
        rows.append((group["lr"], optimizer.effective_lr()[0]))
    return rows


def curve(run):
    """Return the logs of training, each by its step."""
    return {row["step"]: row for row in run.state.log_history if "learning_rate" in row}


def test_the_log_history_has_both_rates_as_a_loop_without_the_trainer_has_them(tmp_path, monkeypatch):
    reads = []
    read = telemetry.read
    monkeypatch.setattr("mechanic_pytorch.integrations.huggingface.read", lambda each: reads.append(1) or read(each))
    run = trainer(tmp_path, eval_strategy="steps", eval_steps=4)
    run.train()
    assert is_mechanized(run.optimizer.optimizer)
    assert isinstance(run.optimizer.optimizer, torch.optim.AdamW)
    rows = curve(run)
    assert sorted(rows) == [2, 4, 6, 8, 10, 12]
    for step, row in rows.items():
        lr, effective_lr = expected()[step - 1]
        assert row["learning_rate"] == pytest.approx(lr, rel=1e-12)
        assert row["effective_lr"] == pytest.approx(effective_lr, rel=1e-9)
        assert 0 < row["effective_lr"] != row["learning_rate"]
    assert rows[12]["effective_lr"] != pytest.approx(run.optimizer.optimizer.effective_lr()[0])  # the lr is 0 by then
    assert len(reads) == len(rows)
    assert not any("effective_lr" in row for row in run.state.log_history if "learning_rate" not in row)


def test_after_a_resume_the_history_goes_on_as_if_nothing_had_happened(tmp_path):
    whole = trainer(tmp_path, save_strategy="steps", save_steps=5, logging_steps=1)
    whole.train()
    resumed = trainer(tmp_path, logging_steps=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    rows = curve(resumed)
    assert sorted(rows) == list(range(1, STEPS + 1))
    for step, row in curve(whole).items():
        assert row["effective_lr"] == rows[step]["effective_lr"]
        assert row["learning_rate"] == rows[step]["learning_rate"]


@pytest.mark.parametrize("bar", [False, True], ids=["without a progress bar", "above the progress bar"])
def test_what_the_trainer_prints_has_the_effective_lr(bar, tmp_path, capsys):
    run = trainer(tmp_path, disable_tqdm=not bar)
    run.train()
    printed = re.findall(r"'learning_rate': '?([\d.e-]+)'?.*'effective_lr': '?([\d.e-]+)'?", capsys.readouterr().out)
    expected = [(row["learning_rate"], row["effective_lr"]) for row in curve(run).values()]
    assert [tuple(map(float, each)) for each in printed] == [pytest.approx(each, rel=1e-3) for each in expected]
    assert len(printed) == STEPS // 2


def test_callbacks_that_come_after_it_log_it_too(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "log"))
    run = trainer(tmp_path, callbacks=[TensorBoardCallback()])
    run.train()
    events = EventAccumulator(str(tmp_path / "log"))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("train/effective_lr")}
    assert logged == {step: pytest.approx(row["effective_lr"], rel=1e-6) for step, row in curve(run).items()}


def test_accumulated_batches_are_one_step(tmp_path):
    run = trainer(tmp_path, gradient_accumulation_steps=2, logging_steps=1)
    seen = []
    run.create_optimizer()
    run.optimizer.register_step_post_hook(lambda optimizer, *_: seen.append(optimizer.effective_lr()[0]))
    run.train()
    assert [row["effective_lr"] for row in curve(run).values()] == seen
    assert len(seen) == STEPS


def test_a_plain_optimizer_is_refused(tmp_path):
    with pytest.raises(
        TypeError, match=r"must be mechanized. Got AcceleratedOptimizer. Remedy: build it with mechanize"
    ):
        trainer(tmp_path, cls=torch.optim.AdamW).train()


def test_without_transformers_the_extra_is_named():
    """A new process, in which it is hidden."""
    code = "import sys; sys.modules['transformers'] = None\nimport mechanic_pytorch.integrations.huggingface"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=False)
    assert "Remedy: pip install 'mechanic-pytorch[huggingface]'." in done.stderr


@pytest.mark.parametrize("launched", [["--cpu", "--num_processes", "1"], ["--multi_gpu", "--num_processes", "2"]])
def test_accelerate_launch_starts_the_command(tmp_path, launched):
    """As docs/huggingface.md says. Two processes of a CPU need no GPU, but the launcher that is for some."""
    script = tmp_path / "train.py"
    script.write_text(
        """
import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
model = torch.nn.Linear(4, 1)
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
for _ in range(20):
    optimizer.zero_grad()
    accelerator.backward((model(torch.ones(8, 4)) - 1).square().mean())
    optimizer.step()
accelerator.print(accelerator.num_processes, "at work")
"""
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", *launched, "--mixed_precision", "no"]
    command = [*launch, "-m", "mechanic_pytorch", "run", "--strict", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("use AdamW with lr=") == 1
    assert f"{launched[-1]} at work" in done.stdout
