"""Trainings and spectra below a folder that exhibits share: what is there is used, what was stopped
goes on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from blockspec.runs import cli
from blockspec.runs.factories import find_factory
from blockspec.runs.run import Resources, RunSettings, measure
from blockspec.spectra.collection import Spectra, read_table, spectra_of
from language_models.train import train as train_language
from training.command import run_command
from vision_models.train import train as train_vision

ROOT = Path(__file__).parent.parent
TRAIN = {"language_models": train_language, "vision_models": train_vision}


def device_of_training(device: str) -> str:
    """Trainers take the accelerator by themselves, or else the CPU."""
    return "auto" if device == "auto" else "cpu"


def trained(config: str, out: Path, *, stages: Sequence[float], device: str) -> Path:
    """Trains by a configuration of the repository, such as
    ``language_models/configs/embedded_bert.yaml``; returns ``out``.

    stages: fractions of training at which a checkpoint is written.
    device: auto, or else the CPU.
    """
    place = f"--training.device={device_of_training(device)}"
    changes = [
        place,
        f"--training.checkpoints={json.dumps(list(stages))}",
        "--training.tracker=none",
    ]
    package = config.split("/", maxsplit=1)[0]
    run_command(TRAIN[package], ["--config", str(ROOT / config), "--out", str(out), *changes])
    return out


def measured(config: str, checkpoints: Path, out: Path, *, device: str) -> pd.DataFrame:
    """The tidy table of the spectra of all checkpoints in a folder, by a configuration of
    ``blockspec run``.
    """
    where = ["--out", str(out), "--checkpoints", str(checkpoints / "step_*"), "--device", device]
    cli.main(["run", "--config", str(ROOT / config), *where, "--plots=false"])
    return read_table(out / "spectra.parquet")


def spectra(
    settings: RunSettings, out: Path, *, device: str, memory: str | float | None = None
) -> Spectra:
    """The spectra of one model."""
    measure(
        settings,
        find_factory(settings.model),
        out,
        resources=Resources(device=device, memory=memory),
    )
    return spectra_of(read_table(out / "spectra.parquet"))
