"""What a step costs, in things that can be counted: operations, host reads, bytes. The same on every machine."""

from __future__ import annotations

import unittest.mock
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST_READS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "_unique2", "masked_select", "tolist")


class Operations(TorchDispatchMode):
    """Count the operations inside a `with` block, by name; a view is not one, `Tensor.tolist` is."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __enter__(self) -> Operations:
        inner = torch.Tensor.tolist

        def tolist(tensor: torch.Tensor) -> Any:
            self.count["tolist"] += 1
            return inner(tensor)

        self._patch = unittest.mock.patch.object(torch.Tensor, "tolist", tolist)  # it reaches no dispatcher
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.stop()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view:
            self.count[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))

    @property
    def host_reads(self) -> int:
        """How often the host has read a value: on an accelerator each of them waits for all that was launched."""
        return sum(self.count[name] for name in HOST_READS)


def transient_bytes(call: Callable[[], Any], device: str = "cpu") -> int:
    """Return how much more memory a call holds at its peak than before it."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - start
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all tensors that the optimizer keeps beside parameters and gradients."""
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    leaves = tree_leaves([list(optimizer.state.values()), groups])
    tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}
    return sum(tensor.nbytes for tensor in tensors.values())
