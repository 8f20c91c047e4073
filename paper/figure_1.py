"""Full spectra of a CNN and a transformer at stages of training, side by side (figure 1).

Eigenvalues are in units of the 10th largest one of their stage, as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure

from blockspec.figures.panels import Panel, draw_density, mark_eigenvalues, scale_of, smoothing_note
from blockspec.figures.plots import divided, tenth_largest
from blockspec.figures.style import Look, styled
from blockspec.spectra.collection import spectra_of
from blockspec.spectra.spectrum import Spectrum
from paper.distances import RESOLVED, mean_distance
from paper.exhibit import Context, Exhibit, Finding, Scale, Tables, command, with_error
from paper.runs import measured, trained
from training.checkpoints import list_checkpoints, read_record

FULL = "model"


@dataclass(frozen=True)
class Settings:
    """Names of configurations: <folder>/<name>.yaml trains, <folder>/spectra/<name>.yaml
    measures.
    """

    cnn: str = "vision_models/configs/digits_vgg"
    transformer: str = "language_models/configs/embedded_bert"
    stages: tuple[float, ...] = (0.0, 0.025, 0.1, 1.0)


def measure(settings: Settings, context: Context) -> dict[str, pd.DataFrame]:
    found = [_measure(name, settings, context) for name in (settings.cnn, settings.transformer)]
    spectra, losses = (pd.concat(tables, ignore_index=True) for tables in zip(*found, strict=True))
    return {"spectra": spectra, "losses": losses, "stages": _stages(spectra, losses)}


def _measure(
    config: str, settings: Settings, context: Context
) -> tuple[pd.DataFrame, pd.DataFrame]:
    folder, name = config.rsplit("/", maxsplit=1)
    run = trained(
        f"{config}.yaml", context.runs / name, stages=settings.stages, device=context.device
    )
    spectra = measured(
        f"{folder}/spectra/{name}.yaml", run, context.runs / name / "spectra", device=context.device
    )
    records = [read_record(path) for path in list_checkpoints(run)]
    losses = pd.DataFrame(records)[["step", "held_out_loss"]].assign(model=name)
    return spectra.assign(model=name), losses.assign(
        fraction=sorted(settings.stages)
    )  # as asked: steps round them


def _stages(spectra: pd.DataFrame, losses: pd.DataFrame) -> pd.DataFrame:
    """A row a stage: how far apart the two full spectra are, and how far apart the blocks within
    each model are.
    """
    names = list(losses["model"].unique())
    rows = []
    for fraction in sorted(losses["fraction"].unique()):
        steps = losses[losses["fraction"] == fraction].set_index("model")["step"]
        parts = {
            name: spectra_of(spectra[(spectra["model"] == name) & (spectra["step"] == steps[name])])
            for name in names
        }
        units = {name: tenth_largest(parts[name][FULL]) for name in names}
        between = mean_distance(
            {name: divided(parts[name][FULL], units[name]) for name in names}, RESOLVED
        )
        row = {"fraction": fraction, "between": between.value, "between_stderr": between.stderr}
        for name in names:
            blocks = mean_distance(parts[name].select(exclude=FULL), RESOLVED)
            row |= {
                f"tenth_{name}": units[name],
                f"blocks_{name}": blocks.value,
                f"blocks_{name}_stderr": blocks.stderr,
            }
        rows.append(row)
    return pd.DataFrame(rows)


def full_spectra(tables: Tables) -> dict[str, dict[float, Spectrum]]:
    """Model -> fraction of training -> full spectrum in units of its 10th largest eigenvalue."""
    found: dict[str, dict[float, Spectrum]] = {}
    for row in tables["losses"].itertuples():
        table = tables["spectra"]
        rows = table[
            (table["model"] == row.model) & (table["step"] == row.step) & (table["block"] == FULL)
        ]
        spectrum = spectra_of(rows)[FULL]
        found.setdefault(row.model, {})[row.fraction] = divided(spectrum, tenth_largest(spectrum))
    return found


@styled
def plot_stages(models: Mapping[str, Mapping[float, Spectrum]]) -> Figure:
    """A column a model, a row a stage; marks at the foot are converged eigenvalues."""
    everything = [spectrum for stages in models.values() for spectrum in stages.values()]
    scale = scale_of(everything)
    fractions = list(next(iter(models.values())))
    figure = Figure(figsize=(7.0, 1.0 * len(fractions) + 0.9), layout="constrained")
    axes = figure.subplots(len(fractions), len(models), sharex=True, sharey=True, squeeze=False)
    for column, (name, stages) in zip(axes.T, models.items(), strict=True):
        for place, (fraction, spectrum), shade in zip(
            column, stages.items(), np.linspace(0.05, 0.8, len(stages)), strict=True
        ):
            draw_density(
                place,
                Panel("", spectrum, Look("", "", colormaps["viridis"](shade), "")),
                scale,
                width=3.0,
            )
            mark_eigenvalues(place, spectrum, colour="0.2")
            place.set_title(f"{100 * fraction:g} % of training", loc="right", y=0.74)
        column[0].annotate(
            name, (0.5, 1.08), xycoords="axes fraction", ha="center", fontweight="bold"
        )
    figure.supxlabel("eigenvalue / 10th largest eigenvalue of the stage (no unit)", fontsize=8)
    figure.supylabel("spectral density (no unit)", fontsize=8)
    figure.suptitle(f"Full Hessian; marks: converged eigenvalues\n{smoothing_note(everything)}")
    return figure


def draw(tables: Tables) -> dict[str, Figure]:
    return {"figure_1": plot_stages(full_spectra(tables))}


def judge(tables: Tables) -> list[Finding]:
    stages = tables["stages"]
    _, transformer = tables["losses"]["model"].unique()
    blocks, stderr = stages[f"blocks_{transformer}"], stages[f"blocks_{transformer}_stderr"]
    gap: Any = (blocks - stages["between"]) / np.hypot(stderr, stages["between_stderr"])
    listed = "; ".join(
        f"{100 * row.fraction:g} %: {with_error(row.between, row.between_stderr)} against "
        f"{with_error(value, error)}"
        for row, value, error in zip(stages.itertuples(), blocks, stderr, strict=True)
    )
    return [
        Finding(
            "the full spectra of CNNs and transformers look alike, at all stages of training",
            "divergence between the two full spectra against the mean between two blocks of the "
            f"transformer, in nats: {listed}",
            "agrees" if (gap > 2).all() else "disagrees",
            "alike: nearer than two blocks of the transformer are on average, by two standard "
            "errors at every stage; ours is a "
            "resolved Jensen-Shannon divergence, in units of the 10th largest eigenvalue; the "
            "paper shows the densities",
        )
    ]


EXHIBIT = Exhibit(
    name="figure_1",
    title="Full spectra of a CNN and a transformer along training",
    source="Why Transformers Need Adam (arXiv 2402.16788), figure 1",
    measure=measure,
    draw=draw,
    judge=judge,
    scales={
        "small": Scale(
            Settings(),
            "A VGG of 6 layers on the digits, and a BERT of 2 layers on the embedded text; 2 "
            "probes, 30 Lanczos steps.",
            "Minutes on one core.",
        ),
        "paper": Scale(
            Settings(
                cnn="vision_models/configs/imagenet_vgg16",
                transformer="language_models/configs/gpt2_124m",
                stages=(0.0, 0.001, 0.025, 0.05, 0.1, 1.0),
            ),
            "VGG16 on ImageNet, GPT-2 124M on OpenWebText, trained as in the paper; the steps and "
            "probes of a tolerance.",
            "Not run. Estimated: days of 8 GPUs for each training, hours of one for the spectra of "
            "a stage.",
        ),
    },
    shown=("stages",),
)

if __name__ == "__main__":
    command(EXHIBIT)
