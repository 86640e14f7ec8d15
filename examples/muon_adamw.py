"""torch.optim.Muon for the hidden matrices, AdamW for the rest: two optimizers, and no lr to choose. No download.

python muon_adamw.py --steps 200
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from mechanic_pytorch import mechanize


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Muon and AdamW")
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()

    torch.manual_seed(0)
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = images.float() / 16
    layers = torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
    model = torch.nn.Sequential(*layers)

    matrices = [layers[0].weight, layers[2].weight]  # of hidden layers; not the last layer, nor embeddings
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers = {
        "Muon": mechanize(torch.optim.Muon)(matrices, lr=1.0),
        "AdamW": mechanize(torch.optim.AdamW)(rest, lr=1.0),
    }
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(each, args.steps) for each in optimizers.values()]
    for _ in range(args.steps):
        batch = torch.randint(len(images), (64,))
        model.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        for each in (*optimizers.values(), *schedules):
            each.step()
    accuracy = (model(images).argmax(1) == labels).float().mean()
    learned = ", ".join(f"{name} {each.learned_lr()[0]:.0e}" for name, each in optimizers.items())
    print(f"accuracy {accuracy:.3f}, learned lr {learned}")


if __name__ == "__main__":
    main()
