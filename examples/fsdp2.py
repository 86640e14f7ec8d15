"""Train a small character GPT on tiny Shakespeare, sharded by FSDP2: the same command on a laptop and on many nodes.

    torchrun --nproc-per-node 2 examples/fsdp2.py --steps 300

On CPU the processes talk through gloo, on GPUs through NCCL. The text is looked for in the directory `MECHANIC_DATA`
(as `tinyshakespeare/input.txt`), else downloaded once into a cache. With `--checkpoints DIR` the run is saved there
regularly by `torch.distributed.checkpoint`, and after an interruption goes on from the last complete checkpoint,
on any number of processes.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pooch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from mechanic_pytorch import mechanize

CONTEXT, WIDTH, HEADS, LAYERS, BATCH = 64, 128, 4, 3, 16
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


class Block(nn.Module):
    """Causal self-attention and a two-layer perceptron, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Return the next activations, shape (batch, time, width)."""
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.attention_norm(x)).chunk(3, -1)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """A character-level language model."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits, shape (batch, time, characters)."""
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(x)))


def load_text() -> str:
    """Return tiny Shakespeare from `MECHANIC_DATA`, or from a cache that is filled at first use."""
    directory = os.environ.get("MECHANIC_DATA")
    path = Path(directory, "tinyshakespeare", "input.txt") if directory else None
    if path is None or not path.exists():
        folder = Path(directory or pooch.os_cache("mechanic-pytorch"), "tinyshakespeare")
        path = Path(pooch.retrieve(URL, SHA256, "input.txt", folder, progressbar=True))
    return path.read_text(encoding="utf-8")


class Training:
    """Everything that a checkpoint holds."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.model = model
        self.optimizer = mechanize(torch.optim.AdamW)(model.parameters(), lr=1.0, weight_decay=0.1)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def save(self, directory: Path) -> None:
        """Save what each process holds, under the number of steps done."""
        dcp.save(self._state(), checkpoint_id=directory / f"{self.schedule.last_epoch:08d}")

    def load_last(self, directory: Path) -> None:
        """Load the last complete checkpoint, if there is one."""
        complete = sorted(path.parent for path in directory.glob("*/.metadata"))  # which is written last
        if complete:
            state = self._state()
            dcp.load(state, checkpoint_id=complete[-1])
            weights, optimizer = state["model"], state["optimizer"]
            set_state_dict(self.model, self.optimizer, model_state_dict=weights, optim_state_dict=optimizer)
            self.schedule.load_state_dict(state["schedule"])

    def _state(self) -> dict[str, Any]:
        weights, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": weights, "optimizer": optimizer, "schedule": self.schedule.state_dict()}


def main() -> None:
    """Train, and print the loss and the learned learning rate from the first process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--checkpoints", type=Path, help="directory to resume from and to save to")
    parser.add_argument("--save-every", type=int, default=100)
    arguments = parser.parse_args()

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    rank = dist.get_rank()
    if int(os.environ["LOCAL_RANK"]) == 0:
        load_text()  # one download per machine
    dist.barrier()
    text = load_text()
    characters = sorted(set(text))
    data = torch.tensor([characters.index(c) for c in text])

    torch.manual_seed(0)  # the same weights everywhere, before they are sharded
    model = GPT(len(characters)).to(device)
    for layer in (*model.blocks, model):
        fully_shard(layer)
    training = Training(model, arguments.steps)
    if arguments.checkpoints:
        training.load_last(arguments.checkpoints)
    for step in range(training.schedule.last_epoch, arguments.steps):
        generator = torch.Generator().manual_seed(step * dist.get_world_size() + rank)  # another batch for each process
        starts = torch.randint(len(data) - CONTEXT - 1, (BATCH,), generator=generator)
        window = torch.stack([data[i : i + CONTEXT + 1] for i in starts]).to(device)
        loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        training.optimizer.zero_grad()
        loss.backward()
        training.optimizer.step()
        training.schedule.step()
        if step % 25 == 0 or step == arguments.steps - 1:
            dist.all_reduce(mean := loss.detach().clone())
            scale = float(training.optimizer.scale)
            if rank == 0:
                mean /= dist.get_world_size()
                print(f"step {step:5d}  loss {mean:.3f}  learned peak lr {scale:.2e}", flush=True)
        if arguments.checkpoints and (step + 1) % arguments.save_every == 0:
            training.save(arguments.checkpoints)
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
