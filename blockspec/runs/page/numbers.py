"""A run as numbers by block and stage, read from its tables: what the page shows, and nothing else.

Every number is a property of the same :class:`blockspec.Spectrum` that ``load_spectra`` gives, so
that a number is the same wherever it is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    """

    name: str
    record: dict[str, Any]
    stages: dict[int, Spectra]
    blocks: tuple[Block, ...]
    distances: pd.DataFrame

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
    return Run(name, record, stages, tuple(in_order), distances)


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
    return {
        "largest": (largest.value, largest.residual, largest.data_stderr),
        "smallest": (smallest.value, smallest.residual, smallest.data_stderr),
        "mean": (mean.value, mean.stderr, mean.data_stderr),
        "trace": (trace.value, trace.stderr, trace.data_stderr),
        "effective_rank": (rank, rank_error, None),
        "error": (spectrum.error, None, spectrum.data_error),
        "total": (spectrum.total_error, None, None),
    }


def as_json(run: Run) -> dict[str, Any]:
    """Numbers and names of a run: number -> value, error, data -> blocks x stages."""
    found = [numbers_of(spectra) for spectra in run.stages.values()]
    names = plain_names([block.name for block in run.blocks])

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
        "loss": [run.entry(step).get("loss") for step in run.steps]
    }


def _rounded(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{DIGITS}g}")


def distance_maps(run: Run, definition: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Distances of a definition and their standard errors (stages, blocks, blocks), nan where they
    are not known; None where the run has none, or more blocks than a map can show.
    """
    places = {block.name: place for place, block in enumerate(run.parts)}
    if run.distances.empty or not 2 <= len(places) <= MOST_PAIRED:
        return None
    rows = run.distances[run.distances["definition"] == definition]
    rows = rows[rows["block"].isin(places) & rows["other"].isin(places)]
    if rows.empty:
        return None
    shape = (len(run.stages), len(places), len(places))
    values, errors = np.full(shape, np.nan), np.full(shape, np.nan)
    for at, (step, spectra) in enumerate(run.stages.items()):
        some = rows[rows["step"] == step]
        one, other = (some[name].map(places).to_numpy() for name in ("block", "other"))
        values[at, one, other] = some["distance"]
        if definition == "jensen-shannon":
            inside = [places[name] for name in spectra if name in places]
            errors[at][np.ix_(inside, inside)] = distance_errors(spectra.parts)
    return values, errors


def distance_errors(spectra: Spectra, definition: str = "jensen-shannon") -> np.ndarray:
    """(blocks, blocks) standard errors of their distances, by the jackknife over probes; nan where
    they cannot be known, 0 between exact blocks.
    """
    parts: Sequence[Spectrum] = list(spectra.values())
    groups = min((part.num_probes for part in parts if not part.exact), default=0)
    if groups < 2:
        return np.full((len(parts), len(parts)), np.nan if groups else 0.0)
    left_out = [
        js_distances(Spectra(without_probes(p, group, groups) for p in parts), definition)
        for group in range(groups)
    ]
    return math.sqrt(groups - 1) * np.std(np.stack([t.to_numpy() for t in left_out]), axis=0)
