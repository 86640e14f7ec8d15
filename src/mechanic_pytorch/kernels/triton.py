"""The same functions in Triton, for GPUs: one launch for all tensors, in which every number is read once.

A launch runs many *programs* side by side. Each takes one chunk of one tensor and goes through it block by block; what
is written below as if for one number happens to all numbers of a block. A program finds its work in a table of 64-bit
integers on the device, a column for each tensor:

    index    where the tensor stands in the lists
    size     how many numbers it has
    first    the first of the programs that share it
    count    how many they are
    address  of its memory; one row for each list: parameters, gradients, ...

Names in capitals are compile-time constants: dtypes, which rule, sizes of blocks. Without a GPU, the environment
variable `TRITON_INTERPRET=1` runs the same code on CPU tensors: slowly, for tests.
"""

# Triton has no types, and its functions cannot have any: they are not Python when they run.
# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, untyped-decorator"

import functools
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mechanic_pytorch._torch import is_capturing
from mechanic_pytorch.kernels.arguments import Scales, Tensors
from mechanic_pytorch.kernels.blocks import are_contiguous, contiguous_views
from mechanic_pytorch.kernels.rule import Rule

# Numbers that a program treats at once, a power of two: of 128 threads each has 8, two loads of 16 bytes in float32.
# Steps with compensations, which need the most registers, take half of it.
BLOCK = 2**10
# Numbers of one program, a multiple of BLOCK: few, so that programs begin and end all the time, and their loads, sums
# and stores overlap. On an H200, float32: measure, move and AdamW's step moved 96, 100 and 95 % of what a copy does;
# with 2**14 they moved 98, 97 and 92 %, with blocks of 2**11 numbers 10 % less.
CHUNK = 2**11
ADDRESSES = tl.constexpr(4)  # the row of the table where they begin
DTYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
RULES = {torch._fused_sgd_: "sgd", torch._fused_adam_: "adam", torch._fused_adamw_: "adamw"}


class Work(NamedTuple):
    """What the programs of a launch have to do."""

    table: Tensor
    owners: Tensor  # the column of each program
    aligned: bool  # all addresses are multiples of 16 bytes, which allows wider loads


def measure(
    params: Tensors,
    grads: Tensors,
    stored: Tensors,
    before: Tensors | None = None,
    compensations: Tensors | None = None,
    plain: bool = False,
    grad_factor: Tensor | None = None,
) -> Tensor:
    """Return `[<delta, g>, <delta, x>, |g|^2, |x|^2]`, if plain also `|delta|^2`, over all tensors. Fill `before`."""
    more = [lists for lists in (before, compensations if plain else None) if lists is not None]
    sums, width = [], 5 if plain else 4
    for dtypes, work in _works(
        [params, [g.resolve_neg() for g in grads], stored, *more], [] if before is None else [3]
    ):
        x, g, ours = dtypes[:3]
        flags = {
            "COPY": before is not None,
            "PLAIN": plain,
            "COMPENSATION": dtypes[-1] if plain and compensations is not None else None,
        }
        sums.append(stored[0].new_empty(len(work.owners), width))
        _launch(_measure, work, sums[-1], grad_factor, X=x, G=g, D=ours, **flags, BLOCK=BLOCK)
    if not sums:
        return stored[0].new_zeros(width)
    return (sums[0] if len(sums) == 1 else torch.cat(sums)).sum(0, dtype=torch.float64).to(stored[0].dtype)


def move(
    params: Tensors,
    before: Tensors,
    stored: Tensors,
    compensations: Tensors | None,
    scales: Scales,
) -> Tensor | None:
    """Rescale the base optimizer's step from `before` to `params`, in place; return |update|^2 if it is plain."""
    return _move(None, params, before, stored, compensations, scales)


