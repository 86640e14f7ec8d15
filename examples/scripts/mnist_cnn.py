"""A small convolutional network that reads handwritten digits, from the four .gz files of MNIST.

python mnist_cnn.py --data mnist --epochs 3 --lr 1e-3
"""

import argparse
import gzip
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """Two convolutions, two linear layers."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, stride=2)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2)
        self.fc1 = nn.Linear(32 * 6 * 6, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x):
        """Return the log-probabilities of the ten digits."""
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = F.relu(self.fc1(x.flatten(1)))
        return F.log_softmax(self.fc2(x), dim=1)


def read(path):
    """Read a file of the IDX format: two zeros, a type, the number of dimensions, their sizes, the bytes."""
    data = gzip.decompress(path.read_bytes())
    n_dims = data[3]
    shape = [int.from_bytes(data[4 * i : 4 * i + 4], "big") for i in range(1, n_dims + 1)]
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=4 + 4 * n_dims).view(shape)


def load(directory, part):
    """Return the images, from 0 to 1, with their labels."""
    images = read(directory / f"{part}-images-idx3-ubyte.gz")
    labels = read(directory / f"{part}-labels-idx1-ubyte.gz")
    return TensorDataset(images.unsqueeze(1) / 255, labels.long())


def train(model, loader, optimizer, epoch):
    """Train for one epoch."""
    model.train()
    total = 0.0
    for images, labels in loader:
        optimizer.zero_grad()
        loss = F.nll_loss(model(images), labels)
        loss.backward()
        optimizer.step()
        total += loss.item() * len(labels)
    print(f"epoch {epoch}  loss {total / len(loader.dataset):.4f}", flush=True)


@torch.no_grad()
def test(model, loader):
    """Print the share of test images that are read right."""
    model.eval()
    right = sum((model(images).argmax(1) == labels).sum().item() for images, labels in loader)
    print(f"test accuracy {100 * right / len(loader.dataset):.1f} %")


def main():
    """Read the command line, train, test."""
    parser = argparse.ArgumentParser(description="Handwritten digits")
    parser.add_argument("--data", type=Path, default=Path("mnist"), help="directory of the four .gz files of MNIST")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--gamma", type=float, default=0.7, help="the lr is multiplied by this after each epoch")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save-model", metavar="FILE")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    train_loader = DataLoader(load(args.data, "train"), args.batch_size, shuffle=True)
    test_loader = DataLoader(load(args.data, "t10k"), 256)

    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    scheduler = StepLR(optimizer, step_size=1, gamma=args.gamma)
    for epoch in range(1, args.epochs + 1):
        train(model, train_loader, optimizer, epoch)
        scheduler.step()
    test(model, test_loader)
    if args.save_model:
        torch.save(model.state_dict(), args.save_model)


if __name__ == "__main__":
    main()
