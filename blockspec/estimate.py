"""Spectra of blocks from their products: drives one process per (block, probe), all of them through the same sweeps."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .blocks import Block
from .curvature import Products
from .dense import Columns
from .lanczos import Lanczos
from .objective import Objective
from .probes import DISTRIBUTIONS, draw_probe
from .quadrature import exact_spectrum, lanczos_spectrum
from .spectra import Cost, Spectra, Spectrum


@dataclass(frozen=True)
class Job:
    """One process on one block: a probe's Lanczos, or all columns of a small block."""

    block: Block
    process: Lanczos | Columns


def estimate_spectra(
    objective: Objective,
    blocks: Sequence[Block] | Block,
    num_probes: int = 4,
    num_steps: int = 40,
    *,
    curvature: str = "hessian",
    seed: int = 0,
    distribution: str = "rademacher",
    reorthogonalize: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Spectra:
    """Spectra of blocks of a curvature matrix by stochastic Lanczos quadrature (Ubaru, Chen, Saad 2017).

    objective: what is differentiated; checked to be deterministic first.
    blocks: from :func:`blockspec.partition`; they may overlap (``model`` beside its parts).
    num_probes: K start vectors a block. The error of a mean over the spectrum falls as 1 / sqrt(K P).
    num_steps: M Lanczos steps a probe. A block with at most M parameters is done exactly instead: all of its eigenvalues.
    curvature: ``"hessian"``, ``"ggn"`` or ``"fisher"``, see :class:`blockspec.curvature.Products`.
    seed, distribution: of the probes, see :func:`blockspec.probes.draw_probe`. A block's probes do not depend on which
        other blocks are estimated beside it.
    reorthogonalize: see :class:`blockspec.lanczos.Lanczos`.
    progress: called with (products done, products in all) after each sweep.

    Raises ValueError or TypeError for settings out of range and for an objective that cannot be differentiated or is not
    deterministic, before the expensive part; ValueError with the block's name for a product that is not finite.
    """
    blocks = _checked_blocks(objective, blocks)
    num_probes = _positive("num_probes", num_probes)
    num_steps = _positive("num_steps", num_steps)
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution is one of {DISTRIBUTIONS}, got {distribution!r}")
    products = Products(objective, curvature)
    objective.check()

    def jobs_of(block: Block) -> list[Job]:
        dtype, device = block_dtype(objective, block), objective.device
        if block.numel <= num_steps:
            return [Job(block, Columns(block.numel, dtype=dtype, device=device))]
        starts = (
            draw_probe(block.name, block.numel, seed=seed, probe=k, distribution=distribution) for k in range(num_probes)
        )
        return [
            Job(block, Lanczos(start.to(device, dtype), num_steps, reorthogonalize=reorthogonalize)) for start in starts
        ]

    def spectrum_of(block: Block, jobs: Sequence[Job]) -> Spectrum:
        settings: dict[str, Any] = {
            "num_steps": num_steps,
            "dtype": block_dtype(objective, block),
            "curvature": curvature,
            "reorthogonalized": reorthogonalize,
            "distribution": distribution,
            "seed": seed,
        }
        processes = [job.process for job in jobs]
        if isinstance(processes[0], Columns):
            return exact_spectrum(block, processes[0].eigenvalues(), num_probes=num_probes, **settings)
        return lanczos_spectrum(block, [p.tridiagonal() for p in processes if isinstance(p, Lanczos)], **settings)

    jobs = {block: jobs_of(block) for block in blocks}
    run([job for group in jobs.values() for job in group], products, progress=progress)
    cost = Cost(gradients=products.gradients, products=products.products)
    return Spectra((spectrum_of(block, group) for block, group in jobs.items()), cost=cost)


def run(jobs: Sequence[Job], products: Products, *, progress: Callable[[int, int], None] | None = None) -> None:
    """Drives every job to its end; one sweep over the data advances all that are not done."""
    done = 0
    while active := [job for job in jobs if not job.process.done]:
        results = products.sweep([(job.block, job.process.vector) for job in active])
        scales: dict[str, float] = {}
        for job in jobs:
            scales[job.block.name] = max(scales.get(job.block.name, 0.0), job.process.scale)
        for job, result in zip(active, results, strict=True):
            job.process.advance(result, scale=scales[job.block.name])
        done += len(active)
        if progress is not None:
            progress(done, done + sum(job.process.remaining for job in jobs))


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


def _positive(name: str, value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is a whole number >= 1, got {value!r}") from None
    if number < 1:
        raise ValueError(f"{name} is a whole number >= 1, got {number}")
    return number
