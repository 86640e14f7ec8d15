"""What is trained: data, model, base optimizer, schedule and length of each task.

All methods of a seed start from the same weights and see the same batches; `Run` makes both from the seed alone.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.convergence import data

PROFILES = ("quick", "full", "groups")
EVALUATION = 5000  # at most so many examples of the training data say what the loss is
CHUNK = 1000
CONTEXT, WIDTH = 64, 64
LAST = "14."  # the last layer of the convolutional network
# Training accuracy of Adam at its best learning rate, and of D-Adapt Adam: Defazio and Mishchenko, "Learning-rate-free
# learning by D-Adaptation", ICML 2023. Means of ten seeds, rounded as there.
PUBLISHED = {
    "Aloi": (94.1, 97.1),
    "DNA": (100.0, 100.0),
    "Glass": (72.0, 72.3),
    "Iris": (98.3, 98.6),
    "Letter": (77.8, 77.7),
    "Pendigits": (96.2, 95.8),
    "Sensorless": (89.5, 90.0),
    "smallNORB": (92.9, 95.8),
    "USPS": (98.6, 98.6),
    "Vehicle": (82.1, 81.9),
    "Vowel": (77.4, 77.4),
    "Wine": (100.0, 100.0),
}


@dataclass(frozen=True)
class Task:
    """One problem to train on, with its base optimizer.

    Args:
        load: returns inputs and targets to train on, and inputs and targets to test on.
        model: returns the model, its weights drawn from torch's global generator.
        metric: what is computed on the test data: "accuracy, %", "R², %" or "test loss".
        schedule: "cosine", after the warm-up, or "steps", x 0.1 at 60 % and at 80 %.
        warm_up: the part of the steps in which the learning rate rises.
        lengths: per profile the number of steps, or of epochs if `epochs`; a task is in the profiles that it names.
        published: the row of `PUBLISHED`.
        files: what must be at hand or public; a task of a file that is neither is left out.
        prepare: is called once, before any job runs.
        ratio: of a base with two kinds of groups, the lr of the second relative to that of the first.
    """

    name: str
    base: str
    load: Callable[[], data.Split]
    model: Callable[[], nn.Module]
    metric: str
    schedule: str
    batch: int
    lengths: dict[str, int]
    warm_up: float = 0.0
    weight_decay: float = 0.0
    epochs: bool = False
    published: str | None = None
    files: tuple[str, ...] = ()
    prepare: Callable[[], Any] = field(default=lambda: None)
    ratio: float = 1.0

    def steps(self, profile: str) -> int:
        """Return how many steps there are."""
        length = self.lengths[profile]
        return length * math.ceil(len(self.load()[0]) / self.batch) if self.epochs else length

    def factor(self, step: int, steps: int) -> float:
        """Return by what the schedule multiplies the learning rate, at most 1."""
        if self.schedule == "steps":
            return 1.0 if step < 0.6 * steps else 0.1 if step < 0.8 * steps else 0.01
        rising = max(1, round(self.warm_up * steps))
        if step < rising:
            return (step + 1) / rising
        return (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2


class Run:
    """Weights and batches of a task, a profile and a seed: the same for every method."""

    def __init__(self, task: Task, profile: str, seed: int) -> None:
        self.task, self.steps = task, task.steps(profile)
        self.x, self.y, self.x_test, self.y_test = task.load()
        torch.manual_seed(seed)
        self.model = task.model()
        self.batches = batches(len(self.x), task.batch, self.steps, seed)
        chosen = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(0))[:EVALUATION]
        self.x_seen, self.y_seen = self.x[chosen], self.y[chosen]

    def fingerprint(self) -> str:
        """Return a hash of weights and batches, taken before training."""
        digest = hashlib.sha256()
        for tensor in (*self.model.state_dict().values(), *self.batches):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()[:16]

    def loss(self, batch: Tensor) -> Tensor:
        """Return the loss of a batch, given by its indices."""
        return self._loss(self.model(self.x[batch]), self.y[batch])

    @torch.no_grad()
    def final_loss(self) -> float:
        """Return the mean loss over part of the training data, the same part for all."""
        return self._mean(self._loss, self.x_seen, self.y_seen)

    @torch.no_grad()
    def metric(self) -> float:
        """Return the metric on the test data."""
        if self.task.metric == "test loss":
            return self._mean(self._loss, self.x_test, self.y_test)
        if self.task.metric == "R², %":
            residual = self._mean(self._loss, self.x_test, self.y_test)
            return 100 * (1 - residual / float(self.y_test.var(correction=0)))
        return 100 * self._mean(lambda out, y: (out.argmax(1) == y).float().mean(), self.x_test, self.y_test)

    def _loss(self, out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y) if y.dtype == torch.long else F.mse_loss(out, y)

    def _mean(self, function: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> float:
        total = weight = 0.0
        self.model.eval()
        for inputs, targets in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            count = int((targets != -100).sum()) if targets.dtype == torch.long else len(targets)
            total += count * float(function(self.model(inputs), targets))
            weight += count
        self.model.train()
        return total / weight


def batches(examples: int, batch: int, steps: int, seed: int) -> list[Tensor]:
    """Return the indices of each batch, epoch after epoch in a new order."""
    generator = torch.Generator().manual_seed(seed)
    epochs = (torch.randperm(examples, generator=generator).split(batch) for _ in itertools.count())
    return list(itertools.islice(itertools.chain.from_iterable(epochs), steps))


def linear(features: int, classes: int) -> nn.Module:
    """Return a linear classifier that starts at zero."""
    layer = nn.Linear(features, classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Standardise(nn.Module):
    """Make numbers of about mean 0 and variance 1 of bytes."""

    def forward(self, image: Tensor) -> Tensor:
        """Return an image of floats."""
        return (image.float() / 255 - 0.3) / 0.35


def mlp(*widths: int) -> nn.Sequential:
    """Return a perceptron with rectifiers between its layers."""
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def perceptron() -> nn.Sequential:
    """Return a perceptron for images of 28 x 28."""
    return mlp(784, 128, 64, 10).insert(0, Standardise())


def cnn() -> nn.Sequential:
    """Return a small convolutional network with batch norm, for images of 28 x 28."""
    widths = [1, 8, 16, 32]
    blocks = [
        (nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
        for a, b in itertools.pairwise(widths)
    ]
    return nn.Sequential(Standardise(), *itertools.chain(*blocks), nn.Flatten(), nn.Linear(9 * widths[-1], 10))


def trained_on_mnist(make: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """Return the weights of a network after 600 steps of AdamW on MNIST."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
    x, y, _, _ = data.images("mnist")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in batches(len(x), 64, 600, seed=0):
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    return model.state_dict()


