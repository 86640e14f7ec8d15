"""Lightning: the learned learning rate among the metrics of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    from lightning.pytorch import Callback
except ImportError as error:
    if not TYPE_CHECKING:
        try:
            from pytorch_lightning import Callback  # the same, by its other name
        except ImportError:
            raise ImportError(
                "mechanic_pytorch.integrations.lightning needs Lightning. Got neither lightning nor pytorch_lightning. "
                "Remedy: pip install 'mechanic-pytorch[lightning]'."
            ) from error

from mechanic_pytorch.telemetry import read_out, unwrap


class MechanicMonitor(Callback):
    """Log `read_out(optimizer).scalars()` of every mechanized optimizer, whenever the trainer logs its metrics.

    As `LearningRateMonitor` does, it logs what is in force when a batch begins, so that the effective lr is the lr
    that stands beside it, times the scale. With several optimizers their number comes after "mechanic/" in the names.
    The progress bar shows `effective_lr`, of the first group. Reads the device only when the trainer logs.

    Raises:
        TypeError: training begins, and no optimizer is mechanized.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[MechanicMonitor()], logger=False, accelerator="cpu")
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse to watch nothing; have the progress bar show digits, where that of rich would show 0.000."""
        if not any(map(unwrap, trainer.optimizers)):
            names = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers)
            raise TypeError(
                f"MechanicMonitor: an optimizer must be mechanized. Got {names or 'none'}. Remedy: in "
                "configure_optimizers, return mechanize(torch.optim.AdamW)(self.parameters(), lr=1.0)."
            )
        if (bar := trainer.progress_bar_callback) is not None and "get_metrics" not in vars(bar):  # not at a second fit
            get = bar.get_metrics
            bar.get_metrics = lambda *who: {
                name: f"{value:.2e}" if name.endswith("effective_lr") and isinstance(value, float) else value
                for name, value in get(*who).items()
            }

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Log, if it is time."""
        if trainer._logger_connector.should_update_logs:  # what Lightning's own monitors ask
            for i, optimizer in enumerate(trainer.optimizers):
                if unwrap(optimizer) is not None:
                    number = "" if len(trainer.optimizers) == 1 else f"{i}/"
                    now = read_out(optimizer)
                    pl_module.log_dict(now.scalars(f"mechanic/{number}"))
                    pl_module.log(f"{number}effective_lr", now.effective_lr[0], prog_bar=True, logger=False)
