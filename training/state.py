"""What a killed run goes on from: weights, optimizer and random numbers, written whole or not at
all.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from training.checkpoints import write_json

SETTINGS = "settings.json"
# not `state`, where the spectra of `blockspec run` into the same folder keep theirs
STATE = "training_state"
COMPLETE = "complete"  # an empty file


def as_json(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content as reading it back would give it: tuples are lists."""
    return json.loads(json.dumps(content))


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """The settings that differ, as ``training.lr: 0.1 -> 0.2``."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(name for name in new if name not in old)]
        return [
            line
            for n in names
            for line in differences(old.get(n), new.get(n), f"{path}.{n}" if path else n)
        ]
    return [] if old == new else [f"{path}: {old} -> {new}"]


def begin(out: Path, settings: Mapping[str, Any], accelerator: Accelerator) -> None:
    """Writes the run's settings, or refuses a folder that holds a run of others."""
    path = out / SETTINGS
    if path.is_file():
        changed = differences(json.loads(path.read_text(encoding="utf-8")), as_json(settings))
        if changed:
            raise ValueError(
                f"{out} holds a run of other settings ({'; '.join(changed)}): choose another "
                "folder or delete it"
            )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
    accelerator.wait_for_everyone()


def is_complete(out: Path) -> bool:
    return (out / COMPLETE).is_file()


def finish(out: Path, accelerator: Accelerator) -> None:
    """Marks the run as complete and removes the state that nobody will go on from."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (out / COMPLETE).touch()
        for state in (out / STATE).glob("step_[0-9]*"):  # partial ones too
            shutil.rmtree(state)
        with suppress(OSError):  # not empty, or not there
            (out / STATE).rmdir()
    accelerator.wait_for_everyone()


def _states(out: Path) -> list[Path]:
    return sorted((out / STATE).glob("step_[0-9]*[0-9]"))


def latest_state(out: Path, accelerator: Accelerator) -> int:
    """Loads the latest state of the run, if there is one, and returns its step, otherwise 0."""
    states = _states(out)
    if not states:
        return 0
    accelerator.load_state(str(states[-1]))
    return int(states[-1].name.removeprefix("step_"))


def save_state(out: Path, step: int, accelerator: Accelerator) -> None:
    """Writes the state at ``step`` and removes the older ones."""
    folder = out / STATE / f"step_{step:08d}"
    partial = folder.with_name(folder.name + ".partial")
    older = _states(out)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    with _without_warnings_of_tied_weights():
        accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        partial.rename(folder)
        for state in older:
            shutil.rmtree(state)
    accelerator.wait_for_everyone()


@contextmanager
def _without_warnings_of_tied_weights() -> Iterator[None]:
    """safetensors stores a tied tensor once, which load_state knows; accelerate warns of it at
    every state.
    """
    logger = logging.getLogger("accelerate.utils.other")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
