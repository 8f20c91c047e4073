"""Adam against SGD on one vision model: ``python -m vision_models.compare_optimizers``; goes on
where it was stopped.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pandas as pd

from training.command import run_command
from training.comparison import ComparisonSettings
from training.comparison import compare as run_comparison
from training.trainer import TrainingSettings
from vision_models.models import ModelSettings
from vision_models.sources import DataSettings
from vision_models.train import train


def compare(
    *,
    out: str = "runs/compare_vision_optimizers",
    model: ModelSettings = ModelSettings(),
    data: DataSettings = DataSettings(),
    comparison: ComparisonSettings = ComparisonSettings(),
) -> pd.DataFrame:
    """Trains one model with several optimizers, each with its best learning rate, and compares the
    held-out losses.

    Args:
        out: Folder for the runs, the tables and the figure.
        model: The model.
        data: The data; held-out losses are those of its test_split.
        comparison: What is compared.

    Returns:
        One line per optimizer: see training.comparison.compare.
    """
    table = run_comparison(partial(train_one, model, data), comparison, out=out)
    print(table.to_string(index=False, float_format="{:.4g}".format))
    return table


def train_one(
    model: ModelSettings, data: DataSettings, settings: TrainingSettings, folder: Path
) -> Path:
    return train(out=str(folder), model=model, data=data, training=settings, progress=False)


if __name__ == "__main__":
    run_command(compare)
