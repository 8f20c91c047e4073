"""At which training step a checkpoint was written: what it says itself, else what its name says
clearly.

A number somewhere in a name is no step: ``epoch=02-val_loss=0.32.ckpt``, ``gpt2-final``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

RECORDS = {"trainer_state.json": "global_step", "checkpoint.json": "step"}
"""File within a checkpoint's folder -> its field: of transformers.Trainer, and of our training."""

FIELDS = ("global_step", "iter_num", "step")
"""Fields of a checkpoint that is a file: Lightning's, nanoGPT's, and what others call it."""

READ = frozenset({".pt", ".pth", ".ckpt", ".bin", ".tar"})
WORDS = "step|steps|iter|iters|iteration|checkpoint|ckpt|update|updates"
NAMED = re.compile(rf"(?:^|[^a-z])(?:global_?)?(?:{WORDS})[ =_-]*(\d+)(?![\d.]*[a-z\d])", re.I)


def step_of(path: str) -> int | None:
    """The training step of a checkpoint; None where nothing tells it."""
    place = Path(path)
    known = _of_folder(place) if place.is_dir() else _of_file(place)
    return _of_name(place) if known is None else known


def _of_folder(folder: Path) -> int | None:
    for name, field in RECORDS.items():
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and (step := _whole(content.get(field))) is not None:
            return step
    return None


def _of_file(path: Path) -> int | None:
    """Weights stay on the disk: they are mapped, not read."""
    if path.suffix not in READ or not path.is_file():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # pickled classes, other formats: the factory's business, the name must do
        return None
    if not isinstance(content, dict):
        return None
    steps = [_whole(content.get(field)) for field in FIELDS]
    return next((step for step in steps if step is not None), None)


def _of_name(path: Path) -> int | None:
    """Of ``step_000100``, ``checkpoint-500``, ``epoch=1-step=80.ckpt``, ``000100.pt``."""
    stem = re.sub(r"(\.[a-z]\w*)+$", "", path.name)
    if stem.isdecimal():
        return int(stem)
    found = NAMED.findall(stem)
    return int(found[-1]) if found else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
