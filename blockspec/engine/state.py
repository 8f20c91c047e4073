"""What a killed estimate goes on from: one file per process, written whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from blockspec.engine.deflation import Deflation
from blockspec.engine.schedule import Schedule
from blockspec.engine.task import Job, Task
from blockspec.model.identity import differences
from blockspec.numerics.basis import fresh
from blockspec.numerics.content import Digest
from blockspec.numerics.files import whole_file
from blockspec.numerics.lanczos import Tridiagonal
from blockspec.numerics.ranks import Ranks
from blockspec.numerics.units import Layout, LeftOut

logger = logging.getLogger(__name__)
STATE_FILE = re.compile(
    r"\.?(state-\d+of\d+-\d+of\d+-)\d{8}(?:-unfinished)?"
    r"\.safetensors(?:\.[0-9a-f]{8}\.partial)?"
)
ROUND_FOLDER = re.compile(r"units_\d+_\d+")  # of an estimate with as much data as it needs
UNFINISHED = "-unfinished"  # behind the number of the sweep that was under way
KEPT = 2  # states of one process: another of its group may be killed between its own two

Content = tuple[dict[str, Tensor], dict[str, Any]]


@dataclass
class Keeper:
    """Saves a schedule's state every ``interval`` seconds, and restores it.

    Args:
        folder: Of the state files; None saves nothing.
        identity: What the numbers depend on, by name; a state of another identity is refused.
    """

    folder: Path | None
    interval: float
    identity: Mapping[str, Any]
    ranks: Ranks
    _last: float = field(default_factory=time.monotonic)
    _sweep: int = 0
    _saved: int = -1

    def __post_init__(self) -> None:
        """Raises ValueError for a folder that cannot be written to, before the work."""
        if self.folder is None:
            return
        path = self.folder.absolute()
        place = next(p for p in (path, *path.parents) if p.exists())
        if not place.is_dir() or not os.access(place, os.W_OK):
            why = "cannot be written to" if place.is_dir() else "is no folder"
            raise ValueError(f"state is a folder that can be written to: {place} {why}")

    def after_sweep(self, schedule: Schedule, *, stop: bool = False) -> bool:
        """Saves if it is time to: all processes of a group after the same sweep.

        Args:
            schedule: What is saved.
            stop: Whether this process was told to stop.

        Returns:
            Whether any process of the group was told to stop; then the sweep is saved.
        """
        self._sweep += 1
        if self.folder is None:
            return stop
        due = time.monotonic() - self._last >= self.interval
        due, stop = self.ranks.agreed(first=due, anyone=stop)
        if due or stop:
            self.save(schedule)
            self._last = time.monotonic()
        return stop

    def save(self, schedule: Schedule) -> None:
        """Writes this process's file, and deletes all but the newest two."""
        assert self.folder is not None
        tensors, record = _content(schedule)
        record |= {"identity": dict(self.identity), "sweep": self._sweep}
        write(self._path(self._sweep), tensors, record)
        self._saved = self._sweep
        for old in sorted(self.folder.glob(f"{self._prefix}{8 * '[0-9]'}.safetensors"))[:-KEPT]:
            old.unlink()
        for over in self.folder.glob(f"{self._prefix}*{UNFINISHED}.safetensors"):
            over.unlink()

    @property
    def unfinished(self) -> Path:
        """Where the sweep under way is saved."""
        assert self.folder is not None
        return self.folder / f"{self._prefix}{self._sweep:08d}{UNFINISHED}.safetensors"

    @property
    def begun_safely(self) -> bool:
        """Whether a killed process would come back to the beginning of the sweep under way."""
        return self._sweep in (0, self._saved)

    def save_last(self, schedule: Schedule) -> None:
        """Saves what has not been saved yet, so that all sweeps are safe until the results are."""
        if self.folder is not None and self._saved != self._sweep:
            self.save(schedule)

    def restore(self, schedule: Schedule) -> bool:
        """Goes on from the newest sound state that all processes of the group have; False where
        there is none.

        Raises:
            ValueError: On every process, if on one of them all states are damaged, or the newest
                sound one is of other settings, weights, data, blocks or code; with the difference.
        """
        if self.folder is None:
            return False
        everyone = self.ranks.all_of((self.ranks.column, self._sweeps()))
        common: dict[int, set[int]] = {}
        for column, sweeps in everyone:
            common[column] = common.get(column, sweeps) & sweeps
        mine = sorted(common[self.ranks.column], reverse=True)
        if not mine:
            self._tell_of_other_processes()
        found, problem = self._newest_sound(mine, rounds=max(map(len, common.values())))
        if problems := [told for told in self.ranks.all_of(problem) if told]:
            raise ValueError(problems[0])
        if found is None:
            return False
        _restore(schedule, *found)
        return True

    def _newest_sound(
        self, sweeps: Sequence[int], *, rounds: int
    ) -> tuple[Content | None, str | None]:
        """The newest state that is sound on all processes of the group, or what is wrong with the
        newest one.

        rounds: of messages, on every process as many: the longest list of sweeps of any group.
        """
        found, first_problem = None, None
        for attempt in range(rounds):
            content, problem = None, None
            if found is None and attempt < len(sweeps):
                content, problem = self._try(sweeps[attempt])
            told = [
                p
                for c, p in self.ranks.all_of((self.ranks.column, problem))
                if c == self.ranks.column
            ]
            first_problem = first_problem or next((p for p in told if p), None)
            if content is not None and not any(told):
                found, self._sweep = content, sweeps[attempt]
                self._saved = self._sweep
        if found is None:
            return None, first_problem
        if first_problem:
            logger.warning(f"{first_problem}; going on from an older one beside it")
        different = differences(found[1]["identity"], json.loads(json.dumps(dict(self.identity))))
        if different:
            return None, (
                f"the state in {self.folder} is of another estimate ({'; '.join(different)}): "
                "delete it, or go back to those"
            )
        return found, None

    def _try(self, sweep: int) -> tuple[Content | None, str | None]:
        try:
            return read(self._path(sweep)), None
        except ValueError as error:
            return None, str(error)

    def clear(self) -> None:
        """Removes the files of this process: the estimate is complete."""
        if self.folder is not None:
            clear(self.folder, self._prefix)

    def _sweeps(self) -> set[int]:
        """After which sweeps this process has states."""
        assert self.folder is not None
        names = [path.stem for path in self.folder.glob(f"{self._prefix}*.safetensors")]
        return {int(name[-8:]) for name in names if name[-8:].isdigit()}

    def _tell_of_other_processes(self) -> None:
        """States of another number of processes are of no use, and a user should know before hours
        of work.
        """
        assert self.folder is not None
        others = [
            path.name for path in self.folder.glob("state-*") if STATE_FILE.fullmatch(path.name)
        ]
        others = [name for name in others if not name.startswith(self._prefix)]
        if others and self.ranks.column == self.ranks.row == 0:
            columns, rows = re.findall(r"\d+of(\d+)", others[0])
            logger.warning(
                f"the state in {self.folder} is of {int(columns) * int(rows)} processes ({columns} "
                f"x {rows}), and these are "
                f"{self.ranks.columns} x {self.ranks.rows}: the estimate begins anew. Start as "
                "many processes to go on from it",
            )

    def _path(self, sweep: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{self._prefix}{sweep:08d}.safetensors"

    @property
    def _prefix(self) -> str:
        ranks = self.ranks
        return f"state-{ranks.column}of{ranks.columns}-{ranks.row}of{ranks.rows}-"


def clear(folder: Path, prefix: str = "") -> None:
    """Removes the states in a folder, and nothing else: what others put there is theirs."""
    for path in folder.glob("*"):
        if (match := STATE_FILE.fullmatch(path.name)) and match[1].startswith(prefix):
            path.unlink(missing_ok=True)
        if path.is_dir() and ROUND_FOLDER.fullmatch(path.name):
            clear(path)
            with suppress(OSError):  # not empty: what others put there is theirs
                path.rmdir()


def _content(schedule: Schedule) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    jobs = []
    for index, job in enumerate(schedule.active):
        kept, numbers = job.recurrence.state()
        tensors |= {f"{index}/{name}": tensor.cpu().contiguous() for name, tensor in kept.items()}
        if job.projections is not None:
            tensors[f"units/{index}"] = job.projections.state()
        jobs.append({"block": job.block.name, "probe": job.probe, "numbers": numbers})
    tasks = {}
    for task in schedule.tasks:
        results = {str(probe): _plain(t) for probe, t in task.tridiagonals.items()}
        entry: dict[str, Any] = {
            "next_probe": task.next_probe,
            "to_start": task.to_start,
            "results": results,
            "exact": task.exact,
        }
        if task.columns is not None and task.columns.done:
            kept, entry["columns"] = task.columns.state()
            tensors[f"columns/{task.block.name}"] = kept["columns"].contiguous()
        if task.deflation is not None:
            tensors[f"deflation/{task.block.name}"] = task.deflation.vectors.cpu()
            entry["deflation"] = {
                name: _listed(value)
                for name, value in vars(task.deflation).items()
                if name != "vectors"
            }
        tasks[task.block.name] = entry
        tensors |= _left_out(task)
    record = {"jobs": jobs, "tasks": tasks, "products": schedule.products}
    if schedule.sampling is not None and schedule.sampling.groups.layout is not None:
        record["units"] = schedule.sampling.groups.layout.ends.tolist()
    return tensors, record


def _left_out(task: Task) -> dict[str, Tensor]:
    """The quadratures of a block's finished probes without each group of data."""
    found = {
        f"left_out/{task.block.name}/{probe}": np.stack([part.nodes, part.weights])
        for probe, part in task.left_out.items()
    }
    if task.columns_left_out is not None:
        found[f"left_out/{task.block.name}/columns"] = task.columns_left_out
    return {name: torch.from_numpy(array) for name, array in found.items()}


def _restore(schedule: Schedule, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    by_name = {task.block.name: task for task in schedule.tasks}
    if (ends := record.get("units")) is not None and schedule.sampling is not None:
        schedule.sampling.groups.layout = Layout.of(np.diff(ends, prepend=0.0))
    for name, entry in record["tasks"].items():
        task = by_name[name]
        task.next_probe, task.to_start = entry["next_probe"], entry["to_start"]
        task.exact, task.running = entry["exact"], 0
        task.tridiagonals = {
            int(probe): _tridiagonal(plain) for probe, plain in entry["results"].items()
        }
        if found := entry.get("deflation"):
            arrays = {
                key: np.array(found[key])
                for key in ("values", "residuals", "left_out")
                if found[key] is not None
            }
            vectors = fresh(tensors[f"deflation/{name}"]).to(task.device)
            task.deflation = Deflation(**(found | arrays), vectors=vectors)
        if (columns := tensors.get(f"columns/{name}")) is not None:
            task.begin_columns().recurrence.restore({"columns": columns}, entry["columns"])
        _restore_left_out(task, tensors)
    for index, entry in enumerate(record["jobs"]):
        task = by_name[entry["block"]]
        probe = entry["probe"]
        job: Job = task.begin_columns() if probe is None else task.run(probe)
        task.running += probe is not None
        prefix = f"{index}/"
        kept = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        job.recurrence.restore(kept, entry["numbers"])
        if job.projections is not None:
            job.projections.restore(tensors[f"units/{index}"])
        schedule.active.append(job)
    schedule.products = record["products"]


def _restore_left_out(task: Task, tensors: Mapping[str, Tensor]) -> None:
    prefix = f"left_out/{task.block.name}/"
    for name, tensor in tensors.items():
        if name.startswith(prefix) and "/" not in (place := name.removeprefix(prefix)):
            if place == "columns":
                task.columns_left_out = tensor.numpy().copy()
            else:
                task.left_out[int(place)] = LeftOut(*tensor.numpy().copy())


def _plain(tridiagonal: Tridiagonal) -> dict[str, Any]:
    return {name: _listed(value) for name, value in asdict(tridiagonal).items()}


def _listed(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _tridiagonal(plain: dict[str, Any]) -> Tridiagonal:
    arrays = {
        name: np.array(plain[name], dtype=np.float64)
        for name in ("alphas", "betas", "beside")
        if plain[name] is not None
    }
    return Tridiagonal(**(plain | arrays))


def write(path: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """A file with a checksum."""
    text = json.dumps(record)
    metadata = {"record": text, "digest": _checksum(tensors, text)}
    with whole_file(path) as partial:
        try:
            save_file(tensors, partial, metadata=metadata)
        except SafetensorError as error:  # its own class for a full disk too
            raise OSError(str(error)) from error


def read(path: Path) -> Content:
    """What :func:`write` has written; ValueError where it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _checksum(tensors, metadata["record"]) != metadata["digest"]:
            raise ValueError("its content does not fit its checksum")
        return tensors, json.loads(metadata["record"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the state {path} is damaged ({error}): delete it") from error


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    return Digest().add({name: tensors[name] for name in sorted(tensors)}).add(text).text()
