"""LoRA by peft: a perceptron that knows handwritten digits learns them mirrored, through adapters. No download.

python lora.py --steps 200
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch.nn import functional as F

from mechanic_pytorch import mechanize


def train(model, optimizer, images, labels, steps):
    """Train with a warm-up, which fine-tuning needs, and a cosine; return the accuracy."""
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=steps // 10)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - steps // 10)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], [steps // 10])
    for _ in range(steps):
        batch = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()
    return float((model(images).argmax(1) == labels).float().mean())


def main() -> None:
    """Read the command line, train, and fine-tune."""
    parser = argparse.ArgumentParser(description="LoRA")
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()

    torch.manual_seed(0)
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = images.float() / 16
    mirrored = images.reshape(-1, 8, 8).flip(2).reshape(-1, 64)
    AdamW = mechanize(torch.optim.AdamW)  # noqa: N806  (a class)

    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    known = train(model, AdamW(model.parameters(), lr=1.0), images, labels, args.steps)

    model = get_peft_model(model, LoraConfig(r=8, target_modules=["0", "2"]))
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(adapters, lr=1.0)
    tuned = train(model, optimizer, mirrored, labels, args.steps)
    print(f"accuracy {known:.3f}, mirrored {tuned:.3f} with {sum(p.numel() for p in adapters)} numbers trained,")
    print(f"learned lr {max(optimizer.learned_lr()):.0e}")


if __name__ == "__main__":
    main()
