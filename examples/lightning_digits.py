"""Lightning: a perceptron learns scikit-learn's handwritten digits, with a schedule, and its monitor. No download.

python lightning_digits.py --epochs 5
"""

import argparse

import torch
from lightning import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from mechanic_pytorch import mechanize
from mechanic_pytorch.integrations.lightning import MechanicMonitor


class Digits(LightningModule):
    """A perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        """Return the loss."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        """Return the optimizer, whose lr is learned, and a schedule with a peak of 1."""
        optimizer = mechanize(torch.optim.AdamW)(self.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Lightning")
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()

    seed_everything(0, verbose=False)
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    data = TensorDataset(images.float() / 16, labels)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=args.epochs, accelerator="cpu", callbacks=[MechanicMonitor()], **quiet)
    model = Digits()
    trainer.fit(model, DataLoader(data, batch_size=64, shuffle=True))
    accuracy = (model.net(data.tensors[0]).argmax(1) == labels).float().mean()
    print(f"accuracy {accuracy:.3f}, learned lr {max(trainer.optimizers[0].learned_lr()):.0e}")


if __name__ == "__main__":
    main()
