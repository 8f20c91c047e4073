"""Spectra of blocks: the engine's front door."""

from __future__ import annotations

import math
import os
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from blockspec.engine.accuracy import Accuracy
from blockspec.engine.enough import (
    ESTIMATES_SHARE,
    Foreseen,
    check_objective,
    foreseen,
    with_enough_data,
)
from blockspec.engine.interrupts import SAVED, held_back
from blockspec.engine.plan import Plan, agree, check_possible, fit, plan
from blockspec.engine.results import spectrum_of
from blockspec.engine.sampling import Sampling
from blockspec.engine.schedule import Schedule, deal
from blockspec.engine.settings import EstimateSettings, Execution
from blockspec.engine.state import Keeper, clear
from blockspec.engine.task import Probing, Task
from blockspec.engine.unfinished import hooks
from blockspec.model.blocks import Block
from blockspec.model.identity import identity_of, same_everywhere
from blockspec.model.objective import Objective
from blockspec.model.patching import patched
from blockspec.numerics.algorithms import Progress
from blockspec.numerics.content import fingerprint
from blockspec.numerics.memory import parse
from blockspec.numerics.progress import expect, shows_progress
from blockspec.numerics.ranks import Ranks, arrange, everywhere
from blockspec.products.curvature import Products
from blockspec.products.operators import Operator, forget
from blockspec.products.preconditioning.operator import Preconditioned, in_own_basis, turned
from blockspec.products.requests import block_dtype
from blockspec.products.selection import check_of, open_operator, told
from blockspec.products.settings import takes
from blockspec.products.units import ByUnit
from blockspec.spectra.collection import Cost, Spectra
from blockspec.spectra.spectrum import Spectrum

PROBES_OF_SMALL, LARGE = (
    4,
    10_000,
)  # blocks of at least so many parameters need one to measure a mean
STEPS_OF_PLAN = 8  # enough for the largest eigenvalues and the first moments of each unit
CHECKED = 2  # examples that checks evaluate where memory is bounded
NOISY = 0.25  # of a block's products: what rounding has in them, so that it is said
REPEATED = 0.02  # of the units; fewer do not change an error of the data by more than it is known
SLACK = 1.05  # times the tolerance: the error at the end is not quite the one that was foreseen


@shows_progress("spectra")
@takes(settings=EstimateSettings, execution=Execution, positional=("num_probes", "num_steps"))
def estimate_spectra(
    objective: Objective | None,
    blocks: Sequence[Block] | Block,
    *,
    settings: EstimateSettings,
    execution: Execution,
    state: str | os.PathLike[str] | None = None,
    keep_state: bool = False,
    progress: Progress | None = None,
) -> Spectra:
    """Spectra of blocks of a curvature matrix by stochastic Lanczos quadrature (Ubaru, Chen, Saad
    2017).

    Args:
        objective: What is differentiated; it is checked to be deterministic first. None where
            ``curvature`` is an operator that belongs to no model.
        blocks: From :func:`blockspec.partition`; they may overlap (``model`` beside its parts).
        [settings]
        state: A folder for what a killed estimate goes on from; the same call then gives the same
            numbers, bit by bit on the same machine. It is saved every ``state_every`` seconds, and
            removed at the end. Ctrl-C ends the sweep that is under way, and saves it; so does what
            a launcher of several processes sends them.
        keep_state: Leave the state, saved once more after the last sweep, for a caller who saves
            the result first; :func:`blockspec.engine.state.clear` removes it.
        progress: Called with (products done, products in all as far as known) after each sweep, and
            within one that takes long. If left out, a call that takes longer than some seconds
            shows a bar; False shows none.

    Returns:
        A read-only mapping from block name to :class:`blockspec.Spectrum`, in the order of the
        blocks.

    Raises:
        ValueError: A setting is out of range, the objective cannot be differentiated twice or is
            not deterministic (both before the expensive part), or a product is not finite (with the
            block's name).
        TypeError: A setting is of another type.
    """
    if settings.data == "auto":
        return _with_enough_data(
            objective, blocks, settings, execution, state, keep_state, progress
        )
    prepared = _prepare(
        objective, blocks, settings, columns=execution.columns, bounded=execution.memory is not None
    )
    operator, schedule = prepared.operator, prepared.schedule
    if operator.ranks.rows * operator.ranks.columns > 1:  # each of these is a message more
        same_everywhere({"memory": execution.memory is None, "state": state is None})
    if execution.memory is not None:
        limit = parse(execution.memory, operator.device)
        schedule.budget = everywhere(lambda: fit(schedule, operator, limit))
        agree(schedule, operator)
    identity = _identity(operator, prepared.blocks, settings) if state is not None else {}
    folder = None if state is None else Path(state)
    keeper = Keeper(folder, execution.state_every, identity, operator.ranks)
    keeper.restore(schedule)

    def after_sweep(schedule: Schedule) -> None:
        stop = keeper.after_sweep(schedule, stop=stopped())
        if progress is not None:
            progress(schedule.products, schedule.products + schedule.remaining)
        if stop or (stopped() and not several):  # several processes agree after the next sweep
            keeper.save_last(schedule)
            raise KeyboardInterrupt(SAVED)

    several = operator.ranks.rows * operator.ranks.columns > 1
    expect(schedule.products, schedule.products + schedule.remaining)
    saved = patched(hooks(operator, keeper))
    with saved, held_back(wanted=folder is not None, several=several) as stopped:
        schedule.run(operator, after_sweep=after_sweep)
    if keep_state:
        keeper.save_last(schedule)
    errors = {} if settings.precision is None else precision_errors(operator, schedule)
    units = 0 if schedule.sampling is None else schedule.sampling.groups.units
    own = [
        spectrum_of(t, operator.curvature, errors.get(t.block.name, 0.0), units)
        for t in schedule.tasks
    ]
    for task, spectrum in zip(schedule.tasks, own, strict=True):
        _warn_of_missed_tolerance(task.accuracy, spectrum)
    found = operator.ranks.all_of(own)
    if settings.precision is None:
        _warn_of_rounding([spectrum for part in found for spectrum in part])
    if not keep_state:
        keeper.clear()
    by_name = {spectrum.block.name: spectrum for part in found for spectrum in part}
    cost = Cost(operator.gradients, operator.products, check_of(operator))
    return Spectra((by_name[block.name] for block in prepared.blocks), cost=cost)


