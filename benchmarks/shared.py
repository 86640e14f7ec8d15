"""What several programs train: scikit-learn's handwritten digits, a small network that reads them, a schedule."""

from __future__ import annotations

import math
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Return images as 64 numbers from 0 to 1, and their labels."""
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    return (images / 16).float(), labels


def network(hidden: int = 32) -> nn.Sequential:
    """Return a perceptron for them."""
    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def cosine(part: float) -> float:
    """Return the factor of lr where this part of a cosine to 0 is behind; 0 from its end on."""
    return (1 + math.cos(math.pi * min(part, 1.0))) / 2
