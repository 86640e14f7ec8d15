"""Small real problems that many tests train on."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

_images, _labels = load_digits(return_X_y=True)
IMAGES, LABELS = torch.tensor(_images / 16, dtype=torch.float32), torch.tensor(_labels)


def batch(t, size=64):
    """Return the t-th batch: images of handwritten digits and their labels. The same at every call."""
    i = torch.randint(len(LABELS), (size,), generator=torch.Generator("cpu").manual_seed(t), device="cpu")
    return IMAGES[i], LABELS[i]


class SparseClassifier(torch.nn.Module):
    """Each pixel's grey level (0 to 16) looks up a row of a table; its gradient is sparse on demand."""

    def __init__(self, sparse=True):
        super().__init__()
        self.table = torch.nn.EmbeddingBag(64 * 17, 10, mode="sum", sparse=sparse)
        torch.nn.init.zeros_(self.table.weight)

    def forward(self, images):
        return self.table((images * 16).round().long() + 17 * torch.arange(64))


def mlp(dtype=torch.float32, bias=True, seed=0):
    torch.manual_seed(seed)
    layers = torch.nn.Linear(64, 32, bias=bias), torch.nn.ReLU(), torch.nn.Linear(32, 10, bias=bias)
    return torch.nn.Sequential(*layers).to(dtype)


def layers(model):
    """Return the parameters of each layer that has some."""
    return [params for layer in model.children() if (params := list(layer.parameters()))]


def loss_of(model, t, size=64):
    images, labels = batch(t, size)
    dtype = next(model.parameters()).dtype
    outputs = model(images.to(dtype))
    return F.cross_entropy(outputs if dtype == torch.float64 else outputs.float(), labels)


def closure_of(model, optimizer, t, before=lambda: None):
    """Return what evaluates the model on the t-th batch, after a call of `before`."""

    def closure():
        before()
        optimizer.zero_grad()
        loss = loss_of(model, t)
        loss.backward()
        return loss

    return closure


def train(model, optimizer, steps, first=0, scheduler=None, closure=False):
    """Train for the given batches; return the losses."""
    losses = []
    for t in range(first, first + steps):
        evaluate = closure_of(model, optimizer, t)
        losses.append((optimizer.step(evaluate) if closure else evaluate()).item())
        if not closure:
            optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return losses


def full_loss(model):
    """Return the loss over all 1,797 images."""
    with torch.no_grad():
        dtype = next(model.parameters()).dtype
        return float(F.cross_entropy(model(IMAGES.to(dtype)).float(), LABELS))


def noisy_quadratic(seed, steps=80):
    """Return a start in NumPy, and a function that gives the gradients of a badly scaled quadratic at x for step t."""
    shapes = [(4, 3), (), (5,), (2, 1, 3)]
    rng = np.random.default_rng(seed)
    curvature = [np.exp(rng.uniform(-2, 2, shape)) for shape in shapes]
    target = [rng.standard_normal(shape) for shape in shapes]
    noise = [[0.1 * rng.standard_normal(shape) for shape in shapes] for _ in range(steps)]
    start = [rng.standard_normal(shape) for shape in shapes]

    def gradients(x, t):
        return [c * (xi - ti) + ni for c, xi, ti, ni in zip(curvature, x, target, noise[t], strict=True)]

    return start, gradients


def large_params(dtype, n=3 * 2**20):
    """Return parameters with gradients, in tensors larger and smaller than a block."""
    shapes = [(n // 2048, 1024), *[(n // 16, 2)] * 3, *[(64,)] * 9, (n // 8,)]
    params = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params
