"""Spectra from a training loop of one's own, nanoGPT's or one under ``accelerate``: three lines,
and training goes on as without.

    objective = blockspec.Objective(model, held_out_batches, blockspec.losses.next_token)
    blocks = blockspec.partition(model, include="*c_attn.weight*")
    for step in range(num_steps):
        if step in (0, 100, 1000): record("runs/mine", step, objective, blocks)

The model is the plain one: before ``torch.compile`` and ``DistributedDataParallel``, which share
its parameters (``accelerator.unwrap_model(model, keep_torch_compile=False)`` after). The folder is
one of ``blockspec run``: ``blockspec plot`` and ``blockspec show`` work on it.

Mean curvature by kind of block over training, the sharpness ranking of arXiv 2502.19002, is
``blockspec plot runs/mine`` (the figure ``trace_by_kind``) and the column ``mean`` of ``blockspec
show runs/mine``.
"""

from __future__ import annotations

import logging
import math
import operator
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import torch.distributed as dist

from blockspec.engine.settings import EstimateSettings
from blockspec.model.blocks import Block
from blockspec.model.identity import (
    Identity,
    differences,
    identity_of,
    remembered,
    same_everywhere,
)
from blockspec.model.objective import Objective
from blockspec.model.training import refuse_wrapped, undisturbed
from blockspec.numerics.content import fingerprint
from blockspec.numerics.ranks import Ranks, everywhere, from_first
from blockspec.products.preconditioning.preconditioner import Preconditioner
from blockspec.products.selection import content_of, open_operator
from blockspec.runs.record import Record
from blockspec.runs.run import check_data, check_same, complete, held, measure_stage, opened
from blockspec.runs.settings import Resources, recorded
from blockspec.runs.tables import heterogeneity_of
from blockspec.spectra.collection import Spectra

logger = logging.getLogger(__name__)
PATIENCE = 120.0  # seconds in which all processes have to come: they may be a training step apart


def record(
    out: str | os.PathLike[str],
    step: int,
    objective: Objective,
    blocks: Sequence[Block],
    *,
    memory: int | float | str | None = None,
    columns: int | None = None,
    replace: bool = False,
    training: Mapping[str, Any] | None = None,
    **settings: Any,
) -> dict[str, float]:
    """Measures the spectra of a model in training and adds them to a run's folder; a step that is
    there already, of the same weights, data and blocks, is not measured again.

    Weights, gradients, optimizer, training flags and the states of all random number generators are
    left as they were: training goes on bit by bit as without. Mixed precision is off meanwhile:
    what is measured is the model in its parameters' own dtype. With several processes every one of
    them calls this with the same batches; they share the work, and the first writes.

    Args:
        out: The folder: ``run.json``, ``spectra.parquet``, ``heterogeneity.parquet``.
        step: The number of updates that were made.
        memory, columns: See :func:`blockspec.estimate_spectra`.
        replace: Measure anew, with a warning, a step that the folder has of other weights; else it
            is refused.
        training: What the training is made of, for the record.
        settings: The fields of :class:`blockspec.engine.settings.EstimateSettings`: ``num_probes=4,
            num_steps=40, seed=0, ...``.

    Returns:
        The step's scalars by name, for one's own tracker: the loss, ``spectrum/js0`` (mean
        Jensen-Shannon divergence over all pairs of blocks, nats), ``spectrum/largest/<kind>`` and
        ``spectrum/trace/<kind>``; kind ``full`` is the block ``model``. Their errors stand beside
        them where they are known: ``spectrum/js0_stderr``, ``spectrum/largest_residual/<kind>``,
        ``spectrum/trace_stderr/<kind>``. Kinds are told apart where
        a model has several of them: ``decoder_cross_query``, ``query_adapter``.

    Raises:
        what: :func:`blockspec.estimate_spectra` raises; ValueError for a wrapped model, a folder of
            other settings, and a step that the folder has of other weights or data: each training
            needs a folder of its own.
    """
    if isinstance(given := settings.get("precondition"), Preconditioner):
        settings["precondition"] = given.renewed()
    out, estimate = Path(out), EstimateSettings(**settings)
    resources = Resources(memory=memory, columns=columns)
    step = _updates(step)
    refuse_wrapped(objective.model)
    wait_for_all(f"record of step {step}")
    with undisturbed(objective.model), held(out), remembered():
        content = from_first(lambda: _opened(out, objective, blocks, estimate))
        content.setdefault("training", training)
        identity = everywhere(lambda: identity_of(objective, blocks, content_of(estimate)))
        same_everywhere(identity)
        known = from_first(lambda: _known(out, content, step, identity, replace=replace))
        if known is not None:
            return known
        spectra, entry = measure_stage(
            objective, blocks, estimate, identity, step=step, resources=resources
        )
        return from_first(lambda: _completed(out, content, spectra, entry))


