"""Does the tuner ever throw a good model away? The figures of `docs/safety.md`.

    python -m benchmarks.safety --fill docs/safety.md

Schedules: a perceptron (20-32-1) on a noisy regression, 512 examples, batches of 32, 600 steps, under schedules that
end early, fall fast, or come back. Mechanized with `s_init="auto"` at lr 1.0, against the plain base at the best
learning rate of half decades for this very row: the loss at the end, the largest of the second half, and how far
weights moved in steps whose lr was 0.

Disturbances: a perceptron (64-64-10) on scikit-learn's handwritten digits, batches of 64, 400 steps, while something
else changes weights, gradients, loss or labels.

Noise: 1000 steps on gradients that are nothing but noise, 200 weights.

Prints Markdown tables, or writes them between the marks `<!-- safety: NAME -->` and `<!-- end -->`. Each row is also
told on stderr as soon as there is one. Losses are over all the data, means over two seeds of data, weights and batches.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

from benchmarks.convergence import plan
from benchmarks.convergence.methods import finite
from benchmarks.pages import arguments, markdown_table, origin, print_or_fill
from benchmarks.shared import cosine, digits, network
from mechanic_pytorch import mechanize

SEEDS = range(2)
tuned = partial(plan.tuned, centre=-3, reach=3)
AUTO, NUMERIC = {"s_init": "auto"}, {"s_init": 1e-8}
Rate = float | dict[str, Any]  # of the plain base, or what the mechanized one is made with


class Lion(optim.Optimizer):
    """Steps by the sign of a momentum, as Chen et al. 2023 found it."""

    def __init__(self, params: Any, lr: float = 1e-4, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Make a step."""
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * momentum.lerp(p.grad, 0.1).sign())
                momentum.lerp_(p.grad, 0.01)


BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (optim.AdamW, {}),
    "Adam": (optim.Adam, {}),
    "NAdam": (optim.NAdam, {}),
    "RAdam": (optim.RAdam, {}),
    "SGD": (optim.SGD, {}),
    "SGD, momentum": (optim.SGD, {"momentum": 0.9}),
    "Lion": (Lion, {}),
    "RMSprop": (optim.RMSprop, {}),
    "Adagrad": (optim.Adagrad, {}),
}
DECAYS = {"AdamW": (0.0, 0.1), "Adam": (0.01,), "SGD": (0.0, 5e-4)}  # others: 0, where Adam is AdamW


def build(name: str, params: Any, rate: Rate, weight_decay: float | None = None) -> Any:
    """Return an optimizer, plain or mechanized, with the base's own weight decay if none is given."""
    base, options = BASES[name]
    if weight_decay is not None:
        options = {**options, "weight_decay": weight_decay}
    if isinstance(rate, dict):
        return mechanize(base, **rate)(params, lr=1.0, **options)
    return base(params, lr=rate, **options)


# --- schedules and decays -------------------------------------------------------------------------------------------

