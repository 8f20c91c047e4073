"""The stages of a run: which models it measures, and how one of them is made ready."""

from __future__ import annotations

import difflib
import glob
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from blockspec.engine.settings import EstimateSettings
from blockspec.model.blocks import Block, partition
from blockspec.model.objective import Objective
from blockspec.products.selection import opened_preconditioner
from blockspec.runs.factories import Factory
from blockspec.runs.settings import BlockSettings, RunSettings, find_device
from blockspec.runs.steps import step_of


@dataclass(frozen=True)
class Stage:
    """One model to measure: a training step and the factory's keyword arguments.

    Attributes:
        step: The training step; where it is not known, the place in the order as given.
        arguments: Keyword arguments of the factory.
        label: What it is called where its step is not known; else None.
    """

    step: int
    arguments: dict[str, Any]
    label: str | None = None

    @property
    def checkpoint(self) -> str | None:
        """The path of its checkpoint, where there is one."""
        return self.arguments.get("checkpoint")


def prepare(
    settings: RunSettings,
    stage: Stage,
    factory: Factory,
    device: str,
    weights_device: str | None = None,
) -> tuple[Objective, tuple[Block, ...]]:
    """The objective of one stage and its blocks, the full matrix among them if it is wanted."""
    dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
    if weights_device is not None:
        return _elsewhere(settings, stage, factory, device, weights_device)
    model, batches, loss = factory(**stage.arguments)
    if not hasattr(model, "hf_device_map"):  # a model that is spread over devices stays where it is
        model = model.to(find_device(device))
    if dtype is not None:
        model = model.to(dtype)
    objective = Objective(model, batches, loss, batch_norm=settings.batch_norm)
    return objective, choose_blocks(objective, settings.blocks)


def _elsewhere(
    settings: RunSettings, stage: Stage, factory: Factory, device: str, weights_device: str
) -> tuple[Objective, tuple[Block, ...]]:
    """The same, where the weights stay as the factory gives them."""
    arguments = stage.arguments | ({"mapped": True} if weights_device == "disk" else {})
    model, batches, loss = factory(**arguments)
    objective = Objective(
        model,
        batches,
        loss,
        batch_norm=settings.batch_norm,
        device=find_device(device),
        dtype=getattr(torch, settings.dtype or "float32"),
    )
    return objective, choose_blocks(objective, settings.blocks)


def with_preconditioner(
    estimate: EstimateSettings, stage: Stage, objective: Objective
) -> EstimateSettings:
    """The settings with the preconditioner itself in the place of its path.

    A path that is found within the stage's checkpoint is meant there, so that ``optimizer.pt`` is
    another file for each checkpoint.
    """
    given = estimate.precondition
    if given is None:
        return estimate
    if isinstance(given, str) and stage.checkpoint is not None:
        checkpoint = Path(stage.checkpoint)
        inside = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / given
        given = str(inside) if inside.exists() else given
    named = replace(estimate, precondition=given)
    return replace(estimate, precondition=opened_preconditioner(named, objective))


def choose_blocks(objective: Objective, settings: BlockSettings) -> tuple[Block, ...]:
    """The blocks, the full matrix among them if it is wanted; roles are found by watching the first
    batch.
    """
    chosen = {"include": settings.include, "exclude": settings.exclude, "names": settings.names}
    blocks = objective.partition(settings.by, **chosen)
    full = settings.full and settings.by != "model"
    return blocks + partition(objective.model, "model") if full else blocks


def stages(settings: RunSettings) -> list[Stage]:
    """The stages in order of their step: one per checkpoint, or the model as the factory makes it
    as step 0.

    Where a step is not known, or two checkpoints have the same one, all of them are numbered in the
    order in which they are given, and each keeps its name as a label.
    """
    if not settings.checkpoints:
        return [Stage(0, dict(settings.model_args))]
    paths = [path for pattern in settings.checkpoints for path in _paths(pattern)]
    if missing := [path for path in paths if not Path(path).exists()]:
        near = difflib.get_close_matches(missing[0], glob.glob(str(Path(missing[0]).parent / "*")))
        told = f"; paths like it: {', '.join(near)}" if near else ""
        raise ValueError(
            f"no checkpoint at {missing[0]!r}{told}: give files, folders or globs of them"
        )
    steps = [step_of(path) for path in paths]
    known = [step for step in steps if step is not None]
    if len(set(known)) == len(paths):
        pairs = sorted(zip(known, paths, strict=True))
        return [Stage(step, settings.model_args | {"checkpoint": path}) for step, path in pairs]
    labels = _labels(paths)
    return [
        Stage(place, settings.model_args | {"checkpoint": path}, label)
        for place, (path, label) in enumerate(zip(paths, labels, strict=True))
    ]


def _paths(pattern: str) -> list[str]:
    """What a pattern matches, numbers in the order of their values: ``epoch=2`` before
    ``epoch=10``.
    """

    def key(path: str) -> list[tuple[bool, int, str]]:
        parts = re.split(r"(\d+)", path)
        return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]

    return sorted(glob.glob(pattern), key=key) or [pattern]


def _labels(paths: list[str]) -> list[str]:
    """The checkpoints' names, or their paths where names repeat."""
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else paths
