"""Adam against SGD on one language model: ``python -m language_models.compare_optimizers``.

The default, the tiny GPT-2 on the embedded text, is 22 trainings of 300 steps: some 3 minutes on
two cores. The same command goes on where it was stopped.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pandas as pd

from language_models.models import ModelSettings
from language_models.train import DataSettings, train
from training.command import run_command
from training.comparison import ComparisonSettings
from training.comparison import compare as run_comparison
from training.trainer import TrainingSettings


def compare(
    *,
    out: str = "runs/compare_optimizers",
    model: ModelSettings = ModelSettings(),
    data: DataSettings = DataSettings(),
    comparison: ComparisonSettings = ComparisonSettings(),
    start: str | None = None,
) -> pd.DataFrame:
    """Trains one model with several optimizers, each with its best learning rate, and compares the
    held-out losses.

    Args:
        out: Folder for the runs, the tables and the figure.
        model: The model.
        data: The data.
        comparison: What is compared.
        start: Folder of a checkpoint that is fine-tuned; None: fresh weights.

    Returns:
        One line per optimizer: see training.comparison.compare.
    """
    table = run_comparison(partial(train_one, model, data, start), comparison, out=out)
    print(table.to_string(index=False, float_format="{:.4g}".format))
    return table


def train_one(
    model: ModelSettings,
    data: DataSettings,
    start: str | None,
    settings: TrainingSettings,
    folder: Path,
) -> Path:
    return train(
        out=str(folder), model=model, data=data, training=settings, start=start, progress=False
    )


if __name__ == "__main__":
    run_command(compare)
