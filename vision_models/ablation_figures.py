"""Figures of the study of batch norm and shortcuts: curvature by stage along the training, and
densities.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blockspec.figures.panels import (
    DENSITY,
    EIGENVALUE,
    density_axes,
    draw_line,
    label_outer,
    resolved_density,
    scale_of,
    smoothing_note,
)
from blockspec.figures.stages import step_axis, step_label
from blockspec.figures.style import RUN_MARKERS, RUNS, save, spread, styled
from blockspec.figures.trends import DASHES
from blockspec.spectra.collection import Spectra

QUANTITIES = {
    "trace": "trace (loss / parameter²)",
    "eigenvalue_1": "largest eigenvalue (loss / parameter²)",
}
COLUMNS = 4  # checkpoints in the figure of densities, at most


def draw(
    table: pd.DataFrame, spectra: Mapping[tuple[int, str], Mapping[int, Spectra]], folder: Path
) -> list[Path]:
    """Writes ``trace``, ``largest``, ``density`` and ``density_<stage>`` for each stage, as png and
    pdf.
    """
    figures = {
        "trace": plot_course(table, "trace"),
        "largest": plot_course(table, "eigenvalue_1"),
        "density": plot_densities(spectra),
    }
    for block in table["block"].unique():
        if block != "model":
            figures[f"density_{block.replace(' ', '_')}"] = plot_densities(spectra, block)
    return [save(figure, folder, name) for name, figure in figures.items()]


@styled
def plot_course(table: pd.DataFrame, quantity: str) -> Figure:
    """A quantity over training: a row a depth, a column a block, a line a variant; bars are
    standard errors or residuals.
    """
    depths, blocks, variants = (
        table[name].unique().tolist() for name in ("depth", "block", "variant")
    )
    blocks = ["model", *(block for block in blocks if block != "model")]
    figure = Figure(
        figsize=(1.45 * len(blocks) + 1.9, 1.5 * len(depths) + 0.9), layout="constrained"
    )
    axes = figure.subplots(len(depths), len(blocks), sharex=True, sharey=True, squeeze=False)
    _value_axis(axes[0, 0], table[quantity])
    for i, depth in enumerate(depths):
        for place, block in zip(axes[i], blocks, strict=True):
            part = table[(table["depth"] == depth) & (table["block"] == block)]
            for j, variant in enumerate(variants):
                _line(place, part[part["variant"] == variant], quantity, j, variant)
            place.axhline(0, color="0.8", linewidth=0.5, zorder=0)
            if i == 0:
                place.set_title("whole network" if block == "model" else block)
        axes[i, 0].set_ylabel(f"depth {depth}")
    step_axis(axes[-1, 0], sorted(table["step"].unique().tolist()), width=1.2)
    for place in axes.flat:
        place.set_xlabel("")
    figure.supxlabel("training step", fontsize=8)
    figure.supylabel(QUANTITIES[quantity], fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    return figure


def _line(axes: Axes, rows: pd.DataFrame, quantity: str, number: int, label: str) -> None:
    rows = rows.sort_values("step")
    error = {"trace": "trace_stderr", "eigenvalue_1": "residual_1"}[quantity]
    colour = RUNS[number % len(RUNS)]
    bars = rows[error].fillna(0)
    axes.errorbar(
        rows["step"], rows[quantity], yerr=bars, fmt="none", ecolor=colour, elinewidth=0.8
    )
    axes.plot(
        rows["step"],
        rows[quantity],
        color=colour,
        marker=RUN_MARKERS[number % len(RUN_MARKERS)],
        markersize=3,
        label=label,
    )


def _value_axis(axes: Axes, values: pd.Series) -> None:
    """Linear around zero, logarithmic beyond the smallest tenth of the values: traces may be
    negative.
    """
    sizes = values.abs()
    linear = float(sizes[sizes > 0].quantile(0.1)) if (sizes > 0).any() else 1.0
    axes.set_yscale("symlog", linthresh=10.0 ** np.floor(np.log10(linear)))


@styled
def plot_densities(
    spectra: Mapping[tuple[int, str], Mapping[int, Spectra]], block: str = "model"
) -> Figure:
    """Spectral density of a stage or of the whole network: a row a depth, a column a checkpoint, a
    line a variant.
    """
    depths = list(dict.fromkeys(depth for depth, _ in spectra))
    variants = list(dict.fromkeys(variant for _, variant in spectra))
    steps = spread(sorted({step for stages in spectra.values() for step in stages}), COLUMNS)
    shown = {
        (*key, step): stages[step][block]
        for key, stages in spectra.items()
        for step in steps
        if step in stages
    }
    scale = scale_of(shown.values())
    figure = Figure(figsize=(1.9 * len(steps) + 1.9, 1.5 * len(depths) + 1.1), layout="constrained")
    axes = figure.subplots(len(depths), len(steps), sharex=True, sharey=True, squeeze=False)
    for i, depth in enumerate(depths):
        for place, step in zip(axes[i], steps, strict=True):
            for j, variant in enumerate(variants):
                if spectrum := shown.get((depth, variant, step)):
                    mean, error = resolved_density(spectrum, scale.grid, scale.linear)
                    look = {"colour": RUNS[j % len(RUNS)], "linestyle": DASHES[j % len(DASHES)]}
                    draw_line(place, scale, mean, error, label=variant, **look)
            density_axes(place, scale, width=1.6)
            if i == 0:
                place.set_title(f"step {step_label(step)}")
        axes[i, 0].set_ylabel(f"depth {depth}")
    label_outer(axes)
    figure.supxlabel(EIGENVALUE, fontsize=8)
    figure.supylabel(DENSITY, fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    figure.suptitle(
        f"Hessian of {'the whole network' if block == 'model' else block}\n"
        f"{smoothing_note(shown.values())}"
    )
    return figure
