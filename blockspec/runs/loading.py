"""A run's folder read back: ``blockspec.load_run("runs/gpt2")``."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from blockspec.runs.json_files import read_json
from blockspec.spectra.collection import TABLE, Spectra, read_table, spectra_of


@dataclass(frozen=True)
class Run:
    """What a run left: ``run[step]`` are the spectra of a step, ``run.last`` those of the last one.

    Attributes:
        folder: Where it lies.
        record: The content of run.json: settings, model, data, versions, stages.
        table: The content of spectra.parquet, a row a node.
    """

    folder: Path
    record: dict[str, Any] = field(repr=False)
    table: pd.DataFrame = field(repr=False)

    @property
    def steps(self) -> list[int]:
        """The steps that were measured, in ascending order."""
        return sorted(self.table["step"].unique().tolist())

    def __getitem__(self, step: int) -> Spectra:
        if step not in self.steps:
            raise KeyError(f"{self.folder} has no step {step}; it has {self.steps}")
        return spectra_of(self.table[self.table["step"] == step])

    @cached_property
    def last(self) -> Spectra:
        """The spectra of the last step."""
        return self[self.steps[-1]]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the run."""
        return self.record["settings"]

    @cached_property
    def heterogeneity(self) -> pd.DataFrame | None:
        """The content of heterogeneity.parquet; None for a run of a single block."""
        path = self.folder / "heterogeneity.parquet"
        return pd.read_parquet(path) if path.exists() else None

    def __repr__(self) -> str:
        model = self.settings.get("model", "a model")
        return f"Run of {model} in {self.folder}: steps {self.steps}, {self.last!r}"


def load_run(folder: str | os.PathLike[str]) -> Run:
    """A run's folder, as ``blockspec run`` or a plug-in has left it; needs no model.

    Raises:
        FileNotFoundError: It is no run's folder.
        ValueError: A file of it is damaged.
    """
    place = Path(folder)
    return Run(place, read_json(place / "run.json"), read_table(place / TABLE))
