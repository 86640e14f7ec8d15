"""What a bug report should say of a machine: `mechanic env`."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from mechanic_pytorch._classes import mechanize
from mechanic_pytorch.telemetry import read_out

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "click",
    "rich",
    "matplotlib",
    "tensorboard",
    "lightning",
    "transformers",
    "accelerate",
)


def describe() -> str:
    """Return versions, devices and kernels, one a line. Each device makes a step, by which its kernel is checked.

    Example:
        >>> describe().splitlines()[0].split()[0]
        'mechanic-pytorch'
    """
    facts = {
        "mechanic-pytorch": version("mechanic-pytorch"),
        "Python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        **{name: _version(name) for name in PACKAGES},
        "CUDA, ROCm": f"{torch.version.cuda}, {torch.version.hip}",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        **{f"${name}": value for name, value in sorted(os.environ.items()) if name.startswith("MECHANIC_")},
    }
    devices = [torch.device("cpu"), *map(torch.device, range(torch.accelerator.device_count()))]
    for device in devices:
        facts[str(device)] = f"{_name(device)}, kernel: {_kernel(device)}"
    width = max(map(len, facts))
    return "\n".join(f"{key:{width}}  {value}" for key, value in facts.items())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type


def _kernel(device: torch.device) -> str:
    """Return which kernel makes a step on a device, or why there is none."""
    try:
        p = torch.ones(3, device=device, requires_grad=True)
        optimizer = mechanize(torch.optim.SGD)([p], lr=1.0)
        p.grad = torch.ones_like(p)
        optimizer.step()
        return ", ".join(read_out(optimizer).kernels.values())
    except Exception as error:
        return f"none works. Got {type(error).__name__}: {error}"
