"""Hugging Face Trainer: the learned learning rate beside the one of the schedule."""

from __future__ import annotations

from typing import Any

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "mechanic_pytorch.integrations.huggingface needs transformers, which cannot be imported. "
        "Remedy: pip install 'mechanic-pytorch[huggingface]'."
    ) from error

from mechanic_pytorch.telemetry import Snapshot, read, snapshot


class MechanicCallback(TrainerCallback):
    """Log `effective_lr` beside `learning_rate`: both of the first group, both of the step just made.

    The Trainer tells its callbacks in their order, those of `report_to` first: pass `report_to="none"` and name them
    after this one, as in `callbacks=[MechanicCallback(), TensorBoardCallback()]`. The log history has it in any case.
    Reads the device only when the Trainer logs.

    Raises:
        TypeError: a step was made, and the optimizer is not mechanized.

    Example:
        >>> from mechanic_pytorch import optim
        >>> mechanic = {"optimizer_cls_and_kwargs": (optim.AdamW, {"lr": 1.0}), "callbacks": [MechanicCallback()]}
        >>> # Trainer(model, arguments, train_dataset=data, **mechanic)
    """

    _last: Snapshot | None = None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep what is in force, because the schedule moves before the Trainer logs."""
        self._last = snapshot(kwargs["optimizer"])

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add it to the logs of a training step, not to those of an evaluation."""
        logs = kwargs["logs"]
        if self._last is not None and "learning_rate" in logs:
            logs["effective_lr"] = state.log_history[-1]["effective_lr"] = read([self._last])[0].effective_lr[0]
