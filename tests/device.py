"""Where tests work that name no device: on a CPU, unless `MECHANIC_TEST_DEVICE` says otherwise, as `make gpu` does."""

import os

import torch

DEVICE = os.environ.get("MECHANIC_TEST_DEVICE", "")

if DEVICE:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # it would take all of the GPU's memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by deterministic matrix products
    torch.set_default_device(DEVICE)

    def on_host(name):
        """Let a tensor's method copy the tensor to the host first: the oracles are NumPy."""
        method = getattr(torch.Tensor, name)
        setattr(torch.Tensor, name, lambda tensor, *args, **options: method(tensor.cpu(), *args, **options))

    on_host("numpy")
    on_host("__array__")
