"""Adam against SGD on one model, and how different the blocks of the very models that they start
from are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from torch import nn

from blockspec.engine.settings import EstimateSettings
from blockspec.model.blocks import partition
from blockspec.runs.factories import find_factory
from blockspec.runs.run import BlockSettings, RunSettings
from blockspec.spectra.collection import Spectra
from language_models import compare_optimizers as language
from language_models.models import ModelSettings as LanguageModel
from language_models.train import DataSettings as LanguageData
from paper.exhibit import Context
from paper.runs import ROOT, device_of_training, spectra
from training.comparison import ComparisonSettings, TrainOne, compare
from vision_models import compare_optimizers as vision
from vision_models.models import ModelSettings as VisionModel
from vision_models.sources import DataSettings as VisionData

ADAM, SGD = "adam", "sgd"
LAST = 0.1  # of the steps, over which the final training loss is averaged


@dataclass(frozen=True)
class Subject:
    """A model on its data.

    Args:
        config: A configuration of the repository that trains it; its model and data are taken.
        model: Changes to the model.
        data: Changes to the data.
        start: Folder of a checkpoint that is fine-tuned; None: fresh weights.
    """

    config: str
    model: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    start: str | None = None

    @property
    def is_language(self) -> bool:
        return self.config.startswith("language_models")

    def train_one(self) -> TrainOne:
        """A function that trains it with given settings into a folder."""
        content = yaml.safe_load((ROOT / self.config).read_text(encoding="utf-8"))
        model, data = content["model"] | self.model, content["data"] | self.data
        if self.is_language:
            return partial(
                language.train_one, LanguageModel(**model), LanguageData(**data), self.start
            )
        return partial(vision.train_one, VisionModel(**model), VisionData(**data))

    @property
    def factory(self) -> str:
        """What measures its checkpoints."""
        if not self.is_language:
            return "vision_models.factories:checkpoint"
        content = yaml.safe_load((ROOT / self.config).read_text(encoding="utf-8"))
        return f"language_models.{content['model']['architecture']}:checkpoint"


@dataclass(frozen=True)
class AdamAgainstSgd:
    """How the two are compared: learning rates, steps and seeds; and the spectra of the models that
    they start from.
    """

    adam: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    sgd: tuple[float, ...] = (3e-2, 1e-1, 3e-1, 1.0)
    num_steps: int = 150
    tuning_seeds: tuple[int, ...] = (10,)
    seeds: tuple[int, ...] = (1, 2, 3)
    probes: int = 2
    steps: int = 30

    def comparison(self, context: Context) -> ComparisonSettings:
        return ComparisonSettings(
            rates={ADAM: self.adam, SGD: self.sgd},
            num_steps=self.num_steps,
            warmup=self.num_steps // 10,
            tuning_seeds=self.tuning_seeds,
            seeds=self.seeds,
            measure_every=max(1, self.num_steps // 10),
            device=device_of_training(context.device),
            workers=context.workers,
        )

    def estimate(self) -> EstimateSettings:
        return EstimateSettings(num_probes=self.probes, num_steps=self.steps)


def trained(subject: Subject, comparison: ComparisonSettings, out: Path) -> pd.DataFrame:
    """A row for each optimizer and seed: learning rate, held-out loss at the start, final held-out
    and training loss.

    The final losses of a run that diverged are infinite.
    """
    optimizers = compare(subject.train_one(), comparison, out=out).set_index("optimizer")
    curves = pd.read_parquet(out / "curves.parquet")
    rows = []
    for (optimizer, lr, seed), curve in curves.groupby(["optimizer", "lr", "seed"], sort=False):
        held_out = curve.dropna(subset="held_out_loss").set_index("step")["held_out_loss"]
        losses = curve.dropna(subset="loss").set_index("step")["loss"]
        whole = losses.index.max() == comparison.num_steps - 1
        rows.append(
            {
                "optimizer": optimizer,
                "lr": lr,
                "at_edge_of_grid": bool(optimizers.loc[optimizer, "at_edge_of_grid"]),
                "seed": seed,
                "first": held_out.iloc[0],
                "held_out": held_out.iloc[-1] if whole else np.inf,
                "training": losses.tail(max(1, round(LAST * len(losses)))).mean()
                if whole
                else np.inf,
            }
        )
    return pd.DataFrame(rows)


def gaps(runs: pd.DataFrame, loss: str = "held_out") -> pd.Series:
    """By seed, the share of Adam's decrease of the loss that SGD does not reach: 0 where they are
    equal, 1 where SGD stays at the start, negative where SGD ends lower. The start is the held-out
    loss before the first step. So models on different data can be compared, which differences of
    losses cannot.
    """
    table = runs.pivot(index="seed", columns="optimizer", values=loss).replace(np.inf, np.nan)
    first = runs.groupby("seed")["first"].mean()
    table = table.fillna(
        {name: first.mean() for name in (ADAM, SGD)}
    )  # a run that diverged has learnt nothing
    return (table[SGD] - table[ADAM]) / (first - table[ADAM])


def initial_spectra(
    subject: Subject,
    out: Path,
    *,
    seed: int,
    estimate: EstimateSettings,
    arguments: Mapping[str, Any],
    context: Context,
) -> Spectra:
    """Spectra of the weight matrices of the model that the runs of that seed in ``out`` start from.

    Batch norm has the statistics of the batch, as in training: with running ones that are not yet
        any, it would be absent.
    """
    (checkpoint,) = out.glob(f"runs/{ADAM}_lr*_seed{seed}/step_000000")
    model, *_ = find_factory(subject.factory)(checkpoint=str(checkpoint), **arguments)
    blocks = BlockSettings(include=weight_matrices(model), full=False)
    settings = RunSettings(
        subject.factory, dict(arguments), [str(checkpoint)], blocks, estimate, batch_norm="train"
    )
    return spectra(settings, out / "spectra" / f"seed_{seed}", device=context.device)


def weight_matrices(model: nn.Module) -> list[str]:
    """Names of the blocks of more than one dimension, but for positions."""
    shapes = {name: parameter.squeeze().shape for name, parameter in model.named_parameters()}
    return [
        b.name
        for b in partition(model)
        if b.kind != "position" and len(shapes[b.name.split("/")[0]]) > 1
    ]
