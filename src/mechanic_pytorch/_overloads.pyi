# Written by tools/stubs.py for torch 2.13. Do not edit.

from typing import ParamSpec, Protocol, overload

import torch

from mechanic_pytorch import optim

Options = ParamSpec("Options")

class Mechanize(Protocol[Options]):
    @overload
    def __call__(  # type: ignore[overload-overlap]  # AdamW is an Adam, the mechanized ones are no such pair
        self, Base: type[torch.optim.AdamW], *args: Options.args, **options: Options.kwargs
    ) -> type[optim.MechanizedAdamW]: ...
    @overload
    def __call__(
        self, Base: type[torch.optim.ASGD], *args: Options.args, **options: Options.kwargs
    ) -> type[optim.MechanizedASGD]: ...
    @overload
    def __call__(
        self, Base: type[torch.optim.Adadelta], *args: Options.args, **options: Options.kwargs
    ) -> type[optim.MechanizedAdadelta]: ...
    @overload
    def __call__(
        self, Base: type[torch.optim.Adafactor], *args: Options.args, **options: Options.kwargs
    ) -> type[optim.MechanizedAdafactor]: ...
    @overload
    def __call__(
        self, Base: type[torch.optim.Adagrad], *args: Options.args, **options: Options.kwargs
    ) -> type[optim.MechanizedAdagrad]: ...
    @overload
    def __call__(
        self, Base: type[torch.optim.Adam], *args: Options.args, **options: Options.kwargs
    ) -> type[optim.MechanizedAdam]: ...
    @overload
    def __call__(
        self, Base: type[torch.optim.Adamax], *args: Options.args, **options: Options.kwargs
    ) -> type[optim.MechanizedAdamax]: ...
    @overload
    def __call__(
        self, Base: type[torch.optim.LBFGS], *args: Options.args, **options: Options.kwargs
    ) -> type[optim.MechanizedLBFGS]: ...
    @overload
    def __call__(
        self, Base: type[torch.optim.Muon], *args: Options.args, **options: Options.kwargs
    ) -> type[optim.MechanizedMuon]: ...
    @overload
    def __call__(
        self, Base: type[torch.optim.NAdam], *args: Options.args, **options: Options.kwargs
    ) -> type[optim.MechanizedNAdam]: ...
    @overload
    def __call__(
        self, Base: type[torch.optim.RAdam], *args: Options.args, **options: Options.kwargs
    ) -> type[optim.MechanizedRAdam]: ...
    @overload
    def __call__(
        self, Base: type[torch.optim.RMSprop], *args: Options.args, **options: Options.kwargs
    ) -> type[optim.MechanizedRMSprop]: ...
    @overload
    def __call__(
        self, Base: type[torch.optim.Rprop], *args: Options.args, **options: Options.kwargs
    ) -> type[optim.MechanizedRprop]: ...
    @overload
    def __call__(
        self, Base: type[torch.optim.SGD], *args: Options.args, **options: Options.kwargs
    ) -> type[optim.MechanizedSGD]: ...
    @overload
    def __call__(
        self, Base: type[torch.optim.SparseAdam], *args: Options.args, **options: Options.kwargs
    ) -> type[optim.MechanizedSparseAdam]: ...
    @overload
    def __call__(
        self, Base: type[torch.optim.Optimizer], *args: Options.args, **options: Options.kwargs
    ) -> type[optim._Mechanized]: ...
