"""Exact weights after the fact.

The idea. Most of a probe's noise is the random share that each of the largest eigenvalues has in
it: a chi-square variable over P, where the truth is 1 / P. Where Lanczos has found an eigenvalue,
its weight need not be taken from the probe: it is 1 / P, and what is left of the probe is a random
vector of the complement. No product is needed for that.

The catch. A Krylov space holds one vector of each eigenspace, so that an eigenvalue that stands
there several times looks like a single one with more weight; and chance gives that to single ones
too. One weight tells nothing. All weights together do: they are put right where they would be too
small for pairs, in 95 of 100 cases, whatever the probes. Else they stay as they were drawn.
(Blocks whose first probe found eigenvectors need none of this, see
:mod:`blockspec.engine.deflation`.)
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import gammaincinv

from blockspec.numerics.measures import SAME
from blockspec.spectra.data import Sample

if TYPE_CHECKING:
    from blockspec.spectra.spectrum import Spectrum

CERTAIN = 1e-5  # residual of an eigenvalue that is found, relative to the norm
ROUNDED = {"float64": 0.0, "float32": 2e-5}  # what of the residuals may be rounding of the matrix
# a single eigenvalue's share of a probe exceeds this many times 1 / P once in 200; more are several
# in one
SIMPLE = 8.0
LEVEL = 0.05  # of pairs that pass for single eigenvalues
MOST = 1 / 4  # of all eigenvalues that may be known: the rest must be a measure to rescale


def with_exact_weights(found: Spectrum) -> Spectrum:
    """The spectrum, its eigenvalues that every probe has found with the weight 1 / P; as it is
    where none are known to be single.
    """
    if not found.reorthogonalized or found.known.any() or found.dtype not in ROUNDED:
        return found
    places = _common(found)
    places = places[_are_single(found, places)]
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


def _are_single(found: Spectrum, places: np.ndarray) -> np.ndarray:
    """(c,) which of these are taken for single eigenvalues: those whose pooled weight is at most
    ``SIMPLE`` / P, if the sum of |value| weight would be too small for pairs; else none.

    Of pairs, that sum is 1 / P times a sum of chi-square variables with 2 degrees of freedom for
    each probe; a gamma variable has its mean and its variance.
    """
    rows = np.arange(found.num_probes)
    weights = found.weights[rows, places].mean(axis=1) * found.block.numel
    single = weights <= SIMPLE
    sizes = np.abs(found.nodes[0, places[:, 0]])[single]
    if not sizes.any():
        return np.zeros(len(places), bool)
    mean = 2 * sizes.sum()
    shape = found.num_probes * sizes.sum() ** 2 / (sizes**2).sum()
    least = mean * gammaincinv(shape, LEVEL) / shape
    return single & (sizes @ weights[single] <= least)


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
