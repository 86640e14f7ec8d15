"""Runs in a new process: resumes checkpoints and saves where they lead. `resume_worker.py DIRECTORY STEPS NAME...`."""

import sys
import warnings
from pathlib import Path

import torch

import device  # noqa: F401  # where to work

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
warnings.simplefilter("error")


def main(directory, steps, names):
    from bases import CASES
    from problems import train

    for name in names:
        case = CASES[name]
        model, optimizer = case.build()
        checkpoint = torch.load(directory / f"{name}.pt", weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        losses = train(model, optimizer, steps, first=steps, closure=case.closure)
        out = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
        torch.save(out, directory / f"{name}.resumed.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
