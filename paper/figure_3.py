"""Spectra of four blocks of a CNN and of a transformer, at initialisation and along training
(figure 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure

from blockspec.figures.panels import (
    Panel,
    draw_density,
    draw_line,
    resolved_density,
    scale_of,
    smoothing_note,
)
from blockspec.figures.plots import divided, tenth_largest
from blockspec.figures.style import Look, short_name, styled
from blockspec.spectra.collection import Spectra, spectra_of
from paper.distances import DEFINITIONS, RESOLVED, heterogeneity
from paper.exhibit import Context, Exhibit, Finding, Scale, Tables, command, with_error
from paper.figure_1 import FULL


@dataclass(frozen=True)
class Settings:
    """The four blocks that are drawn, of the models of figure 1; the paper's are not known."""

    cnn: tuple[str, ...] = (
        "features.2.weight",
        "features.5.weight",
        "features.7.weight",
        "classifier.0.weight",
    )
    transformer: tuple[str, ...] = (
        "bert.embeddings.word_embeddings.weight",
        "bert.encoder.layer.0.attention.self.query.weight",
        "bert.encoder.layer.0.attention.self.value.weight",
        "bert.encoder.layer.0.output.dense.weight",
    )


def measure(settings: Settings, context: Context) -> dict[str, pd.DataFrame]:
    tables = context.needed["figure_1"]
    names = tables["losses"]["model"].unique()
    blocks = pd.DataFrame(
        [
            {"model": m, "block": b}
            for m, chosen in zip(names, (settings.cnn, settings.transformer), strict=True)
            for b in chosen
        ]
    )
    rows = []
    for stage in tables["losses"].itertuples():
        spectra = _at(tables["spectra"], stage.model, stage.step).select(exclude=FULL)
        drawn = spectra.select(list(blocks[blocks["model"] == stage.model]["block"]))
        for chosen, parts in {"drawn": drawn, "all": spectra}.items():
            named = {
                "model": stage.model,
                "fraction": stage.fraction,
                "blocks": chosen,
                "number": len(parts),
            }
            rows.append(heterogeneity(parts).assign(**named))
    return {"heterogeneity": pd.concat(rows, ignore_index=True), "blocks": blocks, **tables}


def _at(table: pd.DataFrame, model: str, step: int) -> Spectra:
    return spectra_of(table[(table["model"] == model) & (table["step"] == step)])


def by_stage(tables: Tables) -> dict[str, dict[float, Spectra]]:
    """Model -> fraction of training -> the chosen blocks, in units of the 10th largest eigenvalue
    of the full Hessian.
    """
    blocks = tables["blocks"]
    found: dict[str, dict[float, Spectra]] = {}
    for stage in tables["losses"].itertuples():
        spectra = _at(tables["spectra"], stage.model, stage.step)
        unit = tenth_largest(spectra[FULL])
        chosen = blocks[blocks["model"] == stage.model]["block"]
        found.setdefault(stage.model, {})[stage.fraction] = Spectra(
            divided(spectra[name], unit) for name in chosen
        )
    return found


