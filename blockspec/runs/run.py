"""A run: the spectra of a model, or of its checkpoints along training, in a folder (run.json, spectra.parquet, ...)."""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
import torch.distributed as dist
from torch import nn

from blockspec.engine.estimate import estimate_spectra, plan_spectra
from blockspec.engine.plan import Plan
from blockspec.engine.settings import EstimateSettings, Execution
from blockspec.engine.state import clear, differences
from blockspec.model.blocks import Block, partition
from blockspec.model.objective import Objective, fingerprint
from blockspec.numerics import memory
from blockspec.runs.factories import Factory
from blockspec.runs.records import read_json, write_json
from blockspec.spectra.collection import Spectra, write_parquet
from blockspec.spectra.heterogeneity import DEFINITIONS, js0, js_distances

VERSIONED = ("blockspec", "torch", "transformers", "numpy", "scipy", "pandas")
Progress = Callable[[str, int, int], None]
Announce = Callable[[Plan, int], None]


@dataclass(frozen=True)
class BlockSettings:
    """Which blocks.

    Args:
        by: Cut by tensor, matrix, head, neuron, layer or model; or a mapping of block names to patterns.
        include: Globs on block names to keep, or one glob; all if left out.
        exclude: Globs on block names to leave out, or one.
        full: Also the full matrix, as a block named model.
    """

    by: str | dict[str, str | list[str]] = "matrix"
    include: list[str] | str | None = None
    exclude: list[str] | str | None = None
    full: bool = True

    def __post_init__(self) -> None:
        _list_patterns(self, "include", "exclude")


@dataclass(frozen=True)
class Resources(Execution):
    """What a run may take: the numbers depend on it by rounding alone.

    Args:
        device: cpu, cuda, cuda:1 ...; auto takes a GPU if there is one.
        plan: Calibrate before the first stage and say what it will cost, as blockspec plan does; run.json says how it came out.
    """

    device: str = "auto"
    plan: bool = True


@dataclass(frozen=True)
class RunSettings:
    """All that a run's numbers depend on.

    Args:
        model: A factory module:function that returns (model, batches, loss), or a Hugging Face name or folder.
        model_args: Keyword arguments of the factory.
        checkpoints: Folders or files of checkpoints, or one (globs allowed); each is given to the factory as checkpoint=.
        blocks: Which blocks.
        estimate: How well.
        batch_norm: eval (running statistics) or train (statistics of each batch).
        dtype: Convert the model to this dtype first, e.g. float64; as loaded if left out.
    """

    model: str
    model_args: dict[str, Any] = field(default_factory=dict)
    checkpoints: list[str] | str = field(default_factory=list)
    blocks: BlockSettings = field(default_factory=BlockSettings)
    estimate: EstimateSettings = field(default_factory=EstimateSettings)
    batch_norm: Literal["eval", "train"] = "eval"
    dtype: str | None = None

    def __post_init__(self) -> None:
        _list_patterns(self, "checkpoints")


def _list_patterns(settings: object, *names: str) -> None:
    """A single pattern becomes a list of one, so that records of a run compare equal."""
    for name in names:
        if isinstance(pattern := getattr(settings, name), str):
            object.__setattr__(settings, name, [pattern])


@dataclass(frozen=True)
class Stage:
    """One model to measure: a training step and the factory's keyword arguments."""

    step: int
    arguments: dict[str, Any]


