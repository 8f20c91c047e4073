"""Figures over training and across runs: heterogeneity, mean eigenvalues by kind of block, runs
beside each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from blockspec.figures.heatmaps import MEASURES
from blockspec.figures.page import width_of
from blockspec.figures.panels import (
    DENSITY,
    EIGENVALUE,
    Scale,
    density_axes,
    draw_line,
    label_outer,
    resolved_density,
    scale_of,
)
from blockspec.figures.stages import Labels, step_axis
from blockspec.figures.style import (
    RUN_MARKERS,
    RUNS,
    Look,
    canvas,
    eigenvalue_axis,
    looks_of,
    styled,
)
from blockspec.model.pieces import FULL
from blockspec.spectra.collection import block_diagonal, spectra_of
from blockspec.spectra.groups import compared
from blockspec.spectra.heterogeneity import js0
from blockspec.spectra.spectrum import Estimate, Spectrum
from blockspec.spectra.stages import short_labels, stage_labels

QUANTITIES = {"mean": "mean eigenvalue (loss / parameter²)", "trace": "trace (loss / parameter²)"}


@styled
def heterogeneity_over_training(table: pd.DataFrame) -> Figure:
    """Mean distance over all pairs of blocks (JS^0 at step 0) over training, a panel for each
    definition; bars are one standard error.

    Args:
        table: Columns step, definition, js0, js0_stderr, as in a run's heterogeneity.parquet;
            repeated rows count once. A column label says what stages are called whose training
            steps are not known.
    """
    rows = table.drop_duplicates(["definition", "step"]).sort_values("step")
    definitions = [definition for definition in MEASURES if definition in set(rows["definition"])]
    if not definitions:
        raise ValueError(f"the table holds none of the definitions {tuple(MEASURES)}")
    figure = canvas(figsize=(width_of(3.5 * len(definitions)), 2.5), layout="constrained")
    for axes, definition in zip(
        figure.subplots(1, len(definitions), squeeze=False)[0], definitions, strict=True
    ):
        part = rows[rows["definition"] == definition]
        _course(axes, part["step"], part["js0"], part["js0_stderr"], Look("", "", "#004488", "o"))
        axes.set_ylabel(f"mean {MEASURES[definition].label}")
        axes.set_ylim(0, None)
        step_axis(
            axes,
            part["step"].tolist(),
            width=width_of(3.5 * len(definitions)) / len(definitions) - 0.7,
            labels=stage_labels(part),
        )
    figure.suptitle("Heterogeneity: mean distance over all pairs of blocks")
    return figure


def _course(axes: Axes, steps: Any, values: Any, errors: Any, shown: Look, **line: Any) -> None:
    """A line with error bars; an unknown error has none."""
    bars = np.nan_to_num(np.asarray(errors, float))
    axes.errorbar(
        steps,
        values,
        yerr=bars if bars.any() else None,
        fmt="none",
        ecolor=shown.colour,
        elinewidth=0.8,
    )
    axes.plot(steps, values, color=shown.colour, marker=shown.marker, **line)


def kinds_over_training(table: pd.DataFrame, quantity: str = "mean") -> pd.DataFrame:
    """Trace, or mean eigenvalue (trace / parameters), of all blocks of each kind at each step, with
    its standard error.

    Returns:
        Columns step, kind, value, stderr; kind ``full`` is the block ``model``, and others are
        roles where a model has several of a kind (``decoder_cross_query``). The traces of
        different blocks are independent, so that their variances add; stderr is nan where it cannot
        be known (one probe).
    """
    if quantity not in QUANTITIES:
        raise ValueError(f"quantity is one of {tuple(QUANTITIES)}, got {quantity!r}")
    moments = table.assign(
        kind=table["role"], moment=table["node"] * table["weight"] * table["numel"]
    )
    keys = ["step", "block", "kind", "numel", "exact"]
    probes = moments.groupby([*keys, "probe"], sort=False)["moment"].sum()
    traces = probes.groupby(keys, sort=False).agg(["mean", "sem"]).reset_index()
    traces["variance"] = (traces["sem"] ** 2).where(~traces["exact"], 0.0)
    groups = traces.groupby(["step", "kind"], sort=False)
    unit = groups["numel"].sum() if quantity == "mean" else 1
    error = groups["variance"].apply(lambda variances: math.sqrt(variances.sum(skipna=False)))
    return pd.DataFrame(
        {"value": groups["mean"].sum() / unit, "stderr": error / unit}
    ).reset_index()


@styled
def trace_by_kind_over_training(table: pd.DataFrame, quantity: str = "mean") -> Figure:
    """Curvature of each kind of block over training; bars are one standard error.

    Args:
        table: The tidy table of spectra at several steps.
        quantity: ``"mean"``, the mean eigenvalue (trace / parameters), which compares kinds of any
            size; or ``"trace"``.
    """
    rows = kinds_over_training(table, quantity)
    steps = sorted(rows["step"].unique().tolist())
    last = rows[rows["step"] == steps[-1]].set_index("kind")["value"]
    drawn = looks_of(last.index)
    width = width_of(5.5)
    figure = canvas(figsize=(width, 3.4), layout="constrained")
    axes = figure.subplots()
    for kind in last.sort_values(ascending=False).index:
        part = rows[rows["kind"] == kind].sort_values("step")
        _course(
            axes, part["step"], part["value"], part["stderr"], drawn[kind], label=drawn[kind].label
        )
    _value_axis(axes, rows)
    labels = stage_labels(table)
    step_axis(axes, steps, width=width - 1.7 if width > 5 else width - 0.7, labels=labels)
    axes.set_ylabel(QUANTITIES[quantity])
    last_one = f"at the last {'stage' if labels else 'step'},"
    if width > 5:
        figure.legend(loc="outside right center", title=f"{last_one}\nlargest first")
    else:
        figure.legend(loc="outside lower center", ncols=2, title=f"{last_one} largest first")
    bars = " (bars: ± 1 standard error)" if rows["stderr"].notna().any() else ""
    figure.suptitle(f"Curvature by kind of block{bars}")
    return figure


def _value_axis(axes: Axes, rows: pd.DataFrame) -> None:
    sizes = rows["value"].abs()
    norm = float(sizes.max()) or 1.0
    linear = max(float(sizes[sizes > 0].quantile(0.1)) if (sizes > 0).any() else 1.0, norm * 1e-8)
    errors = rows["stderr"].fillna(0)
    ends = np.array(
        [min(0.0, (rows["value"] - errors).min()), max(0.0, (rows["value"] + errors).max())]
    )
    low, high = linear * np.sinh(np.arcsinh(ends / linear) + np.array([-0.4, 0.4]))
    eigenvalue_axis(axes, "y", low, high, linear, room=0.08)
    axes.axhline(0, color="0.7", linewidth=0.5, zorder=0)


@styled
def compare_runs(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Runs beside each other: heterogeneity (mean Jensen-Shannon divergence over all pairs of
    blocks) with its standard error, and the spectra of the last step, full and by kind of block,
    the runs drawn over each other.

    Args:
        tables: Run name -> tidy table of spectra.
    """
    if not 1 <= len(tables) <= len(RUNS):
        raise ValueError(
            f"between 1 and {len(RUNS)} runs can be told apart in one figure, got {len(tables)}"
        )
    looks = {name: Look(name, name, RUNS[i], RUN_MARKERS[i]) for i, name in enumerate(tables)}
    kinds = _kinds_of_last_step(tables)
    rows = math.ceil(len(kinds) / 6)
    columns = math.ceil(len(kinds) / rows)
    courses = {name: _heterogeneity_course(table) for name, table in tables.items()}
    some = any(courses.values())  # a run of a single block has none
    heights = [2.4] * some + [max(1.25 * rows + 0.6, 2.4)]  # inches; the axes' names take 2.2
    figure = canvas(figsize=(1.55 * max(columns, 3) + 0.6, sum(heights)), layout="constrained")
    places = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    upper, lower = places[0], places[-1]
    if some:
        labels = _common_labels(tables.values())
        _heterogeneity_of_runs(upper.subplots(), courses, looks, labels)
        upper.suptitle("Heterogeneity")
    _runs_legend(upper, looks)
    scale = scale_of(part for parts in kinds.values() for part in parts.values())
    axes = lower.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for place in axes.flat[len(kinds) :]:
        place.set_axis_off()
    for place, (kind, parts) in zip(axes.flat, kinds.items(), strict=False):
        _overlaid(place, parts, scale, looks)
        place.set_title(looks_of([kind])[kind].label)
    label_outer(axes)
    lower.suptitle("Spectra at the last step of each run, mixed over the blocks of a kind")
    lower.supxlabel(EIGENVALUE, fontsize=8)
    lower.supylabel(DENSITY, fontsize=8)
    return figure


