"""Trains a language model: ``python -m language_models.train --config language_models/configs/embedded_tiny.yaml``.

On several GPUs or processes: ``accelerate launch -m language_models.train --config ...``. The same command goes on where
it was stopped.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from blockspec.losses import next_token
from language_models import embedded
from language_models.batches import causal_batch, random_windows
from language_models.gpt2 import ModelSettings, build, held_out
from language_models.tokens import open_tokens
from training.command import run_command
from training.trainer import TrainingSettings, mean_loss
from training.trainer import train as run_training


@dataclass(frozen=True)
class DataSettings:
    """The data of a training.

    Args:
        source: embedded, or a folder with train.bin and val.bin (nanoGPT's, or of language_models.data).
        num_tokens: Tokens in a window, which is the model's context.
        batch_size: Windows in a micro-batch of one process.
        held_out_batches: Batches of validation text that the held-out loss is taken over.
    """

    source: str = "embedded"
    num_tokens: int = 64
    batch_size: int = 16
    held_out_batches: int = 8


def train(
    *,
    out: str = "runs/embedded_tiny",
    model: ModelSettings = ModelSettings(),
    data: DataSettings = DataSettings(),
    training: TrainingSettings = TrainingSettings(),
) -> Path:
    """Trains a language model and writes checkpoints that ``from_pretrained`` loads.

    Args:
        out: Folder of the run.
        model: The model.
        data: The data.
        training: The training.
    """
    tokens = open_tokens(data.source, "train", window=data.num_tokens, vocabulary=model.vocabulary)
    size = {"batch_size": data.batch_size, "num_tokens": data.num_tokens}
    validation = held_out(data.source, num_batches=data.held_out_batches, vocabulary=model.vocabulary, **size)
    torch.manual_seed(training.seed)
    network = build(model, vocabulary=tokens.vocabulary, window=data.num_tokens, end_token=0)

    def save(network: nn.Module, folder: Path) -> None:
        network.save_pretrained(folder)
        if data.source == "embedded":
            embedded.tokenizer().save_pretrained(folder)

    return run_training(
        network,
        lambda index: causal_batch(
            random_windows(tokens, index, batch_size=data.batch_size, window=data.num_tokens, seed=training.seed)
        ),
        next_token,
        settings=training,
        out=out,
        save=save,
        measure=lambda network: {"held_out_loss": mean_loss(network, validation, next_token)},
        record={"model": dataclasses.asdict(model), "data": dataclasses.asdict(data)},
    )


if __name__ == "__main__":
    run_command(train)
