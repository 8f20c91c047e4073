"""Sizes of blocks: Frobenius norms by random probes, and ranks that say how few eigenvalues carry
them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from blockspec.model.blocks import Block
from blockspec.model.objective import Objective
from blockspec.numerics.algorithms import Algorithm, Progress
from blockspec.numerics.progress import shows_progress
from blockspec.products.requests import block_dtype
from blockspec.products.selection import OperatorSettings, check_of, open_operator
from blockspec.products.settings import takes
from blockspec.products.sweeps import run_together
from blockspec.spectra.collection import Cost
from blockspec.spectra.estimates import Estimates
from blockspec.spectra.spectrum import Estimate, Spectrum, estimate
from blockspec.toolbox.sampling import FEWEST_SAMPLES, Sampling
from blockspec.toolbox.traces import Probes, Result


@shows_progress("norms")
@takes(sampling=Sampling, settings=OperatorSettings)
def squared_norms(
    objective: Objective | None,
    blocks: Sequence[Block] | Block,
    *,
    sampling: Sampling,
    settings: OperatorSettings,
    progress: Progress | None = None,
) -> Estimates:
    """Squared Frobenius norms of diagonal blocks: the mean of ``||H_bb v||^2`` over Gaussian probes
    v.

    This takes products of every block by itself; a block with at most ``num_probes`` parameters is
    done exactly. For norms of the blocks off the diagonal see :func:`blockspec.coupling`.

    Args:
        objective: What is differentiated. None where ``curvature`` is an operator that belongs to
            no model.
        blocks: From :func:`blockspec.partition`; they may overlap.
        [settings]
        progress: Called with (products done, products in all or None where that is unknown).

    ``tolerance`` is relative to the squared norm.

    Returns:
        A mapping from block name to :class:`blockspec.Estimate`, in units of a squared eigenvalue.

    Raises:
        ValueError: A setting is out of range; and as :func:`blockspec.estimate_spectra` does.
    """
    operator, blocks = open_operator(objective, blocks, settings)
    algorithms = {}
    for block in blocks:
        probes = Probes(
            block,
            block_dtype(operator.parameters, block),
            operator.device,
            sampling.seed,
            distribution="gaussian",
        )
        algorithms[block] = (
            sampled(probes, sampling) if block.numel > sampling.num_probes else exact(probes)
        )
    results = run_together(algorithms, operator, progress=progress).values()
    return Estimates(
        blocks,
        [result.estimate for result in results],
        probes=[result.probes for result in results],
        cost=Cost(operator.gradients, operator.products, check_of(operator)),
        one_sign=[True] * len(blocks),
    )


def exact(probes: Probes) -> Algorithm[Result]:
    """From the products with all unit vectors."""
    matrix = yield torch.eye(probes.block.numel, dtype=probes.dtype, device=probes.device)
    return Result(Estimate(float(matrix.double().square().sum()), 0.0), len(matrix))


def sampled(probes: Probes, sampling: Sampling) -> Algorithm[Result]:
    """Until the tolerance is met."""
    together = sampling.num_probes if sampling.tolerance is None else FEWEST_SAMPLES
    samples: list[float] = []
    while len(samples) < sampling.num_probes and not sampling.met(samples, 0.0):
        images = yield probes.draw(len(samples), min(len(samples) + together, sampling.num_probes))
        samples += images.square().sum(1, dtype=torch.float64).tolist()
    return Result(estimate(np.array(samples)), len(samples))


def norms(spectra: Mapping[str, Spectrum]) -> pd.DataFrame:
    """A row a block, out of spectra: no more products are needed. Eigenvalues that are known to be
    single count with their exact weight, see :meth:`blockspec.Spectrum.with_exact_weights`.

    ``squared_norm``: squared Frobenius norm, the sum of squared eigenvalues. ``norm``: the largest
    Ritz value in magnitude, a lower bound. ``nuclear_norm``: the sum of the magnitudes.
    ``stable_rank``: squared_norm / norm^2. ``effective_rank``: nuclear_norm / norm, which is trace
    / norm where all eigenvalues are positive (Vershynin 2018, section 5.6). Both ranks lie between
    1 and the rank, and are upper estimates as long as the norm has not converged. The columns
    ``..._stderr`` are nan where they cannot be known; those of the ranks leave out the error of the
    norm.
    """
    return (
        pd.DataFrame([_row(spectrum) for spectrum in spectra.values()])
        .astype({"layer": "Int64"})
        .set_index("block")
    )


def _row(spectrum: Spectrum) -> dict[str, object]:
    spectrum = spectrum.with_exact_weights()
    block, norm = spectrum.block, spectrum.norm
    row: dict[str, object] = {
        "block": block.name,
        "kind": block.kind,
        "layer": block.layer,
        "numel": block.numel,
    }
    row |= _columns("squared_norm", spectrum.moment(2), block.numel)
    row["norm"] = norm
    row |= _columns("nuclear_norm", spectrum.mean(np.abs), block.numel)
    row |= _columns("stable_rank", spectrum.moment(2), block.numel / norm**2 if norm else math.nan)
    row |= _columns(
        "effective_rank", spectrum.mean(np.abs), block.numel / norm if norm else math.nan
    )
    return row


def _columns(name: str, mean: Estimate, factor: float) -> dict[str, float]:
    return {
        name: factor * mean.value,
        f"{name}_stderr": math.nan if mean.stderr is None else factor * mean.stderr,
    }
