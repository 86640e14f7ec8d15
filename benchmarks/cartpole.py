"""Reinforcement learning, whose gradients are nearly all noise: returns of PPO on CartPole. For `docs/safety.md`.

    python -m benchmarks.cartpole --fill docs/safety.md

Stable-Baselines3's PPO with its defaults and Adam, 10,000 steps; the mean return of ten episodes, 500 at best. Prints a
Markdown table, or writes it between the marks `<!-- cartpole: table -->` and `<!-- end -->`.
"""

from __future__ import annotations

import sys
import warnings
from statistics import fmean
from typing import Any

import gymnasium
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy

from benchmarks.pages import arguments, markdown_table, origin, print_or_fill
from mechanic_pytorch import mechanize

SEEDS = range(5)
STEPS = 10_000
OPTIMIZERS: dict[str, tuple[Any, float]] = {
    "plain Adam, lr 1e-3": (torch.optim.Adam, 1e-3),
    '`s_init="auto"`': (mechanize(torch.optim.Adam, s_init="auto"), 1.0),
    "`s_init=1e-8`": (mechanize(torch.optim.Adam, s_init=1e-8), 1.0),
}


def episode_return(optimizer: Any, lr: float, seed: int) -> float:
    """Train a policy once; return the mean return of ten episodes."""
    model = PPO(
        "MlpPolicy",
        "CartPole-v1",
        seed=seed,
        learning_rate=lr,
        device="cpu",
        policy_kwargs={"optimizer_class": optimizer},
    )
    model.learn(STEPS)
    environment = gymnasium.make("CartPole-v1")
    environment.reset(seed=seed)
    mean, _ = evaluate_policy(model, environment, n_eval_episodes=10, warn=False)
    return float(mean)


def main() -> None:
    """Print the table, or write it into a page."""
    page = arguments(__doc__).parse_args().fill
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    for name, (optimizer, lr) in OPTIMIZERS.items():
        returns = [episode_return(optimizer, lr, seed) for seed in SEEDS]
        rows.append([name, f"{fmean(returns):.0f}", ", ".join(f"{value:.0f}" for value in returns)])
        print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    table = markdown_table(["optimizer", "mean return", f"seeds 0 to {SEEDS[-1]}"], rows)
    print_or_fill(page, "cartpole", {"table": f"{table}\n\n{origin(f'{len(SEEDS)} seeds')}"})


if __name__ == "__main__":
    main()
