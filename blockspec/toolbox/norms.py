"""Sizes of blocks: Frobenius norms by random probes, and ranks that say how few eigenvalues carry
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from blockspec.model.blocks import Block
from blockspec.model.objective import Objective
from blockspec.numerics.algorithms import Algorithm, Progress
from blockspec.numerics.jackknife import jackknife_error
from blockspec.numerics.progress import shows_progress
from blockspec.numerics.units import without_each
from blockspec.products.requests import block_dtype
from blockspec.products.selection import OperatorSettings, check_of, open_operator
from blockspec.products.settings import takes
from blockspec.products.shares import Shares, Sketch
from blockspec.products.sweeps import Watch, run_together
from blockspec.spectra.collection import Cost
from blockspec.spectra.estimates import SQUARES, Estimates
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
        ``data_stderr`` includes what few data add to a squared norm.

    Raises:
        ValueError: A setting is out of range; and as :func:`blockspec.estimate_spectra` does.
    """
    operator, blocks = open_operator(objective, blocks, settings)
    algorithms, sketches = {}, {}
    for block in blocks:
        probes = Probes(
            block,
            block_dtype(operator.parameters, block),
            operator.device,
            sampling.seed,
            distribution="gaussian",
        )
        exactly = block.numel <= sampling.num_probes
        algorithms[block] = exact(probes) if exactly else sampled(probes, sampling)
        sketches[block] = Sketch(block.name, block.numel, operator.device)
    shares = Shares(operator, wanted=sampling.data_errors)
    watch = Watch(shares, lambda block, probe, product: sketches[block](product))
    results = run_together(algorithms, operator, progress=progress, watch=watch)
    for block, rounds in watch.rounds.items():
        error = _data_stderr(rounds, shares.terms, block.numel <= sampling.num_probes)
        value = results[block].estimate._replace(data_stderr=error)
        results[block] = results[block]._replace(estimate=value)
    return Estimates(
        blocks,
        [result.estimate for result in results.values()],
        probes=[result.probes for result in results.values()],
        cost=Cost(operator.gradients, operator.products, check_of(operator)),
        signs=[SQUARES] * len(blocks),
        units=shares.units,
    )


def _data_stderr(rounds: Sequence[np.ndarray], terms: np.ndarray, exactly: bool) -> float | None:
    """From sketches (n, K, S) of the groups' products in each round."""
    sketches = np.concatenate(rounds, axis=1)
    mean = sketches.sum(0) / terms.sum()
    found = [(part**2).sum((-2, -1)) for part in (mean, without_each(sketches, terms))]
    probes = 1 if exactly else sketches.shape[1]  # all unit vectors together are one sample
    return jackknife_error(float(found[0]) / probes, found[1] / probes)


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
    ``..._stderr`` are of the probes, and those of the ranks leave out the error of the norm there.
    ``..._data_stderr`` are of the data, the norm's included. Both are nan where they cannot be
    known.
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
    without = spectrum.left_out()
    left_out = None if without is None else np.abs(without[0]).max((1, 2))
    row |= _columns(spectrum, "squared_norm", np.square, (block.numel, 0), left_out)
    row["norm"] = norm
    error = None if left_out is None else jackknife_error(norm, left_out)
    row["norm_data_stderr"] = _or_nan(error)
    row |= _columns(spectrum, "nuclear_norm", np.abs, (block.numel, 0), left_out)
    row |= _columns(spectrum, "stable_rank", np.square, (block.numel, 2), left_out)
    row |= _columns(spectrum, "effective_rank", np.abs, (block.numel, 1), left_out)
    return row


def _columns(
    spectrum: Spectrum,
    name: str,
    function: Callable[[np.ndarray], np.ndarray],
    scale: tuple[int, int],
    norms: np.ndarray | None,
) -> dict[str, float]:
    """The value, and its errors, of a mean over eigenvalues times a number over a power of the
    norm.

    Args:
        scale: That number, and the power.
        norms: (n,) the norm without each group of data; None where these were not told apart.
    """
    numel, power = scale
    if power and not spectrum.norm:
        return dict.fromkeys((name, f"{name}_stderr", f"{name}_data_stderr"), math.nan)
    mean, factor = spectrum.mean(function), numel / spectrum.norm**power if power else numel
    found = {name: factor * mean.value, f"{name}_stderr": factor * _or_nan(mean.stderr)}
    means = spectrum.means_left_out(function)
    error = None
    if means is not None and norms is not None:
        error = jackknife_error(factor * mean.value, numel * means / norms**power)
    return found | {f"{name}_data_stderr": _or_nan(error)}


def _or_nan(error: float | None) -> float:
    return math.nan if error is None else error
