"""The small files of a run: JSON, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockspec.numerics.files import whole_file


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a run.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path.parent} is no run's folder: it has no {path.name}"
        ) from None
    except ValueError as error:  # also of bytes that are no text
        raise ValueError(f"{path} is damaged ({error}): delete the folder and run again") from error


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Writes whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1, default=str) + "\n")
