"""The log of a run: one JSON object a line, every step, readable by ``pandas.read_json(path,
lines=True)``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import pandas as pd
from accelerate import Accelerator

NAME = "log.jsonl"


def read_log(out: Path | str) -> pd.DataFrame:
    """The whole lines of a log; a line that a kill cut short is left out."""
    return pd.DataFrame(_whole_lines(Path(out) / NAME))


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def _keep_before(path: Path, step: int) -> None:
    kept = [json.dumps(line) + "\n" for line in _whole_lines(path) if line["step"] < step]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)


class Log:
    """Collects the numbers of every step and writes them, to file and trackers, every ``every``
    steps.

    Reading a number waits for the device, so it is done for many steps at once.
    """

    def __init__(self, out: Path, first: int, every: int, accelerator: Accelerator) -> None:
        self.path = out / NAME
        self.first, self.every, self.accelerator = first, every, accelerator
        self.loss: float | None = None
        self._waiting: list[Mapping[str, Any]] = []
        self._file: TextIO | None = None

    def __enter__(self) -> Log:
        if self.accelerator.log_with:
            self.accelerator.init_trackers(
                self.path.parent.resolve().name
            )  # the project in W&B, a folder for TensorBoard
        if self.accelerator.is_main_process:
            _keep_before(self.path, self.first)
            self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            if exception[0] is None:
                self.flush()
        finally:
            if self._file:
                self._file.close()
            if self.accelerator.log_with:
                self.accelerator.end_training()

    def add(self, numbers: Mapping[str, Any]) -> None:
        self._waiting.append(numbers)
        if len(self._waiting) >= self.every:
            self.flush()

    def flush(self) -> None:
        """Raises FloatingPointError at the first loss that is not finite, after writing it."""
        waiting, self._waiting = self._waiting, []
        for numbers in waiting:
            line = {
                name: value if name == "step" else float(value) for name, value in numbers.items()
            }
            if self._file:
                self._file.write(json.dumps(line) + "\n")
            if self.accelerator.log_with:
                self.accelerator.log(
                    {k: v for k, v in line.items() if k != "step"}, step=line["step"]
                )
            self.loss = line.get("loss", self.loss)
            if not math.isfinite(line.get("loss", 0.0)):
                raise FloatingPointError(
                    f"the loss became {self.loss} at step {line['step']}: lower the learning rate "
                    "or clip the gradient"
                )
        if self._file:
            self._file.flush()