DASHES: Any = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (2, 2)), (0, (8, 2)))


def _overlaid(
    axes: Axes, parts: Mapping[str, Spectrum], scale: Scale, looks: Mapping[str, Look]
) -> None:
    order = list(looks)
    for name, spectrum in parts.items():
        mean, error = resolved_density(spectrum, scale.grid, scale.linear)
        draw_line(
            axes, scale, mean, error, colour=looks[name].colour, linestyle=DASHES[order.index(name)]
        )
    density_axes(axes, scale, width=1.3)


def _kinds_of_last_step(tables: Mapping[str, pd.DataFrame]) -> dict[str, dict[str, Spectrum]]:
    """Kind (``full`` first) -> run -> mixture of the blocks of that kind."""
    found: dict[str, dict[str, Spectrum]] = {}
    for run, table in tables.items():
        spectra = spectra_of(table[table["step"] == table["step"].max()])
        for kind in looks_of(s.block.role for s in spectra.values()):
            parts = {n: s for n, s in spectra.items() if s.block.role == kind}
            found.setdefault(kind, {})[run] = block_diagonal(parts)
    return {kind: found[kind] for kind in looks_of(found)}


def _runs_legend(figure: SubFigure, looks: Mapping[str, Look]) -> None:
    lines = [
        Line2D([], [], color=look.colour, marker=look.marker, linestyle=DASHES[i], label=look.label)
        for i, look in enumerate(looks.values())
    ]
    figure.legend(handles=lines, loc="outside right upper", title="run")