@cache
def pretrained() -> dict[str, Tensor]:
    """Return the weights of the convolutional network that knows MNIST, trained once and kept."""
    file = data.cache() / f"cnn-mnist-torch{torch.__version__}.pt"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=file.parent)
        os.close(handle)
        torch.save(trained_on_mnist(cnn), part)
        Path(part).replace(file)  # at once, so that nobody reads half of it
    return torch.load(file, weights_only=True)


def finetuned() -> nn.Module:
    """Return the network that knows MNIST, with a new last layer."""
    model = cnn()
    old = {name: weight for name, weight in pretrained().items() if not name.startswith(LAST)}
    model.load_state_dict({**model.state_dict(), **old})
    return model


class Transformer(nn.Module):
    """A model of the next of 65 characters, 0.1M weights."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(65, WIDTH), nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)  # two equal layers, by deepcopy
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 65))

    def forward(self, text: Tensor) -> Tensor:
        """Return logits, shape (batch, characters, time)."""
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        return self.head(self.layers(self.token(text) + self.position, mask, is_causal=True)).transpose(1, 2)


class LSTM(nn.Module):
    """A model of the next of 27 letters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm, self.head = (
            nn.Embedding(27, 32),
            nn.LSTM(32, 96, batch_first=True),
            nn.Linear(96, 27),
        )

    def forward(self, name: Tensor) -> Tensor:
        """Return logits, shape (batch, letters, time)."""
        return self.head(self.lstm(self.embedding(name))[0]).transpose(1, 2)


def by_head(model: nn.Module) -> list[list[nn.Parameter]]:
    """Return the parameters of the body, and those of the last layer."""
    parts = by_part(model)
    return [[p for part in parts[:-1] for p in part], parts[-1]]


def by_part(model: nn.Module) -> list[list[nn.Parameter]]:
    """Return the parameters of each part of a model: the layers of a plain one; else embedding, blocks and head."""
    parts = [*([p] for p in model.parameters(recurse=False)), *(list(part.parameters()) for part in model.children())]
    return [part for part in parts if part]


def by_kind(model: nn.Module) -> list[list[nn.Parameter]]:
    """Return the matrices, and the rest: biases and what norms have, which often go without weight decay."""
    return [[p for p in model.parameters() if (p.ndim < 2) == is_vector] for is_vector in (False, True)]