def _with_enough_data(
    objective: Objective | None,
    blocks: Sequence[Block] | Block,
    settings: EstimateSettings,
    execution: Execution,
    state: str | os.PathLike[str] | None,
    keep_state: bool,
    progress: Progress | None,
) -> Spectra:
    """The estimate with ``data="auto"``: rounds with a part of the data each."""
    whole = check_objective(objective)
    _warn_of_repetitions(whole)
    by_name = {b.name: b for b in ((blocks,) if isinstance(blocks, Block) else blocks)}
    own = replace(settings, data="all", tolerance=ESTIMATES_SHARE * settings.tolerance)
    done = 0

    def measure(part: Objective, names: Sequence[str], name: str) -> tuple[list[Spectrum], Cost]:
        nonlocal done
        latest = 0

        def after_sweep(products: int, total: int | None) -> None:
            nonlocal latest
            latest = products
            if progress is not None:
                progress(done + products, None if total is None else done + total)

        spectra = estimate_spectra(
            part,
            [by_name[name] for name in names],
            **vars(own),
            **vars(execution),
            state=None if state is None else Path(state) / name,
            keep_state=True,
            progress=after_sweep,
        )
        done += latest
        assert spectra.cost is not None
        return list(spectra.values()), spectra.cost

    found, cost = with_enough_data(whole, list(by_name), settings.tolerance, settings.seed, measure)
    if state is not None and not keep_state:
        everywhere(lambda: clear(Path(state)))
    return Spectra((found[name] for name in by_name), cost=cost)


@takes(settings=EstimateSettings, execution=Execution, positional=("num_probes", "num_steps"))
def plan_spectra(
    objective: Objective,
    blocks: Sequence[Block] | Block,
    *,
    settings: EstimateSettings,
    execution: Execution,
) -> Plan:
    """What :func:`estimate_spectra` with the same arguments would cost on one process.

    It takes a gradient and one product of each block on one micro-batch, and changes nothing of
    what it measures.

    Args:
        objective: As for :func:`estimate_spectra`.
        blocks: As for :func:`estimate_spectra`.
        [settings]

    Raises:
        ValueError: As :func:`estimate_spectra` does before its expensive part; or it would not fit
            into ``memory``.
    """
    prepared = _prepare(
        objective, blocks, settings, ranks=Ranks(), bounded=execution.memory is not None
    )
    device = prepared.operator.device
    limit = None if execution.memory is None else parse(execution.memory, device)
    return plan(prepared.schedule, prepared.operator, limit=limit)


