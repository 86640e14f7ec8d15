"""`MechanicMonitor` in the real Lightning, under both of its import names."""

import csv
import importlib
import re
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from mechanic_pytorch import mechanize, telemetry
from mechanic_pytorch.integrations.lightning import MechanicMonitor

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*is deprecated:FutureWarning"),
]
STEPS = 8  # per epoch


def module_of(name, groups=1, optimizers=1):
    """Return a module that notes the effective lrs with which each of its batches begins."""
    lightning = importlib.import_module(name)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
            self.automatic_optimization = optimizers == 1
            self.seen = []

        def training_step(self, batch, _):
            self.seen.append([telemetry.read_out(each) for each in self.trainer.optimizers if telemetry.unwrap(each)])
            loss = self.net(batch[0]).square().mean()
            self.log("loss", loss.detach())
            if optimizers > 1:
                for each in self.optimizers():
                    each.zero_grad()
                self.manual_backward(loss)
                for each in self.optimizers():
                    each.step()
            return loss

        def configure_optimizers(self):
            cls = mechanize(torch.optim.AdamW, s_init=1e-3)
            layers = [{"params": layer.parameters(), "lr": 1.0 / (i + 1)} for i, layer in enumerate(self.net)]
            if optimizers > 1:
                plain = torch.optim.SGD(self.net[0].parameters(), lr=0.1)
                return [plain, cls(self.net[1].parameters(), lr=1.0)], []
            optimizer = cls(layers if groups > 1 else self.parameters(), lr=1.0)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * STEPS)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Module()


