"""The exact Hessian of a perceptron of 8 hidden neurons at 1, 50 and 100 % of training (figure
2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import blockspec
from blockspec.figures import toolbox as toolbox_plots
from blockspec.model.losses import classification
from paper.block_diagonality import finding, shares, square, tidy
from paper.exhibit import Context, Exhibit, Finding, Scale, Tables, command
from paper.runs import device_of_training
from training.checkpoints import list_checkpoints, read_record
from training.optimizers import OptimizerSettings, ScheduleSettings
from training.trainer import TrainingSettings, train
from vision_models import models
from vision_models.data import Arrays, ShuffledBatches, fixed_batches
from vision_models.digits import digits
from vision_models.models import ModelSettings

INPUTS, HIDDEN = 64, 8
PAPER_OUTPUTS = 2


@dataclass(frozen=True)
class Settings:
    """What is trained.

    Args:
        outputs: C: the classes are the remainders of the digits by C.
        num_steps: Updates, of 64 images.
        stages: Fractions of training.
        runs: Trainings, each with its own seed.
        lr: Learning rate of Adam.
    """

    outputs: tuple[int, ...] = (PAPER_OUTPUTS, 10)
    num_steps: int = 2000
    stages: tuple[float, ...] = (0.01, 0.5, 1.0)
    runs: int = 3
    lr: float = 1e-3


def images(outputs: int) -> Arrays:
    """The digits, to be told apart by their remainder: for 2 outputs, even or odd."""
    found = digits()
    return replace(found, labels=found.labels % outputs, classes=tuple(map(str, range(outputs))))


def neurons(outputs: int) -> np.ndarray:
    """(P,) of which neuron each parameter is: a row of a weight is one."""
    return np.repeat(np.arange(HIDDEN + outputs), [INPUTS] * HIDDEN + [HIDDEN] * outputs)


def measure(settings: Settings, context: Context) -> dict[str, pd.DataFrame]:
    hessians, found = [], []
    for outputs in settings.outputs:
        for run in range(settings.runs):
            seed = context.seed + run
            for folder in _train(outputs, settings, seed, context):
                matrix, loss = _hessian(folder, outputs)
                stage = {
                    "outputs": outputs,
                    "fraction": read_record(folder)["fraction"],
                    "seed": seed,
                }
                found.append(stage | {"loss": loss} | shares(matrix, neurons(outputs)))
                if run == 0:
                    hessians.append(tidy(matrix).assign(**stage))
    return {"shares": pd.DataFrame(found), "hessians": pd.concat(hessians, ignore_index=True)}


def _train(outputs: int, settings: Settings, seed: int, context: Context) -> list[Path]:
    """Its checkpoints."""
    training = TrainingSettings(
        num_steps=settings.num_steps,
        checkpoints=tuple(settings.stages),
        state_every=0,
        seed=seed,
        device=device_of_training(context.device),
        tracker="none",
        optimizer=OptimizerSettings(name="adam", lr=settings.lr, weight_decay=0.0, clip=0.0),
        schedule=ScheduleSettings(shape="constant"),
    )
    out = context.runs / "perceptron_of_8_neurons" / f"{outputs}_outputs_seed_{seed}"
    perceptron = ModelSettings("mlp", {"sizes": [INPUTS, HIDDEN, outputs], "bias": False})
    train(
        models.build(perceptron, seed=seed),
        ShuffledBatches(images(outputs), 64, seed=seed),
        classification,
        settings=training,
        out=out,
        save=models.save,
        record={"model": asdict(perceptron)},
        progress=False,
    )
    return list_checkpoints(out)


def _hessian(checkpoint: Path, outputs: int) -> tuple[np.ndarray, float]:
    """(P, P) the Hessian of the mean loss over the training images, and that loss, in float64."""
    model = models.load(checkpoint).double()
    batches = [
        (x.double(), y) for x, y in fixed_batches(images(outputs), count=None, batch_size=2048)
    ]
    objective = blockspec.Objective(model, batches, classification)
    (whole,) = blockspec.partition(model, "model")
    return blockspec.dense(objective, whole), objective.value()


def draw(tables: Tables) -> dict[str, Figure]:
    pictures: Mapping[str, np.ndarray] = {
        f"{outputs} outputs, {100 * fraction:g} %": square(part)
        for (outputs, fraction), part in tables["hessians"].groupby(["outputs", "fraction"])
    }
    title = (
        "Hessian along training: 8 hidden neurons of 64 rows each; the last rows are the outputs' "
        "neurons, of 8 each"
    )
    columns = tables["hessians"]["fraction"].nunique()
    return {"figure_2": toolbox_plots.hessian_blocks(pictures, title=title, columns=columns)}


def judge(tables: Tables) -> list[Finding]:
    return [
        _judge(outputs, fraction, part)
        for (outputs, fraction), part in tables["shares"].groupby(["outputs", "fraction"])
    ]


def _judge(outputs: int, fraction: float, part: pd.DataFrame) -> Finding:
    claim = (
        f"near block diagonal, with a block for each neuron, at {100 * fraction:g} % of training"
    )
    found = finding(
        claim
        if outputs == PAPER_OUTPUTS
        else f"the same with {outputs} outputs, at {100 * fraction:g} %",
        part,
    )
    if outputs == PAPER_OUTPUTS:
        return found
    return replace(
        found,
        verdict="not comparable",
        why="the paper has 2 outputs: this shows what the number of classes does",
    )


SETUP = (
    "64-8-2 perceptron without biases (528 parameters; the paper's, its data are not known) that "
    "tells even from odd in the "
    "digits of scikit-learn, and one with 10 outputs that tells the digits apart; Adam; the "
    "Hessian of the whole network on all "
    "1,442 training images in float64, entry by entry."
)
EXHIBIT = Exhibit(
    name="figure_2",
    title="Exact Hessian of a perceptron of 8 neurons",
    source="Why Transformers Need Adam (arXiv 2402.16788), figure 2",
    measure=measure,
    draw=draw,
    judge=judge,
    scales={
        "small": Scale(Settings(), SETUP, "Two minutes on one core."),
        "paper": Scale(
            Settings(num_steps=20_000, runs=20),
            SETUP + " Ten times the steps, 20 trainings.",
            "Ten minutes on one core (estimated).",
        ),
    },
)

if __name__ == "__main__":
    command(EXHIBIT)
