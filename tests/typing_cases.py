"""Right and wrong uses: `test_types.py` runs mypy and pyright on this file, and the right ones themselves.

A wrong one bears `type: ignore`, which is an error where the checker finds nothing wrong.
"""

from typing import Any

import torch
from typing_extensions import assert_type

from mechanic_pytorch import Mechanic, is_mechanized, mechanize, optim, patched
from mechanic_pytorch.optim import AdamW, MechanizedAdamW, MechanizedSGD


class Theirs(torch.optim.Optimizer):
    """An optimizer that is not torch's."""

    momentum = 0.9

    def __init__(self, params: list[torch.Tensor], rate: float) -> None:
        super().__init__(params, {"lr": rate})


class Mine(optim.SGD):
    """A class derived from a mechanized one, with a base that type checkers know."""


def right(params: list[torch.Tensor]) -> None:
    cls = mechanize(torch.optim.AdamW, s_init="auto", max_lr=0.1)
    assert_type(cls, type[MechanizedAdamW])
    optimizer = cls(params, lr=1.0, betas=(0.8, 0.99), fused=False)
    assert_type(optimizer.learned_lr(), list[float])
    assert_type(optimizer.scale, torch.Tensor)
    assert_type(optimizer.param_groups, list[dict[str, Any]])
    optimizer.step(lambda: torch.ones(()))
    base: torch.optim.AdamW = optimizer
    ours: Mechanic = optimizer
    assert base.defaults is ours.defaults
    assert_type(AdamW(params, lr=1.0, mechanic_s_init="auto"), MechanizedAdamW)
    assert_type(mechanize(torch.optim.SGD, 0.0, (0.999,))(params, lr=0.1, momentum=0.9), MechanizedSGD)
    assert Mine(params, lr=1.0, nesterov=False).effective_lr() == [0.0]

    third = mechanize(Theirs)(params, rate=1.0)
    assert_type(third.effective_lr(), list[float])
    assert isinstance(third, Theirs)
    assert_type(third.momentum, float)
    third.reset()

    some: type[torch.optim.Optimizer] = torch.optim.RMSprop
    either: torch.optim.Optimizer = mechanize(some)(params, lr=1.0)
    if is_mechanized(either):
        assert_type(either.skipped_steps, int)
    with patched() as built:
        plain = torch.optim.SGD(params, lr=0.1)
    assert built[0].optimizer is plain
    assert_type(built[0].learned_lr(), list[float])


def wrong(params: list[torch.Tensor]) -> None:
    optimizer = mechanize(torch.optim.AdamW)(params, lr=1.0)
    optimizer.efective_lr()  # type: ignore[attr-defined]
    optimizer.scale.item().upper()  # type: ignore[union-attr]
    mechanize(torch.optim.AdamW)(params, lrr=1.0)  # type: ignore[call-arg]
    mechanize(torch.optim.AdamW, s_int="auto")  # type: ignore[call-overload]
    mechanize(torch.optim.AdamW, s_init="Auto")  # type: ignore[call-overload]
    mechanize(optimizer)  # type: ignore[call-overload]
    AdamW(params, lr=1.0, mechanic_s_init="Auto")  # type: ignore[arg-type]
    AdamW(params, lr=1.0, s_init="auto")  # type: ignore[call-arg]
    optim.AdamWW(params)  # type: ignore[attr-defined]
    with patched() as built:
        built[0].optimizer.step()  # type: ignore[union-attr]
    mechanize(Theirs)(params, rate=1.0).learnt_lr()  # type: ignore[attr-defined]