def step_and_move(
    rule: Rule,
    params: Tensors,
    grads: Tensors,
    stored: Tensors,
    compensations: Tensors | None,
    scales: Scales,
) -> Tensor | None:
    """Make the base's step and rescale it, in place; return |update|^2 if it is plain."""
    return _move(rule, params, grads, stored, compensations, scales)


def can_step(params: Tensors, *others: Tensors) -> bool:
    """Return True if `step_and_move` takes these parameters, gradients, what is stored for them, and states.

    All tensors of a parameter must lie in memory in the same order, and have its dtype, except what is stored.
    """
    grads, stored, *states = others
    lists = [params, grads, *states]
    if not {t.dtype for tensors in (params, stored) for t in tensors} <= DTYPES.keys():
        return False
    if any([t.is_neg() for tensors in lists for t in tensors]):  # noqa: C419  # see are_contiguous
        return False
    for x, *rest in zip(*lists, strict=True):
        if any([t.dtype != x.dtype for t in rest]):  # noqa: C419
            return False
    return are_contiguous(*lists, stored) or all(
        contiguous_views(t) is not None for t in zip(*lists, stored, strict=True)
    )


def _move(
    rule: Rule | None,
    params: Tensors,
    others: Tensors,
    stored: Tensors,
    compensations: Tensors | None,
    scales: Scales,
) -> Tensor | None:
    """Move to what the base makes of `params` with the gradients `others`; without a rule, it has, from `others`."""
    squares: list[Tensor] = []
    states = [] if rule is None else rule.states
    lists = [params, others, stored, *states, *([] if compensations is None else [compensations])]
    options: dict[str, Any] = {} if rule is None else rule.options
    scaler = [options.get("grad_scale"), options.get("found_inf")]
    numbers, rates = (None, None) if rule is None else _numbers(rule, params[0].device, len(params))
    unchanged = {1} if scaler[0] is None else set()
    for dtypes, work in _works(lists, changed=sorted({*range(len(lists))} - unchanged)):
        x, other, ours = dtypes[:3]
        flags = {
            "RULE": None if rule is None else RULES[rule.function],
            "STATES": len(states),
            "NESTEROV": options.get("nesterov", False),
            "MAXIMIZE": options.get("maximize", False),
            "COMPENSATION": None if compensations is None else dtypes[-1],
        }
        flags["BLOCK"] = BLOCK if compensations is None else BLOCK // 2
        if scales.follow is not None:
            squares.append(stored[0].new_empty(len(work.owners)))
        partial = squares[-1] if squares else None
        _launch(_step, work, *scales, partial, numbers, rates, *scaler, X=x, OTHER=other, D=ours, **flags)
    for weight in params:  # autograd has not seen the kernel write, and could not refuse a graph of the old weights
        torch.autograd.graph.increment_version(weight)
    if scales.follow is None:
        return None
    return torch.cat(squares or [stored[0].new_zeros(1)]).sum(dtype=torch.float64).to(stored[0].dtype)


def _numbers(rule: Rule, device: torch.device, n: int) -> tuple[Tensor, Tensor]:
    """Return the rule's constants, shape (6,), and what differs by parameter, shape (n, 3), in float64.

    Nothing is read from the device: neither the counts of steps nor a learning rate that is a tensor.
    """
    options = rule.options
    lr, decay = options["lr"], options["weight_decay"]
    if isinstance(lr, Tensor):  # torch takes a number on the CPU to any device, as an argument
        lr = lr.reshape(()).to(device if not lr.is_cpu else lr.device, torch.float64)
    if not rule.steps:
        constants = (options["momentum"], 1 - options["dampening"], 0.0, 0.0, decay, 0.0)
        step_size = correction = torch.ones(n, dtype=torch.float64, device=device) * lr
    else:
        beta1, beta2 = options["beta1"], options["beta2"]
        constants = (beta1, 1 - beta1, beta2, 1 - beta2, decay, options["eps"])
        steps = torch.stack(rule.steps).to(device, torch.float64)
        step_size, correction = lr / (1 - beta1**steps), (1 - beta2**steps).sqrt()
    rates = torch.stack([step_size, correction, torch.full_like(correction, decay) * lr], dim=1)
    return _cached(_constants, tuple(map(float, constants)), device), rates