@styled
def plot_blocks(models: Mapping[str, Mapping[float, Spectra]]) -> Figure:
    """A row a model, a column a block: filled at initialisation, lines along training."""
    everything = [
        part
        for stages in models.values()
        for spectra in stages.values()
        for part in spectra.values()
    ]
    scale = scale_of(everything)
    columns = max(len(spectra) for stages in models.values() for spectra in stages.values())
    figure = Figure(figsize=(1.75 * columns + 0.6, 1.6 * len(models) + 1.2), layout="constrained")
    axes = figure.subplots(len(models), columns, sharex=True, sharey=True, squeeze=False)
    for line, (model, stages) in zip(axes, models.items(), strict=True):
        shades = [colormaps["viridis"](shade) for shade in np.linspace(0.05, 0.9, len(stages))]
        for place, name in zip(line, next(iter(stages.values())), strict=False):
            for (fraction, spectra), colour in zip(stages.items(), shades, strict=True):
                if fraction == min(stages):
                    draw_density(
                        place, Panel("", spectra[name], Look("", "", colour, "")), scale, width=1.6
                    )
                else:
                    draw_line(
                        place,
                        scale,
                        *resolved_density(spectra[name], scale.grid, scale.linear),
                        colour=colour,
                    )
                place.lines[-1].set_label(f"{100 * fraction:g} %")
            place.set_title(short_name(name))
        line[0].set_ylabel(model)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside right center",
        title="of training\n(filled: 0 %)",
    )
    figure.supxlabel(
        "eigenvalue / 10th largest eigenvalue of the full Hessian of the stage (no unit)",
        fontsize=8,
    )
    figure.supylabel("spectral density (no unit)", fontsize=8)
    figure.suptitle(f"Hessian blocks\n{smoothing_note(everything)}")
    return figure


def draw(tables: Tables) -> dict[str, Figure]:
    return {"figure_3": plot_blocks(by_stage(tables))}


def judge(tables: Tables) -> list[Finding]:
    table = (
        tables["heterogeneity"]
        .set_index(["definition", "blocks", "fraction", "model"])
        .sort_index()
    )
    models = list(tables["losses"]["model"].unique())
    first, *later = sorted(tables["losses"]["fraction"].unique())
    claim = "at initialisation the blocks of a transformer differ, those of a CNN are alike"
    return [
        *(_finding(claim, table, definition, [first], models) for definition in DEFINITIONS),
        _finding("so it stays along training", table, RESOLVED, later, models),
    ]


def _finding(
    claim: str,
    table: pd.DataFrame,
    definition: str,
    fractions: Sequence[float],
    models: Sequence[str],
) -> Finding:
    cnn, transformer = models
    parts, larger = [], []
    for fraction in fractions:
        for blocks in ("drawn", "all"):
            rows = table.loc[definition, blocks, fraction]
            a, b = rows.loc[transformer], rows.loc[cnn]
            larger.append(a["js0"] - b["js0"] > 2 * np.hypot(a["stderr"], b["stderr"]))
            values = (
                f"{with_error(a['js0'], a['stderr'])} against {with_error(b['js0'], b['stderr'])}"
            )
            parts.append(f"{100 * fraction:g} %, {blocks} blocks: {values}")
    return Finding(
        claim,
        f"mean distance over pairs ({definition}), transformer against CNN: {'; '.join(parts)}",
        "agrees" if all(larger) else "disagrees",
        "the transformer's must be larger by two standard errors, for the four blocks that are "
        "drawn and for all weight matrices",
    )


SETUP = (
    "The models and spectra of figure 1. Four blocks of each are drawn (our choice: the paper's "
    "are not known), the numbers are "
    "given for all weight matrices too."
)

EXHIBIT = Exhibit(
    name="figure_3",
    title="Spectra of blocks, at initialisation and along training",
    source="Why Transformers Need Adam (arXiv 2402.16788), figure 3",
    measure=measure,
    draw=draw,
    judge=judge,
    scales={
        "small": Scale(Settings(), SETUP, "Figure 1's runs, and half a minute."),
        "paper": Scale(
            Settings(
                cnn=(
                    "features.2.weight",
                    "features.12.weight",
                    "features.24.weight",
                    "classifier.3.weight",
                ),
                transformer=(
                    "transformer.wte.weight",
                    "transformer.h.0.attn.c_attn.weight/query",
                    "transformer.h.0.attn.c_attn.weight/value",
                    "transformer.h.0.mlp.c_proj.weight",
                ),
            ),
            SETUP,
            "Figure 1's runs, and a minute.",
        ),
    },
    needs=("figure_1",),
    shown=("heterogeneity",),
)

if __name__ == "__main__":
    command(EXHIBIT)
