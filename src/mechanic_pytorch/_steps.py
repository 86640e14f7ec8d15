"""Steps: which are left out, and when one is logged."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mechanic_pytorch import _base, _state, _warnings
from mechanic_pytorch._buckets import Bucket


def needs_us(optimizer: Any, buckets: Sequence[Bucket]) -> bool:
    """Tell whether it is up to us, not to the base, to leave a step out."""
    # Even a base that skips by itself creates state at its first step, and not always with defined values.
    base_skips = _base.skips_by_itself(optimizer) and not any(bucket.is_new for bucket in buckets)
    return bool(optimizer.mechanic_config.skip_nonfinite) and not base_skips and _base.has_values(optimizer)


def is_left_out(optimizer: Any, skip: Tensor, we_skip: bool) -> bool:
    """Ask the host, if it can be asked, whether to leave this step out, and count it if so."""
    if not (we_skip and _base.can_ask_host(optimizer) and skip.item()):
        optimizer._skips_in_a_row = 0
        return False
    counts = [optimizer.param_groups[0][key] for key in (_state.STEPS, _state.SKIPPED_STEPS)]
    torch._foreach_add_(counts, 1)
    report(optimizer, [])
    _warnings.warn_if_stuck(optimizer)
    return True


def report(optimizer: Any, buckets: list[Bucket]) -> None:
    """Watch the scale after a step, and log it if its turn has come."""
    _warnings.warn_of_new_shapes(optimizer, buckets)
    home, config = optimizer.param_groups[0], optimizer.mechanic_config
    if not _state.is_frozen(optimizer):
        _warnings.watch(optimizer)
    if not config.log_every:
        return
    optimizer._log_count = int(home[_state.STEPS]) if optimizer._log_count is None else optimizer._log_count + 1
    if optimizer._log_count % config.log_every == 0:
        log = _log if config.log_func is None else config.log_func
        log({"iter_count": optimizer._log_count, "s": optimizer.scale.tolist()})


def _log(data: dict[str, Any]) -> None:
    scales = data["s"] if isinstance(data["s"], list) else [data["s"]]
    s = " ".join(f"{scale:.6e}" for scale in scales)
    logging.getLogger("mechanic_pytorch").info("iter_count=%d s=%s", data["iter_count"], s)