def _heterogeneity_course(table: pd.DataFrame) -> dict[int, Estimate]:
    """Step -> js0; without steps that have a single block."""
    parts = table[table["kind"] != FULL]
    return {
        step: js0(compared(spectra_of(parts[parts["step"] == step])))
        for step in sorted(parts["step"].unique().tolist())
        if parts.loc[parts["step"] == step, "block"].nunique() > 1
    }


def _heterogeneity_of_runs(
    axes: Axes,
    courses: Mapping[str, Mapping[int, Estimate]],
    looks: Mapping[str, Look],
    labels: Labels,
) -> None:
    for name, course in courses.items():
        values = [estimate.value for estimate in course.values()]
        errors = [math.nan if e.stderr is None else e.stderr for e in course.values()]
        _course(axes, list(course), values, errors, looks[name], label=name)
    axes.set_ylim(0, math.log(2))
    axes.set_ylabel("mean JS divergence over pairs\n(nats; axis ends at ln 2)")
    steps = sorted({step for course in courses.values() for step in course})
    step_axis(axes, steps, width=5, labels=labels)


def _common_labels(tables: Iterable[pd.DataFrame]) -> Labels:
    """Place -> what the runs call it, each name once; empty where all training steps are known.

    Raises:
        ValueError: Some runs have training steps, and others only places in an order.
    """
    each = [short_labels(table) for table in tables]
    if any(each) and not all(each):
        raise ValueError(
            "the training steps of some of these runs are known, and others hold stages in the "
            "order in which they were given, so that there is no axis for both: name all "
            "checkpoints by their training step (step_500)"
        )
    places = sorted({place for labels in each for place in labels})
    return {
        place: " / ".join(dict.fromkeys(labels[place] for labels in each if place in labels))
        for place in places
    }
