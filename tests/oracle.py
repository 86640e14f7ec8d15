"""Algorithm 1 in float64 NumPy, written from the paper; imports nothing of the package that it judges.

Each base optimizer is a function of its own memory: `base(x, g) -> u`, on lists of arrays.
"""

import numpy as np


class Oracle:
    """Runs Mechanic with x_ref and delta both kept, one line of code per line of the algorithm."""

    def __init__(
        self,
        x,
        base,
        s_decay=0.01,
        betas=(0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999),
        s_init=1e-8,
        eps=1e-8,
        max_lr=np.inf,
    ):
        self.max_lr, self.highest_lr, self.is_bounded = max_lr, 0.0, False
        self.x_ref = [np.array(xi, dtype=np.float64) for xi in x]
        self.x = [xi.copy() for xi in self.x_ref]
        self.delta = [np.zeros_like(xi) for xi in self.x_ref]
        self.base, self.s_decay, self.s_init, self.eps = base, s_decay, s_init, eps
        self.beta = np.array(betas, dtype=np.float64)
        self.m, self.v, self.r, self.s = np.zeros((4, len(betas)))

    def step(self, g, lr=1.0):
        g_norm = np.sqrt(sum(np.sum(gi**2) for gi in g))
        x_norm = np.sqrt(sum(np.sum(xi**2) for xi in self.x))
        decayed = [gi + self.s_decay * self.s.sum() * g_norm * xi / x_norm for gi, xi in zip(g, self.x, strict=True)]
        h = sum(np.sum(di * gi) for di, gi in zip(self.delta, decayed, strict=True))
        u = self.base(self.x, g)
        self.delta = [di + ui for di, ui in zip(self.delta, u, strict=True)]
        self.m = np.maximum(self.beta * self.m, abs(h))
        self.v = self.beta**2 * self.v + h**2
        self.r = np.maximum(0, self.beta * self.r - self.s * h)
        wealth = self.s_init / len(self.beta) * self.m + self.r
        self.s = wealth / (np.sqrt(self.v) + self.eps)
        self.highest_lr = max(self.highest_lr, lr)
        self.is_bounded = self.s.sum() * self.highest_lr > self.max_lr
        if self.is_bounded:
            self.s = self.s * (self.max_lr / self.highest_lr / self.s.sum())
        self.x = [xi + self.s.sum() * di for xi, di in zip(self.x_ref, self.delta, strict=True)]


class AutoOracle:
    """`s_init="auto"`: Algorithm 1 on c * delta, with a relative s_init, eps in units of |g| |x|, and losses halved.

    The units are really changed here: what the tuner remembers is rescaled whenever c is. Decay is counted in the
    longest |x| so far. All updates are kept, and delta is added up anew with their weights.
    """

    def __init__(self, x, base, s_decay=0.01, betas=(0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999), eps=1e-8):
        self.x = [np.array(xi, dtype=np.float64) for xi in x]
        self.delta = [np.zeros_like(xi) for xi in self.x]
        self.updates, self.weights = [], []
        self.largest, self.is_found = 0.0, False
        self.base, self.s_decay, self.eps, self.s_init = base, s_decay, eps, 1e-3
        self.beta = np.array(betas, dtype=np.float64)
        self.m, self.v, self.r, self.s = np.zeros((4, len(betas)))
        self.c, self.highest_lr, self.longest, self.scale = None, 0.0, 1.0, 0.0

    def step(self, g, lr):
        g_norm = np.sqrt(sum(np.sum(gi**2) for gi in g))
        x_norm = np.sqrt(sum(np.sum(xi**2) for xi in self.x))
        delta_norm = np.sqrt(sum(np.sum(di**2) for di in self.delta))
        self.longest = max(self.longest, x_norm)
        if self.c is None and delta_norm > 0 and g_norm > 0:
            self.first = max(x_norm, 1)
            self.c = self.first / delta_norm
            self.eps_unit = g_norm * max(x_norm, 1)
        if lr > self.highest_lr:
            if self.c is not None:
                ratio = self.highest_lr / lr
                self.c, self.m, self.v, self.s = self.c * ratio, self.m * ratio, self.v * ratio**2, self.s / ratio
            self.highest_lr = lr
        if self.c is not None:
            s_decay = self.s_decay * self.first / self.longest
            decayed = [gi + s_decay * self.s.sum() * g_norm * xi / x_norm for gi, xi in zip(g, self.x, strict=True)]
            h = sum(np.sum(self.c * di * gi) for di, gi in zip(self.delta, decayed, strict=True))
            self.m = np.maximum(self.beta * self.m, abs(h))
            self.v = self.beta**2 * self.v + h**2
            loss = self.s * h
            self.r = np.maximum(0, self.beta * self.r - np.where(loss > 0, loss / 2, loss))
            wealth = self.s_init / len(self.beta) * self.m + self.r
            self.s = wealth / (np.sqrt(self.v) + self.eps * self.eps_unit)
        scale = 0.0 if self.c is None else self.s.sum() * self.c
        if not self.is_found and scale > self.largest:  # an update weighs as much as the scale was large
            self.weights = [w * self.largest / scale for w in self.weights]
        self.largest = max(self.largest, scale)
        self.is_found |= scale < 0.75 * self.largest
        self.updates.append(self.base(self.x, g))
        self.weights.append(1.0)
        self.x = [xi - self.scale * di for xi, di in zip(self.x, self.delta, strict=True)]
        self.delta = [np.tensordot(self.weights, np.stack(us), 1) for us in zip(*self.updates, strict=True)]
        self.x = [xi + scale * di for xi, di in zip(self.x, self.delta, strict=True)]
        self.scale = scale


def sgd(lr, momentum=0.0, weight_decay=0.0):
    memory = {}

    def base(x, g):
        g = [gi + weight_decay * xi for gi, xi in zip(g, x, strict=True)]
        previous = memory.get("b")
        memory["b"] = g if previous is None else [momentum * bi + gi for bi, gi in zip(previous, g, strict=True)]
        return [-lr * bi for bi in memory["b"]]

    return base


def adamw(lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
    memory = {"t": 0}

    def base(x, g):
        if not memory["t"]:
            memory["m"] = [np.zeros_like(gi) for gi in g]
            memory["v"] = [np.zeros_like(gi) for gi in g]
        memory["t"] += 1
        t = memory["t"]
        memory["m"] = [betas[0] * mi + (1 - betas[0]) * gi for mi, gi in zip(memory["m"], g, strict=True)]
        memory["v"] = [betas[1] * vi + (1 - betas[1]) * gi**2 for vi, gi in zip(memory["v"], g, strict=True)]
        return [
            -lr * weight_decay * xi - lr * (mi / (1 - betas[0] ** t)) / (np.sqrt(vi / (1 - betas[1] ** t)) + eps)
            for xi, mi, vi in zip(x, memory["m"], memory["v"], strict=True)
        ]

    return base
