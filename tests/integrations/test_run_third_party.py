"""Training loops of other packages, which build their optimizers by themselves, under `patched` and `mechanic run`."""

import re
import subprocess
import sys

import pytest
import torch

from mechanic_pytorch import is_mechanized, patched

LIGHTNING = """
import torch
from lightning import LightningModule, Trainer

class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 1)

    def training_step(self, batch, _):
        x, y = batch
        return (self.net(x) - y).square().mean()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-6)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=15)]

torch.manual_seed(0)
x = torch.randn(64, 4)
y = x.sum(1, keepdim=True)
module = Module()
trainer = Trainer(accelerator="cpu", max_epochs=15, logger=False, enable_checkpointing=False,
                  enable_progress_bar=False, enable_model_summary=False)
trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 8))
print("loss", (module.net(x) - y).square().mean().item())
"""


def test_the_trainer_of_hugging_face(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    row = torch.arange(8) % 16
    arguments = TrainingArguments(
        tmp_path,
        use_cpu=True,
        learning_rate=1e-6,
        max_steps=60,
        per_device_train_batch_size=4,
        weight_decay=0.01,  # two groups
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    with torch.no_grad():
        first = model(row[None], labels=row[None]).loss.item()
    with patched() as built:
        trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row}] * 16)
        trainer.train()
    (one,) = built
    assert one.is_mechanized
    assert one.base is torch.optim.AdamW
    assert one.steps == 60
    assert one.script_lrs == [1e-6, 1e-6]
    assert one.learned_lr()[0] > 1e-4
    with torch.no_grad():
        assert model(row[None], labels=row[None]).loss.item() < first / 2


def test_a_script_of_lightning(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(LIGHTNING, encoding="utf-8")

    def loss(*arguments):
        command = [sys.executable, *arguments, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
        return float(re.search(r"^loss (\S+)$", done.stdout, re.MULTILINE)[1]), done.stderr

    plain, _ = loss()
    learned, report = loss("-m", "mechanic_pytorch", "run", "--report", str(tmp_path / "report"))
    assert learned < plain / 10
    assert re.search(r"AdamW\W+120\W+0\W+0\W+1\.0e-06", report)
    assert report.count("to train without Mechanic, use AdamW with lr=") == 1
    assert '"loss": [\n        [\n          1,' in (tmp_path / "report" / "report.json").read_text(encoding="utf-8")


def test_accelerate():
    from accelerate import Accelerator

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    with patched() as built:
        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-6))
        x = torch.randn(64, 4)
        for _ in range(60):
            optimizer.zero_grad()
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            accelerator.backward(loss)
            optimizer.step()
    assert [(one.base, one.steps) for one in built] == [(torch.optim.SGD, 60)]
    assert is_mechanized(optimizer.optimizer)
    assert loss < 0.5


def test_skorch():
    skorch = pytest.importorskip(
        "skorch", reason="not among the development dependencies; tested where it is installed"
    )
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    net = skorch.NeuralNetRegressor(
        torch.nn.Linear, module__in_features=4, module__out_features=1, lr=1e-6, max_epochs=20, verbose=0
    )
    with patched() as built:
        net.fit(x.numpy(), x.sum(1, keepdim=True).numpy())
    assert is_mechanized(net.optimizer_)
    assert built[-1].learned_lr()[0] > 1e-4


def test_stable_baselines3():
    sb3 = pytest.importorskip(
        "stable_baselines3", reason="not among the development dependencies; tested where it is installed"
    )
    with patched() as built:
        model = sb3.PPO("MlpPolicy", "CartPole-v1", n_steps=64, batch_size=32, device="cpu", seed=0)
        model.learn(128)
    assert is_mechanized(model.policy.optimizer)
    assert built[0].steps > 0
