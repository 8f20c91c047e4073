"""What a killed estimate goes on from: one file per process, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from blockspec.engine.deflation import Deflation
from blockspec.engine.schedule import Job, Schedule
from blockspec.model.objective import Objective, fingerprint
from blockspec.numerics.basis import fresh
from blockspec.numerics.lanczos import Tridiagonal
from blockspec.numerics.ranks import Ranks

STATE_FILE = re.compile(r"state-\d+of\d+-\d+of\d+-\d{8}\.(safetensors|\d+\.partial)")


@dataclass
class Keeper:
    """Saves a schedule's state every ``interval`` seconds, and restores it.

    folder: of the state files; None saves nothing.
    identity: what the numbers depend on, by name; a state of another identity is refused.
    """

    folder: Path | None
    interval: float
    identity: Mapping[str, Any]
    ranks: Ranks
    _last: float = field(default_factory=time.monotonic)
    _sweep: int = 0

    def after_sweep(self, schedule: Schedule) -> None:
        """Saves if it is time to: all processes of a column after the same sweep."""
        self._sweep += 1
        if self.folder is None or not self.ranks.first_of_column(
            time.monotonic() - self._last >= self.interval
        ):
            return
        self.save(schedule)
        self._last = time.monotonic()

    def save(self, schedule: Schedule) -> None:
        """Writes this process's file and deletes all but the two newest: the column's processes may be killed between theirs."""
        assert self.folder is not None
        tensors, record = _content(schedule)
        record |= {"identity": dict(self.identity), "sweep": self._sweep}
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self._prefix}{self._sweep:08d}.safetensors"
        partial = path.with_suffix(f".{os.getpid()}.partial")
        save_file(tensors, partial, metadata={"record": json.dumps(record)})
        partial.replace(path)
        for old in sorted(self.folder.glob(f"{self._prefix}*.safetensors"))[:-2]:
            old.unlink()

    def restore(self, schedule: Schedule) -> bool:
        """Goes on from the newest state that all processes of the column have; False where there is none.

        Raises ValueError for a damaged file, and for a state of other settings, weights or data, with the difference.
        """
        if self.folder is None:
            return False
        own = {
            int(m[1])
            for p in self.folder.glob(f"{self._prefix}*")
            if (m := re.search(r"(\d{8})\.safetensors$", p.name))
        }
        everyone = self.ranks.all_of((self.ranks.column, own))
        common = set.intersection(
            *(sweeps for column, sweeps in everyone if column == self.ranks.column)
        )
        if not common:
            return False
        self._sweep = max(common)
        tensors, record = _read(self.folder / f"{self._prefix}{self._sweep:08d}.safetensors")
        if different := differences(
            record["identity"], json.loads(json.dumps(dict(self.identity)))
        ):
            raise ValueError(
                f"the state in {self.folder} is of another estimate ({'; '.join(different)}): delete it, or go back to those"
            )
        _restore(schedule, tensors, record)
        return True

    def clear(self) -> None:
        """Removes the files of this process: the estimate is complete."""
        if self.folder is not None:
            clear(self.folder, self._prefix)

    @property
    def _prefix(self) -> str:
        ranks = self.ranks
        return f"state-{ranks.column}of{ranks.columns}-{ranks.row}of{ranks.rows}-"


def clear(folder: Path, prefix: str = "") -> None:
    """Removes the states in a folder, and nothing else: what others put there is theirs."""
    for path in folder.glob("state-*"):
        if path.name.startswith(prefix) and STATE_FILE.fullmatch(path.name):
            path.unlink(missing_ok=True)


def identity_of(objective: Objective, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the numbers of an estimate depend on: settings, weights and data."""
    weights = hashlib.sha256()
    for name, tensor in objective.model.state_dict().items():
        weights.update(f"{name}{fingerprint(tensor)}".encode())
    data = hashlib.sha256(
        "".join(fingerprint(batch) for batch in objective.whole_batches()).encode()
    )
    return dict(settings) | {"weights": weights.hexdigest()[:16], "data": data.hexdigest()[:16]}


def _content(schedule: Schedule) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    jobs = []
    for index, job in enumerate(schedule.active):
        kept, numbers = job.process.state()
        tensors |= {f"{index}/{name}": tensor.cpu().contiguous() for name, tensor in kept.items()}
        jobs.append({"block": job.block.name, "probe": job.probe, "numbers": numbers})
    tasks = {}
    for task in schedule.tasks:
        results = {str(probe): _plain(t) for probe, t in task.tridiagonals.items()}
        if task.columns is not None and task.columns.done:
            tensors[f"columns/{task.block.name}"] = task.columns.state()[0]["columns"].contiguous()
        entry = {
            "wanted": task.wanted,
            "started": task.started,
            "results": results,
            "exact": task.exact,
        }
        if task.deflation is not None:
            tensors[f"deflation/{task.block.name}"] = task.deflation.vectors.cpu()
            entry["deflation"] = {
                name: _listed(value)
                for name, value in vars(task.deflation).items()
                if name != "vectors"
            }
        tasks[task.block.name] = entry
    return tensors, {"jobs": jobs, "tasks": tasks, "products": schedule.products}


def _restore(schedule: Schedule, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    by_name = {task.block.name: task for task in schedule.tasks}
    for name, entry in record["tasks"].items():
        task = by_name[name]
        task.wanted, task.started, task.exact = entry["wanted"], entry["started"], entry["exact"]
        task.tridiagonals = {
            int(probe): _tridiagonal(plain) for probe, plain in entry["results"].items()
        }
        if found := entry.get("deflation"):
            arrays = {key: np.array(found[key]) for key in ("values", "residuals")}
            vectors = fresh(tensors[f"deflation/{name}"]).to(task.device)
            task.deflation = Deflation(**(found | arrays), vectors=vectors)
        if (columns := tensors.get(f"columns/{name}")) is not None:
            task.begin_columns().process.restore({"columns": columns}, {})
    for index, entry in enumerate(record["jobs"]):
        task = by_name[entry["block"]]
        job: Job = task.begin_columns() if entry["probe"] < 0 else task.lanczos(entry["probe"])
        prefix = f"{index}/"
        kept = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        job.process.restore(kept, entry["numbers"])
        schedule.active.append(job)
    schedule.products = record["products"]


def _plain(tridiagonal: Tridiagonal) -> dict[str, Any]:
    return {name: _listed(value) for name, value in asdict(tridiagonal).items()}


def _listed(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _tridiagonal(plain: dict[str, Any]) -> Tridiagonal:
    arrays = {name: np.array(plain[name], dtype=np.float64) for name in ("alphas", "betas")}
    return Tridiagonal(**(plain | arrays))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            record = json.loads(file.metadata()["record"])
            return {name: file.get_tensor(name) for name in file.keys()}, record  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the state {path} is damaged ({error}): delete it; an older one beside it is then taken"
        ) from error


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """In words, the settings in which what lies in a folder differs from what is asked; nested ones by their path."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        there, here = old.get(key), new.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            lines += differences(there, here, f"{prefix}{key}.")
        elif there != here:
            lines.append(f"{prefix}{key} is {there!r} there, {here!r} here")
    return lines
