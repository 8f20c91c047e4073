"""Densities as they are drawn and compared: no finer than Lanczos resolves them."""

from __future__ import annotations

import math

import numpy as np

from blockspec.numerics.flat_tops import drawn
from blockspec.numerics.jackknife import FEWEST_UNITS, jackknife_errors
from blockspec.spectra.spectrum import RESOLUTION, Spectrum

POINTS = 1200  # of a curve; 3 to 15 a width of smoothing


def even_grid(low: float, high: float, linear: float, points: int = POINTS) -> np.ndarray:
    """(points,) eigenvalues that are even on the scale asinh(x / linear)."""
    return linear * np.sinh(
        np.linspace(np.arcsinh(low / linear), np.arcsinh(high / linear), points)
    )


def resolution(spectrum: Spectrum) -> float:
    """How closely the bulk is known, in units of an eigenvalue: the mean residual of its nodes by
    weight.

    It is at least ``RESOLUTION`` of the largest magnitude, and 1 for a block of zeros.
    """
    known = float((spectrum.weights * spectrum.residuals).sum() / spectrum.num_probes)
    return max(known, RESOLUTION * spectrum.norm) or 1.0


def resolved_density(
    spectrum: Spectrum, grid: np.ndarray, linear: float, *, like: Spectrum | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The density at the eigenvalues ``grid`` (G,), as it is drawn: that of
    :meth:`Spectrum.density` with its error.

    Args:
        spectrum: Of one block, or a mixture.
        grid: In units of an eigenvalue. The density is per unit of eigenvalue, whatever the scale
            of an axis.
        linear: Where the scale of the axis turns from linear to logarithmic; around zero no node is
            drawn finer than a twentieth of it.
        like: A spectrum to compare with: the density is not drawn finer than that one is.

    Returns:
        Mean (G,) and total standard error (G,), over probes and over the data; where there is one
        probe, or the data's error is not known, without that part.
    """
    widths = _widths(spectrum, linear, like)
    tops = spectrum.flat_tops(widths, linear)
    densities = _drawn(spectrum, widths, tops, grid)
    probes = len(densities)
    error = densities.std(0, ddof=1) / math.sqrt(probes) if probes > 1 else np.zeros(len(grid))
    mean = densities.mean(0)
    without = spectrum.left_out()
    if without is not None and len(without[0]) >= FEWEST_UNITS:
        flat = zip(*(array.reshape(len(array), -1) for array in without), strict=True)
        left_out = np.stack([drawn(n, w, widths.ravel(), tops, grid) for n, w in flat]) / probes
        error = np.hypot(error, jackknife_errors(mean, left_out))
    return mean, error


def resolved_mean(
    spectrum: Spectrum, grid: np.ndarray, linear: float, *, like: Spectrum | None = None
) -> np.ndarray:
    """(G,) the mean of :func:`resolved_density` alone."""
    widths = _widths(spectrum, linear, like)
    return _drawn(spectrum, widths, spectrum.flat_tops(widths, linear), grid).mean(0)


def _drawn(
    spectrum: Spectrum, widths: np.ndarray, tops: np.ndarray, grid: np.ndarray
) -> np.ndarray:
    """(K, G)"""
    rows = zip(spectrum.nodes, spectrum.weights, widths, strict=True)
    return np.stack([drawn(*row, tops, grid) for row in rows])


def _widths(spectrum: Spectrum, linear: float, like: Spectrum | None) -> np.ndarray:
    """(K, M)"""
    widths = spectrum.widths(linear)
    if like is None:
        return widths
    order = np.argsort(like.nodes, axis=None)
    other = like.widths(linear).ravel()[order]
    return np.maximum(widths, np.interp(spectrum.nodes, like.nodes.ravel()[order], other))
