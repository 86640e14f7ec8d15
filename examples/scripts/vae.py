"""A variational autoencoder of handwritten digits: scikit-learn's 1,797 images of 8 x 8 pixels.

python vae.py --epochs 10 --lr 1e-3
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn, optim


class VAE(nn.Module):
    """An encoder to the mean and the log-variance of a code, and a decoder."""

    def __init__(self, code):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        self.mean = nn.Linear(64, code)
        self.log_variance = nn.Linear(64, code)
        self.decoder = nn.Sequential(nn.Linear(code, 64), nn.ReLU(), nn.Linear(64, 64))

    def forward(self, x):
        """Return the logits of the pixels, and the mean and log-variance of the code."""
        h = self.encoder(x)
        mean, log_variance = self.mean(h), self.log_variance(h)
        code = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decoder(code), mean, log_variance


def loss_function(logits, x, mean, log_variance):
    """Return the negative evidence lower bound per image: reconstruction error plus divergence from the prior."""
    reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
    return (reconstruction + divergence) / len(x)


def main():
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="A variational autoencoder")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--code", type=int, default=8, help="numbers per code")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    images = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    model = VAE(args.code)
    optimizer = optim.Adam(model.parameters(), lr=args.lr)
    for epoch in range(1, args.epochs + 1):
        total = 0.0
        for batch in torch.randperm(len(images)).split(args.batch_size):
            x = images[batch]

            def closure(x=x):
                optimizer.zero_grad()
                logits, mean, log_variance = model(x)
                loss = loss_function(logits, x, mean, log_variance)
                loss.backward()
                return loss

            total += optimizer.step(closure).item() * len(batch)
        print(f"epoch {epoch}  loss {total / len(images):.4f}", flush=True)


if __name__ == "__main__":
    main()
