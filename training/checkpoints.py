"""Checkpoints at stated fractions of training: folders that are whole or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_model
from torch import nn

RECORD = "checkpoint.json"

Save = Callable[[nn.Module, Path], None]


def due_steps(fractions: Iterable[float], num_steps: int) -> dict[int, float]:
    """Steps at which a checkpoint is due, with their fractions; only fraction 0 gives step 0."""
    fractions = sorted(fractions)
    if fractions and not 0 <= fractions[0] <= fractions[-1] <= 1:
        raise ValueError(
            f"checkpoint fractions {fractions} must lie between 0 and 1 (1 is the end of training)"
        )
    return {max(round(fraction * num_steps), int(fraction > 0)): fraction for fraction in fractions}


def save_weights(model: nn.Module, folder: Path) -> None:
    """The weights of any module; tied tensors once."""
    save_model(model, str(folder / "model.safetensors"))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fills a new folder under another name, then gives it its own: a kill leaves the old one, or
    none.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def write_checkpoint(
    out: Path, model: nn.Module, *, step: int, record: Mapping[str, Any], save: Save
) -> Path:
    """Writes ``<out>/step_<step>/``: what ``save`` puts there, and the record as JSON."""
    folder = out / f"step_{step:06d}"

    def fill(partial: Path) -> None:
        save(model, partial)
        write_json(partial / RECORD, {"step": step, **record})

    replace_folder(folder, fill)
    return folder


def list_checkpoints(out: Path) -> list[Path]:
    """The whole checkpoints of a run, first step first."""
    return sorted(
        path.parent
        for path in Path(out).glob(f"step_*/{RECORD}")
        if not path.parent.name.endswith(".partial")
    )


def last_checkpoint(out: Path) -> Path | None:
    return max(list_checkpoints(out), default=None)


def read_record(checkpoint: Path | str) -> dict[str, Any]:
    path = Path(checkpoint) / RECORD
    if not path.is_file():
        raise FileNotFoundError(
            f"{checkpoint} has no {RECORD}: it is no checkpoint of this trainer, or an unfinished "
            "one"
        )
    return json.loads(path.read_text(encoding="utf-8"))
