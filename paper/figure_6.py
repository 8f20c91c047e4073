"""Fine-tuning a trained GPT-2: distances between its blocks, and SGD against Adam (figure 6)."""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from blockspec.figures.plots import distance_heatmaps
from blockspec.figures.style import styled
from language_models.data import prepare
from paper.distances import DEFINITIONS, RESOLVED, distances, heterogeneity, square, tidy
from paper.exhibit import Context, Exhibit, Finding, Scale, Tables, command, with_error
from paper.optimizers import ADAM, SGD, AdamAgainstSgd, Subject, gaps, initial_spectra, trained
from paper.runs import trained as trained_by_config
from training.curves import draw_curves, draw_rates

FRESH, PRETRAINED = "fresh weights", "pretrained"


@dataclass(frozen=True)
class Settings(AdamAgainstSgd):
    """Which model is trained on its own text, and then on other text; the rates, steps and seeds of
    the comparison.

    data: a folder with train.bin and val.bin; None: source files of Python's standard library, by
        the embedded tokenizer.
    """

    config: str = "language_models/configs/embedded_tiny.yaml"
    data: str | None = None
    windows: int = 16


def subjects(settings: Settings, context: Context) -> dict[str, Subject]:
    """The same model on the same text, with fresh and with trained weights."""
    start = trained_by_config(
        settings.config, context.runs / "pretrained", stages=(1.0,), device=context.device
    )
    (checkpoint,) = start.glob("step_*")
    data = {"source": settings.data or str(python_source(context.runs / "python_source"))}
    return {
        FRESH: Subject(settings.config, data=data),
        PRETRAINED: Subject(settings.config, data=data, start=str(checkpoint)),
    }


def python_source(out: Path) -> Path:
    """Token files of the modules of Python's standard library that begin with a letter from a to d
    (about 1 MB).
    """
    folder = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("[a-d]*.py"))]
    out.mkdir(parents=True, exist_ok=True)
    pd.DataFrame({"text": texts}).to_parquet(out / "source.parquet")
    return prepare(
        str(out / "source.parquet"), out=str(out / "tokens"), tokenizer="embedded", val_share=0.1
    )


def measure(settings: Settings, context: Context) -> dict[str, pd.DataFrame]:
    arguments = {"num_batches": 1, "batch_size": settings.windows}
    tables: dict[str, list[pd.DataFrame]] = {
        name: [] for name in ("runs", "trials", "curves", "distances", "js0")
    }
    for name, subject in subjects(settings, context).items():
        out = context.runs / "compared" / f"GPT2 {name} on other text"
        tables["runs"].append(
            trained(subject, settings.comparison(context), out).assign(model=name)
        )
        for kind in ("trials", "curves"):
            tables[kind].append(pd.read_parquet(out / f"{kind}.parquet").assign(model=name))
        for seed in (
            settings.seeds[:1] if subject.start else settings.seeds
        ):  # all seeds start from the same trained weights
            found = initial_spectra(
                subject,
                out,
                seed=seed,
                estimate=settings.estimate(),
                arguments=arguments,
                context=context,
            )
            tables["distances"].append(
                tidy(distances(found, RESOLVED)).assign(model=name, seed=seed)
            )
            tables["js0"].append(heterogeneity(found).assign(model=name, seed=seed))
    return {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}


def draw(tables: Tables) -> dict[str, Figure]:
    return {
        "figure_6_distances": distance_heatmaps(_maps(tables["distances"])),
        "figure_6_training": plot_training(tables),
    }


