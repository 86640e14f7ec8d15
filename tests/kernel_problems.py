"""What a kernel is tried on: tensors that break careless ones, and steps of the bases whose rule it knows."""

import torch

from mechanic_pytorch.kernels.rule import Rule

# Where Triton runs: without a GPU by its interpreter, see conftest.py.
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# One table for all comparisons: sums are added in another order, moves are rounded at most once differently.
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-14},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 1e-5, "atol": 1e-6},
    torch.float16: {"rtol": 1e-5, "atol": 1e-6},
}
DTYPES = list(TOLERANCE)
HALF = [torch.bfloat16, torch.float16]


def accumulator_of(dtype):
    """Return the dtype of what is summed: float32 or better."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def shapes():
    """Tensors that break careless kernels."""
    yield torch.empty(0)
    yield torch.empty(())
    yield torch.empty(1)
    yield torch.empty(7)
    yield torch.empty(3, 0, 2)
    yield torch.empty(33, 17)
    yield torch.empty(17, 33).t()  # dense, not contiguous
    yield torch.empty(40, 6)[::2, 1:4]  # not dense
    yield torch.empty(2, 3, 5, 4).to(memory_format=torch.channels_last)
    yield torch.empty(2, 3, 2, 5, 4).to(memory_format=torch.channels_last_3d)
    yield torch.empty(70_001)  # no multiple of any block size


def problem(dtype, device=None):
    """Return parameters after and before a base step, gradients, deltas and compensations."""
    torch.manual_seed(0)
    wide = accumulator_of(dtype)

    def like(template, dtype, size=1.0):
        new = torch.empty_strided(template.size(), template.stride(), dtype=dtype, device=device)
        return new.copy_(size * torch.randn(template.shape, dtype=torch.float64))

    templates = list(shapes())
    exact = [like(t, wide) for t in templates]
    before = [like(t, dtype).copy_(x) for t, x in zip(templates, exact, strict=True)]
    params = [x.clone(memory_format=torch.preserve_format).add_(like(x, dtype, 0.1)) for x in before]
    grads = [like(t, dtype) for t in templates]
    grads[-1] = grads[-1].flip(0)  # same shape, its own layout
    deltas = [like(t, wide) for t in templates]
    compensations = None
    if dtype.itemsize < 4:
        compensations = [(x - b).to(torch.bfloat16) for x, b in zip(exact, before, strict=True)]
        compensations[5][3:5] = 1.0  # as left behind by weights that somebody has overwritten
    return params, before, grads, deltas, compensations


def assert_all_close(actual, expected, dtype):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **TOLERANCE[dtype], equal_nan=False)


# Base step and move in one pass.

SGD = {"weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "maximize": False}
SGD |= {"is_first_step": False, "lr": 0.3}
ADAM = {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8, "amsgrad": False, "maximize": False, "lr": 0.3}
RULES = {  # torch's function, how many lists of states there are and could be, options
    "sgd": (torch._fused_sgd_, 0, 1, SGD),
    "sgd_decay": (torch._fused_sgd_, 0, 1, {**SGD, "weight_decay": 0.1, "maximize": True}),
    "sgd_momentum": (torch._fused_sgd_, 1, 1, {**SGD, "momentum": 0.9, "dampening": 0.2, "maximize": True}),
    "sgd_nesterov": (torch._fused_sgd_, 1, 1, {**SGD, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "sgd_tensor_lr": (torch._fused_sgd_, 0, 1, {**SGD, "lr": torch.tensor(0.3, device=TRITON_DEVICE)}),
    "adam": (torch._fused_adam_, 2, 3, {**ADAM, "weight_decay": 0.1}),
    "adam_amsgrad": (torch._fused_adam_, 3, 3, {**ADAM, "amsgrad": True, "eps": 1e-3}),
    "adamw": (torch._fused_adamw_, 2, 3, {**ADAM, "weight_decay": 0.1, "maximize": True}),
    "adamw_amsgrad": (torch._fused_adamw_, 3, 3, {**ADAM, "amsgrad": True, "weight_decay": 0.1}),
    "adamw_tensor_lr": (torch._fused_adamw_, 2, 3, {**ADAM, "lr": torch.tensor([0.3]), "weight_decay": 0.1}),
}


def step_problem(name, dtype, grad_scale=None, found_inf=None):
    """Return a rule, parameters, gradients, deltas and compensations."""
    torch.manual_seed(0)
    function, present, possible, options = RULES[name]
    templates = [torch.empty(n) for n in (7, 20_001, 0)]
    templates += [torch.empty(()), torch.empty(17, 33).t()]
    templates += [torch.empty(2, 3, 5, 4).to(memory_format=torch.channels_last)]

    def random(dtype, size=1.0):
        return [
            torch.empty_strided(t.shape, t.stride(), dtype=dtype, device=TRITON_DEVICE).copy_(
                size * torch.randn(t.shape)
            )
            for t in templates
        ]

    compensations = random(torch.bfloat16, 2**-12) if dtype in HALF else None
    states = [random(dtype)] * (present > 0) + [[t.abs() for t in random(dtype)] for _ in range(1, present)]
    counts = [torch.tensor(float(3 + i), device=TRITON_DEVICE) for i in range(len(templates))] if present > 1 else []
    options = {**options, "grad_scale": grad_scale, "found_inf": found_inf}
    rule = Rule(function, states, possible - present, counts, options)
    return rule, random(dtype), random(dtype), random(accumulator_of(dtype)), compensations


def scales(dtype, *numbers):
    """Return the old and the new scale, and perhaps a part, as tensors of what sums such a dtype."""
    return [torch.tensor(s, dtype=accumulator_of(dtype), device=TRITON_DEVICE) for s in numbers or (0.2, 0.5)]
