"""Print a digest of what sixty short runs do to weights and state: a redesign must not change one of them.

    python tools/trajectories.py > before.txt
    # change the code
    python tools/trajectories.py | diff before.txt - && echo "the same, to the bit"

Digests depend on the machine and on the version of torch, so they are compared, never stored.
"""

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mechanic_pytorch import mechanize

STEPS = 40
Run = Iterator[Any]  # yields what is to be compared
RUNS: dict[str, Callable[[], Run]] = {}


def add_to(digest: Any, value: Any) -> None:
    """Take in a value: tensors by their bits, containers with their keys."""
    if isinstance(value, Tensor):
        value = value.detach().to_dense() if value.layout is not torch.strided else value.detach()
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        real = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
        digest.update(real.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            add_to(digest, value[key])
    elif isinstance(value, list | tuple):
        for each in value:
            add_to(digest, each)
    else:
        digest.update(repr(value).encode())


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Return a small network, always the same."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).to(dtype)


def data(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the batch of a step."""
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(step)).to(dtype)


def loss_of(model: nn.Module, step: int) -> Tensor:
    """Return the loss of a step."""
    batch = data(step, next(model.parameters()).dtype)
    return (model(batch) - batch[:, :3].roll(1, 1).sin()).square().mean()


def groups_of(model: nn.Sequential) -> list[dict[str, Any]]:
    """Return two groups with lrs of their own."""
    return [{"params": model[0].parameters(), "lr": 1.0}, {"params": model[2].parameters(), "lr": 0.1}]


def run(
    base: type[torch.optim.Optimizer] = torch.optim.AdamW,
    *,
    dtype: torch.dtype = torch.float32,
    lr: Any = 1.0,
    grouped: bool = False,
    schedule: Callable[[int], float] | None = None,
    at: Callable[[Any, nn.Module, int], Any] | None = None,
    closure: bool = False,
    mechanic: dict[str, Any] | None = None,
    **options: Any,
) -> Callable[[], Run]:
    """Return a run of `STEPS` steps; `at` is called between backward and step, and may return another optimizer."""

    def steps() -> Run:
        torch.manual_seed(0)
        model, log = network(dtype), []
        kind = mechanize(base, **{"s_init": 1e-8, "log_every": 7, "log_func": log.append, **(mechanic or {})})
        params = groups_of(model) if grouped else model.parameters()
        optimizer = kind(params, lr=lr, **options)
        scheduler = schedule and torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        for step in range(STEPS):

            def evaluate(step: int = step, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            if closure:
                yield optimizer.step(evaluate)
            else:
                evaluate()
                optimizer = (at and at(optimizer, model, step)) or optimizer
                optimizer.step()
            if scheduler:
                scheduler.step()
            yield list(model.parameters())
        yield optimizer.state_dict(), optimizer.scale, optimizer.effective_lr(), optimizer.learned_lr(), log
        yield optimizer.skipped_steps

    return steps


def cosine(step: int) -> float:
    """Warm up from 0, then fall to 0."""
    return step / 5 if step < 5 else 0.5 * (1 + torch.cos(torch.tensor(3.14159265 * (step - 5) / 30)).item())


def freezes(optimizer: Any, model: nn.Module, step: int) -> None:
    """Freeze the scale for a while."""
    if step in (15, 30):
        optimizer.freeze_scale() if step == 15 else optimizer.unfreeze_scale()


def spoils(optimizer: Any, model: Any, step: int) -> None:
    """Make some gradients infinite, the first among them."""
    if step in (0, 9, 10, 25):
        model[0].weight.grad[0, 0] = torch.inf


def resumes(optimizer: Any, model: nn.Module, step: int) -> Any:
    """Go on from a checkpoint, in a new optimizer."""
    if step not in (1, 20):
        return None
    fresh = type(optimizer)([{**g, "params": list(g["params"])} for g in optimizer.param_groups])
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return fresh


def reshapes(optimizer: Any, model: Any, step: int) -> None:
    """Remove the first group, put it back at the end, add a group, reset, edit weights, drop a gradient."""
    if step == 5:
        removed = optimizer.param_groups.pop(0)
        optimizer.param_groups.append(removed)
    if step == 10:
        model.extra = nn.Parameter(torch.ones(4))
        optimizer.add_param_group({"params": [model.extra], "lr": 0.5})
    if step > 10:
        model.extra.grad = model.extra.detach() - 0.1 * step
    if step == 15:
        model[0].weight.data.clamp_(-0.2, 0.2)
    if step in (18, 19):
        model[2].bias.grad = None
    if step == 30:
        optimizer.reset()


def scales_loss(optimizer: Any, model: nn.Module, step: int) -> None:
    """Hand over gradients as a GradScaler does to a fused optimizer: scaled, with the scale and its finding."""
    optimizer.grad_scale = torch.tensor(1024.0)
    optimizer.found_inf = torch.tensor(float(step in (0, 7)))
    for p in model.parameters():
        p.grad.mul_(1024.0)


def sparse(auto: bool) -> Callable[[], Run]:
    """Return a run on a table of which few rows have a gradient."""

    def steps() -> Run:
        torch.manual_seed(0)
        table = nn.Embedding(20, 4, sparse=True)
        kind = mechanize(torch.optim.SparseAdam, s_init="auto" if auto else 1e-8)
        optimizer = kind(table.parameters(), lr=0.1)
        for step in range(STEPS):
            optimizer.zero_grad()
            (table(torch.tensor([step % 20, 3])) - 1).square().sum().backward()
            optimizer.step()
            yield table.weight
        yield optimizer.state_dict()

    return steps


def complex_numbers(auto: bool) -> Callable[[], Run]:
    """Return a run on complex weights."""

    def steps() -> Run:
        torch.manual_seed(0)
        p = torch.randn(5, dtype=torch.complex64, requires_grad=True)
        optimizer = mechanize(torch.optim.Adam, s_init="auto" if auto else 1e-8)([p], lr=1.0, maximize=True)
        for _ in range(STEPS):
            optimizer.zero_grad()
            (-(p - 1j).abs().square().sum()).backward()
            optimizer.step()
            yield p
        yield optimizer.state_dict()

    return steps


def compiled(auto: bool, **options: Any) -> Callable[[], Run]:
    """Return a run whose steps are traced by torch.compile."""

    def steps() -> Run:
        torch._dynamo.reset()
        model = network()
        kind = mechanize(torch.optim.AdamW, s_init="auto" if auto else 1e-8, **options)
        optimizer = kind(model.parameters(), lr=torch.tensor(1.0))
        step_once = torch.compile(optimizer.step, backend="eager")
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            step_once()
            yield list(model.parameters())
        yield optimizer.state_dict()

    return steps


for start in ("number", "auto"):
    auto: dict[str, Any] = {"s_init": "auto" if start == "auto" else 1e-8}
    SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
    RUNS |= {
        f"{start}, {name}": each
        for name, each in {
            "AdamW": run(mechanic=auto),
            "AdamW, cosine": run(mechanic=auto, schedule=cosine, weight_decay=0.1),
            "SGD, momentum, cosine": run(SGD, mechanic=auto, momentum=0.9, schedule=cosine),
            "SGD, lr 1e-6": run(SGD, mechanic=auto, lr=1e-6),
            "Adam, fused": run(Adam, mechanic=auto, fused=True, weight_decay=0.01),
            "SGD, fused, infinite gradients": run(SGD, mechanic=auto, fused=True, at=spoils, momentum=0.9),
            "AdamW, infinite gradients": run(mechanic=auto, at=spoils),
            "AdamW, infinite gradients are not skipped": run(mechanic={**auto, "skip_nonfinite": False}, at=spoils),
            "AdamW, fused, GradScaler": run(mechanic=auto, fused=True, at=scales_loss),
            "two groups": run(mechanic=auto, grouped=True),
            "per group": run(mechanic={**auto, "per_group": True}, grouped=True, schedule=cosine),
            "per group, fused, infinite gradients": run(
                AdamW, mechanic={**auto, "per_group": True}, grouped=True, fused=True, at=spoils
            ),
            "max_lr": run(mechanic={**auto, "max_lr": 1e-6}),
            "per group, max_lr": run(mechanic={**auto, "max_lr": 1e-6, "per_group": True}, grouped=True),
            "frozen": run(mechanic=auto, at=freezes, schedule=cosine),
            "per group, frozen, fused": run(mechanic={**auto, "per_group": True}, grouped=True, at=freezes, fused=True),
            "bfloat16": run(mechanic=auto, dtype=torch.bfloat16),
            "float64, lr a tensor": run(mechanic=auto, dtype=torch.float64, lr=torch.tensor(0.5)),
            "resumed": run(mechanic=auto, at=resumes, grouped=True),
            "per group, resumed, bfloat16": run(
                mechanic={**auto, "per_group": True}, at=resumes, grouped=True, dtype=torch.bfloat16
            ),
            "groups come and go": run(SGD, mechanic=auto, at=reshapes, grouped=True),
            "per group, groups come and go": run(SGD, mechanic={**auto, "per_group": True}, at=reshapes, grouped=True),
            "closure": run(mechanic=auto, closure=True),
            "LBFGS": run(torch.optim.LBFGS, mechanic=auto, closure=True, max_iter=3, line_search_fn="strong_wolfe"),
            "Rprop": run(torch.optim.Rprop, mechanic=auto, lr=1e-3),
            "betas, eps, s_decay": run(mechanic={**auto, "betas": (0.9, 0.999), "eps": 1e-6, "s_decay": 0.1}),
            "sparse": sparse(start == "auto"),
            "complex, maximize": complex_numbers(start == "auto"),
            "compiled": compiled(start == "auto"),
            "compiled, per group": compiled(start == "auto", per_group=True),
        }.items()
    }


def main() -> None:
    """Print a line for each run: digest, steps until it ends, name, and the warnings that came."""
    torch.set_num_threads(1)
    for name, steps in RUNS.items():
        digest, count, error = hashlib.sha256(), 0, ""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                for values in steps():
                    add_to(digest, values)
                    count += 1
            except Exception as raised:
                error = f", {type(raised).__name__}: {raised}"
        said = sorted({str(each.message)[:60] for each in caught if "mechanic" in str(each.message).lower()})
        print(f"{digest.hexdigest()[:16]} {count:3} {name}{error} {said}")


if __name__ == "__main__":
    main()
