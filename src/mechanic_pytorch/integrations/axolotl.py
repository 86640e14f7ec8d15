"""axolotl: a plugin that mechanizes the optimizer of the configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    BasePlugin = object
else:
    try:
        from axolotl.integrations.base import BasePlugin
    except ImportError:  # then nobody asks for the plugin but its documentation
        BasePlugin = object

from mechanic_pytorch._classes import mechanize


class MechanicPlugin(BasePlugin):
    """Mechanize the optimizer that the configuration names, and log `effective_lr`.

    The trainer builds it as it always does: with its own parameter groups, arguments and schedule. Options of
    `mechanize` stand in the configuration under names that begin with `mechanic_`. `learning_rate` makes no difference,
    unless `mechanic_s_init` is a number.

    Raises:
        TypeError: an option is of the wrong kind or does not exist; the optimizer is no class of its own but a factory,
            as axolotl's "muon" is.
        ValueError: an option breaks its rule.

    Example:
        >>> plugin = MechanicPlugin()  # all of this is done by axolotl
        >>> plugin.register({"optimizer": "adamw_torch", "learning_rate": 2e-5, "mechanic_max_lr": 1e-2})
        >>> # plugin.post_trainer_create(cfg, trainer)
    """

    def register(self, cfg: Any) -> None:
        """Take the options from the configuration as it was written: axolotl then drops keys that it does not know."""
        self._options = {key: value for key, value in cfg.items() if key.startswith("mechanic_")}
        params = [torch.zeros(1, requires_grad=True)]
        mechanize(torch.optim.SGD)(params, lr=1.0, **self._options)  # refuses mistakes before a model is loaded

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """Log `effective_lr` beside `learning_rate`."""
        from mechanic_pytorch.integrations.huggingface import MechanicCallback

        return [MechanicCallback()]

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Mechanize what the trainer will build, whether it was given the class or chooses it by name."""
        given, choose = trainer.optimizer_cls_and_kwargs, trainer.get_optimizer_cls_and_kwargs
        if given is not None:
            trainer.optimizer_cls_and_kwargs = self._mechanized(*given)
        trainer.get_optimizer_cls_and_kwargs = lambda *args, **kwargs: self._mechanized(*choose(*args, **kwargs))

    def _mechanized(self, cls: Any, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return mechanize(cls), {**arguments, **self._options}
