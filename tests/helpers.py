"""What many tests compare, count and start processes with."""

import os
import sys
from enum import Enum

import pytest
import torch

from device import DEVICE
from mechanic_pytorch._buckets import slot

PUBLISHED = {"s_init": 1e-8}  # Algorithm 1 as published, with the start of version 0.0.1


def environment_of_tests(**more):
    """Return the environment in which a new Python imports what tests import."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **more}


def leaves(value, path="root"):
    """Yield path and content of everything in a nested state, quantized tensors and objects opened, types included."""
    yield path, type(value)
    if isinstance(value, torch.Tensor) and hasattr(value, "__tensor_flatten__"):
        names, context = value.__tensor_flatten__()
        yield f"{path} context", context
        parts = {name: getattr(value, name) for name in names}
    elif isinstance(value, torch.Tensor):
        yield f"{path} dtype", value.dtype
        parts = {}
        yield path, value
    elif isinstance(value, dict):
        parts = value
    elif isinstance(value, list | tuple):
        parts = dict(enumerate(value))
    elif hasattr(value, "__dict__") and not isinstance(value, type | Enum):
        parts = vars(value)
    else:
        parts = {}
        yield path, value
    for key in sorted(parts, key=str):
        yield from leaves(parts[key], f"{path}.{key}")


def assert_identical(actual, expected):
    """Compare nested state bit for bit, types and dtypes included; not devices: the first step moves the tuner."""
    for (where, a), (expected_where, e) in zip(leaves(actual), leaves(expected), strict=True):
        assert where == expected_where
        assert torch.equal(a.to(e.device), e) if isinstance(e, torch.Tensor) else a == e, where


def as_added_up(numbers):
    """Return what sums that the package makes must equal: these numbers, which a GPU may add up in another order."""
    return pytest.approx(numbers, rel=1e-14, abs=0.0) if DEVICE else numbers


# What an optimizer stores, for tests of something else than of how. `test_what_a_checkpoint_holds` spells that out.

COMPENSATION = "mechanic_compensation"
COUNTS = "mechanic_steps", "mechanic_skipped_steps"


def slot_of(optimizer):
    """Return the key of the one tensor that is stored for each parameter."""
    return slot(optimizer.mechanic_config)


def stored_of(optimizer, p):
    """Return that tensor, which steps change: where the parameter's way begins, or its sum of updates; None if none."""
    return optimizer.state[p].get(slot_of(optimizer))


def compensation_of(optimizer, p):
    """Return what rounding has taken from a parameter's weights; None if nothing is kept."""
    return optimizer.state[p].get(COMPENSATION)


def row_of(group):
    """Return what a parameter group holds of the tuner, without the counts."""
    return {key: value for key, value in group.items() if key.startswith("mechanic_") and key not in COUNTS}


def lr_factors(optimizer):
    """Return for each parameter group by what `s_init="auto"` multiplies the base's lr."""
    return optimizer.mechanic_tuner.lr_factors(can_sync=False)


def set_steps(optimizer, steps):
    """Let an optimizer have made so many steps."""
    optimizer.mechanic_tuner.groups[0][COUNTS[0]].fill_(steps)


def count_a_skipped_step(state_dict):
    """Count one more step and one more skip in a checkpoint: all that a step with a bad gradient may change."""
    for key in COUNTS:
        state_dict["param_groups"][0][key] += 1


def forget_counts(state_dict):
    """Take the counts out of a checkpoint."""
    for key in COUNTS:
        del state_dict["param_groups"][0][key]


class Graphs:
    """A backend that runs each graph as it is, and counts."""

    def __init__(self):
        self.compiled = self.runs = 0

    def __call__(self, graph, inputs):
        self.compiled += 1

        def run(*arguments):
            self.runs += 1
            return graph(*arguments)

        return run
