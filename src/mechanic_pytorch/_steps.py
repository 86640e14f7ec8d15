"""Steps: which are left out, how many there were, and when one is logged."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mechanic_pytorch import _base, _state, _warnings
from mechanic_pytorch._buckets import Bucket


def needs_us(optimizer: Any, buckets: Sequence[Bucket]) -> bool:
    """Tell whether it is up to us, not to the base, to leave a step out."""
    # Even a base that skips by itself creates state at its first step, and not always with defined values.
    base_skips = _base.skips_by_itself(optimizer) and not any(bucket.is_new for bucket in buckets)
    return bool(optimizer.mechanic_config.skip_nonfinite) and not base_skips


def is_left_out(optimizer: Any, skip: Tensor, we_skip: bool) -> bool:
    """Ask the host, if it can be asked, whether to leave this step out, and count it if so."""
    if not (we_skip and _base.can_ask_host() and skip.item()):
        optimizer._skips_in_a_row = 0
        return False
    count(optimizer, skip)
    _warnings.warn_if_stuck(optimizer)
    return True


def count(optimizer: Any, skip: Tensor) -> None:
    """Count a step, and whether it was skipped; log it if its turn has come."""
    home, config = optimizer.param_groups[0], optimizer.mechanic_config
    home[_state.STEPS].add_(1)
    home[_state.SKIPPED_STEPS].add_(skip)
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