def _works(lists: Sequence[Tensors], changed: Sequence[int]) -> Iterator[tuple[tuple[torch.dtype, ...], Work]]:
    """Yield the work for each combination of dtypes. At the end, copy back what the kernel could not change in place.

    Args:
        lists: parallel lists of tensors.
        changed: which of the lists the kernel writes to.
    """
    device, copied = lists[0][0].device, []
    if not are_contiguous(*lists):
        rows = []
        for tensors in zip(*lists, strict=True):
            lines = contiguous_views(tensors)
            if lines is None:
                lines = [t.contiguous() for t in tensors]
                copied.append((tensors, lines))
            rows.append(lines)
        lists = [*zip(*rows, strict=True)]
    by_dtypes: dict[tuple[torch.dtype, ...], list[int]] = {}
    for i, dtypes in enumerate(zip(*[[t.dtype for t in tensors] for tensors in lists], strict=True)):
        by_dtypes.setdefault(dtypes, []).append(i)
    for dtypes, indices in by_dtypes.items():
        sizes = [lists[0][i].numel() for i in indices]
        addresses = [tuple([tensors[i].data_ptr() for i in indices]) for tensors in lists]
        if any(sizes):
            yield dtypes, _cached(_work, (tuple(indices), tuple(sizes), *addresses), device)
    for tensors, lines in copied:
        for k in changed:
            if lines[k] is not tensors[k]:
                tensors[k].copy_(lines[k])


def _cached(make: Any, content: tuple[Any, ...], device: torch.device) -> Any:
    """Make something on the device, or take what was made of the same content before."""
    if is_capturing():  # what is made then is there only when the graph runs
        return make.__wrapped__(content, device)
    # Things stay on one stream, which puts their making, use and end in order.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    return make(content, device, stream, CHUNK)


@functools.lru_cache(maxsize=64)
def _work(rows: tuple[tuple[int, ...], ...], device: torch.device, *_: object) -> Work:
    indices, sizes, *addresses = rows
    counts = [triton.cdiv(size, CHUNK) for size in sizes]
    *first, programs = accumulate(counts, initial=0)
    table = _on_device([*indices, *sizes, *first, *counts, *chain(*addresses)], torch.int64, device)
    table = table.view(-1, len(indices))
    owners = torch.repeat_interleave(table[3], output_size=programs)
    return Work(table, owners, all(address % 16 == 0 for address in chain(*addresses)))


@functools.lru_cache(maxsize=64)
def _constants(numbers: tuple[float, ...], device: torch.device, *_: object) -> Tensor:
    return _on_device(numbers, torch.float64, device)