STEPS = 600
SCHEDULES: dict[str, Callable[[int], float]] = {
    "constant": lambda t: 1.0,
    "cosine, then 0": lambda t: cosine(2 * t / STEPS),
    "linear, then 0": lambda t: max(0.0, 1 - 2 * t / STEPS),
    "x 0.9 a step": lambda t: 0.9**t,
    "x 0.99 a step": lambda t: 0.99**t,
    "three steps of x 0.1": lambda t: 0.1 ** (4 * t // STEPS),
    "three steps of x 1e-4": lambda t: 1e-4 ** (4 * t // STEPS),
    "warm restarts": lambda t: cosine(t % 100 / 100),
    "one cycle": lambda t: 1 - 0.96 * cosine(t / 180) if t < 180 else cosine((t - 180) / (STEPS - 180)),
}


class Row(NamedTuple):
    """What is trained."""

    base: str
    weight_decay: float
    schedule: str


class Run(NamedTuple):
    """The loss at the end, the largest of the second half, and the weights' way at lr 0, in their lengths."""

    final: float
    spike: float
    moved: float


ROWS = [Row(base, decay, name) for base in BASES for decay in DECAYS.get(base, (0.0,)) for name in SCHEDULES]
QUICK = [
    Row("AdamW", 0.0, "cosine, then 0"),
    Row("AdamW", 0.1, "constant"),
    Row("RAdam", 0.0, "x 0.9 a step"),
    Row("SGD", 0.0, "warm restarts"),
]


def train(row: Row, seed: int, rate: Rate) -> Run:
    """Fit the regression once."""
    generator = torch.Generator().manual_seed(seed)
    x, plane, noise = (torch.randn(shape, generator=generator) for shape in ((512, 20), (20, 1), (512, 1)))
    y = x @ plane + 0.5 * noise
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = build(row.base, model.parameters(), rate, row.weight_decay)
    schedule = optim.lr_scheduler.LambdaLR(optimizer, SCHEDULES[row.schedule])
    losses, moved = [], 0.0
    for t in range(STEPS):
        chosen = torch.randint(len(x), (32,), generator=generator)
        optimizer.zero_grad()
        F.mse_loss(model(x[chosen]), y[chosen]).backward()
        rests = optimizer.param_groups[0]["lr"] == 0
        before = parameters_to_vector(model.parameters()).detach().double() if rests else None
        optimizer.step()
        schedule.step()
        if before is not None:
            after = parameters_to_vector(model.parameters()).detach().double()
            moved += float((after - before).norm() / before.norm())
        if t % 5 == 4:
            with torch.no_grad():
                losses.append(float(F.mse_loss(model(x), y)))
            if not math.isfinite(losses[-1]):
                return Run(math.inf, math.inf, moved)
    return Run(fmean(losses[-10:]), max(losses[len(losses) // 2 :]), moved)


def compare(row: Row, seeds: Iterable[int] = SEEDS) -> Run:
    """Return a mechanized run: its losses relative to those of the tuned one."""

    def mean(rate: Rate) -> Run:
        return Run(*map(fmean, zip(*(train(row, seed, rate) for seed in seeds), strict=True)))

    ours, (plain, _) = mean(AUTO), tuned(mean)
    return Run(ours.final / plain.final, ours.spike / plain.spike, ours.moved)


def cells(row: Row, run: Run) -> list[str]:
    """Return a row of the table."""
    moved = f"{run.moved:.2g}" if any(SCHEDULES[row.schedule](t) == 0 for t in range(STEPS)) else ""
    return [row.base, f"{row.weight_decay:g}", row.schedule, f"{run.final:.2f}", f"{run.spike:.2f}", moved]


def summary(made: dict[Row, Run]) -> str:
    """Return mean, median and worst over all rows of the table."""
    rows = []
    for title, name in (("final loss / tuned", "final"), ("late spike / tuned", "spike")):
        ratios = {row: getattr(run, name) for row, run in made.items()}
        worst = max(ratios, key=ratios.get)
        figures = (f(ratios.values()) for f in (fmean, median, max))
        rows.append([title, *(f"{figure:.2f}" for figure in figures), text_of(worst)])
    return markdown_table([f"{len(made)} rows", "mean", "median", "worst", "which"], rows)


def text_of(row: Row) -> str:
    """Return a row's name."""
    return f"{row.base}, weight decay {row.weight_decay:g}, {row.schedule}"


# --- disturbances ---------------------------------------------------------------------------------------------------

DIGITS_STEPS, MIDDLE = 400, 200


class Undisturbed:
    """A training whose weights, gradients, loss and labels are left alone; `t` is the number of steps before."""

    factor = staticmethod(lambda t: 1.0)  # of lr

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = network(64)
        self.layers = self.model[0], self.model[2]
        self.generator = torch.Generator().manual_seed(seed)

    def labels(self, t: int, labels: Tensor) -> Tensor:
        """Return what is to be learned."""
        return labels

    def loss(self, t: int, loss: Tensor) -> Tensor:
        """Return what is minimised."""
        return loss

    def change_gradients(self, t: int) -> None:
        """Change gradients before a step."""

    def change_weights(self, t: int) -> None:
        """Change weights after a step, which counts."""


class Clamped(Undisturbed):
    """Every weight between -0.2 and 0.2."""

    def change_weights(self, t: int) -> None:  # noqa: D102
        for p in self.model.parameters():
            p.clamp_(-0.2, 0.2)


class UnitRows(Undisturbed):
    """Rows of the first layer on the unit sphere."""

    def change_weights(self, t: int) -> None:  # noqa: D102
        self.layers[0].weight.div_(self.layers[0].weight.norm(dim=1, keepdim=True))


class MaxNorm(Undisturbed):
    """Rows of both layers within the unit ball."""

    def change_weights(self, t: int) -> None:  # noqa: D102
        for layer in self.layers:
            layer.weight.renorm_(p=2, dim=0, maxnorm=1.0)


class AveragedBack(Undisturbed):
    """Training goes on from an average every now and then."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.averages = [p.detach().clone() for p in self.model.parameters()]

    def change_weights(self, t: int) -> None:  # noqa: D102
        for average, p in zip(self.averages, self.model.parameters(), strict=True):
            average.lerp_(p, 0.02)
            if t % 50 == 0:
                p.copy_(average)


class Renewed(Undisturbed):
    """The last layer starts again, three times."""

    def change_weights(self, t: int) -> None:  # noqa: D102
        if t in (100, 200, 300):
            self.layers[1].reset_parameters()


class Halved(Undisturbed):
    """Every weight is halved, once."""

    def change_weights(self, t: int) -> None:  # noqa: D102
        if t == MIDDLE:
            for p in self.model.parameters():
                p.mul_(0.5)


class NoisyBatch(Undisturbed):
    """One gradient is mostly noise."""

    def change_gradients(self, t: int) -> None:  # noqa: D102
        if t == MIDDLE:
            self.add_noise(10.0)

    def add_noise(self, deviation: float) -> None:
        """Add noise of this standard deviation to every gradient."""
        for p in self.model.parameters():
            p.grad.add_(torch.randn(p.shape, generator=self.generator), alpha=deviation)


class Noise(NoisyBatch):
    """Every gradient is mostly noise, of length 10, while lr goes to 0."""

    factor = staticmethod(lambda t: cosine(t / DIGITS_STEPS))

    def change_gradients(self, t: int) -> None:  # noqa: D102
        self.add_noise(10.0 / sum(p.numel() for p in self.model.parameters()) ** 0.5)


class Magnified(Undisturbed):
    """The loss grows a hundredfold."""

    def loss(self, t: int, loss: Tensor) -> Tensor:  # noqa: D102
        return 100 * loss if t >= MIDDLE else loss


class Relabelled(Undisturbed):
    """What was a 9 is a 0, and so on."""

    def labels(self, t: int, labels: Tensor) -> Tensor:  # noqa: D102
        return 9 - labels if t >= MIDDLE else labels


DISTURBANCES: dict[str, type[Undisturbed]] = {
    "none": Undisturbed,
    "weights clamped to ±0.2": Clamped,
    "rows of the first layer at unit norm": UnitRows,
    "rows of both layers at most at unit norm": MaxNorm,
    "an average copied back every 50 steps": AveragedBack,
    "last layer renewed at 100, 200, 300": Renewed,
    "all weights halved at 200": Halved,
    "one noisy batch at 200": NoisyBatch,
    "noise of norm 10 in every gradient, cosine": Noise,
    "loss x 100 from 200 on": Magnified,
    "other labels from 200 on": Relabelled,
}
DISTURBED = "AdamW", "SGD, momentum"  # bases
QUICK_DISTURBANCES = ("weights clamped to ±0.2",)


def train_disturbed(name: str, base: str, seed: int, rate: Rate) -> float:
    """Learn to read digits once; return the loss at the end, for the labels of the last step."""
    x, y = digits()
    case = DISTURBANCES[name](seed)
    optimizer = build(base, case.model.parameters(), rate)
    schedule = optim.lr_scheduler.LambdaLR(optimizer, case.factor)
    for t in range(DIGITS_STEPS):
        chosen = torch.randint(len(x), (64,), generator=case.generator)
        optimizer.zero_grad()
        case.loss(t, F.cross_entropy(case.model(x[chosen]), case.labels(t, y[chosen]))).backward()
        case.change_gradients(t)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            case.change_weights(t + 1)
    with torch.no_grad():
        return finite(float(F.cross_entropy(case.model(x), case.labels(DIGITS_STEPS, y))))


def disturbed(name: str, base: str, rate: Rate, seeds: Iterable[int] = SEEDS) -> tuple[float, ...]:
    """Return the mean of final losses, and each."""
    losses = [train_disturbed(name, base, seed, rate) for seed in seeds]
    return fmean(losses), *losses


def disturbed_cells(name: str, base: str, seeds: Sequence[int] = SEEDS) -> list[str]:
    """Return a row of the table."""

    def loss(losses: tuple[float, ...]) -> str:
        spread = f" ({min(losses):.2g} to {max(losses):.2g})" if len(seeds) > 1 else ""
        return f"{losses[0]:.3g}{spread}"

    plain, lr = tuned(lambda rate: disturbed(name, base, rate, seeds))
    ours = [disturbed(name, base, rate, seeds) for rate in (AUTO, NUMERIC)]
    return [name, base, f"{loss(plain)}, lr {lr:.2g}", *map(loss, ours)]


# --- noise ----------------------------------------------------------------------------------------------------------

NOISE_STEPS, NOISE_SEEDS = 1000, range(5)
NOISE_SCHEDULES: dict[str, Callable[[float], float]] = {  # of the part of the run
    "constant": lambda part: 1.0,
    "linear": lambda part: 1 - part,
    "cosine": cosine,
    "warm-up for a tenth, linear": lambda part: min(10 * part, 1.0) * (1 - part),
    "warm-up for a half, linear": lambda part: min(2 * part, 2 - 2 * part),
}


def growth_on_noise(base: str, schedule: str, seed: int, rate: Rate) -> float:
    """Return how many times as long weights are after steps on nothing but noise."""
    generator = torch.Generator().manual_seed(seed)
    weights = nn.Parameter(torch.randn(200, generator=generator))
    start = weights.norm().item()
    optimizer = build(base, [weights], rate)
    scheduler = optim.lr_scheduler.LambdaLR(optimizer, lambda t: NOISE_SCHEDULES[schedule]((t + 1) / NOISE_STEPS))
    for _ in range(NOISE_STEPS):
        weights.grad = torch.randn(200, generator=generator)
        optimizer.step()
        scheduler.step()
    return finite(weights.norm().item()) / start


def noise_cells(base: str, schedule: str) -> list[str]:
    """Return a row of the table."""
    grown = [[growth_on_noise(base, schedule, seed, rate) for seed in NOISE_SEEDS] for rate in (AUTO, NUMERIC)]
    return [base, schedule, *(f"{median(some):.2g}, at most {max(some):.2g}" for some in grown)]


# --- the page -------------------------------------------------------------------------------------------------------


def tell(row: list[str]) -> list[str]:
    """Show a row at once."""
    print(*row, sep=" | ", file=sys.stderr, flush=True)
    return row


def main() -> None:
    """Print the tables, or write them into a page."""
    parser = arguments(__doc__)
    parser.add_argument("--quick", action="store_true", help="a handful of rows, one seed")
    parser.add_argument("--only", choices=("schedules", "disturbances", "noise"), help="of the tables")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES), help="of the schedules' table")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many (%(default)s)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    seeds = range(1 if options.quick else options.seeds)
    small = origin(f"means of {len(seeds)} seeds" if len(seeds) > 1 else "one seed")
    made = {}
    if options.only in (None, "schedules"):
        runs, rows = {}, []
        for row in QUICK if options.quick else [row for row in ROWS if row.base in options.bases]:
            runs[row] = compare(row, seeds)
            rows.append(tell(cells(row, runs[row])))
        head = ["base", "weight decay", "schedule", "final loss / tuned", "late spike / tuned", "moved at lr 0"]
        made |= {"schedules": f"{markdown_table(head, rows)}\n\n{small}", "summary": summary(runs)}
    if options.only in (None, "disturbances"):
        names = QUICK_DISTURBANCES if options.quick else DISTURBANCES
        rows = [tell(disturbed_cells(name, base, seeds)) for name in names for base in DISTURBED]
        head = ["disturbance", "base", "loss, plain tuned", '`s_init="auto"`', "`s_init=1e-8`"]
        made["disturbances"] = f"{markdown_table(head, rows)}\n\n{small}"
    if options.only == "noise" or (options.only is None and not options.quick):
        rows = [tell(noise_cells(base, schedule)) for base in DISTURBED for schedule in NOISE_SCHEDULES]
        head = ["base", "schedule", '`s_init="auto"`', "`s_init=1e-8`"]
        made["noise"] = f"{markdown_table(head, rows)}\n\n{origin(f'{len(NOISE_SEEDS)} seeds')}"
    print_or_fill(options.fill, "safety", made)


if __name__ == "__main__":
    main()
