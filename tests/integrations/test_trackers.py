"""`read_out(optimizer).scalars()` in the loggers that people use, read back from what these write."""

import json
import struct

import pytest
import torch
import wandb
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from wandb.proto.wandb_internal_pb2 import Record

from mechanic_pytorch import mechanize
from mechanic_pytorch.telemetry import read_out
from problems import loss_of, mlp

HALF, STEPS = 4, 8
NAMES = {"mechanic/effective_lr", "mechanic/scale", "mechanic/skipped_steps"}


def from_tensorboard(directory):
    """Return the numbers by step and name."""
    rows = {}
    for path in directory.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(path))
        events.Reload()
        for name in events.Tags()["scalars"]:
            for event in events.Scalars(name):
                rows.setdefault(event.step, {})[name] = event.value
    return rows


def records_of_wandb(path):
    """Yield the records of its file: a header, and then blocks as in LevelDB's log. wandb has no public reader."""
    data, at, record = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while at < len(data):
        room = 2**15 - at % 2**15
        if room < 7:
            at += room
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


def from_wandb(directory):
    """Return the same of the files that wandb would upload."""
    rows = {}
    for path in directory.rglob("run-*.wandb"):
        for record in records_of_wandb(path):
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            numbers = {name: json.loads(value) for name, value in items.items()}
            if numbers:
                rows[numbers["_step"]] = {name: value for name, value in numbers.items() if name[0] != "_"}
    return rows


class TensorBoard:
    def __init__(self, directory):
        self.writer = SummaryWriter(str(directory))

    def log(self, numbers, step):
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def finish(self):
        self.writer.close()


class WandB:
    def __init__(self, directory):
        self.run = wandb.init(project="test", dir=directory, mode="offline")
        self.log = self.run.log

    def finish(self):
        self.run.finish()
        wandb.teardown()  # its service has closed the file when it has ended, not before


class Accelerate:
    """Both at once."""

    def __init__(self, directory):
        self.accelerator = Accelerator(cpu=True, log_with=["tensorboard", "wandb"], project_dir=str(directory))
        self.accelerator.init_trackers("test", init_kwargs={"wandb": {"dir": str(directory), "mode": "offline"}})
        self.log = self.accelerator.log

    def finish(self):
        self.accelerator.end_training()
        wandb.teardown()


@pytest.fixture(autouse=True)
def quiet_and_alone(monkeypatch, tmp_path):
    """Keep wandb within the directory of the test, and leave neither its service nor Accelerate's state behind."""
    for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.teardown()
    AcceleratorState._reset_state(reset_partial_state=True)


def train_and_log(kind, directory, first, last, saved=None):
    """Train and log from one step to another; return what was logged, and a checkpoint."""
    directory.mkdir()
    tracker = kind(directory)
    model = mlp()
    optimizer = mechanize(torch.optim.AdamW, s_init=1e-3)(model.parameters(), lr=1.0)
    if saved is not None:
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
    if kind is Accelerate:
        model, optimizer = tracker.accelerator.prepare(model, optimizer)
    logged = {}
    for step in range(first, last):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        logged[step] = {"loss": loss.item(), **read_out(optimizer).scalars()}
        tracker.log(logged[step], step=step)
    tracker.finish()
    return logged, [model.state_dict(), optimizer.state_dict()]


@pytest.mark.parametrize(
    ("kind", "readers"),
    [(TensorBoard, [from_tensorboard]), (WandB, [from_wandb]), (Accelerate, [from_tensorboard, from_wandb])],
    ids=["tensorboard", "wandb", "accelerate"],
)
def test_the_numbers_arrive_and_go_on_after_a_resume(kind, readers, tmp_path):
    whole, _ = train_and_log(kind, tmp_path / "whole", 0, STEPS)
    first, saved = train_and_log(kind, tmp_path / "first", 0, HALF)
    rest, _ = train_and_log(kind, tmp_path / "rest", HALF, STEPS, saved)
    assert {**first, **rest} == whole
    assert all(row.keys() == {"loss", *NAMES} for row in whole.values())
    assert whole[STEPS - 1]["mechanic/scale"] > 1e-3
    for reader in readers:
        for directory, expected in (("whole", whole), ("first", first), ("rest", rest)):
            rows = reader(tmp_path / directory)
            assert rows, (reader, [str(path) for path in (tmp_path / directory).rglob("*")])
            assert rows == {step: pytest.approx(row, rel=1e-6) for step, row in expected.items()}