def _on_device(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a tensor on the device, without waiting for it."""
    if is_capturing():
        # A graph would copy from the host again whenever it runs, and torch may not even pin memory for that now.
        # Arguments of a kernel are part of the graph.
        tensor = torch.zeros(len(numbers), dtype=dtype, device=device)
        torch._foreach_add_(tensor.unbind(), list(numbers))
        return tensor
    return torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _launch(kernel: Any, work: Work, *args: Tensor | None, **constants: Any) -> None:
    constants = {key: DTYPES.get(value, value) for key, value in constants.items()}
    with torch.cuda.device_of(work.table):  # type: ignore[no-untyped-call]
        kernel[(len(work.owners),)](
            work.table,
            work.owners,
            work.table.shape[1],
            *args,
            **constants,
            ALIGNED=work.aligned,
            CHUNK=CHUNK,
            enable_fp_fusion=False,  # a * b + c * d, fused, is not 0 where it should: what does not move would
        )


@triton.jit(do_not_specialize=["columns"])
def _measure(
    table,
    owners,
    columns,
    sums,
    grad_factor,
    X: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    COPY: tl.constexpr,
    PLAIN: tl.constexpr,
    COMPENSATION: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    column, begin, full, end = _part(table, owners, columns, BLOCK, CHUNK)
    params = _address(table, 0, columns, column, X, ALIGNED)
    grads = _address(table, 1, columns, column, G, ALIGNED)
    stored = _address(table, 2, columns, column, D, ALIGNED)
    before = _address(table, 3 if COPY else 0, columns, column, X, ALIGNED)
    if COMPENSATION is not None:
        compensations = _address(table, 4 if COPY else 3, columns, column, COMPENSATION, ALIGNED)
    delta_g = tl.zeros((BLOCK,), D)
    delta_x = tl.zeros((BLOCK,), D)
    g_squared = tl.zeros((BLOCK,), D)
    x_squared = tl.zeros((BLOCK,), D)
    delta_squared = tl.zeros((BLOCK,), D)
    for tail in tl.static_range(2):  # first whole blocks, without a mask, which makes loads wider; then the rest
        for start in range(full if tail else begin, end if tail else full, BLOCK):
            at = start + tl.arange(0, BLOCK).to(tl.int64)
            x = _load(params, at, end, tail)
            if COPY:
                _store(before, x, at, end, tail)
            x = x.to(D)
            g = _load(grads, at, end, tail).to(D)
            if grad_factor is not None:
                g = g * tl.load(grad_factor).to(D)
            delta = _load(stored, at, end, tail)
            if PLAIN:
                delta = x - delta
                if COMPENSATION is not None:
                    delta += _load(compensations, at, end, tail).to(D)
            delta_g += delta * g
            delta_x += delta * x
            g_squared += g * g
            x_squared += x * x
            if PLAIN:
                delta_squared += delta * delta
    row = sums + (5 if PLAIN else 4) * tl.program_id(0).to(tl.int64)
    tl.store(row, tl.sum(delta_g))
    tl.store(row + 1, tl.sum(delta_x))
    tl.store(row + 2, tl.sum(g_squared))
    tl.store(row + 3, tl.sum(x_squared))
    if PLAIN:
        tl.store(row + 4, tl.sum(delta_squared))


@triton.jit(do_not_specialize=["columns"])
def _step(
    table,
    owners,
    columns,
    old_scale,
    new_scale,
    follow,
    squares,
    constants,
    rates,
    grad_scale,
    found_inf,
    X: tl.constexpr,
    OTHER: tl.constexpr,
    D: tl.constexpr,
    RULE: tl.constexpr,
    STATES: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    COMPENSATION: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    column, begin, full, end = _part(table, owners, columns, BLOCK, CHUNK)
    params = _address(table, 0, columns, column, X, ALIGNED)
    others = _address(table, 1, columns, column, OTHER, ALIGNED)
    stored = _address(table, 2, columns, column, D, ALIGNED)
    first = _address(table, 3 if STATES > 0 else 0, columns, column, X, ALIGNED)
    second = _address(table, 4 if STATES > 1 else 0, columns, column, X, ALIGNED)
    third = _address(table, 5 if STATES > 2 else 0, columns, column, X, ALIGNED)
    if COMPENSATION is not None:
        compensations = _address(table, 3 + STATES, columns, column, COMPENSATION, ALIGNED)
    old, new = tl.load(old_scale).to(D), tl.load(new_scale).to(D)
    if follow is not None:
        nearer = tl.load(follow).to(D)
        squared = tl.zeros((BLOCK,), D)
    if RULE is not None:
        keep1, take1 = tl.load(constants).to(D), tl.load(constants + 1).to(D)
        keep2, take2 = tl.load(constants + 2).to(D), tl.load(constants + 3).to(D)
        decay, eps = tl.load(constants + 4).to(D), tl.load(constants + 5).to(D)
        rates += 3 * tl.load(table + column)
        step_size, correction = tl.load(rates).to(D), tl.load(rates + 1).to(D)
        shrink = tl.load(rates + 2).to(D)
    if found_inf is not None:  # nothing to do for this program
        skip = tl.load(found_inf) != 0
        full = tl.where(skip, begin, full)
        end = tl.where(skip, begin, end)
    for tail in tl.static_range(2):  # see _measure
        for start in range(full if tail else begin, end if tail else full, BLOCK):
            at = start + tl.arange(0, BLOCK).to(tl.int64)
            x = _load(params, at, end, tail).to(D)
            other = _load(others, at, end, tail).to(D)
            if RULE is None:
                before, update = other, x - other
            else:
                before, g = x, other
                if grad_scale is not None:
                    g = _divide(g, tl.load(grad_scale).to(D))
                    _store(others, g, at, end, tail)
                if MAXIMIZE:
                    g = -g
                if RULE != "adamw":
                    g += decay * x
                if STATES > 0:
                    m = keep1 * _load(first, at, end, tail).to(D) + take1 * g
                    _store(first, m, at, end, tail)
                if RULE == "sgd":
                    if NESTEROV:
                        g += keep1 * m
                    elif STATES > 0:
                        g = m
                    update = -step_size * g
                else:
                    v = keep2 * _load(second, at, end, tail).to(D) + take2 * g * g
                    _store(second, v, at, end, tail)
                    if STATES > 2:
                        v = tl.maximum(v, _load(third, at, end, tail).to(D), tl.PropagateNan.ALL)
                        _store(third, v, at, end, tail)
                    update = -_divide(step_size * m, _divide(_sqrt(v), correction) + eps)
                    if RULE == "adamw":
                        update -= shrink * x
                if COMPENSATION is not None:  # the base would have stored it
                    update = (before + update).to(X).to(D) - before
            ours = _load(stored, at, end, tail)
            if follow is None:
                step = (new - old) * ours + new * update
                _store(stored, ours + update, at, end, tail)
            else:
                step = new * update
                inside = tl.where(at < end, update, 0.0) if tail else update
                squared += inside * inside
                _store(stored, ours + nearer * (before - ours), at, end, tail)
            if COMPENSATION is None:
                _store(params, before + step, at, end, tail)
            else:  # see for_loop
                lost = _load(compensations, at, end, tail).to(D)
                lost = tl.where((before + 0.75 * lost).to(X).to(D) != before, 0.0, lost)
                target = before + lost + step
                rounded = target.to(X).to(D)
                still = step == 0
                _store(params, tl.where(still, before, rounded), at, end, tail)
                _store(compensations, tl.where(still, lost, target - rounded), at, end, tail)
    if follow is not None:
        tl.store(squares + tl.program_id(0), tl.sum(squared))


@triton.jit
def _part(table, owners, columns, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Return the column of this program, and where its part of the tensor begins, has no more whole block, and ends."""
    program = tl.program_id(0)
    column = tl.load(owners + program)
    size = tl.load(table + columns + column)
    begin = (program - tl.load(table + 2 * columns + column)) * CHUNK
    end = tl.minimum(begin + CHUNK, size)
    return column, begin, begin + (end - begin) // BLOCK * BLOCK, end


@triton.jit
def _address(table, row, columns, column, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    address = tl.load(table + (ADDRESSES + row) * columns + column).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def _load(address, at, end, TAIL: tl.constexpr):
    return tl.load(address + at, at < end, other=0.0) if TAIL else tl.load(address + at)


@triton.jit
def _store(address, value, at, end, TAIL: tl.constexpr):
    if TAIL:
        tl.store(address + at, value, at < end)
    else:
        tl.store(address + at, value)


@triton.jit
def _divide(a, b):  # as torch does; in float32, Triton's own division is less precise, and so is its square root
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def _sqrt(a):
    return tl.sqrt(a) if a.dtype == tl.float64 else tl.sqrt_rn(a)
