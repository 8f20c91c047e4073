"""JS^0 of the models as training begins with them, and the gap between Adam and SGD on the same
models (table 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from blockspec.figures.style import styled
from paper.distances import DEFINITIONS, RESOLVED, heterogeneity
from paper.exhibit import Context, Exhibit, Finding, Scale, Tables, command, with_error
from paper.optimizers import ADAM, SGD, AdamAgainstSgd, Subject, gaps, initial_spectra, trained
from training.curves import draw_curves

LOSSES = ("held_out", "training")
SIZES = [64, 64, 64, 64, 10]


def mlp(c: float) -> dict[str, object]:
    """Layers' Hessian blocks from the first to the last are scaled by factors from c to 1 / c."""
    return {
        "settings": {
            "sizes": SIZES,
            "scales": [round(float(c**x), 6) for x in (0.5, 1 / 6, -1 / 6, -0.5)],
        }
    }


CONFIGS = "vision_models/configs"
SMALL = {
    "ResNet": Subject(f"{CONFIGS}/digits_resnet.yaml", {"settings": {"depth": 8}}),
    "ResNet, no BN": Subject(
        f"{CONFIGS}/digits_resnet.yaml", {"settings": {"depth": 8, "batch_norm": False}}
    ),
    "VGG": Subject(f"{CONFIGS}/digits_vgg.yaml"),
    "VGG, BN": Subject(f"{CONFIGS}/digits_vgg.yaml", {"settings": {"batch_norm": True}}),
    "MLP, c = 1": Subject(f"{CONFIGS}/digits_mlp.yaml", mlp(1)),
    "MLP, c = 10": Subject(f"{CONFIGS}/digits_mlp.yaml", mlp(10)),
    "MLP, c = 100": Subject(f"{CONFIGS}/digits_mlp.yaml", mlp(100)),
    "mixer": Subject(f"{CONFIGS}/digits_mixer.yaml", {"settings": {"depth": 2}}),
    "ViT": Subject(f"{CONFIGS}/digits_vit.yaml", {"settings": {"num_hidden_layers": 2}}),
    "BERT": Subject("language_models/configs/embedded_bert.yaml", data={"batch_size": 16}),
}
FROM_FIGURE_6 = {"fresh weights": "GPT2", "pretrained": "GPT2, fine-tuned"}
IMAGENET = {"held_out": 10000}
PAPER = {
    "ResNet18": Subject(f"{CONFIGS}/imagenet_resnet18.yaml", data=IMAGENET),
    "ResNet18, no BN": Subject(
        f"{CONFIGS}/imagenet_resnet18.yaml", {"settings": {"batch_norm": False}}, IMAGENET
    ),
    "VGG16": Subject(f"{CONFIGS}/imagenet_vgg16.yaml", data=IMAGENET),
    "VGG16, BN": Subject(
        f"{CONFIGS}/imagenet_vgg16.yaml", {"settings": {"batch_norm": True}}, IMAGENET
    ),
    "mixer": Subject(f"{CONFIGS}/imagenet_mixer.yaml", data=IMAGENET),
    "ViT-base": Subject(f"{CONFIGS}/imagenet_vit_base.yaml", data=IMAGENET),
    "BERT": Subject("language_models/configs/bert_base.yaml"),
}


@dataclass(frozen=True)
class Settings(AdamAgainstSgd):
    """The models, and how they are compared and measured.

    images, windows: of the training data, that the initial Hessian is measured on.
    measured_seeds: of how many seeds it is measured.
    """

    models: Mapping[str, Subject] = field(default_factory=lambda: SMALL)
    measured_seeds: int = 2
    images: int = 64
    windows: int = 16


def measure(settings: Settings, context: Context) -> dict[str, pd.DataFrame]:
    runs, js0, curves = [], [], []
    for name, subject in settings.models.items():
        out = context.runs / "compared" / name
        print(name, flush=True)
        runs.append(trained(subject, settings.comparison(context), out).assign(model=name))
        curves.append(pd.read_parquet(out / "curves.parquet").assign(model=name))
        js0 += [
            _heterogeneity(name, subject, seed, settings, context)
            for seed in settings.seeds[: settings.measured_seeds]
        ]
    for tables, kind in ((runs, "runs"), (js0, "js0"), (curves, "curves")):
        found = context.needed["figure_6"][kind]
        tables.append(found.assign(model=found["model"].map(FROM_FIGURE_6)))
    parts = {"runs": runs, "js0": js0, "curves": curves}
    joined = {name: pd.concat(part, ignore_index=True) for name, part in parts.items()}
    table = summary(joined)
    return {"overview": overview(table), "table_1": table, **joined}


def _heterogeneity(
    name: str, subject: Subject, seed: int, settings: Settings, context: Context
) -> pd.DataFrame:
    images = {"count": settings.images, "batch_size": settings.images}
    arguments = (
        {"num_batches": 1, "batch_size": settings.windows, "split": "train"}
        if subject.is_language
        else images
    )
    found = initial_spectra(
        subject,
        context.runs / "compared" / name,
        seed=seed,
        estimate=settings.estimate(),
        arguments=arguments,
        context=context,
    )
    return heterogeneity(found).assign(model=name, seed=seed)


