"""Trains a language model: ``python -m language_models.train --config
language_models/configs/embedded_tiny.yaml``.

On several GPUs or processes: ``accelerate launch -m language_models.train --config ...``. The same
command goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from blockspec.integrations import TrackSettings
from blockspec.model.losses import Loss, masked_token, next_token
from language_models import embedded
from language_models.batches import (
    Batch,
    MakeBatch,
    causal_batch,
    fixed_batches,
    masked_batch,
    random_windows,
)
from language_models.loading import load_pretrained, quiet_transformers
from language_models.models import ModelSettings, build
from language_models.tokens import Tokens, mask_token, open_tokens, read_meta
from training.command import run_command
from training.following import follower
from training.trainer import TrainingSettings, mean_loss
from training.trainer import train as run_training


@dataclass(frozen=True)
class DataSettings:
    """The data of a training.

    Args:
        source: embedded, or a folder with train.bin and val.bin (nanoGPT's own, or of
            language_models.data).
        num_tokens: Tokens in a window, which is the model's longest context.
        batch_size: Windows in a micro-batch.
        held_out_batches: Batches of val.bin that the held-out loss is taken over.
    """

    source: str = "embedded"
    num_tokens: int = 64
    batch_size: int = 16
    held_out_batches: int = 8


@dataclass(frozen=True)
class Task:
    """What is predicted, from which text."""

    loss: Loss
    make: MakeBatch
    tokens: Tokens
    data: DataSettings
    seed: int

    def batch_at(self, index: int) -> Batch:
        """Batch number ``index`` of the training text."""
        data = self.data
        windows = random_windows(
            self.tokens, index, batch_size=data.batch_size, window=data.num_tokens, seed=self.seed
        )
        return self.make(windows, index)

    def held_out(self) -> list[Batch]:
        data = self.data
        tokens = open_tokens(data.source, "val", window=data.num_tokens)
        size = {"batch_size": data.batch_size, "window": data.num_tokens}
        return fixed_batches(tokens, self.make, num_batches=data.held_out_batches, **size)


def make_task(model: ModelSettings, data: DataSettings, *, seed: int) -> Task:
    """The task of a model's architecture on the data, which are checked."""
    tokens = open_tokens(data.source, "train", window=data.num_tokens)
    if model.architecture == "gpt2":
        return Task(next_token, causal_batch, tokens, data, seed)
    masked = partial(
        masked_batch, mask=mask_token(data.source), vocabulary=tokens.vocabulary, seed=seed
    )
    return Task(masked_token, masked, tokens, data, seed)


def make_model(
    model: ModelSettings, task: Task, *, seed: int, start: str | None = None
) -> PreTrainedModel:
    """The model with the weights of that seed, or of the checkpoint ``start``; ValueError if they
    do not fit.
    """
    torch.manual_seed(seed)
    network = build(
        model,
        vocabulary=task.tokens.vocabulary,
        window=task.data.num_tokens,
        end_token=read_meta(task.data.source).get("end_token"),
    )
    if start is not None:
        trained = load_pretrained(start, "causal" if model.architecture == "gpt2" else "masked")
        try:
            network.load_state_dict(trained.state_dict())
        except RuntimeError as error:
            raise ValueError(f"the weights of {start} do not fit {model}: {error}") from error
    return network


def save_with_tokenizer(source: str) -> Any:
    """A function that writes a model and the tokenizer of its data into a folder."""

    def save(model: PreTrainedModel, folder: Path) -> None:
        with quiet_transformers():
            model.save_pretrained(folder)
        if source == "embedded":
            embedded.tokenizer().save_pretrained(folder)
        elif (Path(source) / "tokenizer").is_dir():
            shutil.copytree(Path(source) / "tokenizer", folder, dirs_exist_ok=True)

    return save


def train(
    *,
    out: str = "runs/embedded_tiny",
    model: ModelSettings = ModelSettings(),
    data: DataSettings = DataSettings(),
    training: TrainingSettings = TrainingSettings(),
    start: str | None = None,
    track: TrackSettings | None = None,
    progress: bool = True,
) -> Path:
    """Trains a language model and writes checkpoints that Hugging Face's from_pretrained loads.

    Args:
        out: Folder of the run.
        model: The model.
        data: The data.
        training: The training.
        start: Folder of a checkpoint that is trained further (fine-tuned), with a new optimizer;
            None: fresh weights.
        track: Eigenvalues that are followed along the training, on held-out windows
            (``--track.every 10``); None: none.
        progress: Whether to show a progress bar.
    """
    task = make_task(model, data, seed=training.seed)
    held_out = task.held_out()
    return run_training(
        make_model(model, task, seed=training.seed, start=start),
        task.batch_at,
        task.loss,
        settings=training,
        out=out,
        save=save_with_tokenizer(data.source),
        measure=lambda network: {"held_out_loss": mean_loss(network, held_out, task.loss)},
        record={
            "model": dataclasses.asdict(model),
            "data": dataclasses.asdict(data),
            "start": start,
        },
        follow=follower(track, held_out, task.loss),
        progress=progress,
    )


if __name__ == "__main__":
    run_command(train)
