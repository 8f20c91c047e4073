"""Spectra of blocks: the engine's front door."""

from __future__ import annotations

import hashlib
import math
import operator
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from blockspec.engine.accuracy import Accuracy
from blockspec.engine.plan import Plan, fit, plan
from blockspec.engine.results import exact_spectrum, lanczos_spectrum
from blockspec.engine.schedule import Probing, Schedule, Task, deal
from blockspec.engine.state import Keeper, identity_of
from blockspec.model.blocks import Block
from blockspec.model.differentiability import check_twice_differentiable
from blockspec.model.objective import Objective
from blockspec.numerics.memory import parse
from blockspec.numerics.probes import DISTRIBUTIONS
from blockspec.numerics.ranks import Ranks, arrange
from blockspec.products.curvature import Products
from blockspec.products.requests import block_dtype, checked_blocks
from blockspec.spectra.collection import Cost, Spectra
from blockspec.spectra.spectrum import Spectrum

Auto = str  # the word "auto"
Storage = tuple[torch.dtype, torch.device] | None
STORED = (torch.bfloat16, torch.float32, torch.float64)
PROBES_OF_SMALL, LARGE = (
    4,
    10_000,
)  # blocks of at least so many parameters need one to measure a mean
TOLERANCE = (
    2e-3  # below it, a density drawn over the whole range of eigenvalues does not change visibly
)


