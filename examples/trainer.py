"""The Hugging Face Trainer: a small GPT-2, from its configuration, learns the bytes of a Python file. No download.

python trainer.py --steps 60
"""

import argparse
import inspect
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from mechanic_pytorch import mechanize
from mechanic_pytorch.integrations.huggingface import MechanicCallback
from mechanic_pytorch.telemetry import unwrap


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="The Hugging Face Trainer")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()

    torch.manual_seed(0)
    text = torch.tensor(list(inspect.getsource(argparse).encode()))
    blocks = [{"input_ids": block, "labels": block} for block in text[: len(text) // 64 * 64].split(64)]
    sizes = {"vocab_size": 256, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))

    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(
            model,
            TrainingArguments(
                directory,
                max_steps=args.steps,
                per_device_train_batch_size=16,
                lr_scheduler_type="cosine",
                warmup_steps=args.steps // 10,
                logging_steps=max(1, args.steps // 6),
                save_strategy="no",
                report_to="none",
                use_cpu=True,
            ),
            train_dataset=blocks,
            optimizer_cls_and_kwargs=(mechanize(torch.optim.AdamW), {"lr": 1.0}),
            callbacks=[MechanicCallback()],  # the log has effective_lr
        )
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    learned = unwrap(trainer.optimizer).learned_lr()  # out of Accelerate's wrapper
    print(f"loss {float(losses[0]):.2f} -> {float(losses[-1]):.2f}, learned lr {max(learned):.0e}")


if __name__ == "__main__":
    main()
