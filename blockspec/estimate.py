"""Spectra of blocks: the engine's front door."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence

import torch

from .accuracy import Accuracy
from .blocks import Block
from .curvature import Products
from .objective import Objective
from .probes import DISTRIBUTIONS
from .results import exact_spectrum, lanczos_spectrum
from .schedule import Probing, Schedule, Task
from .spectra import Cost, Spectra, Spectrum

Auto = str  # the word "auto"
TOLERANCE = 2e-3  # below it, a density drawn over the whole range of eigenvalues does not change visibly


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
    progress: Callable[[int, int], None] | None = None,
) -> Spectra:
    """Spectra of blocks of a curvature matrix by stochastic Lanczos quadrature (Ubaru, Chen, Saad 2017).

    objective: what is differentiated; checked to be deterministic first.
    blocks: from :func:`blockspec.partition`; they may overlap (``model`` beside its parts).
    num_probes: K start vectors a block, or ``"auto"``: per block, as many as ``tolerance`` needs (large blocks: one).
    num_steps: M Lanczos steps a probe, or ``"auto"``: per block, until its spectrum stands still. A block with at most M
        parameters is done exactly instead: all of its eigenvalues; with ``"auto"``, every block for which that is cheaper.
    tolerance: used where one of them is ``"auto"``: Wasserstein-1 distance between the estimated and the true spectrum,
        relative to the block's spectral norm; held in at least 95 % of seeds. What was reached is ``Spectrum.error``.
    curvature: ``"hessian"``, ``"ggn"`` or ``"fisher"``, see :class:`blockspec.curvature.Products`.
    seed, distribution: of the probes, see :func:`blockspec.probes.draw_probe`. A block's probes do not depend on which
        other blocks are estimated beside it.
    reorthogonalize: see :class:`blockspec.lanczos.Lanczos`.
    progress: called with (products done, products in all as far as known) after each sweep.

    Raises ValueError or TypeError for settings out of range and for an objective that cannot be differentiated or is not
    deterministic, before the expensive part; ValueError with the block's name for a product that is not finite.
    """
    blocks = _checked_blocks(objective, blocks)
    accuracy = Accuracy(_count("num_steps", num_steps), _count("num_probes", num_probes), _positive(tolerance))
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution is one of {DISTRIBUTIONS}, got {distribution!r}")
    products = Products(objective, curvature)
    objective.check()
    probing = Probing(seed, distribution, reorthogonalize)
    tasks = [Task(block, block_dtype(objective, block), objective.device, accuracy, probing) for block in blocks]

    def after_sweep(schedule: Schedule) -> None:
        if progress is not None:
            progress(schedule.products, schedule.products + schedule.remaining)

    Schedule(tasks).run(products, after_sweep=after_sweep)
    cost = Cost(gradients=products.gradients, products=products.products)
    return Spectra((_spectrum(task, curvature) for task in tasks), cost=cost)


def _spectrum(task: Task, curvature: str) -> Spectrum:
    settings = {
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
    return lanczos_spectrum(task.block, results, num_steps=steps, **settings)


def block_dtype(objective: Objective, block: Block) -> torch.dtype:
    """The dtype that the block's vectors have: the widest of its parameters', at least float32."""
    parameters = objective.parameters()
    dtype = torch.float32
    for name in block.parameters:
        dtype = torch.promote_types(dtype, parameters[name].dtype)
    return dtype


def _checked_blocks(objective: Objective, blocks: Iterable[Block] | Block) -> tuple[Block, ...]:
    blocks = (blocks,) if isinstance(blocks, Block) else tuple(blocks)
    if not blocks:
        raise ValueError("no blocks: the partition is empty; see blockspec.partition")
    names = [block.name for block in blocks]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"blocks with the same name: {twice[:3]}; names must differ")
    parameters = objective.parameters()
    for block in blocks:
        if unknown := [name for name in block.parameters if name not in parameters]:
            raise ValueError(
                f"block {block.name!r} holds {unknown[0]!r}, which is no parameter of the model that requires gradients; "
                "make the partition from the same model, after freezing"
            )
        if not block.pieces:
            raise ValueError(f"block {block.name!r} has no parameters (from a file?): make it with blockspec.partition")
    return blocks


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
        raise ValueError(f"tolerance is relative to the spectral norm, between 0 and 1 (both excluded), got {tolerance}")
    return float(tolerance)
