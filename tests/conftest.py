import gc
import os

import pytest
import torch
from hypothesis import settings

from device import DEVICE
from forks import Python

if DEVICE:
    settings.register_profile("gpu", deadline=None)  # what is compiled takes its time at first
    settings.load_profile("gpu")
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


@pytest.fixture(scope="session")
def forks():
    """A Python that has imported torch, which takes seconds: `forks.run` does what `python -W error` does, in forks."""
    python = Python()
    yield python
    python.close()


@pytest.fixture(scope="session")
def forks_of_frameworks():
    """The same with frameworks, which take seconds more, and with warnings, of which they have some."""
    python = Python("lightning", "transformers.trainer", "peft", warnings="default")
    yield python
    python.close()


@pytest.fixture
def triton_kernel(monkeypatch):
    """The Triton kernel, under its name: compiled where there is a GPU, elsewhere in Triton's interpreter."""
    reason = "there are no wheels of Triton for macOS and Windows"
    pytest.importorskip("triton", reason=reason)
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason=reason)
    from mechanic_pytorch import kernels
    from mechanic_pytorch.kernels import triton as kernel

    monkeypatch.setattr(kernel, "BLOCK", 2**13)  # few of them, because the interpreter takes its time over each
    monkeypatch.setattr(kernel, "CHUNK", 2**14)
    monkeypatch.setitem(kernels.KERNELS, "triton", kernel)
    convert = interpreter._convert_float

    def convert_to_nearest(data, source, target, mode):
        """Round as a GPU does: the interpreter (3.9) cuts bfloat16 off instead."""
        if (source, target) != (kernel.tl.float32, kernel.tl.bfloat16):
            return convert(data, source, target, mode)
        return torch.tensor(data).bfloat16().view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert_to_nearest)
    yield kernel
    kernel._work.cache_clear()
    kernel._constants.cache_clear()


def pytest_collection_finish():
    gc.freeze()  # torch.compile collects often, and need not go through all that was imported


def pytest_collection_modifyitems(items):
    if DEVICE:
        for item in items:
            if "Adagrad_fused" in item.name:
                item.add_marker(pytest.mark.skip(reason="torch's fused Adagrad is for CPUs"))
