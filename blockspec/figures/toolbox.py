"""Figures of coupling, of single blocks and of loss landscapes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from blockspec.figures.style import (
    KINDS,
    canvas,
    matrix_called,
    short_names,
    styled,
)
from blockspec.figures.style import save as save
from blockspec.toolbox.couplings import Coupling
from blockspec.toolbox.directional import Directional
from blockspec.toolbox.landscapes import Landscape

COLOURS = ListedColormap(
    colormaps["magma_r"](np.linspace(0, 0.88, 256))
)  # lightness falls evenly: readable in grey
SIGNED = "RdBu_r"
LARGEST_PICTURE = 512  # pixels a side: larger blocks are drawn as the largest entries of squares
WRITTEN = 10  # blocks up to which numbers are written into cells
FAINTEST = 1e-2  # relative norm from which on there is colour


@styled
def coupling_heatmap(found: Coupling, *, relative: bool = True) -> Figure:
    """Norms of all blocks of the matrix, on and off the diagonal.

    Args:
        relative: ``||H_bc|| / sqrt(||H_bb|| ||H_cc||)``, from 0.01 on; False: the norms themselves.
            Both on a logarithmic scale: in an indefinite matrix, blocks off the diagonal may be far
            larger than those on it (query and key).
    """
    table = found.relative if relative else found.norms
    size = len(table)
    side = min(max(0.16 * size, 2.4), 6.0)
    figure = canvas(figsize=(side + 2.6, side + 1.6), layout="compressed")
    axes = figure.subplots()
    norm = (
        LogNorm(FAINTEST, max(1.0, float(table.to_numpy().max())))
        if relative
        else _decades(table.to_numpy())
    )
    values = table.clip(lower=norm.vmin).to_numpy()
    edges = np.arange(size + 1)
    image = axes.pcolormesh(edges, edges, values, cmap=COLOURS, norm=norm)
    axes.set_aspect("equal")
    axes.set_ylim(size, 0)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    places, labels = _labels(table, side)
    axes.set_xticks(places, labels, rotation=90)
    axes.set_yticks(places, labels)
    if size <= WRITTEN:
        for i, j in np.ndindex(size, size):
            colour = "white" if norm(values[i, j]) > 0.55 else "black"
            axes.text(
                j + 0.5,
                i + 0.5,
                f"{table.to_numpy()[i, j]:.2g}",
                ha="center",
                va="center",
                fontsize=6,
                color=colour,
            )
    bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=20, extend="min")
    bar.set_label(
        r"$\|H_{bc}\| / \sqrt{\|H_{bb}\| \|H_{cc}\|}$"
        if relative
        else r"$\|H_{bc}\|_F$ (loss / parameter²)"
    )
    bar.outline.set_visible(False)
    share, stderr, _ = found.off_diagonal_share
    known = "" if stderr is None else f" ± {100 * stderr:.2g}"
    matrix = matrix_called(found.curvature)
    probes = len(found.samples)
    figure.suptitle(
        f"{matrix}: Frobenius norms of {size} x {size} blocks, {probes} probe{'s' * (probes > 1)}\n"
        f"{100 * share:.3g}{known} % of the squared norm is off the block diagonal"
    )
    return figure


def _decades(values: np.ndarray, most: float = 1e-5) -> LogNorm:
    """Colours of norms: the last decades below the largest."""
    top = float(values.max()) or 1.0
    low = float(values[values > 0].min(initial=top))
    return LogNorm(max(min(low, top / 10), top * most), top)


def _labels(table: pd.DataFrame, side: float) -> tuple[np.ndarray, list[str]]:
    """Every block's name where there is room, else evenly spread ones."""
    short = short_names(
        name for name in table.index if "." in name
    )  # groups are called what they are
    names = [
        short.get(name) or (KINDS[name].label if name in KINDS else name) for name in table.index
    ]
    stride = math.ceil(len(names) * 0.11 / side)
    return np.arange(len(names))[::stride] + 0.5, names[::stride]


