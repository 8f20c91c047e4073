"""run.json: what was run, and which stages are complete.

A stage is announced before its rows are written to the tables, and entered when they are on the
disk. What the record says, it says with digests: of the weights, data and blocks that were
measured, and of the rows in the tables. So other content under the same name is noticed, and so are
rows that are another run's.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from blockspec import __version__
from blockspec.model.identity import differences
from blockspec.numerics.files import remove_partials
from blockspec.runs.json_files import read_json, write_json

VERSIONED = ("torch", "transformers", "numpy", "scipy", "pandas")
WRITTEN = re.compile(r"run\.json|spectra\.parquet|heterogeneity\.parquet")

Record = dict[str, Any]


def open_record(settings: Mapping[str, Any], out: Path) -> Record:
    """The content of run.json where the same run was begun before, if with fewer checkpoints; else
    a new one, not yet written.

    A record without any complete stage binds nobody: other settings take its place. Only for who
        alone writes to the folder.

    Raises:
        ValueError: The folder holds a run of other settings, or tables without a record.
    """
    remove_partials(out, WRITTEN)
    wanted = json.loads(json.dumps(settings))
    if (out / "run.json").exists():
        record = read_json(out / "run.json")
        if different := differences(
            record["settings"] | {"checkpoints": None}, wanted | {"checkpoints": None}
        ):
            if record["stages"]:
                raise ValueError(
                    f"{out} holds a run of other settings ({'; '.join(different)}): choose another "
                    "--out"
                )
            return _new(wanted)
        return record
    if tables := [path.name for path in out.glob("*.parquet") if WRITTEN.fullmatch(path.name)]:
        raise ValueError(
            f"{out} holds {tables[0]}, but no run.json that says of what: move it away, or choose "
            "another --out"
        )
    return _new(wanted)


def _new(settings: dict[str, Any]) -> Record:
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "settings": settings,
        **_made_by(),
        "seed": settings["estimate"]["seed"],
        "machine": {
            "system": platform.platform(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "started": _now(),
        "stages": [],
    }


def _made_by() -> dict[str, Any]:
    made_by = versions() | {"python": platform.python_version()}
    return {"versions": made_by, "git_commit": git_commit()}


def versions() -> dict[str, str]:
    """Of this package, installed or a checkout on the path, and of those that numbers depend on."""
    return {"blockspec": __version__} | {name: version(name) for name in VERSIONED}


def announce_stage(out: Path, record: Record, entry: dict[str, Any]) -> None:
    """Writes into run.json which stage the tables get next, so that its rows are known if the
    writing is cut short.
    """
    record["writing"] = entry | _made_by()
    write_record(out, record)


def complete_stage(out: Path, record: Record) -> None:
    """Writes into run.json that the announced stage is complete: after its tables."""
    entry = record.pop("writing")
    record["stages"] = [s for s in record["stages"] if s["step"] != entry["step"]] + [entry]
    record["finished"] = _now()
    write_record(out, record)


def write_record(out: Path, record: Record) -> None:
    """Writes run.json."""
    write_json(record, out / "run.json")


def git_commit() -> str | None:
    """The commit of the working folder.

    Whether files differ from it is not said: git would run the programs that the folder's own
    configuration names to find out, and the folder may be anybody's.
    """
    try:
        run = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