def fit(module, directory, name="lightning.pytorch", epochs=1, first=None, log_every_n_steps=2, **options):
    """Train, and return the rows that the logger wrote, each by its step."""
    lightning = importlib.import_module(name)
    loggers, callbacks = (importlib.import_module(f"{name}.{each}") for each in ("loggers", "callbacks"))
    logger = loggers.CSVLogger(directory, name="", version="log")
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        log_every_n_steps=log_every_n_steps,
        logger=logger,
        callbacks=[
            MechanicMonitor(),
            callbacks.LearningRateMonitor("step"),
            callbacks.ModelCheckpoint(directory, filename="{step}", save_top_k=-1),
        ],
        **{"enable_progress_bar": False, "enable_model_summary": False, **options},
    )
    data = DataLoader(TensorDataset(torch.randn(STEPS * 4, 4, generator=torch.Generator().manual_seed(1))), 4)
    trainer.fit(module, data, ckpt_path=first)
    rows = {}
    with open(directory / "log" / "metrics.csv", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found = {key: float(value) for key, value in row.items() if value and key != "step"}
            rows.setdefault(int(row["step"]), {}).update(found)
    return rows


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_it_logs_with_the_metrics_what_is_in_force_when_the_batch_begins(name, tmp_path, monkeypatch):
    reads = []
    read = telemetry.read
    monkeypatch.setattr(telemetry, "read", lambda snapshots: reads.append(1) or read(snapshots))
    module = module_of(name)
    rows = fit(module, tmp_path, name)
    assert sorted(rows) == [1, 3, 5, 7]
    lr = f"lr-{mechanize(torch.optim.AdamW).__name__}"  # what LearningRateMonitor logs
    for step, row in rows.items():
        (seen,) = module.seen[step]
        assert "loss" in row
        assert row["mechanic/effective_lr"] == pytest.approx(seen.effective_lr[0], rel=1e-6)
        assert row["mechanic/scale"] == pytest.approx(seen.scale[0], rel=1e-6)
        assert row["mechanic/skipped_steps"] == 0
        assert row["mechanic/effective_lr"] == pytest.approx(row[lr] * row["mechanic/scale"], rel=1e-6)
    assert rows[7][lr] < rows[1][lr]
    assert rows[7]["mechanic/scale"] > rows[3]["mechanic/scale"] > 0
    assert len(reads) == STEPS + 4, "one in each training_step of the test, one at each step that logs"


def test_of_several_groups_each_is_logged(tmp_path):
    row = fit(module_of("lightning.pytorch", groups=2), tmp_path)[7]
    assert row["mechanic/effective_lr/0"] == pytest.approx(2 * row["mechanic/effective_lr/1"], rel=1e-6) != 0
    assert "mechanic/effective_lr" not in row


@pytest.mark.parametrize(("several", "name"), [({}, "effective_lr"), ({"optimizers": 2}, "1/effective_lr")], ids=str)
def test_the_progress_bar_has_the_effective_lr_of_the_first_group(several, name, tmp_path, capsys):
    """From the first step that logs on, and no other number of ours."""
    module = module_of("lightning.pytorch", **several)
    bars = []
    module.on_train_batch_end = lambda *_: bars.append(dict(module.trainer.progress_bar_metrics))
    rows = fit(module, tmp_path, enable_progress_bar=True)
    logged = {step: row[f"mechanic/{name}"] for step, row in rows.items()}
    assert bars[0] == {}
    for step in range(1, STEPS):
        assert bars[step] == {name: pytest.approx(logged[step if step in logged else step - 1], rel=1e-6)}
    assert not any(name in row for row in rows.values()), "loggers get it once, under its other name"
    assert re.search(rf"\b{name}[=:]\s*\d\.\d\de-\d\d", capsys.readouterr().out), "digits, where 3e-4 might be 0.000"


def test_of_several_optimizers_each_mechanized_one_is_logged_under_its_number(tmp_path):
    module = module_of("lightning.pytorch", optimizers=2)
    row = fit(module, tmp_path)[7]
    assert row["mechanic/1/effective_lr"] == pytest.approx(module.seen[7][0].effective_lr[0], rel=1e-6) != 0
    assert not any(key.startswith("mechanic/0") for key in row)


def test_accumulated_batches_are_one_step(tmp_path):
    module = module_of("lightning.pytorch")
    rows = fit(module, tmp_path, accumulate_grad_batches=2)
    assert sorted(rows) == [1, 3]
    for step, row in rows.items():
        assert row["mechanic/scale"] == pytest.approx(module.seen[2 * step][0].scale[0], rel=1e-6)
    assert rows[3]["mechanic/scale"] > 0


def test_after_a_resume_the_curve_goes_on_as_if_nothing_had_happened(tmp_path):
    whole = fit(module_of("lightning.pytorch"), tmp_path / "whole", epochs=2)
    checkpoint = tmp_path / "whole" / f"step={STEPS}.ckpt"
    rest = fit(module_of("lightning.pytorch"), tmp_path / "rest", epochs=2, first=str(checkpoint))
    assert sorted(rest) == [9, 11, 13, 15]
    for step, row in rest.items():
        assert row == whole[step]


def test_to_watch_nothing_is_refused(tmp_path):
    module = module_of("lightning.pytorch")
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"an optimizer must be mechanized. Got SGD. Remedy: in configure_optimizers"):
        fit(module, tmp_path)


def test_the_wrapper_that_a_module_gets_is_read_as_what_it_wraps(tmp_path):
    module = module_of("lightning.pytorch")
    fit(module, tmp_path)
    assert module.optimizers() is not module.trainer.optimizers[0]
    assert telemetry.read_out(module.optimizers()) == telemetry.read_out(module.trainer.optimizers[0])


@pytest.mark.parametrize("installed", [[], ["pytorch_lightning"]], ids=["neither", "only pytorch_lightning"])
def test_one_of_the_two_names_is_enough_and_without_both_the_extra_is_named(installed):
    """A new process, in which packages are hidden."""
    hidden = {"lightning", "pytorch_lightning"} - {*installed}
    code = f"import sys; sys.modules.update(dict.fromkeys({hidden}))\n"
    code += "from mechanic_pytorch.integrations.lightning import Callback; print(Callback.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=False)
    if installed:
        assert done.stdout.startswith("pytorch_lightning."), done.stderr
    else:
        assert "Remedy: pip install 'mechanic-pytorch[lightning]'." in done.stderr
