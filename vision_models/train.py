"""Trains a vision model: ``python -m vision_models.train --config
vision_models/configs/digits_vit.yaml``.

On several GPUs or processes: ``accelerate launch -m vision_models.train --config ...``. The same
command goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from blockspec.integrations import TrackSettings
from blockspec.model.losses import classification
from training.command import run_command
from training.following import follower
from training.trainer import TrainingSettings, mean_loss
from training.trainer import train as run_training
from vision_models.augment import AUGMENT
from vision_models.data import ShuffledBatches, fixed_batches
from vision_models.models import ModelSettings, build, save
from vision_models.sources import DataSettings, open_images


def train(
    *,
    out: str = "runs/digits_vit",
    model: ModelSettings = ModelSettings(),
    data: DataSettings = DataSettings(),
    training: TrainingSettings = TrainingSettings(),
    track: TrackSettings | None = None,
    progress: bool = True,
) -> Path:
    """Trains a vision model and writes checkpoints that ``vision_models.factories:checkpoint``
    loads.

    Args:
        out: Folder of the run.
        model: The model.
        data: The data.
        training: The training.
        track: Eigenvalues that are followed along the training, on held-out images
            (``--track.every 10``); None: none.
        progress: Whether to show a progress bar.
    """
    network = build(model, seed=training.seed)
    batches = ShuffledBatches(
        open_images(data, data.train_split, model),
        data.batch_size,
        seed=training.seed,
        augment=AUGMENT.get(data.augment),
        workers=data.workers,
        stride=int(
            os.environ.get("WORLD_SIZE", "1")
        ),  # process i of n asks for batches i, i + n, …
        on_broken=data.on_broken,
    )
    held_out = fixed_batches(
        open_images(data, data.test_split, model),
        count=data.held_out,
        batch_size=data.batch_size,
        workers=data.workers,
        on_broken=data.on_broken,
    )
    return run_training(
        network,
        batches,
        classification,
        settings=training,
        out=out,
        save=save,
        measure=lambda network: {
            "held_out_loss": mean_loss(network, held_out, classification),
            "accuracy": mean_loss(network, held_out, number_right),
        },
        record={"model": dataclasses.asdict(model), "data": dataclasses.asdict(data)},
        follow=follower(track, held_out, classification),
        progress=progress,
    )


def number_right(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """(images whose class is predicted, images): the accuracy, in the form of a loss."""
    predicted = classification.outputs(model, batch).argmax(-1)
    return (predicted == batch[1]).sum(), len(predicted)


if __name__ == "__main__":
    run_command(train)
