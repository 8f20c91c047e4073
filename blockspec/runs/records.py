"""The small files of a run: JSON, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path.parent} is no run's folder: it has no {path.name}"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): delete the folder and run again") from error


def write_json(content: dict[str, Any], path: Path) -> None:
    """Writes whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1, default=str) + "\n")
    partial.replace(path)
