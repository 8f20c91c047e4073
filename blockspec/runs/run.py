"""A run: the spectra of a model, or of its checkpoints along training, in a folder (run.json,
spectra.parquet, ...).

A stage is one model. It is done when run.json has an entry of the same step and the same content:
weights, data, blocks, and what the loss gives. Names and dates of files count for nothing. The
order of writing makes every moment a safe one to be killed
in: the state after all sweeps, then the tables, then the record, and only then is the state
    removed.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from blockspec.engine.estimate import estimate_spectra, plan_spectra
from blockspec.engine.plan import Plan
from blockspec.engine.settings import EstimateSettings
from blockspec.engine.state import clear
from blockspec.model.blocks import Block
from blockspec.model.identity import (
    MEASURED,
    Identity,
    differences,
    identity_of,
    remembered,
    same_everywhere,
)
from blockspec.model.objective import Objective
from blockspec.numerics import memory
from blockspec.numerics.content import fingerprint
from blockspec.numerics.files import only_writer
from blockspec.numerics.ranks import everywhere, from_first, is_first
from blockspec.products.selection import content_of
from blockspec.runs.factories import Factory
from blockspec.runs.record import (
    Record,
    announce_stage,
    complete_stage,
    open_record,
    write_record,
)
from blockspec.runs.settings import BlockSettings as BlockSettings
from blockspec.runs.settings import Resources, RunSettings, recorded
from blockspec.runs.stages import Stage, prepare, stages, with_preconditioner
from blockspec.runs.tables import (
    append_rows,
    check_tables,
    digests_of,
    heterogeneity_of,
    holds,
    rows_of,
)
from blockspec.spectra.collection import Spectra
from blockspec.spectra.stages import stage_label

Progress = Callable[[str, int, int], None]
Announce = Callable[[Plan, int], None]


def measure(
    settings: RunSettings,
    factory: Factory,
    out: str | os.PathLike[str],
    *,
    resources: Resources = Resources(),
    progress: Progress = lambda label, done, total: None,
    announce: Announce | None = None,
) -> None:
    """Does what is not done yet of a run; a stage under way goes on where it was killed.

    With several processes every one of them calls this. The first decides what is to be done, and
    writes; each plans as if it were alone.

    Args:
        settings: What the numbers depend on.
        factory: Makes the model, its batches and its loss.
        out: The run's folder.
        resources: What the run may take.
        progress: Called with (label, products done, products in all) after each sweep.
        announce: Is given the plan of the first stage that is measured, and the number of stages,
            before the work; run.json then says how it came out. None makes no plan.

    Raises:
        ValueError: The folder holds a run of other settings, a step of other content, or tables
            that are not this run's; or another program writes to it.
    """
    out = Path(out)
    with held(out):
        todo = from_first(lambda: stages(settings))
        record = from_first(lambda: opened(recorded(settings), out))
        run = _Run(out, record, settings, factory, resources, progress)
        done = {entry["step"]: entry for entry in record["stages"]}
        from_first(lambda: check_numbering(out, todo, record))
        for stage in todo:
            if stage.step in done:
                run.check(stage, done[stage.step])
        run.measure([stage for stage in todo if stage.step not in done], announce)


@dataclasses.dataclass(frozen=True)
class _Run:
    out: Path
    record: Record
    settings: RunSettings
    factory: Factory
    resources: Resources
    progress: Progress

    def check(self, stage: Stage, done: dict[str, Any]) -> None:
        """That a stage which is done is still of the same content."""
        *_, identity = self._ready(stage)
        from_first(lambda: check_same(self.out, identity, done, stage.checkpoint))
        _remove_state(self._state(stage))  # a run that was killed after its record has left it

    def measure(self, rest: Sequence[Stage], announce: Announce | None) -> None:
        planned: dict[str, Any] | None = None
        for number, stage in enumerate(rest):
            with remembered():
                objective, blocks, estimate, identity = self._ready(stage)
                from_first(lambda i=identity: check_data(self.out, i, self.record))  # type: ignore[misc]
                if announce is not None and number == 0:
                    planned = self._plan(objective, blocks, estimate, len(rest), announce)
                spectra, entry = self._measured(stage, objective, blocks, estimate, identity)
            entry |= {"planned": planned, "label": stage.label}
            from_first(lambda s=spectra, e=entry: self._complete(s, e))  # type: ignore[misc]
            _remove_state(self._state(stage))

    def _measured(
        self,
        stage: Stage,
        objective: Objective,
        blocks: Sequence[Block],
        estimate: EstimateSettings,
        identity: Identity,
    ) -> tuple[Spectra, dict[str, Any]]:
        with memory.watched(objective.device) as peak:
            spectra, entry = measure_stage(
                objective,
                blocks,
                estimate,
                identity,
                step=stage.step,
                checkpoint=stage.checkpoint,
                state=self._state(stage),
                resources=self.resources,
                progress=self._first_writes_the_record(stage),
            )
        return spectra, entry | {"peak": peak.peak}

    def _state(self, stage: Stage) -> Path:
        return self.out / "state" / f"step_{stage.step}"

    def _complete(self, spectra: Spectra, entry: dict[str, Any]) -> None:
        rows = heterogeneity_of(spectra, step=entry["step"])
        complete(self.out, self.record, spectra, entry, rows)

    def _ready(
        self, stage: Stage
    ) -> tuple[Objective, tuple[Block, ...], EstimateSettings, Identity]:
        """The objective of a stage, its blocks, the settings with what they name read, and the
        identity of all, which is the same on all processes.
        """
        objective, blocks = everywhere(
            lambda: prepare(
                self.settings,
                stage,
                self.factory,
                self.resources.device,
                self.resources.weights_device,
            )
        )
        estimate = with_preconditioner(self.settings.estimate, stage, objective)
        identity = everywhere(lambda: identity_of(objective, blocks, content_of(estimate)))
        same_everywhere(identity)
        return objective, blocks, estimate, identity

    def _plan(
        self,
        objective: Objective,
        blocks: Sequence[Block],
        estimate: EstimateSettings,
        number: int,
        announce: Announce,
    ) -> dict[str, Any]:
        settings = dataclasses.asdict(estimate)
        plan = plan_spectra(objective, blocks, **settings, memory=self.resources.memory)
        announce(plan, number)
        return {"products": plan.products, "seconds": round(plan.seconds, 2), "peak": plan.peak}

    def _first_writes_the_record(self, stage: Stage) -> Callable[[int, int], None]:
        """After the first sweep all that can be refused has been: from here on the folder is this
        run's.
        """

        def update(done: int, total: int) -> None:
            if is_first() and not self.record["stages"] and not (self.out / "run.json").exists():
                write_record(self.out, self.record)
            self.progress(stage.label or stage_label(stage.step), done, total)

        return update


@contextmanager
def held(out: Path) -> Iterator[None]:
    """The folder is written to by this program alone; the first process holds it for all."""
    with ExitStack() as stack:
        from_first(lambda: stack.enter_context(only_writer(out)))
        yield


def opened(settings: dict[str, Any], out: Path) -> Record:
    """The record of the stages that are complete and whose tables are there."""
    record = open_record(settings, out)
    changed = False
    if entry := record.pop("writing", None):  # it was ended between the tables and the record
        record["stages"] += [entry] if holds(out, entry["step"], entry["tables"]) else []
        changed = True
    lost, mended = check_tables(out, record["stages"])
    record["stages"] = [entry for entry in record["stages"] if entry["step"] not in lost]
    if changed or mended or lost:
        write_record(out, record)
    return record


def check_numbering(out: Path, todo: Sequence[Stage], record: Record) -> None:
    """Stages are numbered by training steps, or all of them by their order: never both ways.

    Raises:
        ValueError: With a checkpoint whose step is not known.
    """
    known = {entry.get("label") is None for entry in record["stages"]}
    unknown = [stage.checkpoint for stage in todo if stage.label is not None]
    if known == {True} and unknown:
        raise ValueError(
            f"{out} holds stages by their training step, and not every checkpoint that is asked "
            f"for has a step of its own ({', '.join(map(str, unknown[:3]))}): name them by their "
            "steps (step_500), or choose another --out"
        )
    if False in known and not unknown:
        raise ValueError(
            f"{out} holds stages in the order in which they were given, and the checkpoints that "
            "are asked for now have training steps: choose another --out"
        )


def check_same(
    out: Path, identity: Identity, done: dict[str, Any], path: str | None = None
) -> None:
    """A step that is done must be of the same content, whatever its file is called.

    Raises:
        ValueError: With what differs.
    """
    if different := differences(done["identity"], identity):
        there, here = (f" ({name})" if name else "" for name in (done["checkpoint"], path))
        raise ValueError(
            f"step {done['step']} of {out}{there} was measured of other content than is there "
            f"now{here}: "
            f"{'; '.join(different)}. Name checkpoints by their training step, or choose another "
            "--out"
        )


def check_data(out: Path, identity: Identity, record: Record) -> None:
    """All stages of a folder are of the same data: their numbers stand side by side.

    Raises:
        ValueError: With the digests of both.
    """
    for entry in record["stages"]:
        if entry["identity"]["data"] != identity["data"]:
            raise ValueError(
                f"step {entry['step']} of {out} was measured on other data (digest "
                f"{entry['identity']['data']}) than is "
                f"asked for now ({identity['data']}): choose another --out; a factory that draws "
                "data needs a seed"
            )


def measure_stage(
    objective: Objective,
    blocks: Sequence[Block],
    estimate: EstimateSettings,
    identity: Identity,
    *,
    step: int,
    checkpoint: str | None = None,
    state: Path | None = None,
    resources: Resources = Resources(),
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Spectra, dict[str, Any]]:
    """The spectra of one step, and its entry in run.json; the state is left for who writes both."""
    started = time.perf_counter()
    products = 0

    def update(done: int, total: int) -> None:
        nonlocal products
        products = done
        if progress is not None:
            progress(done, total)

    spectra = estimate_spectra(
        objective,
        blocks,
        **dataclasses.asdict(estimate),
        memory=resources.memory,
        columns=resources.columns,
        state=state,
        state_every=resources.state_every,
        keep_state=True,
        progress=update,
    )
    entry = {
        "step": step,
        "checkpoint": checkpoint,
        "identity": identity,
        "model": _describe(objective.model),
        "data": [fingerprint(batch) for batch in objective.whole_batches()],
        "loss": identity[MEASURED]["loss"],
        "cost": _cost(spectra, products),
        "seconds": round(time.perf_counter() - started, 2),
    }
    return spectra, entry


def _cost(spectra: Spectra, products: int) -> dict[str, Any] | None:
    """Of a stage: products over all batches, as a plan counts them, and over single batches."""
    if spectra.cost is None:
        return None
    counted = dataclasses.asdict(spectra.cost)
    return counted | {"products": products, "batch_products": counted["products"]}


def complete(
    out: Path,
    record: Record,
    spectra: Spectra,
    entry: dict[str, Any],
    heterogeneity: pd.DataFrame | None,
) -> None:
    """Writes the tables of a stage, then its entry.

    Args:
        out: The run's folder.
        record: Content of run.json.
        spectra: Of the stage.
        entry: Of the stage in run.json; gets the digests of its rows in the tables.
        heterogeneity: The stage's part of heterogeneity.parquet; None for a single block.
    """
    label = entry.get("label")
    rows = rows_of(spectra, heterogeneity, step=entry["step"], label=label)
    entry["tables"] = digests_of(rows)
    recorded = [stage["step"] for stage in record["stages"]]
    announce_stage(out, record, entry)
    append_rows(out, rows, recorded=recorded)
    complete_stage(out, record)


def _describe(model: nn.Module) -> dict[str, Any]:
    sizes = [p.numel() for p in model.parameters()]
    return {
        "class": type(model).__name__,
        "parameters": sum(sizes),
        "dtype": str(next(model.parameters()).dtype),
    }


def _remove_state(folder: Path) -> None:
    clear(folder)
    for empty in (folder, folder.parent):
        with suppress(OSError):  # not empty, or not there
            empty.rmdir()
