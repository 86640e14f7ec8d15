import os

import pytest
import torch

from device import DEVICE

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, which torch.compile does, too

torch.set_num_threads(1)  # the suite runs in two processes on two cores


@pytest.fixture(autouse=True)
def reproducible(monkeypatch):
    torch.manual_seed(0)
    # Freshly allocated memory holds NaN, so that a forgotten store shows.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items):
    if DEVICE:
        for item in items:
            if "Adagrad_fused" in item.name:
                item.add_marker(pytest.mark.skip(reason="torch's fused Adagrad is for CPUs"))
