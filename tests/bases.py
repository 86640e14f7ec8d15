"""Every optimizer of torch.optim, with what it needs to train: tables that several tests walk through."""

from dataclasses import dataclass, field
from functools import partial

import torch

from device import DEVICE
from helpers import PUBLISHED
from mechanic_pytorch import mechanize
from problems import SparseClassifier, layers, mlp


@dataclass
class Case:
    base: type
    options: dict = field(default_factory=dict)
    model: object = mlp
    closure: bool = False
    per_group: bool = False  # a scale for each layer
    mechanic: dict = field(default_factory=dict)  # other options of mechanize
    bar: float = 0.5  # for the loss after 200 steps at lr=1.0, from 2.3

    def build(self, **mechanic_options):
        """Return a new model and its mechanized optimizer at lr=1.0."""
        model = self.model()
        mechanized = mechanize(self.base, **{"per_group": self.per_group, **self.mechanic, **mechanic_options})
        return model, mechanized(self.params(model), lr=1.0, **self.options)

    def params(self, model):
        """Return what an optimizer of the model takes."""
        return [{"params": layer} for layer in layers(model)] if self.per_group else model.parameters()


CASES = {
    "SGD": Case(torch.optim.SGD),
    "SGD_momentum": Case(torch.optim.SGD, {"momentum": 0.9}),
    "SGD_fused": Case(torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    "Adam": Case(torch.optim.Adam),
    "AdamW": Case(torch.optim.AdamW),
    "AdamW_amsgrad": Case(torch.optim.AdamW, {"amsgrad": True}),
    "AdamW_foreach": Case(torch.optim.AdamW, {"foreach": True}),
    "AdamW_fused": Case(torch.optim.AdamW, {"fused": True}),
    "AdamW_bfloat16": Case(torch.optim.AdamW, model=partial(mlp, torch.bfloat16)),
    "AdamW_bfloat16_fused": Case(torch.optim.AdamW, {"fused": True}, model=partial(mlp, torch.bfloat16)),
    "AdamW_float64": Case(torch.optim.AdamW, model=partial(mlp, torch.float64)),
    "AdamW_published": Case(torch.optim.AdamW, mechanic=PUBLISHED),
    "AdamW_bfloat16_published": Case(torch.optim.AdamW, model=partial(mlp, torch.bfloat16), mechanic=PUBLISHED),
    "SGD_fused_published": Case(torch.optim.SGD, {"momentum": 0.9, "fused": True}, mechanic=PUBLISHED),
    "AdamW_per_group": Case(torch.optim.AdamW, {"fused": True}, per_group=True),
    "NAdam": Case(torch.optim.NAdam),
    "RAdam": Case(torch.optim.RAdam),
    "RMSprop": Case(torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
    # On mini-batches its step sizes shrink a millionfold (docs/limits.md). The best plain lr has 0.25.
    "Rprop": Case(torch.optim.Rprop, bar=0.75),
    "Adagrad": Case(torch.optim.Adagrad),
    **({} if DEVICE else {"Adagrad_fused": Case(torch.optim.Adagrad, {"fused": True})}),  # for CPUs alone
    "Adadelta": Case(torch.optim.Adadelta),
    "Adamax": Case(torch.optim.Adamax),
    "ASGD": Case(torch.optim.ASGD),
    "Adafactor": Case(torch.optim.Adafactor),
    "Muon": Case(torch.optim.Muon, model=partial(mlp, bias=False)),
    "LBFGS": Case(torch.optim.LBFGS, {"max_iter": 4, "line_search_fn": "strong_wolfe"}, closure=True),
    "SGD_closure": Case(torch.optim.SGD, {"momentum": 0.9}, closure=True),
    "SparseAdam": Case(torch.optim.SparseAdam, model=SparseClassifier),
}
