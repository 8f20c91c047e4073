"""The exact Hessian of a perceptron of 8 hidden neurons at 1, 50 and 100 % of training (figure 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import blockspec
from blockspec import toolbox_plots
from blockspec.losses import classification
from paper.block_diagonality import finding, shares, square, tidy
from paper.exhibit import Context, Exhibit, Finding, Scale, Tables, command
from training.checkpoints import list_checkpoints, read_record
from training.optimizers import OptimizerSettings, ScheduleSettings
from training.trainer import TrainingSettings, train
from vision_models import models
from vision_models.data import Arrays, ShuffledBatches, fixed_batches
from vision_models.digits import digits
from vision_models.models import ModelSettings

MODEL = ModelSettings("mlp", {"sizes": [64, 8, 2], "bias": False})  # 528 parameters
NEURONS = np.repeat(np.arange(10), [64] * 8 + [8] * 2)  # of each parameter: a row of a weight is a neuron


@dataclass(frozen=True)
class Settings:
    """What is trained.

    Args:
        num_steps: Updates, of 64 images.
        stages: Fractions of training.
        runs: Trainings, each with its own seed.
        lr: Learning rate of Adam.
    """

    num_steps: int = 2000
    stages: tuple[float, ...] = (0.01, 0.5, 1.0)
    runs: int = 5
    lr: float = 1e-3


def even_or_odd() -> Arrays:
    """The digits, to be told apart by whether they are even."""
    images = digits()
    return replace(images, labels=images.labels % 2, classes=("even", "odd"))


def measure(settings: Settings, context: Context) -> dict[str, pd.DataFrame]:
    hessians, found = [], []
    for run in range(settings.runs):
        seed = context.seed + run
        for folder in _train(settings, seed, context.runs / "mlp_8_neurons" / f"seed_{seed}", context.device):
            matrix, loss = _hessian(folder)
            stage = {"fraction": read_record(folder)["fraction"], "seed": seed}
            found.append(stage | {"loss": loss} | shares(matrix, NEURONS))
            if run == 0:
                hessians.append(tidy(matrix).assign(**stage))
    return {"shares": pd.DataFrame(found), "hessians": pd.concat(hessians, ignore_index=True)}


def _train(settings: Settings, seed: int, out: Path, device: str) -> list[Path]:
    training = TrainingSettings(
        num_steps=settings.num_steps,
        checkpoints=tuple(settings.stages),
        state_every=0,
        seed=seed,
        device="auto" if device == "auto" else "cpu",
        tracker="none",
        optimizer=OptimizerSettings(name="adam", lr=settings.lr, weight_decay=0.0, clip=0.0),
        schedule=ScheduleSettings(shape="constant"),
    )
    model, batches = models.build(MODEL, seed=seed), ShuffledBatches(even_or_odd(), 64, seed=seed)
    record = {"model": asdict(MODEL)}
    train(model, batches, classification, settings=training, out=out, save=models.save, record=record, progress=False)
    return list_checkpoints(out)


def _hessian(checkpoint: Path) -> tuple[np.ndarray, float]:
    """(528, 528) the Hessian of the mean loss over the training images, and that loss, in float64."""
    model = models.load(checkpoint).double()
    batches = [(x.double(), y) for x, y in fixed_batches(even_or_odd(), count=None, batch_size=2048)]
    objective = blockspec.Objective(model, batches, classification)
    (whole,) = blockspec.partition(model, "model")
    return blockspec.dense(objective, whole), objective.value()


def draw(tables: Tables) -> dict[str, Figure]:
    pictures: Mapping[str, np.ndarray] = {
        f"{100 * fraction:g} % of training": square(part) for fraction, part in tables["hessians"].groupby("fraction")
    }
    title = "Hessian of a perceptron: 64 inputs, 8 hidden neurons (64 rows each), 2 outputs (the last 16 rows)"
    return {"figure_2": toolbox_plots.hessian_blocks(pictures, title=title)}


def judge(tables: Tables) -> list[Finding]:
    claim = "near block diagonal, with a block for each neuron, at {:g} % of training"
    return [finding(claim.format(100 * fraction), part) for fraction, part in tables["shares"].groupby("fraction")]


SETUP = (
    "64-8-2 perceptron without biases (528 parameters) that tells even from odd in the 1,442 digits of scikit-learn; Adam; the "
    "Hessian of the whole network on all training images in float64, entry by entry. The paper's sizes; its data are not known."
)
EXHIBIT = Exhibit(
    name="figure_2",
    title="Exact Hessian of a perceptron of 8 neurons",
    source="Why Transformers Need Adam (arXiv 2402.16788), figure 2",
    measure=measure,
    draw=draw,
    judge=judge,
    scales={
        "small": Scale(Settings(), SETUP, "A minute on one core."),
        "paper": Scale(
            Settings(num_steps=20_000, runs=20),
            SETUP + " Ten times the steps, 20 trainings.",
            "Ten minutes on one core (estimated).",
        ),
    },
)

if __name__ == "__main__":
    command(EXHIBIT)