def _maps(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return {
        model: square(rows[rows["seed"] == rows["seed"].min()])
        for model, rows in table.groupby("model", sort=False)
    }


@styled
def plot_training(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """A row a model. Left: final held-out loss by learning rate; right: held-out loss by step with
    the best rate.
    """
    models = list(tables["curves"]["model"].unique())
    figure = Figure(figsize=(7.0, 2.0 * len(models) + 0.4), layout="constrained")
    axes = figure.subplots(len(models), 2, width_ratios=(1, 1.4), sharey="row", squeeze=False)
    for (left, right), model in zip(axes, models, strict=True):
        trials, curves = (
            tables[name][tables[name]["model"] == model] for name in ("trials", "curves")
        )
        draw_rates(left, trials, [ADAM, SGD])
        draw_curves(right, curves, [ADAM, SGD], x="step")
        left.get_legend().remove()
        right.get_legend().remove()
        left.set_title(f"{model}: rates, {trials.loc[trials['tuning'], 'seed'].nunique()} seed")
        right.set_title(f"mean and range of {curves['seed'].nunique()} other seeds")
        right.set(xlabel="training step", ylabel="")
    figure.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def judge(tables: Tables) -> list[Finding]:
    seed = tables["js0"]["seed"].min()
    js0 = tables["js0"][tables["js0"]["seed"] == seed].set_index(["definition", "model"])
    found = {name: gaps(rows) for name, rows in tables["runs"].groupby("model")}
    mean = {name: gap.mean() for name, gap in found.items()}
    error = {name: gap.sem() for name, gap in found.items()}
    smaller = mean[FRESH] - mean[PRETRAINED] > 2 * np.hypot(error[FRESH], error[PRETRAINED])
    count = len(found[FRESH])
    return [
        *(_more_alike(definition, js0.loc[definition]) for definition in DEFINITIONS),
        Finding(
            "SGD comes closer to Adam in fine-tuning than in training from scratch",
            f"share of Adam's decrease of the held-out loss that SGD does not reach: fine-tuned "
            f"{with_error(mean[PRETRAINED], error[PRETRAINED])}, from scratch "
            f"{with_error(mean[FRESH], error[FRESH])}",
            "agrees" if smaller else "disagrees",
            f"two standard errors over {count} seeds; learning rates tuned on another "
            f"seed{_edges(tables['runs'])}",
        ),
    ]


def _more_alike(definition: str, js0: pd.DataFrame) -> Finding:
    value, error = js0["js0"], js0["stderr"]
    fewer = value[FRESH] - value[PRETRAINED] > 2 * np.hypot(error[FRESH], error[PRETRAINED])
    return Finding(
        "the blocks of a pretrained GPT-2 are more alike than those of a fresh one",
        f"mean distance over pairs ({definition}): pretrained "
        f"{with_error(value[PRETRAINED], error[PRETRAINED])}, "
        f"fresh {with_error(value[FRESH], error[FRESH])}",
        "agrees" if fewer else "disagrees",
        "two standard errors over probes",
    )


def _edges(runs: pd.DataFrame) -> str:
    """Which learning rates are the first or last of their grid, so that a better one may lie
    beyond.
    """
    rows = runs[runs["at_edge_of_grid"]].drop_duplicates(["model", "optimizer"])
    names: Sequence[str] = [
        f"{row.optimizer} {row.lr:g} ({row.model})" for row in rows.itertuples()
    ]
    return (
        f"; at the edge of the grid: {', '.join(names)}"
        if names
        else ", none at the edge of its grid"
    )


EXHIBIT = Exhibit(
    name="figure_6",
    title="Fine-tuning a trained GPT-2",
    source="Why Transformers Need Adam (arXiv 2402.16788), figure 6",
    measure=measure,
    draw=draw,
    judge=judge,
    scales={
        "small": Scale(
            Settings(),
            "A GPT-2 of 2 layers that was trained on the embedded text for 1,000 steps, then 150 "
            "steps on source files of "
            "Python's library, beside the same model from fresh weights on these files. SGD has "
            "momentum 0.9; gradients are "
            "clipped at norm 1 for both; no weight decay.",
            "Some four minutes on one core.",
        ),
        "paper": Scale(
            Settings(
                config="language_models/configs/gpt2_124m.yaml",
                data="data/finetuning",
                adam=(3e-5, 1e-4, 3e-4, 6e-4),
                sgd=(1e-3, 1e-2, 1e-1, 1.0),
                num_steps=2000,
                windows=480,
                probes=4,
                steps=100,
            ),
            "GPT-2 124M, trained on OpenWebText as in the paper, then 2,000 steps of 12 windows on "
            "data/finetuning (any text, by "
            "language_models.data), beside fresh weights. The paper's data and steps are not "
            "known.",
            "Not run. Estimated: days of 8 GPUs for the training, two days of one for the rest.",
        ),
    },
    shown=("runs", "js0"),
)

if __name__ == "__main__":
    command(EXHIBIT)