@takes(settings=EstimateSettings, execution=Execution, positional=("num_probes", "num_steps"))
def foresee_data(
    objective: Objective,
    blocks: Sequence[Block] | Block,
    *,
    settings: EstimateSettings,
    execution: Execution,
) -> Foreseen:
    """How much data :func:`estimate_spectra` with ``data="auto"`` would take: from one probe of a
    few steps on the units of its first round.

    Args:
        objective: As for :func:`estimate_spectra`.
        blocks: As for :func:`estimate_spectra`.
        [settings]

    Raises:
        ValueError: As :func:`estimate_spectra` does with ``data="auto"``.
    """
    whole = check_objective(objective)
    _warn_of_repetitions(whole)
    by_name = {b.name: b for b in ((blocks,) if isinstance(blocks, Block) else blocks)}
    own = replace(settings, data="all", num_probes=1, num_steps=STEPS_OF_PLAN)

    def measure(part: Objective, names: Sequence[str], _: str) -> tuple[list[Spectrum], Cost]:
        spectra = estimate_spectra(
            part, [by_name[name] for name in names], **vars(own), **vars(execution)
        )
        assert spectra.cost is not None
        return list(spectra.values()), spectra.cost

    return foreseen(whole, list(by_name), settings.tolerance, settings.seed, measure)


@dataclass(frozen=True)
class Prepared:
    """All that is known before the first sweep: the operator, all blocks, and the schedule of this
    process's own.
    """

    operator: Operator
    blocks: tuple[Block, ...]
    schedule: Schedule


def _prepare(
    objective: Objective | None,
    blocks: Sequence[Block] | Block,
    settings: EstimateSettings,
    *,
    columns: int | None = None,
    ranks: Ranks | None = None,
    bounded: bool = False,
) -> Prepared:
    number = 1 if isinstance(blocks, Block) else len(blocks)
    if objective is not None and (objective.sharded or objective.weights.sharded):
        if columns not in (None, 1):
            raise ValueError(
                f"columns={columns} splits the blocks over processes, but with Objective(..., "
                "sharded=True), and for a model under fully_shard, every process is "
                "needed for every block: leave out columns"
            )
        columns = 1
    ranks = ranks or arrange(number, columns=columns)
    few = bounded and objective is not None  # so that checks keep within the bound too
    with patched([(objective, "checked_examples", CHECKED)] if few else []):
        operator, chosen = open_operator(
            objective, blocks, settings, ranks=ranks, precision=settings.precision
        )
    operator = in_own_basis(operator)
    ranks, device = operator.ranks, operator.device
    own: Sequence[Block] = chosen
    if ranks.columns > 1:
        own = deal(chosen, list(operator.parameters), ranks.columns)[ranks.column]
    by_unit = operator if settings.data_errors and settings.reorthogonalize else None
    sampling = Sampling(by_unit, ranks) if isinstance(by_unit, ByUnit) else None
    probing = Probing(
        settings.seed,
        settings.distribution,
        settings.reorthogonalize,
        settings.storage(device),
        ranks,
        sampling is not None,
        isinstance(operator, Products) and operator.takes_portions,
    )
    tasks = [
        Task(
            b,
            block_dtype(operator.parameters, b),
            device,
            settings.accuracy,
            probing,
            turned=partial(turned, operator),
        )
        for b in own
    ]
    schedule = Schedule(tasks, sampling=sampling)
    everywhere(lambda: check_possible(schedule, device, bounded=bounded))
    return Prepared(operator, chosen, schedule)


def _identity(
    operator: Operator, blocks: Sequence[Block], settings: EstimateSettings
) -> dict[str, object]:
    """What a state has to be of, to go on from it."""
    if operator.objective is None:
        raise ValueError(
            "state= needs an objective: what an operator of your own depends on is not known"
        )
    numbers = {
        name: value if isinstance(value, int | float) else str(value)
        for name, value in told(settings, operator).items()
    }
    return identity_of(operator.objective, blocks, numbers)


