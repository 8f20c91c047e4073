"""A run as numbers by block and stage, read from its tables: what the page shows, and nothing else.

Every number is a property of the same :class:`blockspec.Spectrum` that ``load_spectra`` gives, so
that a number is the same wherever it is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from blockspec.figures.style import plain_names
from blockspec.model.pieces import FULL
from blockspec.runs.loading import Run
from blockspec.spectra.heterogeneity import corrected_distances
from blockspec.spectra.spectrum import Spectrum
from blockspec.toolbox.norms import norms

DIGITS = 5  # of a number on the page; errors are rarely below 1e-3 of it
MOST_PAIRED = 150  # blocks: maps of more cannot be read, and fill the page
Number = tuple[float | None, float | None, float | None]
"""A value, its error for the given batches, and its standard error over the sample of data."""

NUMBERS = {
    "largest": "largest eigenvalue",
    "smallest": "smallest eigenvalue",
    "mean": "mean eigenvalue",
    "trace": "trace",
    "effective_rank": "effective rank",
    "error": "error of the spectrum",
}
"""Of each block at each stage; the first is shown first."""


def names_of(run: Run) -> dict[str, str]:
    """Block -> how the page calls it."""
    short = plain_names([block.name for block in run.blocks])
    return short | {block.name: "full matrix" for block in run.blocks if block.kind == FULL}


def numbers_of(spectra: Mapping[str, Spectrum]) -> dict[str, dict[str, Number]]:
    """Block -> name of a number -> value and errors."""
    ranks = norms(spectra)[["effective_rank", "effective_rank_stderr"]].to_numpy(float)
    return {
        name: _numbers(spectrum, *map(float, rank))
        for (name, spectrum), rank in zip(spectra.items(), ranks, strict=True)
    }


def _numbers(spectrum: Spectrum, rank: float, rank_error: float) -> dict[str, Number]:
    largest, smallest = spectrum.largest, spectrum.smallest
    mean, trace = spectrum.moment(1), spectrum.trace
    error, data = spectrum.error, spectrum.data_error  # each is played through: once
    return {
        "largest": (largest.value, largest.residual, largest.data_stderr),
        "smallest": (smallest.value, smallest.residual, smallest.data_stderr),
        "mean": (mean.value, mean.stderr, mean.data_stderr),
        "trace": (trace.value, trace.stderr, trace.data_stderr),
        "effective_rank": (rank, rank_error, None),
        "error": (error, None, data),
        "total": (None if data is None else math.hypot(error, data), None, None),
    }


def as_json(run: Run, name: str) -> dict[str, Any]:
    """Numbers and names of a run: number -> value, error, data -> blocks x stages.

    Args:
        run: As it was read.
        name: How the page calls it.
    """
    found = [numbers_of(spectra) for spectra in run.stages.values()]
    names = names_of(run)

    def of(number: str, place: int) -> list[list[float | None]]:
        return [
            [_rounded(stage[b.name][number][place]) if b.name in stage else None for stage in found]
            for b in run.blocks
        ]

    parts = {"value": 0, "error": 1, "data": 2}
    numbers = {
        number: {part: of(number, place) for part, place in parts.items()}
        for number in [*NUMBERS, "total"]
    }
    blocks = [
        {"name": b.name, "short": names[b.name], "kind": b.role, "layer": b.layer}
        | {"numel": b.numel}
        for b in run.blocks
    ]
    return {"name": name, "steps": run.steps, "blocks": blocks, "numbers": numbers} | {
        "loss": [run.entry(step).get("loss") for step in run.steps],
        "called": [run.called(step) for step in run.steps],
    }


def _rounded(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{DIGITS}g}")


Maps = dict[str, np.ndarray]
"""Of distances, each (stages, blocks, blocks), nan where one is not known: ``values`` as the table
has them, ``corrected`` for the noise of probes, and their standard ``errors``.
"""


def distance_maps(run: Run, definition: str) -> Maps | None:
    """Distances of a definition; None where the run has none, or more blocks than a map can show.

    Only Jensen-Shannon divergences are corrected and have errors: the others take too long.
    """
    places = {block.name: place for place, block in enumerate(run.parts)}
    distances = run.heterogeneity
    if distances is None or not 2 <= len(places) <= MOST_PAIRED:
        return None
    rows = distances[distances["definition"] == definition]
    rows = rows[rows["block"].isin(places) & rows["other"].isin(places)]
    if rows.empty:
        return None
    shape = (len(run.stages), len(places), len(places))
    maps = {name: np.full(shape, np.nan) for name in ("values", "corrected", "errors")}
    for at, (step, spectra) in enumerate(run.stages.items()):
        some = rows[rows["step"] == step]
        one, other = (some[name].map(places).to_numpy() for name in ("block", "other"))
        maps["values"][at, one, other] = some["distance"]
        if definition == "jensen-shannon" and len(spectra.parts) > 1:
            inside = np.ix_(*2 * [[places[name] for name in spectra.parts]])
            corrected, errors = corrected_distances(spectra.parts)
            maps["corrected"][at][inside], maps["errors"][at][inside] = corrected, errors
    return maps
