"""A run's folder read back: ``blockspec.load_run("runs/gpt2")``."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from blockspec.model.pieces import FULL, Block
from blockspec.runs.json_files import read_json
from blockspec.spectra.collection import TABLE, Spectra, read_table, spectra_of
from blockspec.spectra.stages import short_labels


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

    @cached_property
    def steps(self) -> list[int]:
        """The steps that were measured, in ascending order."""
        return sorted(self.table["step"].unique().tolist())

    @cached_property
    def stages(self) -> dict[int, Spectra]:
        """Step -> spectra, in ascending order."""
        return {step: spectra_of(self.table[self.table["step"] == step]) for step in self.steps}

    def __getitem__(self, step: int) -> Spectra:
        if step not in self.steps:
            raise KeyError(f"{self.folder} has no step {step}; it has {self.steps}")
        return self.stages[step]

    @property
    def last(self) -> Spectra:
        """The spectra of the last step."""
        return self[self.steps[-1]]

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of all steps, in order; the full matrix, where it was measured, is last."""
        found = {name: s.block for spectra in self.stages.values() for name, s in spectra.items()}
        return tuple(sorted(found.values(), key=lambda block: block.kind == FULL))

    @property
    def parts(self) -> tuple[Block, ...]:
        """The blocks without the full matrix."""
        return tuple(block for block in self.blocks if block.kind != FULL)

    @cached_property
    def labels(self) -> dict[int, str]:
        """Step -> what a stage is called; empty where the training steps are known."""
        return short_labels(self.table)

    def called(self, step: int) -> str:
        """``step 1,000``, or ``stage ckpt.pt``."""
        return f"stage {self.labels[step]}" if self.labels else f"step {step:,}"

    def entry(self, step: int) -> dict[str, Any]:
        """What run.json says of a step: loss, model, data, cost; empty where it says nothing."""
        return next((s for s in self.record.get("stages", []) if s["step"] == step), {})

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