def summary(tables: Tables) -> pd.DataFrame:
    """A row a model: JS^0 by each definition with the standard error over probes and the deviation
    over seeds, the gap by each loss with its standard error over seeds, and the learning rates.
    """
    rows = []
    for name, runs in tables["runs"].groupby("model", sort=False):
        row: dict[str, object] = {"model": name}
        for definition in DEFINITIONS:
            js0 = tables["js0"][
                (tables["js0"]["model"] == name) & (tables["js0"]["definition"] == definition)
            ]
            row |= {definition: js0["js0"].mean(), f"{definition}, probes": js0["stderr"].mean()}
            row |= {f"{definition}, seeds": js0["js0"].std(ddof=1)}
        for loss in LOSSES:
            gap = gaps(runs, loss)
            row |= {f"gap ({loss})": gap.mean(), f"gap ({loss}), seeds": gap.sem()}
        for optimizer, part in runs.groupby("optimizer"):
            row |= {
                f"lr {optimizer}": part["lr"].iloc[0],
                f"{optimizer} at edge": bool(part["at_edge_of_grid"].iloc[0]),
            }
        rows.append(row)
    return pd.DataFrame(rows).sort_values(RESOLVED, ignore_index=True)


def overview(table: pd.DataFrame) -> pd.DataFrame:
    """The table to read: JS^0 with its standard error over probes, the gaps with theirs over seeds;
    * marks a learning rate at the edge of its grid.
    """
    columns: dict[str, Any] = {"model": table["model"]}
    errors = {name: f"{name}, probes" for name in DEFINITIONS} | {
        f"gap ({x})": f"gap ({x}), seeds" for x in LOSSES
    }
    for name, error in errors.items():
        columns[name] = [with_error(*pair) for pair in zip(table[name], table[error], strict=True)]
    for optimizer in (ADAM, SGD):
        edges = zip(table[f"lr {optimizer}"], table[f"{optimizer} at edge"], strict=True)
        columns[f"lr {optimizer}"] = [f"{lr:g}{'*' * at_edge}" for lr, at_edge in edges]
    return pd.DataFrame(columns)


@styled
def plot_curves(curves: pd.DataFrame) -> Figure:
    """Held-out loss by step of Adam and SGD, each with its best learning rate, a panel a model."""
    models = list(curves["model"].unique())
    columns = 4
    rows = -(-len(models) // columns)
    figure = Figure(figsize=(7.2, 1.6 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for place in axes.flat[len(models) :]:
        place.set_axis_off()
    for place, model in zip(axes.flat, models, strict=False):
        draw_curves(place, curves[curves["model"] == model], [ADAM, SGD], x="step")
        place.get_legend().remove()
        place.set(title=model, xlabel="", ylabel="")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    figure.supxlabel("training step", fontsize=8)
    figure.supylabel(
        f"held-out loss (nats): mean and range of {curves['seed'].nunique()} seeds", fontsize=8
    )
    return figure


def draw(tables: Tables) -> dict[str, Figure]:
    return {"table_1_training": plot_curves(tables["curves"])}


TRANSFORMERS = ("ViT", "BERT", "GPT2")


def judge(tables: Tables) -> list[Finding]:
    table = tables["table_1"]
    is_transformer = table["model"].str.startswith(TRANSFORMERS)
    columns = {"JS^0 ({})": DEFINITIONS, "gap ({} loss)": [f"gap ({loss})" for loss in LOSSES]}
    return [
        _larger(
            label.format(name.removeprefix("gap (").removesuffix(")")),
            table.loc[is_transformer, name],
            table.loc[~is_transformer, name],
        )
        for label, names in columns.items()
        for name in names
    ]


def _larger(what: str, transformers: pd.Series, others: pd.Series) -> Finding:
    error = np.hypot(transformers.sem(), others.sem())
    difference = transformers.mean() - others.mean()
    return Finding(
        f"{what} is larger for transformers than for other models",
        f"{with_error(transformers.mean(), transformers.sem())} in the mean of {len(transformers)} "
        "transformers, "
        f"{with_error(others.mean(), others.sem())} in that of {len(others)} other models",
        "agrees" if difference > 2 * error else "disagrees",
        "two standard errors over models; the mixer and the man-made perceptrons are among the "
        "others",
    )


SETUP = (
    "Adam and SGD (momentum 0.9; clipping at norm 1, cosine, no weight decay for both), the best "
    "learning rate of a grid by "
    "held-out loss on another seed. Gap: share of Adam's decrease of the loss that SGD does not "
    "reach. JS^0 is measured at the "
    "weights that the runs start from; batch norm with the statistics of the batch."
)

EXHIBIT = Exhibit(
    name="table_1",
    title="Heterogeneity at initialisation, and the gap between Adam and SGD",
    source="Why Transformers Need Adam (arXiv 2402.16788), table 1",
    measure=measure,
    draw=draw,
    judge=judge,
    scales={
        "small": Scale(
            Settings(),
            f"Small models on the digits (8x8) and on embedded text, 150 steps. {SETUP}",
            "Some twenty minutes on one core.",
        ),
        "paper": Scale(
            Settings(
                models=PAPER,
                adam=(1e-4, 3e-4, 1e-3),
                sgd=(1e-2, 3e-2, 1e-1, 3e-1),
                num_steps=50000,
                seeds=(1, 2),
                images=256,
                windows=32,
                probes=4,
                steps=100,
            ),
            "The paper's models on ImageNet and OpenWebText, 50,000 steps of the micro-batches of "
            f"their configurations. {SETUP}",
            "Not run. Estimated: months of one GPU: 77 trainings.",
        ),
    },
    needs=("figure_6",),
    shown=("overview",),
)

if __name__ == "__main__":
    command(EXHIBIT)
