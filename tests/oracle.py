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
    """`s_init="auto"`: plain steps at a scale that is learned by bets on the way gone, said in one vector.

    Gains are counted per way gone, not per delta: with D = x - x_ref, a step adds -(share of the scale) * <D, g>.
    After the search, m, v and s are for the multiple of the least scale at which a step is made.
    """

    def __init__(self, x, base, s_decay=0.01, betas=(0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)):
        self.x = [np.array(xi, dtype=np.float64) for xi in x]
        self.base, self.s_decay, self.beta = base, s_decay, np.array(betas, dtype=np.float64)
        self.m, self.v, self.r, self.s = np.zeros((4, len(betas)))
        self.reference = [None for _ in self.x]  # until it takes part
        self.pace, self.highest, self.longest = None, 0.0, 0.0
        self.ends = 0  # of searches
        self.begun = 0  # how often

    def step(self, g, lr):
        """Take gradients, None of what does not take part."""
        here = [i for i, gi in enumerate(g) if gi is not None]
        newcomers = [i for i in here if self.reference[i] is None]
        for i in newcomers:
            self.reference[i] = self.x[i]
        gradient = flat([g[i] for i in here])
        length = self.learn(here, gradient, lr) if self.pace is not None else 1.0
        self.highest = max(self.highest, lr)
        u = self.base(self.x, g)
        measured = newcomers or here
        u_norm = norm(flat([u[i] for i in measured]))
        is_too_long = newcomers and length < 1 and norm(flat([g[i] for i in newcomers])) > length * self.held
        if (self.pace is None or is_too_long) and u_norm > 0 and norm(gradient) > 0:
            self.begin(flat([self.x[i] for i in measured]), gradient, u_norm / lr)
            length = 1.0
        if self.pace is not None and lr > 0:
            now = min(length * norm(flat([u[i] for i in here])) / lr, 2 * self.stride)
            n = min(max(self.time, 1.0), 10.0)
            w = lr / self.highest if self.is_found else 1.0
            if now > 0:
                self.speed = np.sqrt((1 - w / n) * self.speed**2 + w / n * now**2)
                self.stride = max(self.stride, now)
        if self.pace is not None:
            self.path += self.scale * length * norm(flat([u[i] for i in here]))
        self.x = [xi + self.scale * length * ui for xi, ui in zip(self.x, u, strict=True)]

    @property
    def scale(self):
        return self.s.sum() * self.unit if self.pace is not None else 0.0

    def begin(self, x, g, pace):
        self.begun += 1
        self.reference = [None if at is None else xi for at, xi in zip(self.reference, self.x, strict=True)]
        self.pace = self.speed = self.stride = pace
        self.usual = self.held = norm(g)
        self.longest = norm(x) or 1.0
        self.loudest = 1e-3 * self.longest / pace  # effective lr
        self.reach, self.rest, self.is_found = 0.0, 0.0, False
        self.won = self.noise = 0.0
        self.unit, self.start = 1.0, self.loudest / self.highest
        self.bet_anew(self.start)
        self.time = 0.0

    def bet_anew(self, scale):
        self.m, self.v, self.r = np.zeros((3, len(self.beta)))
        self.s = np.full(len(self.beta), scale / len(self.beta))
        self.peak, self.farthest, self.path = scale, 0.0, 0.0

    def least(self):
        return self.reach / (3 * np.sqrt(40 + self.rest) * max(self.speed, self.stride / 10) * self.highest)

    def learn(self, here, g, lr):
        x, reference = (flat([values[i] for i in here]) for values in (self.x, self.reference))
        self.longest = max(self.longest, norm(x))
        self.held = max(norm(g), 0.9 * self.held)
        length = min(1.0, 3 * self.usual / self.held)
        self.usual = max(0.99 * self.usual, min(norm(g), 2 * self.usual))
        is_higher, highest = lr > self.highest, max(self.highest, lr)
        moves = is_higher or lr < (1 - 1e-6) * self.highest
        way = x - reference
        self.farthest = max(self.farthest, min(norm(way), self.path))
        if not self.is_found and lr > 0:
            lr_seen, now = max(lr, 1e-6 * self.highest), self.s.sum()
            wanted = lr_seen * now
            if way @ g < 0 and now >= (1 - 1e-6) * self.peak:
                wanted = max(wanted, self.loudest)
            wanted = min(wanted, (2 if is_higher else 1) * self.loudest)
            change = wanted / (lr_seen * now)
            self.r, self.s, self.peak = change * self.r, change * self.s, change * self.peak
        if not self.is_found:
            self.start *= self.highest / highest
        self.highest = highest
        decay = self.unit * self.s_decay * self.pace * highest / self.longest
        h = length * (way @ g / self.s.sum() + decay * norm(g) * (way @ x) / norm(x))
        m, v = np.maximum(self.beta * self.m, abs(h)), self.beta**2 * self.v + h**2
        gain = -self.s * h
        s_init = 1.0 if self.is_found else self.start
        cosine = way @ g / (norm(way) * norm(g)) if norm(way) * norm(g) > 0 else 0.0
        self.won, self.noise = 0.99 * self.won - cosine, 0.99**2 * self.noise + cosine**2
        is_signal = self.s.sum() < 2 * s_init or self.won > 2 * np.sqrt(self.noise)
        r = np.maximum(0, self.beta * self.r + np.where((gain < 0) & moves & is_signal, gain / 2, gain))
        s = (s_init / len(self.s) * m + r) / np.sqrt(v) if v.all() else self.s
        w = lr / highest if self.is_found else float(lr > 0)
        self.m, self.v, self.r, self.s = (
            (1 - w) * old + w * new for old, new in zip((self.m, self.v, self.r, self.s), (m, v, r, s), strict=True)
        )
        if self.is_found:
            self.time += w
            self.rest += w**8
            self.unit = self.least()
            self.s *= max(1.0, 1 / self.s.sum())
        if self.s.sum() < 0.75 * self.peak and (not self.is_found or self.peak > 4):
            self.ends += 1
            reach, peak = max(self.reach, self.farthest), self.peak * self.unit
            self.rest *= (self.reach / reach) ** 2
            self.reach = reach
            if not self.is_found:
                self.highest, self.time, self.is_found = lr, 1.0, True
            else:
                excess = max(1.0, 2 * self.least() / peak)
                self.rest, self.time = (40 + self.rest) * excess**2 - 40, 10.0
            self.unit = self.least()
            self.bet_anew(1.0)
        else:
            self.peak = max(self.peak, self.s.sum())
            self.loudest = max(self.loudest, lr * self.s.sum() * self.unit)
            if self.is_found and self.s.sum() <= 2:
                self.peak, self.farthest, self.path = self.s.sum(), 0.0, 0.0
        if self.is_found:
            for i in here:
                self.reference[i] = self.reference[i] + w * 0.3 / (self.time + 0.3 + 7) * (
                    self.x[i] - self.reference[i]
                )
        return length


def flat(arrays):
    return np.concatenate([np.ravel(a) for a in arrays])


def norm(vector):
    return float(np.linalg.norm(vector))


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
