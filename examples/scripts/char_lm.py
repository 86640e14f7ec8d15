"""A language model of characters: a GRU that learns to continue a text.

python char_lm.py --text ../../LICENSE --epochs 5 --lr 3e-3
"""

import argparse
from pathlib import Path

import torch
from torch import nn, optim


class CharModel(nn.Module):
    """An embedding, a GRU and a linear layer."""

    def __init__(self, n_chars, width):
        super().__init__()
        self.embedding = nn.Embedding(n_chars, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, n_chars)

    def forward(self, x, hidden=None):
        """Return the logits of the next character at each position, and the hidden state."""
        y, hidden = self.gru(self.embedding(x), hidden)
        return self.head(y), hidden


@torch.no_grad()
def sample(model, chars, length):
    """Let the model write."""
    x, hidden, text = torch.zeros(1, 1, dtype=torch.long), None, ""
    for _ in range(length):
        logits, hidden = model(x, hidden)
        x = torch.multinomial(logits[0, -1].softmax(0), 1).view(1, 1)
        text += chars[x.item()]
    return text


def main():
    """Read the command line, train, write a sample."""
    parser = argparse.ArgumentParser(description="A language model of characters")
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[2] / "LICENSE")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=32, help="characters per sequence")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--sample", type=int, default=0, help="characters to write at the end")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    text = args.text.read_text(encoding="utf-8")
    chars = sorted(set(text))
    codes = torch.tensor([chars.index(char) for char in text])
    n = (len(codes) - 1) // args.length * args.length
    inputs, targets = codes[:n].view(-1, args.length), codes[1 : n + 1].view(-1, args.length)

    model = CharModel(len(chars), args.width)
    criterion = nn.CrossEntropyLoss()
    optimizer = optim.Adam(model.parameters(), lr=args.lr)
    for epoch in range(1, args.epochs + 1):
        total = 0.0
        for batch in torch.randperm(len(inputs)).split(args.batch_size):
            optimizer.zero_grad()
            logits, _ = model(inputs[batch])
            loss = criterion(logits.flatten(0, 1), targets[batch].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            total += loss.item() * len(batch)
        print(f"epoch {epoch}  loss {total / len(inputs):.4f}", flush=True)
    if args.sample:
        print(sample(model, chars, args.sample))


if __name__ == "__main__":
    main()
