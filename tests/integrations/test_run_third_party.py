"""Training loops of other packages, which build their optimizers by themselves, under `patched` and `mechanic run`."""

import os
import re
import signal
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


@pytest.mark.xdist_group("frameworks")
def test_a_script_of_lightning(tmp_path, forks_of_frameworks):
    path = tmp_path / "script.py"
    path.write_text(LIGHTNING, encoding="utf-8")

    def loss(*arguments):
        done = forks_of_frameworks.run([*arguments, path], tmp_path, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return float(re.search(r"^loss (\S+)$", done.stdout, re.MULTILINE)[1]), done.stderr

    plain, _ = loss()
    learned, report = loss("-m", "mechanic_pytorch", "run", "--report", str(tmp_path / "report"))
    assert learned < plain / 10
    assert re.search(r"AdamW\W+120\W+0\W+0\W+1\.0e-06", report)
    assert report.count("to train without Mechanic, use AdamW with lr=") == 1
    assert '"loss": [\n        [\n          1,' in (tmp_path / "report" / "report.json").read_text(encoding="utf-8")


PREEMPTED = """
import os, signal, sys
from lightning import Callback

def handler():
    theirs = signal.getsignal(signal.SIGTERM)
    return getattr(theirs, "signal_handlers", theirs)

class Preempt(Callback):
    def on_train_batch_end(self, *_):
        print("in fit", [each.__name__ for each in handler()])
        os.kill(os.getpid(), signal.SIGTERM)

trainer.callbacks.append(Preempt())
print("before", int(handler()))
try:
    trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 8))
except SystemExit as error:
    print("after", type(error).__name__, trainer.received_sigterm, int(handler()), flush=True)
    if "again" in sys.argv:
        os.kill(os.getpid(), signal.SIGTERM)
    raise
"""


@pytest.mark.xdist_group("frameworks")
def test_lightning_handles_sigterm_as_it_does_without_us(tmp_path, forks_of_frameworks):
    """It looks who handles SIGTERM first, calls that one after its own, and puts it back at the end."""
    path = tmp_path / "script.py"
    path.write_text(LIGHTNING[: LIGHTNING.index("trainer.fit")] + PREEMPTED, encoding="utf-8")

    def ends(*arguments):
        plain = forks_of_frameworks.run([path, *arguments], tmp_path, cwd=tmp_path)
        ours = forks_of_frameworks.run(["-m", "mechanic_pytorch", "run", path, *arguments], tmp_path, cwd=tmp_path)
        assert ours.stdout == plain.stdout, ours.stderr
        return plain, ours

    plain, ours = ends()
    assert plain.stdout.splitlines() == [
        "before 0",
        "in fit ['_sigterm_notifier_fn']",
        "after SIGTERMException True 0",
    ]
    assert plain.returncode == ours.returncode == 0, "Lightning's choice"
    assert ours.stderr.endswith("mechanic: no lr is advised, because the script ended with SIGTERMException\n")
    plain, ours = ends("again")
    assert plain.returncode == ours.returncode == -signal.SIGTERM
    assert ours.stderr.endswith("mechanic: no lr is advised, because the script ended with SIGTERM\n")


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
    from skorch import NeuralNetRegressor

    x = torch.randn(64, 4)
    y = x.sum(1, keepdim=True)

    def fit():
        torch.manual_seed(0)
        net = NeuralNetRegressor(
            torch.nn.Linear, module__in_features=4, module__out_features=1, lr=1e-6, max_epochs=40, verbose=0
        )
        net.fit(x.numpy(), y.numpy())
        return net, (torch.from_numpy(net.predict(x.numpy())) - y).square().mean()

    with patched() as built:
        net, loss = fit()
    assert is_mechanized(net.optimizer_)
    assert [(one.base, one.script_lrs) for one in built] == [(torch.optim.SGD, [1e-6])]
    assert built[0].steps == 40
    assert built[0].learned_lr()[0] > 1e-3
    assert loss < fit()[1] / 10


def test_stable_baselines3(tmp_path):
    from stable_baselines3 import PPO

    with patched() as built:
        model = PPO("MlpPolicy", "CartPole-v1", n_steps=64, batch_size=32, n_epochs=3, device="cpu", seed=0)
        model.learn(128)
        model.save(tmp_path / "model")
        again = PPO.load(tmp_path / "model", device="cpu")
    first, second = model.policy.optimizer, again.policy.optimizer
    assert is_mechanized(first)
    assert is_mechanized(second)
    assert built[0].base is torch.optim.Adam
    assert built[0].steps == 2 * 3 * 64 / 32
    assert built[0].learned_lr()[0] > 0
    assert second.learned_lr() == first.learned_lr()
    assert torch.equal(second.scale, first.scale)


LIGHTNING_THAT_STARTS_PROCESSES = """
import os, torch
from lightning import LightningModule, Trainer

class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 1)

    def training_step(self, x, _):
        return self.net(x).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def on_train_end(self):
        os.write(1, f"{type(self.optimizers().optimizer).__name__} {self.net.weight.tolist()}\\n".encode())

torch.manual_seed(0)
trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False, enable_progress_bar=False,
                  enable_checkpointing=False, enable_model_summary=False)
trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(16, 4), 4))
"""


@pytest.mark.xdist_group("distributed")
def test_processes_that_lightning_starts_train_like_the_first_one(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(LIGHTNING_THAT_STARTS_PROCESSES, encoding="utf-8")
    launched = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"}
    environment = {key: value for key, value in os.environ.items() if key not in launched}
    command = [sys.executable, "-m", "mechanic_pytorch", "run", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    weights = re.findall(r"^AdamW (.*)$", done.stdout, re.MULTILINE)
    assert len(weights) == 2, done.stdout
    assert weights[0] == weights[1]
    assert "use torchrun --nproc-per-node 2 -m mechanic_pytorch run" in done.stderr
