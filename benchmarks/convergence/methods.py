"""What is compared: the plain base at many learning rates, ours, and the peers; and how one job trains.

A method is a name. `plain@10^-2.5` is a point of the grid, `plain@learned` the plain base at the learning rate that
`ours-auto` has found, `ours@1e-04` ours at that base learning rate. These run only if they are asked for:
`ours-auto/head` is ours with a scale for each group of one of the `GROUPINGS`, here for the body and for the last
layer.
"""

from __future__ import annotations

import fnmatch
import math
import platform
import time
import traceback
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.convergence.tasks import GROUPINGS, Run, Task
from benchmarks.start import load_old
from mechanic_pytorch import is_mechanized, mechanize

GRID, LEARNED, TEACHER = "grid", "plain@learned", "ours-auto"
CENTRE = {"Adam": -2, "AdamW": -6, "SGD": -2, "Muon": -3}  # in half decades: 0.1, 0.001, 0.1, 0.03
REACH = {"quick": 2, "full": 4, "groups": 4}  # points of the grid on either side of the centre, before it is extended
FURTHEST = 24  # half decades: no learning rate above 1e12 or below 1e-12 is tried
FIXED = (
    "ours",
    "ours-auto",
    *(f"ours@{lr:.0e}" for lr in (1e-8, 1e-4, 1e4, 1e8)),
    *(f"ours-auto@{lr:.0e}" for lr in (1e-6, 1e6)),
    "0.0.1",
    "prodigy",
    "d-adaptation",
    "ldog",
    "schedule-free",
    "schedule-free-warm",
    "prodigy-plus",
    "prodigy-adv",
    "momo",
    "adamw@1e-3",
)
# Their lr stays constant, and they must be told when they are judged.
UNSCHEDULED = ("schedule-free", "schedule-free-warm", "prodigy-plus")
FREE_WARM_UP = 0.05  # of all steps, over which Schedule-Free's authors advise to warm up
PER_GROUP = tuple(f"{family}/{grouping}" for family in ("ours", "ours-auto") for grouping in GROUPINGS)
METHODS = (GRID, *FIXED, LEARNED)
NAMES = {  # for tables that people read
    TEACHER: "mechanized",
    "ours": "mechanized, `s_init=1e-8`",
    "0.0.1": "version 0.0.1",
    "prodigy": "Prodigy",
    "d-adaptation": "D-Adaptation",
    "ldog": "LDoG",
    "schedule-free": "Schedule-Free, default lr",
    "schedule-free-warm": "Schedule-Free, warm-up of 5 %",
    "prodigy-plus": "Prodigy plus Schedule-Free",
    "prodigy-adv": "Prodigy_adv",
    "momo": "Momo",
    "adamw@1e-3": "AdamW at 1e-3",
    LEARNED: "the plain base at `learned_lr()` of “auto”",
}
POINTS = 20  # of the effective learning rate over time that are kept


@dataclass(frozen=True)
class Job:
    """One training run."""

    task: Task
    method: str
    seed: int
    profile: str

    @property
    def identity(self) -> dict[str, Any]:
        """What distinguishes its result from all others."""
        return {
            "task": self.task.name,
            "method": self.method,
            "seed": self.seed,
            "profile": self.profile,
            "steps": self.task.steps(self.profile),
            "torch": torch.__version__,
            "package": package_version(),
        }


@cache
def package_version() -> str:
    """Return the version of the package that is measured."""
    return version("mechanic-pytorch")


def grid_name(k: int) -> str:
    """Return the name of the plain base at a learning rate given in half decades."""
    return f"plain@10^{k / 2:g}"


def grid_point(method: str) -> int | None:
    """Return the learning rate of a point of the grid in half decades, None if the method is none."""
    return round(2 * float(method[9:])) if method.startswith("plain@10^") else None