def measure(
    settings: RunSettings,
    factory: Factory,
    out: str | os.PathLike[str],
    *,
    resources: Resources = Resources(),
    progress: Progress = lambda label, done, total: None,
    announce: Announce | None = None,
) -> None:
    """Does what is not done yet of a run; a stage is written when it is complete, and one under way goes on where it was killed.

    announce: is given the plan of the first stage that is measured, and the number of stages, before the work; run.json then
        says how it came out. None makes no plan.

    With several processes every one of them calls this, and the first writes; each plans as if it were alone.

    Raises ValueError for a folder that holds a run of other settings.
    """
    out = Path(out)
    first = is_first()
    record = open_record(dataclasses.asdict(settings), out, write=first)
    done = {entry["step"]: entry["checkpoint"] for entry in record["stages"]}
    planned: dict[str, Any] | None = None
    todo = stages(settings)
    for stage in todo:
        if stage.step in done:
            _check_same(stage, done[stage.step], out)
        else:
            objective, blocks = prepare(settings, stage, factory, resources.device)
            if announce is not None and planned is None:
                plan = plan_spectra(
                    objective,
                    blocks,
                    **dataclasses.asdict(settings.estimate),
                    memory=resources.memory,
                )
                announce(plan, sum(other.step not in done for other in todo))
                planned = {
                    "products": plan.products,
                    "seconds": round(plan.seconds, 2),
                    "peak": plan.peak,
                }
            with memory.watched(objective.device) as peak:
                spectra, entry = measure_stage(
                    objective,
                    blocks,
                    settings.estimate,
                    step=stage.step,
                    checkpoint=stage.arguments.get("checkpoint"),
                    state=out / "state" / f"step_{stage.step}",
                    resources=resources,
                    progress=progress,
                )
            entry |= {"peak": peak.peak, "planned": planned}
            if first:
                append_tables(out, spectra, step=stage.step)
                append_stage(out, record, entry)
                _remove_state(out / "state" / f"step_{stage.step}")


def _check_same(stage: Stage, done: str | None, out: Path) -> None:
    """A step that is done must be of the same checkpoint: without numbers in their names, steps are places in the list."""
    path = stage.arguments.get("checkpoint")
    if Path(str(path)).name != Path(str(done)).name:
        raise ValueError(
            f"step {stage.step} of {out} is that of {done!r}, and here of {path!r}: name checkpoints by their training step, "
            "or choose another --out"
        )


def _remove_state(folder: Path) -> None:
    clear(folder)
    for empty in (folder, folder.parent):
        with suppress(OSError):  # not empty, or not there
            empty.rmdir()


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def prepare(
    settings: RunSettings, stage: Stage, factory: Factory, device: str
) -> tuple[Objective, tuple[Block, ...]]:
    """The objective of one stage and its blocks, the full matrix among them if it is wanted."""
    dtype = None if settings.dtype is None else _dtype(settings.dtype)
    model, batches, loss = factory(**stage.arguments)
    if not hasattr(model, "hf_device_map"):  # a model that is spread over devices stays where it is
        model = model.to(find_device(device))
    if dtype is not None:
        model = model.to(dtype)
    objective = Objective(model, batches, loss, batch_norm=settings.batch_norm)
    return objective, choose_blocks(model, settings.blocks)


def choose_blocks(model: nn.Module, settings: BlockSettings) -> tuple[Block, ...]:
    """The blocks, the full matrix among them if it is wanted."""
    blocks = partition(model, settings.by, settings.include, settings.exclude)
    return (
        blocks + partition(model, "model") if settings.full and settings.by != "model" else blocks
    )


def _dtype(name: str) -> torch.dtype:
    allowed = ("float32", "float64", "bfloat16")
    if name not in allowed:
        raise ValueError(f"dtype is one of {allowed}, got {name!r}")
    return getattr(torch, name)


def find_device(name: str) -> str:
    """``auto`` is a GPU if there is one: that of this process, where there are several."""
    if name == "auto":
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {name!r} cannot be used ({error}); devices here: cpu, or auto"
        ) from None
    return name


def stages(settings: RunSettings) -> list[Stage]:
    """The stages in order of their step: one per checkpoint, or the model as the factory makes it as step 0."""
    if not settings.checkpoints:
        return [Stage(0, dict(settings.model_args))]
    paths = [
        path for pattern in settings.checkpoints for path in sorted(glob.glob(pattern)) or [pattern]
    ]
    if missing := [path for path in paths if not Path(path).exists()]:
        raise ValueError(f"no checkpoint at {missing[0]!r}: give files, folders or globs of them")
    steps = [step_of(path) for path in paths]
    if None in steps or len(set(steps)) < len(steps):
        steps = list(range(len(paths)))
    pairs = sorted(zip(steps, paths, strict=True), key=lambda pair: pair[0] or 0)
    return [Stage(step or 0, settings.model_args | {"checkpoint": path}) for step, path in pairs]


def step_of(path: str) -> int | None:
    """The training step in a checkpoint's name: its last whole number (``step_000100``, ``checkpoint-500``)."""
    numbers = re.findall(r"\d+", Path(path).name)
    return int(numbers[-1]) if numbers else None