@styled
def hessian_blocks(
    matrices: Mapping[str, np.ndarray], *, columns: int = 4, title: str = ""
) -> Figure:
    """Pictures of dense blocks side by side, as in figure 3 of Adam-mini (arXiv 2406.16793):
    magnitudes of the entries, each block on its own scale, whose end is written below it.

    Args:
        matrices: title -> (P, Q), as of :func:`blockspec.dense`.
    """
    if not matrices:
        raise ValueError("no matrices to draw: the mapping is empty")
    columns = min(columns, len(matrices))
    rows = math.ceil(len(matrices) / columns)
    figure = canvas(figsize=(1.85 * columns + 0.7, 2.1 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for place in axes[len(matrices) :]:
        place.set_axis_off()
    for place, (name, matrix) in zip(axes, matrices.items(), strict=False):
        picture = coarse(np.abs(matrix))
        top = float(picture.max()) or 1.0
        image = place.imshow(
            picture / top,
            cmap=COLOURS,
            norm=SymLogNorm(1e-3, vmin=0, vmax=1),
            interpolation="nearest",
        )
        place.set_title(name)
        place.set_xticks([])
        place.set_yticks([])
        place.spines[:].set_visible(True)
        place.set_xlabel(f"{matrix.shape[0]} x {matrix.shape[1]}, largest {top:.2g}", fontsize=6.5)
    bar = figure.colorbar(
        image, ax=list(axes), shrink=0.6, aspect=25, ticks=[0, 1e-3, 1e-2, 1e-1, 1]
    )
    bar.ax.set_yticklabels(["0", "0.001", "0.01", "0.1", "1"])
    bar.set_label("|entry| / largest of its block")
    bar.outline.set_visible(False)
    figure.suptitle(title)
    return figure


def coarse(matrix: np.ndarray, most: int = LARGEST_PICTURE) -> np.ndarray:
    """At most ``most`` x ``most``: the largest entry of each cell, so that thin structures stay
    visible.
    """
    for axis in (0, 1):
        size = matrix.shape[axis]
        if size > most:
            matrix = np.maximum.reduceat(
                matrix, np.unique(np.linspace(0, size, most, endpoint=False).astype(int)), axis=axis
            )
    return matrix


@styled
def landscape_line(found: Landscape) -> Figure:
    """The loss along one direction."""
    if len(found.steps) != 1:
        raise ValueError(
            f"a line needs a landscape of 1 direction, got {len(found.steps)}: draw it with "
            "landscape_surface"
        )
    figure = canvas(figsize=(4.2, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(found.steps[0], found.losses, color="#332288", marker="o", markersize=2.5)
    axes.axvline(0, color="0.7", linewidth=0.5, zorder=0)
    axes.set_xlabel(f"step along the {found.names[0]}")
    axes.set_ylabel("loss")
    return figure


@styled
def landscape_surface(found: Landscape, *, logarithmic: bool = False) -> Figure:
    """The loss in a plane: a surface, and beside it its contours; a cross marks the parameters.

    Args:
        logarithmic: Of the loss, for surfaces with steep walls.
    """
    if len(found.steps) != 2:
        raise ValueError(
            f"a surface needs a landscape of 2 directions, got {len(found.steps)}: draw it with "
            "landscape_line"
        )
    losses = np.where(np.isfinite(found.losses), found.losses, np.nan)
    if logarithmic and np.nanmin(losses) <= 0:
        raise ValueError(f"logarithmic needs positive losses, got {np.nanmin(losses):.3g}")
    heights = np.log10(losses) if logarithmic else losses
    label = "log10 of the loss" if logarithmic else "loss"
    across, along = np.meshgrid(*found.steps, indexing="ij")
    figure = canvas(figsize=(7.8, 3.2), layout="constrained")
    solid = figure.add_subplot(1, 2, 1, projection="3d")
    solid.plot_surface(
        across, along, heights, cmap="viridis", linewidth=0, rstride=1, cstride=1, antialiased=True
    )
    solid.set_zlabel(label, labelpad=0)
    solid.set_box_aspect(None, zoom=0.85)
    solid.tick_params(pad=-2)
    solid.view_init(elev=28, azim=-60)
    for axis in (solid.xaxis, solid.yaxis, solid.zaxis):
        axis.set_major_locator(MaxNLocator(4))
    flat = figure.add_subplot(1, 2, 2)
    filled = flat.contourf(across, along, heights, levels=20, cmap="viridis")
    flat.contour(across, along, heights, levels=20, colors="white", linewidths=0.3)
    flat.plot(0, 0, "x", color="white", markersize=5)
    bar = figure.colorbar(filled, ax=flat, shrink=0.9, aspect=25)
    bar.set_label(label)
    bar.outline.set_visible(False)
    for axes, pad in ((solid, -4), (flat, None)):
        axes.set_xlabel(found.names[0], labelpad=pad)
        axes.set_ylabel(found.names[1], labelpad=pad)
    return figure


@styled
def directional_waterfall(found: Directional) -> Figure:
    """What each block adds to the predicted change of the loss, and the couplings ``d_b'H_bc d_c``
    beside.

    The bars run from block to block, so that the last one ends at the prediction; the measured
    change is a line. A bar is a block's slope ``g_b'd_b`` with half of its row of the matrix: its
    own curvature and half of every coupling.
    """
    table = found.to_frame()
    labels = list(short_names(table.index).values())
    ends = table["predicted"].cumsum().to_numpy()
    starts = np.concatenate([[0.0], ends[:-1]])
    size = len(table)
    beside = found.curvature is not None
    height = min(max(0.17 * size, 2.2), 7.0)
    figure = canvas(figsize=(7.6 if beside else 4.2, height + 1.0), layout="constrained")
    axes = figure.subplots(
        1, 2 if beside else 1, squeeze=False, width_ratios=(1, 1.1)[: 1 + beside]
    )[0]
    colours = np.where(table["predicted"] > 0, "#CC6677", "#4477AA")
    axes[0].barh(np.arange(size), ends - starts, left=starts, color=colours, height=0.7)
    axes[0].axvline(0, color="0.6", linewidth=0.5)
    if found.measured is not None:
        axes[0].axvline(found.measured.value, color="black", linewidth=0.9, label="measured")
        error = found.measured.data_stderr
        if error is not None:
            reach = 2 * error
            axes[0].axvspan(
                found.measured.value - reach, found.measured.value + reach, color="0.85", zorder=0
            )
        axes[0].legend(fontsize=6.5, frameon=False)
    axes[0].set_yticks(np.arange(size), labels, fontsize=6)
    axes[0].set_ylim(size - 0.5, -0.5)
    axes[0].set_xlabel("change of the loss, added up")
    if found.curvature is not None:
        _couplings(figure, axes[1], found.curvature, labels)
    figure.suptitle(
        f"predicted {found.predicted.value:.3g}"
        + ("" if found.measured is None else f", measured {found.measured.value:.3g}")
    )
    return figure


def _couplings(figure: Figure, axes: Axes, table: pd.DataFrame, labels: Sequence[str]) -> None:
    values = table.to_numpy()
    top = float(np.abs(values).max()) or 1.0
    norm = SymLogNorm(1e-3 * top, vmin=-top, vmax=top)
    image = axes.imshow(  # its rows stand beside the bars
        values, cmap=SIGNED, norm=norm, interpolation="nearest", aspect="auto"
    )
    axes.set_xticks(np.arange(len(table)), labels, rotation=90, fontsize=5)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.7, aspect=25)
    bar.set_label("$d_b' H_{bc} d_c$ (loss)")
    bar.outline.set_visible(False)
