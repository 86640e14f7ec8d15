import pytest
import torch

torch.set_num_threads(1)  # the suite runs in two processes on two cores


@pytest.fixture(autouse=True)
def reproducible(monkeypatch):
    torch.manual_seed(0)
    # Freshly allocated memory holds NaN, so that a forgotten store shows.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
