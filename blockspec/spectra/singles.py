"""Exact weights after the fact.

The idea. Most of a probe's noise is the random share that each of the largest eigenvalues has in
it: a chi-square variable over P, where the truth is 1 / P. Where Lanczos has found an eigenvalue,
its weight need not be taken from the probe: it is 1 / P, and what is left of the probe is a random
vector of the complement. No product is needed for that.

The catch. A Krylov space holds one vector of each eigenspace, so that an eigenvalue that stands
there several times looks like a single one with more weight; and chance gives that to single ones
too. So weights tell little. Two probes together tell all: the first one's Ritz vector y is a unit
vector of the eigenspace, and the weight w that the second one's start vector v has there is that
of its projection on all of the space. For a single eigenvalue (y'v)^2 is w; for repeated ones it is
less, by the cosine of an angle between random directions. It takes an inner product a step, which
Lanczos keeps (``Tridiagonal.beside``).

With one probe alone there is no proof, only likelihood: weights times P are chi-square variables
with one degree of freedom, or with two where they are those of pairs, and the likelihood ratio
depends on the sum of their logarithms. Where that is smaller than those of pairs in 95 of 100
cases, all are taken for single. That is for numbers that one probe gives without an error.
(Blocks whose first probe found eigenvectors need none of this, see
:mod:`blockspec.engine.deflation`.)
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from blockspec.numerics.measures import SAME
from blockspec.spectra.data import Sample

if TYPE_CHECKING:
    from blockspec.spectra.spectrum import Spectrum

CERTAIN = 1e-5  # residual of an eigenvalue that is found, relative to the norm
ROUNDED = {"float64": 0.0, "float32": 2e-5}  # what of the residuals may be rounding of the matrix
# a single eigenvalue's share of a probe exceeds this many times 1 / P once in 200; more are several
# in one
SIMPLE = 8.0
MOST_LIKELY = 12.0  # the same, once in 2,000: where all weights together speak for single ones
LEVEL = 0.05  # of sets of pairs that pass for single eigenvalues, with one probe
# between |y'v| and the root of the weight, relative to that or to what it is on average: two random
# directions of a plane are as close as that in 3 of 100 cases
AGREEMENT = 1e-3
DRAWS = 4000  # of chi-square variables: the level is then 0.05 +- 0.004
MOST = 1 / 4  # of all eigenvalues that may be known: the rest must be a measure to rescale


def with_exact_weights(found: Spectrum) -> Spectrum:
    """The spectrum, its eigenvalues that every probe has found with the weight 1 / P; as it is
    where none are known to be single.
    """
    if not found.reorthogonalized or found.known.any() or found.dtype not in ROUNDED:
        return found
    places = _common(found)
    single = _are_likely if found.num_probes == 1 else _are_proven
    places = places[single(found, places)]
    if len(places) == 0 or len(places) > MOST * found.block.numel:
        return found
    known = np.zeros(found.nodes.shape, bool)
    np.put_along_axis(known, places.T, True, axis=1)
    weights = _rescaled(found.weights, known, 1 / found.block.numel)
    sample = None if found.sample is None else _sample(found, weights, known)
    return replace(found, weights=weights, known=known, sample=sample)


def _common(found: Spectrum) -> np.ndarray:
    """(c, K) places of the eigenvalues that each probe has found, once."""
    used = found.weights > 0
    sure = used & (found.residuals <= (CERTAIN + ROUNDED[found.dtype]) * found.norm)
    places = []
    for value in found.nodes[0, sure[0]]:
        near = used & (np.abs(found.nodes - value) <= SAME * found.norm)
        if (near.sum(axis=1) == 1).all() and sure[near].all():
            places.append(near.argmax(axis=1))
    return np.array(places, int).reshape(-1, found.num_probes)


def proven(
    nodes: np.ndarray,
    weights: np.ndarray,
    residuals: np.ndarray,
    across: np.ndarray | None,
    numel: int,
) -> np.ndarray:
    """(K, M) which nodes of the first two probes are eigenvalues that stand there once.

    Args:
        nodes, weights, residuals: (K, M) of K probes.
        across: (m,) inner products of the first probe's Ritz vectors with the start vector of the
            second; None where they are not known.
        numel: P.
    """
    single = np.full(nodes.shape, False)
    if across is None or len(nodes) < 2:
        return single
    scale = np.abs(nodes).max()
    sure = (weights[:2] > 0) & (residuals[:2] <= 4 * CERTAIN * scale)
    for place in np.flatnonzero(sure[0, : len(across)]):
        (near,) = np.nonzero(np.abs(nodes[1] - nodes[0, place]) <= SAME * scale)
        if len(near) == 1 and sure[1, near[0]]:
            size = math.sqrt(weights[1, near[0]])
            allowed = AGREEMENT * max(size, numel**-0.5)
            agrees = abs(abs(across[place]) - size) <= allowed
            single[0, place] = single[1, near[0]] = agrees
    return single


def _are_proven(found: Spectrum, places: np.ndarray) -> np.ndarray:
    """(c,) by the first two probes."""
    return found.single[0, places[:, 0]] & found.single[1, places[:, 1]]


def _are_likely(found: Spectrum, places: np.ndarray) -> np.ndarray:
    """(c,) those whose weight is at most ``MOST_LIKELY`` / P, if the product of all weights, none
    of them taken for more than that, would be too small for pairs; else none.
    """
    weights = found.weights[0, places[:, 0]] * found.block.numel
    logarithms = np.log(np.minimum(weights, MOST_LIKELY))
    return (weights <= MOST_LIKELY) & (logarithms.sum() <= _least_of_pairs(len(weights)))


@lru_cache
def _least_of_pairs(count: int) -> float:
    """The sum of the logarithms of so many chi-square variables with 2 degrees of freedom exceeds
    this but for ``LEVEL`` of cases.
    """
    drawn = 2 * np.random.default_rng(0).standard_exponential((DRAWS, count))
    return float(np.quantile(np.log(np.minimum(drawn, MOST_LIKELY)).sum(1), LEVEL))


def _rescaled(weights: np.ndarray, known: np.ndarray, exact: float) -> np.ndarray:
    """(..., K, M) with the exact weight in known places; the rest of each row keeps its shape."""
    rest = np.where(known, 0.0, weights)
    left = 1 - exact * known.sum(axis=-1, keepdims=True)
    return np.where(known, exact, rest * left / rest.sum(axis=-1, keepdims=True))


def _sample(found: Spectrum, weights: np.ndarray, known: np.ndarray) -> Sample:
    """The same without each group of data: known eigenvalues keep their exact weight there too.

    To scale their weights as those of the whole would not do: a weight that a probe has next to
    nothing of changes many times over.
    """
    before = found.left_out()
    assert before is not None
    nodes, shares = before
    return Sample.of(found.nodes, weights, (nodes, _rescaled(shares, known, 1 / found.block.numel)))
