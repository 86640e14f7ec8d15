# Written by tools/stubs.py for torch 2.13. Do not edit.

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from mechanic_pytorch._config import LogFunc
from mechanic_pytorch.mechanic import Mechanic

class _Mechanized(Mechanic):
    def __init__(self, params: ParamsT, *args: Any, **kwargs: Any) -> None: ...

class _Options(TypedDict, total=False):
    mechanic_s_decay: float
    mechanic_betas: Sequence[float]
    mechanic_s_init: float | Literal["auto"]
    mechanic_eps: float
    mechanic_store_delta: bool
    mechanic_log_func: LogFunc | None
    mechanic_log_every: int
    mechanic_skip_nonfinite: bool
    mechanic_process_group: ProcessGroup | None
    mechanic_max_lr: float | None
    mechanic_per_group: bool

class MechanizedASGD(_Mechanized, torch.optim.ASGD):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        lambd: float = 0.0001,
        alpha: float = 0.75,
        t0: float = 1000000.0,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class MechanizedAdadelta(_Mechanized, torch.optim.Adadelta):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-06,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class MechanizedAdafactor(_Mechanized, torch.optim.Adafactor):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 0.001),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class MechanizedAdagrad(_Mechanized, torch.optim.Adagrad):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[_Options],
    ) -> None: ...

class MechanizedAdam(_Mechanized, torch.optim.Adam):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class MechanizedAdamW(_Mechanized, torch.optim.AdamW):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.01,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[_Options],
    ) -> None: ...

class MechanizedAdamax(_Mechanized, torch.optim.Adamax):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.002,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class MechanizedLBFGS(_Mechanized, torch.optim.LBFGS):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-07,
        tolerance_change: float = 1e-09,
        history_size: int = 100,
        line_search_fn: str | None = None,
        **options: Unpack[_Options],
    ) -> None: ...

class MechanizedMuon(_Mechanized, torch.optim.Muon):
    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.001,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-07,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        **options: Unpack[_Options],
    ) -> None: ...

class MechanizedNAdam(_Mechanized, torch.optim.NAdam):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.002,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0,
        momentum_decay: float = 0.004,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class MechanizedRAdam(_Mechanized, torch.optim.RAdam):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class MechanizedRMSprop(_Mechanized, torch.optim.RMSprop):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        alpha: float = 0.99,
        eps: float = 1e-08,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class MechanizedRprop(_Mechanized, torch.optim.Rprop):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-06, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

class MechanizedSGD(_Mechanized, torch.optim.SGD):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[_Options],
    ) -> None: ...

class MechanizedSparseAdam(_Mechanized, torch.optim.SparseAdam):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        maximize: bool = False,
        **options: Unpack[_Options],
    ) -> None: ...

ASGD = MechanizedASGD
Adadelta = MechanizedAdadelta
Adafactor = MechanizedAdafactor
Adagrad = MechanizedAdagrad
Adam = MechanizedAdam
AdamW = MechanizedAdamW
Adamax = MechanizedAdamax
LBFGS = MechanizedLBFGS
Muon = MechanizedMuon
NAdam = MechanizedNAdam
RAdam = MechanizedRAdam
RMSprop = MechanizedRMSprop
Rprop = MechanizedRprop
SGD = MechanizedSGD
SparseAdam = MechanizedSparseAdam