def _updates(step: int) -> int:
    """The step, if it is one: tables of several stages are in its order."""
    try:
        number = -1 if isinstance(step, bool) else operator.index(step)
    except TypeError:
        raise TypeError(f"step is the number of updates so far, got {step!r}") from None
    if number < 0:
        raise ValueError(f"step is the number of updates so far, at least 0, got {step!r}")
    return number


def _known(
    out: Path, content: Record, step: int, identity: Identity, *, replace: bool
) -> dict[str, float] | None:
    """The scalars of a step that was measured before, of the same content; None where it was
    not.
    """
    check_data(out, identity, content)
    done = {stage["step"]: stage for stage in content["stages"]}.get(step)
    if done is None:
        return None
    try:
        check_same(out, identity, done)
    except ValueError as error:
        if not replace:
            raise
        logger.warning(f"measured anew, because {error}")
        return None
    return done["scalars"]


def _completed(
    out: Path, content: Record, spectra: Spectra, entry: dict[str, Any]
) -> dict[str, float]:
    rows = heterogeneity_of(spectra, step=entry["step"])
    entry["scalars"] = {"spectrum/loss": entry["loss"]} | scalars(spectra, rows)
    complete(out, content, spectra, entry, rows)
    return entry["scalars"]


def check(
    out: str | os.PathLike[str],
    objective: Objective,
    blocks: Sequence[Block],
    estimate: EstimateSettings,
    *,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Raises before training what :func:`record` would raise in the middle of it; costs a few
    gradients of one batch.

    Args:
        training: What a training that begins is made of; a folder that holds the record of another
            one is refused.
    """
    out = Path(out)
    refuse_wrapped(objective.model)
    wait_for_all("check before training")
    with undisturbed(objective.model), held(out):
        content = from_first(lambda: _opened(out, objective, blocks, estimate))
        if training is not None and content["stages"]:
            from_first(lambda: _check_training(out, content, training))
        open_operator(objective, blocks, estimate, ranks=Ranks(), precision=estimate.precision)


def _check_training(out: Path, content: Record, training: Mapping[str, Any]) -> None:
    steps = [stage["step"] for stage in content["stages"]]
    if different := differences(content.get("training") or {}, training):
        raise ValueError(
            f"a training begins at step 0, and {out} holds the record of another one (steps "
            f"{steps[:5]}; "
            f"{'; '.join(different)}): give each training a folder of its own"
        )


def scalars(spectra: Spectra, heterogeneity: pd.DataFrame | None) -> dict[str, float]:
    """The largest eigenvalue and the trace by role of block, and the heterogeneity, each with its
    error where that is known (one probe has no standard error).
    """
    table = spectra.summary().reset_index()
    roles = [spectrum.block.role for spectrum in spectra.values()]
    groups = table.groupby(pd.Series(roles), sort=False)
    found = {
        f"spectrum/largest/{kind}": float(value) for kind, value in groups["largest"].max().items()
    }
    found |= {
        f"spectrum/trace/{kind}": float(value) for kind, value in groups["trace"].sum().items()
    }
    for kind, rows in groups:
        at = int(rows["largest"].to_numpy().argmax())
        found[f"spectrum/largest_residual/{kind}"] = float(rows["residual"].to_numpy()[at])
        squares = rows["trace_stderr"].astype(float) ** 2
        found[f"spectrum/trace_stderr/{kind}"] = math.sqrt(squares.sum(skipna=False))
    if heterogeneity is not None:
        first = heterogeneity[heterogeneity["definition"] == "jensen-shannon"].iloc[0]
        stderr = first["js0_stderr"]
        found["spectrum/js0"] = float(first["js0"])
        found["spectrum/js0_stderr"] = math.nan if stderr is None else float(stderr)
    return {name: value for name, value in found.items() if not math.isnan(value)}


_met: Counter[str] = Counter()


def wait_for_all(what: str, patience: float = PATIENCE) -> None:
    """Waits until every process has come here.

    Raises:
        ValueError: Some have not: ``if rank == 0: record(...)`` would wait for them without an end.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    rank, world = dist.get_rank(), dist.get_world_size()
    _met[what] += 1
    store = dist.distributed_c10d._get_default_store()
    key = f"blockspec/{what}/{_met[what]}"
    store.set(f"{key}/{rank}", "here")
    try:
        store.wait([f"{key}/{other}" for other in range(world)], timedelta(seconds=patience))
    except RuntimeError:  # DistStoreError is one
        absent = [other for other in range(world) if not store.check([f"{key}/{other}"])]
        raise ValueError(
            f"{what}: process {rank} has waited {patience:g} s for the processes {absent} of "
            f"{world}, which have not called it. Every process calls it, with the same batches; "
            "they share the work, and the first one writes: do not put it under if rank == 0"
        ) from None


def _opened(
    out: Path,
    objective: Objective,
    blocks: Sequence[Block],
    estimate: EstimateSettings,
) -> Record:
    names = [block.name for block in blocks]
    chosen = {"number": len(names), "digest": fingerprint(names)}
    settings = {
        "model": type(objective.model).__name__,
        "blocks": chosen,
        "estimate": recorded(estimate),
    }
    return opened(settings, out)