def precision_errors(operator: Operator, schedule: Schedule) -> dict[str, float]:
    """By block, the root mean square length of (A - B) q with A the matrix in reduced precision, B
    in the parameters' own, and q random of length 1.

    The mean square is the squared Frobenius norm of A - B over P, whose root bounds the Wasserstein
    distance between the two spectra (Hoffman and Wielandt 1953). One q does for a large block.
    """
    wide = _in_own_precision(operator)
    squares: dict[str, list[float]] = {}
    for tasks in schedule.groups():
        sweeps = [
            [
                (task.block, task.probe(probe))
                for task in tasks
                if probe == 0 or task.block.numel < LARGE
            ]
            for probe in range(PROBES_OF_SMALL)
        ]
        rounded = [operator.sweep(requests) for requests in sweeps]
        forget(operator)  # its graph must not lie beside the other one
        for requests, narrow in zip(sweeps, rounded, strict=True):
            for (block, q), a, b in zip(requests, narrow, wide.sweep(requests), strict=True):
                squares.setdefault(block.name, []).append(
                    float((a - b).square().sum() / q.square().sum())
                )
        forget(wide)
    operator.gradients += wide.gradients  # type: ignore[misc]  # counters of its class
    operator.products += wide.products  # type: ignore[misc]
    return {name: math.sqrt(statistics.fmean(values)) for name, values in squares.items()}


def _in_own_precision(operator: Operator) -> Operator:
    """The same matrix by products in the parameters' own precision, made in the same way and from
    as many examples at once, which was fitted to memory.
    """
    if isinstance(operator, Preconditioned):
        wide_inner = _in_own_precision(operator.inner)
        basis = operator.in_own_basis
        return Preconditioned(wide_inner, operator.preconditioner, in_own_basis=basis)
    assert isinstance(operator, Products)  # no other has a precision: see open_operator
    way = "layerwise" if operator.way.layerwise else operator.way.name
    wide = Products(
        operator.objective,
        operator.curvature,
        ranks=operator.ranks,
        graphs=operator.graphs,
        products=way,
    )
    wide.micro_batch = operator.micro_batch
    return wide


def _warn_of_repetitions(objective: Objective) -> None:
    """Errors of the data take units for independent: one that comes twice shows no spread."""
    seen = [fingerprint(unit) for unit in objective.batches()]
    repeated = len(seen) - len(set(seen))
    if repeated > REPEATED * len(seen):
        warnings.warn(
            f"{repeated} of {len(seen)} units of data repeat another one: errors of the data take "
            "units for independent draws, and are too small. Leave the repetitions out",
            stacklevel=4,
        )


def _warn_of_rounding(spectra: Sequence[Spectrum]) -> None:
    """Says once which blocks are rounding, in all or in a large part."""
    noisy = [s for s in spectra if s.precision_error > NOISY * math.sqrt(max(s.moment(2).value, 0))]
    if not noisy:
        return
    first = max(noisy, key=lambda spectrum: spectrum.precision_error / spectrum.norm)
    wider = " (model.double() shows it)" if first.dtype != "float64" else ""
    others = f" and {len(noisy) - 1} more blocks" if len(noisy) > 1 else ""
    warnings.warn(
        f"{first.block.name!r}{others}: products are rounding in {first.dtype}, for the most part "
        f"(their size is {first.norm:.1e}, and they are not symmetric). The curvature may be zero, "
        f"as that of the bias of keys in attention is{wider}; more data, steps or probes do not "
        "help. Leave such blocks out with exclude=",
        stacklevel=4,
    )


def _warn_of_missed_tolerance(accuracy: Accuracy, spectrum: Spectrum) -> None:
    """Where the number of probes is free and the tolerance is not met all the same: a limit was
    reached.
    """
    reached = replace(spectrum, precision_error=0.0).error
    allowed = accuracy.tolerance * spectrum.norm
    if accuracy.num_probes is None and reached > SLACK * allowed:
        warnings.warn(
            f"{spectrum.block.name!r}: the tolerance {accuracy.tolerance:g} was not reached; the "
            "error is "
            f"{reached / spectrum.norm:.1e} of the norm after {spectrum.num_probes} probes of up "
            "to "
            f"{int(spectrum.steps.max())} steps. More than {accuracy.max_products} products or "
            f"{accuracy.max_steps} steps a "
            "probe are not taken: ask for a larger tolerance, or give num_probes and num_steps as "
            "numbers",
            stacklevel=3,
        )
