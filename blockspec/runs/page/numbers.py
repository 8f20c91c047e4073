"""A run as numbers by block and stage, read from its tables: what the page shows, and nothing else.

Every number is a property of the same :class:`blockspec.Spectrum` that ``load_spectra`` gives, so
that a number is the same wherever it is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from blockspec.figures.style import plain_names
from blockspec.model.pieces import FULL, Block
from blockspec.runs.json_files import read_json
from blockspec.spectra.collection import Spectra, read_table, spectra_of
from blockspec.spectra.heterogeneity import js_distances, without_probes
from blockspec.spectra.spectrum import Spectrum
from blockspec.spectra.stages import short_labels
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


@dataclass(frozen=True)
class Run:
    """A run as it lies on the disk.

    Attributes:
        name: The folder's name, or its path where names repeat.
        record: Content of run.json.
        stages: Step -> spectra, in the order of steps.
        blocks: Of all stages, in order; the full matrix, if it was measured, is last.
        distances: The run's heterogeneity.parquet; empty where there is none.
        labels: Step -> what a stage is called; empty where the training steps are known.
    """

    name: str
    record: dict[str, Any]
    stages: dict[int, Spectra]
    blocks: tuple[Block, ...]
    distances: pd.DataFrame
    labels: dict[int, str] = field(default_factory=dict)

    def called(self, step: int) -> str:
        """``step 1,000``, or ``stage ckpt.pt``."""
        return f"stage {self.labels[step]}" if self.labels else f"step {step:,}"

    @property
    def steps(self) -> list[int]:
        return list(self.stages)

    @property
    def last(self) -> Spectra:
        return self.stages[self.steps[-1]]

    @property
    def parts(self) -> list[Block]:
        """The blocks without the full matrix."""
        return [block for block in self.blocks if block.kind != FULL]

    @property
    def names(self) -> dict[str, str]:
        """Block -> how the page calls it."""
        short = plain_names([block.name for block in self.blocks])
        return short | {b.name: "full matrix" for b in self.blocks if b.kind == FULL}

    def entry(self, step: int) -> dict[str, Any]:
        """What run.json says of a step."""
        return next((s for s in self.record.get("stages", []) if s["step"] == step), {})


def read_run(folder: Path, name: str) -> Run:
    """Reads a run's folder.

    Raises:
        FileNotFoundError: It is no run's folder, or has no complete stage.
        ValueError: A file of it is damaged.
    """
    record = read_json(folder / "run.json")
    table = read_table(folder / "spectra.parquet")
    steps = sorted(table["step"].unique().tolist())
    stages = {step: spectra_of(table[table["step"] == step]) for step in steps}
    blocks = {name: s.block for spectra in stages.values() for name, s in spectra.items()}
    path = folder / "heterogeneity.parquet"
    distances = pd.read_parquet(path) if path.exists() else pd.DataFrame()
    in_order = sorted(blocks.values(), key=lambda block: block.kind == FULL)
    return Run(name, record, stages, tuple(in_order), distances, short_labels(table))


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


def as_json(run: Run) -> dict[str, Any]:
    """Numbers and names of a run: number -> value, error, data -> blocks x stages."""
    found = [numbers_of(spectra) for spectra in run.stages.values()]
    names = run.names

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
    return {"name": run.name, "steps": run.steps, "blocks": blocks, "numbers": numbers} | {
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
    if run.distances.empty or not 2 <= len(places) <= MOST_PAIRED:
        return None
    rows = run.distances[run.distances["definition"] == definition]
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
            maps["corrected"][at][inside], maps["errors"][at][inside] = jackknifed(spectra.parts)
    return maps


def jackknifed(spectra: Spectra) -> tuple[np.ndarray, np.ndarray]:
    """(blocks, blocks) Jensen-Shannon divergences with the bias by the noise of probes taken off,
    and their standard errors, as :func:`blockspec.js0` does it for their mean; nan where they
    cannot be known.
    """
    parts: Sequence[Spectrum] = list(spectra.values())
    values = js_distances(spectra).to_numpy()
    groups = min((part.num_probes for part in parts if not part.exact), default=0)
    if groups < 2:
        return values, np.full(values.shape, np.nan if groups else 0.0)
    left_out = np.stack(
        [
            js_distances(Spectra(without_probes(p, group, groups) for p in parts)).to_numpy()
            for group in range(groups)
        ]
    )
    corrected = groups * values - (groups - 1) * left_out.mean(0)
    return np.maximum(corrected, 0.0), math.sqrt(groups - 1) * left_out.std(0)