def estimate_spectra(
    objective: Objective,
    blocks: Sequence[Block] | Block,
    num_probes: int | Auto = 4,
    num_steps: int | Auto = 40,
    *,
    tolerance: float = TOLERANCE,
    curvature: str = "hessian",
    seed: int = 0,
    distribution: str = "rademacher",
    reorthogonalize: bool = True,
    basis_dtype: str | None = None,
    basis_device: str | None = None,
    precision: str | None = None,
    memory: int | float | str | None = None,
    state: str | os.PathLike[str] | None = None,
    state_every: float = 300.0,
    columns: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Spectra:
    """Spectra of blocks of a curvature matrix by stochastic Lanczos quadrature (Ubaru, Chen, Saad 2017).

    objective: what is differentiated; checked to be deterministic first.
    blocks: from :func:`blockspec.partition`; they may overlap (``model`` beside its parts).
    num_probes: K start vectors a block, or ``"auto"``: per block, as many as ``tolerance`` needs (large blocks: one). Where
        these are many, the first one is given up for the eigenvalues that it finds, see
        :mod:`blockspec.engine.deflation`; not with a ``basis_dtype``, a ``basis_device`` or without reorthogonalisation.
    num_steps: M Lanczos steps a probe, or ``"auto"``: per block, until its spectrum stands still. A block with at most M
        parameters is done exactly instead: all of its eigenvalues; with ``"auto"``, every block for which that is cheaper.
    tolerance: used where one of them is ``"auto"``: Wasserstein-1 distance between the estimated and the true spectrum,
        relative to the block's spectral norm; held in at least 95 % of seeds. What was reached is ``Spectrum.error``.
    curvature: ``"hessian"``, ``"ggn"`` or ``"fisher"``, see :class:`blockspec.products.curvature.Products`.
    seed, distribution: of the probes, see :func:`blockspec.numerics.probes.draw_probe`. A block's probes do not depend on which
        other blocks are estimated beside it.
    reorthogonalize: see :class:`blockspec.numerics.lanczos.Lanczos`.
    basis_dtype, basis_device: where the Krylov vectors are kept, e.g. ``"bfloat16"``, ``"cpu"``; None: as the parameters.
    precision: ``"tf32"`` or ``"bfloat16"`` products, faster on GPUs that have them; the error that they cause is measured with
        two more products a block (eight for small ones), and is a part of ``Spectrum.error``. None: the parameters' own.
    memory: what the estimate may take: bytes, a share of the device (0.8) or a size (``"20GiB"``). Micro-batch and the number of
        processes under way at once are chosen to fit, see :mod:`blockspec.engine.plan`. None: no bound is kept.
    state: a folder for what a killed estimate goes on from; the same call then gives the same numbers, bit by bit on the same
        machine. Saved every ``state_every`` seconds, removed at the end.
    columns: with several processes (``torch.distributed``), how many ways the blocks are split; the batches are split the
        remaining ways. None: blocks where there are many, else batches.
    progress: called with (products done, products in all as far as known) after each sweep.

    Raises ValueError or TypeError for settings out of range and for an objective that cannot be differentiated or is not
    deterministic, before the expensive part; ValueError with the block's name for a product that is not finite.
    """
    blocks = checked_blocks(objective, blocks)
    accuracy = Accuracy(
        _count("num_steps", num_steps), _count("num_probes", num_probes), _positive(tolerance)
    )
    ranks = arrange(len(blocks), columns=columns)
    probing = _probing(
        seed, distribution, reorthogonalize, _storage(objective, basis_dtype, basis_device), ranks
    )
    products = Products(objective, curvature, ranks=ranks, precision=precision)
    objective.check()
    check_twice_differentiable(objective, [name for block in blocks for name in block.parameters])
    own = (
        deal(blocks, list(objective.parameters()), ranks.columns)[ranks.column]
        if ranks.columns > 1
        else blocks
    )
    schedule = _schedule(objective, own, accuracy, probing)
    if memory is not None:
        schedule.budget = fit(objective, schedule, products, parse(memory, objective.device))
    identity = _identity(products, own, accuracy, probing) if state is not None else {}
    keeper = Keeper(None if state is None else Path(state), state_every, identity, ranks)
    keeper.restore(schedule)

    def after_sweep(schedule: Schedule) -> None:
        keeper.after_sweep(schedule)
        if progress is not None:
            progress(schedule.products, schedule.products + schedule.remaining)

    schedule.run(products, after_sweep=after_sweep)
    errors = {} if precision is None else precision_errors(products, schedule)
    found = ranks.all_of(
        [_spectrum(task, curvature, errors.get(task.block.name, 0.0)) for task in schedule.tasks]
    )
    keeper.clear()
    by_name = {spectrum.block.name: spectrum for part in found for spectrum in part}
    cost = Cost(gradients=products.gradients, products=products.products)
    return Spectra((by_name[block.name] for block in blocks), cost=cost)


def plan_spectra(
    objective: Objective,
    blocks: Sequence[Block] | Block,
    num_probes: int | Auto = 4,
    num_steps: int | Auto = 40,
    *,
    tolerance: float = TOLERANCE,
    curvature: str = "hessian",
    seed: int = 0,
    distribution: str = "rademacher",
    reorthogonalize: bool = True,
    basis_dtype: str | None = None,
    basis_device: str | None = None,
    precision: str | None = None,
    memory: int | float | str | None = None,
) -> Plan:
    """What :func:`estimate_spectra` with the same arguments would cost on one process; takes a gradient and one product of
    each block on one micro-batch.

    Raises what :func:`estimate_spectra` raises before its expensive part; ValueError where it would not fit into ``memory``.
    """
    blocks = checked_blocks(objective, blocks)
    accuracy = Accuracy(
        _count("num_steps", num_steps), _count("num_probes", num_probes), _positive(tolerance)
    )
    probing = _probing(
        seed, distribution, reorthogonalize, _storage(objective, basis_dtype, basis_device), Ranks()
    )
    products = Products(objective, curvature, precision=precision)
    objective.check()
    check_twice_differentiable(objective, [name for block in blocks for name in block.parameters])
    limit = None if memory is None else parse(memory, objective.device)
    return plan(_schedule(objective, blocks, accuracy, probing), products, limit=limit)


def _schedule(
    objective: Objective, blocks: Sequence[Block], accuracy: Accuracy, probing: Probing
) -> Schedule:
    return Schedule(
        [Task(b, block_dtype(objective, b), objective.device, accuracy, probing) for b in blocks]
    )


def _identity(
    products: Products, blocks: Sequence[Block], accuracy: Accuracy, probing: Probing
) -> dict[str, object]:
    """What a state has to be of, to go on from it."""
    settings = {name: str(value) for name, value in vars(probing).items() if name != "ranks"}
    names = hashlib.sha256("\n".join(block.name for block in blocks).encode()).hexdigest()[:16]
    settings |= {
        "curvature": products.curvature,
        "precision": str(products.precision),
        "blocks": names,
    }
    return identity_of(products.objective, asdict(accuracy) | settings)


def _probing(
    seed: int, distribution: str, reorthogonalize: bool, storage: Storage, ranks: Ranks
) -> Probing:
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution is one of {DISTRIBUTIONS}, got {distribution!r}")
    return Probing(seed, distribution, reorthogonalize, storage, ranks)


def _storage(objective: Objective, dtype: str | None, device: str | None) -> Storage:
    if dtype is None and device is None:
        return None
    kept = torch.float32 if dtype is None else getattr(torch, dtype, None)
    if kept not in STORED:
        raise ValueError(
            f"basis_dtype is one of {[str(d).removeprefix('torch.') for d in STORED]}, got {dtype!r}"
        )
    return kept, torch.device(device or objective.device)


def precision_errors(products: Products, schedule: Schedule) -> dict[str, float]:
    """By block, the root mean square length of (A - B) q with A the matrix in reduced precision, B in the parameters' own, and q
    random of length 1.

    The mean square is the squared Frobenius norm of A - B over P, whose root bounds the Wasserstein distance between the two
    spectra (Hoffman and Wielandt 1953). One q does for a large block.
    """
    wide = Products(products.objective, products.curvature, ranks=products.ranks)
    squares: dict[str, list[float]] = {}
    for tasks in schedule.groups():
        for probe in range(PROBES_OF_SMALL):
            chosen = [task for task in tasks if probe == 0 or task.block.numel < LARGE]
            requests = [(task.block, task.probe(probe)) for task in chosen]
            for (block, q), a, b in zip(
                requests, products.sweep(requests), wide.sweep(requests), strict=True
            ):
                squares.setdefault(block.name, []).append(
                    float((a - b).square().sum() / q.square().sum())
                )
    products.gradients += wide.gradients
    products.products += wide.products
    return {name: math.sqrt(statistics.fmean(values)) for name, values in squares.items()}


def _spectrum(task: Task, curvature: str, precision_error: float) -> Spectrum:
    settings: dict[str, Any] = {
        "precision_error": precision_error,
        "dtype": task.dtype,
        "curvature": curvature,
        "reorthogonalized": task.probing.reorthogonalize,
        "distribution": task.probing.distribution,
        "seed": task.probing.seed,
    }
    if task.columns is not None:
        probes, steps = task.accuracy.num_probes or 1, task.accuracy.num_steps or task.block.numel
        shape = (1, task.block.numel) if task.accuracy.adaptive else (probes, steps)
        return exact_spectrum(task.block, task.columns.eigenvalues(), shape=shape, **settings)
    results = task.results()
    steps = task.accuracy.num_steps or max(len(t.alphas) for t in results)
    return lanczos_spectrum(
        task.block, results, num_steps=steps, deflation=task.deflation, **settings
    )


def _count(name: str, value: int | Auto) -> int | None:
    """A whole number >= 1, or None for "auto"."""
    if value == "auto":
        return None
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} is a whole number >= 1 or 'auto', got {value!r}") from None
    if number < 1:
        raise ValueError(f"{name} is a whole number >= 1 or 'auto', got {number}")
    return number


def _positive(tolerance: float) -> float:
    if not 0 < tolerance < 1:
        raise ValueError(
            f"tolerance is relative to the spectral norm, between 0 and 1 (both excluded), got {tolerance}"
        )
    return float(tolerance)
