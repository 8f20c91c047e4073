"""The stages of a run: which models it measures, and how one of them is made ready."""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blockspec.model.blocks import Block, partition
from blockspec.model.objective import Objective
from blockspec.runs.factories import Factory
from blockspec.runs.settings import BlockSettings, RunSettings, find_device


@dataclass(frozen=True)
class Stage:
    """One model to measure: a training step and the factory's keyword arguments."""

    step: int
    arguments: dict[str, Any]

    @property
    def checkpoint(self) -> str | None:
        """The path of its checkpoint, where there is one."""
        return self.arguments.get("checkpoint")


def prepare(
    settings: RunSettings, stage: Stage, factory: Factory, device: str
) -> tuple[Objective, tuple[Block, ...]]:
    """The objective of one stage and its blocks, the full matrix among them if it is wanted."""
    dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
    model, batches, loss = factory(**stage.arguments)
    if not hasattr(model, "hf_device_map"):  # a model that is spread over devices stays where it is
        model = model.to(find_device(device))
    if dtype is not None:
        model = model.to(dtype)
    objective = Objective(model, batches, loss, batch_norm=settings.batch_norm)
    return objective, choose_blocks(objective, settings.blocks)


def choose_blocks(objective: Objective, settings: BlockSettings) -> tuple[Block, ...]:
    """The blocks, the full matrix among them if it is wanted; roles are found by watching the first
    batch.
    """
    blocks = objective.partition(settings.by, include=settings.include, exclude=settings.exclude)
    full = settings.full and settings.by != "model"
    return blocks + partition(objective.model, "model") if full else blocks


def stages(settings: RunSettings) -> list[Stage]:
    """The stages in order of their step: one per checkpoint, or the model as the factory makes it
    as step 0.
    """
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
    """The training step in a checkpoint's name: its last whole number (``step_000100``,
    ``checkpoint-500``).
    """
    numbers = re.findall(r"\d+", Path(path).name)
    return int(numbers[-1]) if numbers else None