def for_muon(model: nn.Module) -> list[list[nn.Parameter]]:
    """Return the matrices of the blocks, which are Muon's, and what AdamW takes: embeddings, head, vectors."""
    hidden = {id(p) for p in model.get_submodule("layers").parameters() if p.ndim == 2}
    return [[p for p in model.parameters() if (id(p) in hidden) == is_hidden] for is_hidden in (True, False)]


GROUPINGS = {"head": by_head, "part": by_part, "kind": by_kind, "muon": for_muon}


def _linear_task(name: str, path: str, quick: int | None = None, published: str | None = None) -> Task:
    def load() -> data.Split:
        x, y = data.usps() if name == "usps" else data.libsvm(path)
        return x, y, x, y  # the published figure is training accuracy, and so is ours

    def model() -> nn.Module:
        x, y, _, _ = load()
        return linear(x.shape[1], int(y.max()) + 1)

    lengths = {"full": 100} if quick is None else {"quick": quick, "full": 100}
    about: dict[str, Any] = {"epochs": True, "published": published, "files": (path,), "prepare": load}
    return Task(f"linear-{name}", "Adam", load, model, "accuracy, %", "steps", 16, lengths, **about)


def _all() -> list[Task]:
    images, text = partial(data.images, "fashion-mnist"), partial(data.shakespeare, CONTEXT)
    accuracy, prices = "accuracy, %", partial(mlp, 8, 64, 64, 1)

    def both() -> None:
        images()
        pretrained()

    def task(
        name: str, base: str, load: Any, model: Any, metric: str, batch: int, full: int, quick: int = 0, **more: Any
    ) -> Task:
        lengths = {"quick": quick, "full": full} if quick else {"full": full}
        options = {"warm_up": 0.05, "weight_decay": 0.01 if base == "AdamW" else 0.0, "prepare": load, **more}
        return Task(name, base, load, model, metric, "cosine", batch, lengths, **options)

    return [
        _linear_task("dna", "libsvm/dna.scale", published="DNA"),
        _linear_task("german", "libsvm/german.numer_scale"),
        _linear_task("glass", "libsvm/glass.scale", 25, "Glass"),
        _linear_task("iris", "libsvm/iris.scale", published="Iris"),
        _linear_task("letter", "libsvm/letter.scale", published="Letter"),
        _linear_task("mushrooms", "libsvm/mushrooms"),
        _linear_task("pendigits", "libsvm/pendigits", published="Pendigits"),
        _linear_task("satimage", "libsvm/satimage.scale"),
        _linear_task("segment", "libsvm/segment.scale"),
        _linear_task("sensorless2200", "libsvm/sensorless2200.scale"),  # a subset: no published row is about it
        _linear_task("svmguide2", "libsvm/svmguide2"),
        _linear_task("usps", "usps/usps.bz2", published="USPS"),
        _linear_task("vehicle", "libsvm/vehicle.scale", published="Vehicle"),
        _linear_task("vowel", "libsvm/vowel.scale", published="Vowel"),
        _linear_task("wine", "libsvm/wine.scale", 25, "Wine"),
        task("fashion-mlp-adamw", "AdamW", images, perceptron, accuracy, 64, 1500, quick=100),
        task("fashion-mlp-sgd", "SGD", images, perceptron, accuracy, 64, 1500),
        task("fashion-cnn-adamw", "AdamW", images, cnn, accuracy, 64, 800),
        task("fashion-cnn-sgd", "SGD", images, cnn, accuracy, 64, 800, quick=40),
        task("mnist-to-fashion", "AdamW", images, finetuned, accuracy, 64, 600, prepare=both),
        task("shakespeare-gpt", "AdamW", text, Transformer, "test loss", 16, 1000, weight_decay=0.1),
        task("names-lstm", "AdamW", data.names, LSTM, "test loss", 64, 1000),
        task("housing-mlp", "AdamW", data.housing, prices, "R², %", 64, 1500, quick=200),
        task("fashion-mlp-adamw-cold", "AdamW", images, perceptron, accuracy, 64, 400, warm_up=0.0),
        task("fashion-mlp-sgd-cold", "SGD", images, perceptron, accuracy, 64, 400, warm_up=0.0),
        *(
            replace(
                task("shakespeare-gpt", "Muon", text, Transformer, "test loss", 16, 0, weight_decay=0.1),
                name=f"shakespeare-muon-{ratio:g}",
                lengths={"groups": 600},
                ratio=ratio,
            )
            for ratio in (1, 0.01)
        ),
    ]


TASKS = {task.name: task for task in _all()}
