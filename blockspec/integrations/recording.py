"""Spectra from a training loop of one's own, nanoGPT's or one under ``accelerate``: three lines, and training goes on as without.

    objective = blockspec.Objective(model, held_out_batches, blockspec.losses.next_token)
    blocks = blockspec.partition(model, include="*c_attn.weight*")
    for step in range(num_steps):
        if step in (0, 100, 1000): record("runs/mine", step, objective, blocks)

The model is the plain one: before ``torch.compile`` and ``DistributedDataParallel``, which share its parameters
(``accelerator.unwrap_model(model, keep_torch_compile=False)`` after). The folder is one of ``blockspec run``: ``blockspec plot``
and ``blockspec show`` work on it.

Mean curvature by kind of block over training, the sharpness ranking of arXiv 2502.19002, is ``blockspec plot runs/mine`` (the
figure ``trace_by_kind``) and the column ``mean`` of ``blockspec show runs/mine``.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from torch import nn

from blockspec.engine.settings import EstimateSettings
from blockspec.model.blocks import Block
from blockspec.model.differentiability import check_twice_differentiable
from blockspec.model.objective import Objective, fingerprint
from blockspec.runs.run import (
    Resources,
    append_stage,
    append_tables,
    is_first,
    measure_stage,
    open_record,
)
from blockspec.spectra.collection import Spectra

T = TypeVar("T")
WRAPPERS = {  # class names: torch's own are not importable in every build
    "DistributedDataParallel": "pass its .module",
    "DataParallel": "pass its .module",
    "OptimizedModule": "pass the model as it was before torch.compile, its ._orig_mod",
    "FullyShardedDataParallel": "measure its checkpoints with blockspec run instead",
}


def record(
    out: str | os.PathLike[str],
    step: int,
    objective: Objective,
    blocks: Sequence[Block],
    *,
    memory: int | float | str | None = None,
    columns: int | None = None,
    **settings: Any,
) -> dict[str, float]:
    """Measures the spectra of a model in training and adds them to a run's folder; a step that is there already is not
    measured again.

    Weights, gradients, optimizer, training flags and the states of all random number generators are left as they were:
    training goes on bit by bit as without. Mixed precision is off meanwhile: what is measured is the model in its parameters'
    own dtype. With several processes every one of them calls this with the same batches; they share the work, and the first
    writes.

    out: the folder: ``run.json``, ``spectra.parquet``, ``heterogeneity.parquet``.
    step: the number of updates that were made.
    memory, columns: see :func:`blockspec.estimate_spectra`.
    settings: the fields of :class:`blockspec.engine.settings.EstimateSettings`: ``num_probes=4, num_steps=40, seed=0, ...``

    Returns the step's scalars by name, for one's own tracker: the loss, ``spectrum/js0`` (mean Jensen-Shannon divergence over
    all pairs of blocks, nats), ``spectrum/largest/<kind>`` and ``spectrum/trace/<kind>``; kind ``full`` is the block ``model``.

    Raises what :func:`blockspec.estimate_spectra` raises; ValueError for a wrapped model and for a folder of other settings.
    """
    out, estimate = Path(out), EstimateSettings(**settings)
    content = _open(out, objective, blocks, estimate)
    known = _from_first({stage["step"]: stage["scalars"] for stage in content["stages"]}.get(step))
    if known is not None:
        return known
    with undisturbed(objective.model):
        spectra, entry = measure_stage(
            objective,
            blocks,
            estimate,
            step=step,
            resources=Resources(memory=memory, columns=columns),
        )
        if is_first():
            heterogeneity = append_tables(out, spectra, step=step)
            entry["scalars"] = {"spectrum/loss": entry["loss"]} | scalars(spectra, heterogeneity)
            append_stage(out, content, entry)
        return _from_first(entry.get("scalars", {}))


def check(
    out: str | os.PathLike[str],
    objective: Objective,
    blocks: Sequence[Block],
    estimate: EstimateSettings,
) -> None:
    """Raises before training what :func:`record` would raise in the middle of it; costs one gradient of one batch."""
    _open(Path(out), objective, blocks, estimate)
    with undisturbed(objective.model):
        objective.check()
        check_twice_differentiable(
            objective, [name for block in blocks for name in block.parameters]
        )


def scalars(spectra: Spectra, heterogeneity: pd.DataFrame | None) -> dict[str, float]:
    """The largest eigenvalue and the trace by kind of block, and the heterogeneity."""
    table = spectra.summary().reset_index()
    groups = table.groupby(table["kind"].where(table["block"] != "model", "full"), sort=False)
    found = {
        f"spectrum/largest/{kind}": float(value) for kind, value in groups["largest"].max().items()
    }
    found |= {
        f"spectrum/trace/{kind}": float(value) for kind, value in groups["trace"].sum().items()
    }
    if heterogeneity is not None:
        rows = heterogeneity[heterogeneity["definition"] == "jensen-shannon"]
        found["spectrum/js0"] = float(rows["js0"].iloc[0])
    return found


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Training does not notice what is done while this is open: random numbers are given back, mixed precision is off."""
    own, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002 - what others use
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with ExitStack() as stack:
        stack.callback(random.setstate, own)
        stack.callback(np.random.set_state, numbers)
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(_without_autocast(model))
        yield


@contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """Neither the autocast of a surrounding block nor the one that accelerate puts around a model's forward."""
    wrapped, plain = (vars(model).get(name) for name in ("forward", "_original_forward"))
    try:
        if wrapped is not None and plain is not None:
            model.forward = plain
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        if wrapped is not None and plain is not None:
            model.forward = wrapped


def _open(
    out: Path, objective: Objective, blocks: Sequence[Block], estimate: EstimateSettings
) -> dict[str, Any]:
    name = type(objective.model).__name__
    if name in WRAPPERS:
        raise ValueError(f"the objective's model is a {name}: {WRAPPERS[name]}")
    names = [block.name for block in blocks]
    chosen = {"number": len(names), "digest": fingerprint(names)}
    settings = {"model": name, "blocks": chosen, "estimate": asdict(estimate)}
    return open_record(settings, out, write=is_first())


def _from_first(item: T) -> T:
    """The first process's item, on all of them."""
    if not (dist.is_available() and dist.is_initialized()):
        return item
    items = [item]
    dist.broadcast_object_list(items, src=0)
    return items[0]