def matching(names: Iterable[str], patterns: Sequence[str] | None) -> list[str]:
    """Return the names that match one of the patterns, all if there are none.

    Raises:
        ValueError: a pattern matches nothing.
    """
    names = list(names)
    for pattern in patterns or ():
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"nothing is called {pattern!r}. Known: {', '.join(names)}")
    return [name for name in names if not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def build(
    method: str, task: Task, model: nn.Module, lr: float | None, peers: Path, steps: int
) -> torch.optim.Optimizer:
    """Return the optimizer of a method. The peers' options are those that their authors advise, where they do."""
    import momo
    import pytorch_optimizer as po
    import schedulefree
    from adv_optm import Prodigy_adv
    from dog import LDoG
    from prodigyplus import ProdigyPlusScheduleFree

    base, decay = po.Muon if task.base == "Muon" else getattr(torch.optim, task.base), task.weight_decay
    options: dict[str, Any] = {"momentum": 0.9} if task.base == "SGD" else {"weight_decay": decay}
    decoupled = {"weight_decay": decay, "weight_decouple": True}
    if (k := grid_point(method)) is not None:
        lr = 10.0 ** (k / 2)
        return base(grouped(task, model, lr), lr=lr, **options)
    if method == LEARNED:
        return base(grouped(task, model, lr), lr=lr, **options)
    name, _, number = method.partition("@")
    family, _, grouping = name.partition("/")
    if family in ("ours", "ours-auto"):
        kind = mechanize(base, s_init="auto" if family == "ours-auto" else 1e-8, per_group=bool(grouping))
        return kind(grouped(task, model, lr := float(number or 1), grouping), lr=lr, **options)
    if task.base == "Muon":
        raise ValueError(f"{method} is not for two kinds of groups")
    params = model.parameters()
    if name == "0.0.1":
        return load_old(peers)(base)(params, lr=1.0, **options)
    if name == "prodigy":
        return po.Prodigy(params, safeguard_warmup=task.warm_up > 0, **decoupled)
    if name == "d-adaptation":
        return po.DAdaptSGD(params, momentum=0.9) if task.base == "SGD" else po.DAdaptAdam(params, **decoupled)
    if name == "ldog":  # its weight decay is an L2 penalty, another thing, so it goes without
        return LDoG(params, reps_rel=1e-4 if has_batch_norm(model) else 1e-6)
    if name == "schedule-free":
        return po.ScheduleFreeSGD(params) if task.base == "SGD" else po.ScheduleFreeAdamW(params, **decoupled)
    if name == "schedule-free-warm":
        warm_up = {"warmup_steps": round(FREE_WARM_UP * steps)}
        if task.base == "SGD":
            return schedulefree.SGDScheduleFree(params, **warm_up)
        return schedulefree.AdamWScheduleFree(params, weight_decay=decay, **warm_up)
    if name == "prodigy-plus":
        return ProdigyPlusScheduleFree(params, weight_decay=decay)
    if name == "prodigy-adv":
        return Prodigy_adv(params, weight_decay=decay)
    if name == "momo":
        return momo.Momo(params, lr=1.0) if task.base == "SGD" else momo.MomoAdam(params, lr=1e-2, weight_decay=decay)
    if method == "adamw@1e-3":
        return torch.optim.AdamW(params, lr=1e-3, weight_decay=decay)
    raise ValueError(f"nothing is called {method!r}. Known: {', '.join(METHODS)}")


def grouped(task: Task, model: nn.Module, lr: float | None, grouping: str = "") -> Any:
    """Return the parameters as an optimizer of a task takes them, in groups if it or the method wants some."""
    if task.base == "Muon":
        parts = zip(GROUPINGS["muon"](model), (lr, None if lr is None else lr * task.ratio), (True, False), strict=True)
        return [
            {"params": part, "lr": rate, "use_muon": is_hidden, "weight_decay": task.weight_decay}
            for part, rate, is_hidden in parts
        ]
    return [{"params": part} for part in GROUPINGS[grouping](model)] if grouping else model.parameters()


def has_batch_norm(model: nn.Module) -> bool:
    """Return True if a model has batch norm."""
    return any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def effective_lr(method: str, optimizer: Any) -> float:
    """Return the learning rate with which a step is made now, NaN where the optimizer does not say."""
    if hasattr(optimizer, "effective_lr"):
        return float(optimizer.effective_lr()[0])
    if method in ("0.0.1", "ldog", "momo"):
        return math.nan
    group = optimizer.param_groups[0]
    return float(group["lr"] * group.get("d", 1.0))


def train(job: Job, lr: float | None, peers: Path) -> dict[str, Any]:
    """Train once; return what is to be known about it."""
    run = Run(job.task, job.profile, job.seed)
    result: dict[str, Any] = {"start": run.fingerprint()}
    optimizer = build(job.method, job.task, run.model, lr, peers, run.steps)
    scheduled = job.method not in UNSCHEDULED
    factor = (lambda step: job.task.factor(min(step, run.steps - 1), run.steps)) if scheduled else (lambda step: 1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    kept = {round(i * (run.steps - 1) / (POINTS - 1)) for i in range(POINTS)}
    peak, points, began = math.nan, [], time.perf_counter()
    switch(optimizer, "train")
    for step, batch in enumerate(run.batches):
        optimizer.zero_grad()
        loss = run.loss(batch)
        if not loss.isfinite() and not all(p.isfinite().all() for p in run.model.parameters()):
            break  # weights that are not finite never become so again
        loss.backward()
        optimizer.step(**({"loss": loss.detach()} if job.method == "momo" else {}))
        now = effective_lr(job.method, optimizer)
        peak = now if math.isnan(peak) else max(peak, now)
        if step in kept:
            points.append([step, now])
        scheduler.step()
    seconds = time.perf_counter() - began
    switch(optimizer, "eval")
    if not scheduled and has_batch_norm(run.model):
        with torch.no_grad():  # its weights are others now, so the running statistics are taken again
            for batch in run.batches[:50]:
                run.loss(batch)
    result |= {"loss": run.final_loss(), "metric": run.metric(), "metric name": job.task.metric}
    learned = optimizer.learned_lr() if is_mechanized(optimizer) else [math.nan]
    if len(learned) > 1:
        result["learned lrs"] = learned
    return result | {"learned lr": learned[0], "peak lr": peak, "lr over time": points, "seconds": round(seconds, 3)}


def switch(optimizer: Any, mode: str) -> None:
    """Tell a schedule-free optimizer whether to train or to be judged."""
    getattr(optimizer, mode, lambda: None)()


def execute(job: Job, lr: float | None, peers: Path, threads: int) -> dict[str, Any]:
    """Run a job in a worker. Return its line for the results file, which names the error if it has failed."""
    torch.set_num_threads(threads)
    line = {**job.identity, "lr": lr, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    line |= {"python": platform.python_version(), "machine": platform.machine()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return line | train(job, lr, peers)
    except (Exception, SystemExit) as error:  # benchmarks.start ends the program if there is no 0.0.1
        return line | {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


def finite(value: Any) -> float:
    """Return a loss to compare; one that is missing or not finite is infinite."""
    return value if isinstance(value, int | float) and math.isfinite(value) else math.inf