def measure_stage(
    objective: Objective,
    blocks: Sequence[Block],
    estimate: EstimateSettings,
    *,
    step: int,
    checkpoint: str | None = None,
    state: Path | None = None,
    resources: Resources = Resources(),
    progress: Progress = lambda label, done, total: None,
) -> tuple[Spectra, dict[str, Any]]:
    """The spectra of one step, and its entry in run.json."""
    started = time.perf_counter()
    value = objective.value()
    spectra = estimate_spectra(
        objective,
        blocks,
        **dataclasses.asdict(estimate),
        memory=resources.memory,
        columns=resources.columns,
        state=state,
        state_every=resources.state_every,
        progress=lambda done, total: progress(f"step {step}", done, total),
    )
    entry = {
        "step": step,
        "checkpoint": checkpoint,
        "model": _describe(objective.model),
        "data": [fingerprint(batch) for batch in objective.whole_batches()],
        "loss": value,
        "cost": dataclasses.asdict(spectra.cost) if spectra.cost else None,
        "seconds": round(time.perf_counter() - started, 2),
    }
    return spectra, entry


def _describe(model: nn.Module) -> dict[str, Any]:
    sizes = [p.numel() for p in model.parameters()]
    return {
        "class": type(model).__name__,
        "parameters": sum(sizes),
        "dtype": str(next(model.parameters()).dtype),
    }


def append_stage(out: Path, record: dict[str, Any], entry: dict[str, Any]) -> None:
    """Writes into run.json that a step is complete: after its tables."""
    record["stages"].append(entry)
    record["finished"] = _now()
    write_json(record, out / "run.json")


def append_tables(out: Path, spectra: Spectra, *, step: int) -> pd.DataFrame | None:
    """Adds a step to both tables; returns its part of heterogeneity.parquet, None for a single block."""
    _join(spectra.frame(step=step), out / "spectra.parquet")
    parts = spectra.select(exclude="model")
    if len(parts) < 2:
        return None
    heterogeneity = pd.concat(
        [heterogeneity_table(parts, definition, step=step) for definition in DEFINITIONS]
    )
    _join(heterogeneity, out / "heterogeneity.parquet")
    return heterogeneity


def heterogeneity_table(spectra: Spectra, definition: str, *, step: int) -> pd.DataFrame:
    """Distances of all pairs of blocks as a tidy table, with their mean and its standard error in every row."""
    distances = js_distances(spectra, definition)
    mean = js0(spectra, definition)
    pairs = (
        distances.rename_axis("block")
        .reset_index()
        .melt("block", var_name="other", value_name="distance")
    )
    return pairs.assign(step=step, definition=definition, js0=mean.value, js0_stderr=mean.stderr)


def _join(table: pd.DataFrame, path: Path) -> None:
    """Adds a step to a table on disk, in place of what an interrupted run may have left of that step."""
    if path.exists():
        before = pd.read_parquet(path)
        table = pd.concat(
            [before[~before["step"].isin(table["step"].unique())], table], ignore_index=True
        )
    write_parquet(table, path)


def open_record(settings: Mapping[str, Any], out: Path, *, write: bool) -> dict[str, Any]:
    """The content of run.json: read where the same run was begun before, if with fewer checkpoints, else made.

    Raises ValueError for a folder that holds a run of other settings.
    """
    wanted = json.loads(json.dumps(settings))
    path = out / "run.json"
    if path.exists():
        record = read_json(path)
        if different := differences(
            record["settings"] | {"checkpoints": None}, wanted | {"checkpoints": None}
        ):
            raise ValueError(
                f"{out} holds a run of other settings ({'; '.join(different)}): choose another --out"
            )
        return record
    record = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "settings": wanted,
        "versions": {name: version(name) for name in VERSIONED}
        | {"python": platform.python_version()},
        "git_commit": git_commit(),
        "seed": settings["estimate"]["seed"],
        "machine": {
            "system": platform.platform(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "started": _now(),
        "stages": [],
    }
    if write:
        write_json(record, path)
    return record


def git_commit() -> str | None:
    """The commit of the working folder, with a + where files differ from it."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
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
