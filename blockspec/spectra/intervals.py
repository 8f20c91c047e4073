"""Intervals that hold the number of the population, with the error of the estimate and that of the
data together.

The idea. Each of the two errors has an interval of its own, which need not be symmetric, and the
distances of their ends from the value add up like the legs of a right triangle (Zou and Donner
2008). A plain "value plus or minus two standard errors" fails in two ways:

1. Few probes. Where one eigenvalue makes most of a trace, a probe sees it times a chi-square
   variable, and four such numbers say little about how far their mean lies from the truth. But the
   spectrum is known, and with it the variance of a probe; the mean of K is about a gamma variable.
2. Few units of data with a heavy tail. Their mean is most often too small, and its standard error
   with it. The end on the side of the tail is moved out by what their skewness says (Johnson 1978).

And the bias of few data, as far as the jackknife sees it, moves the end on its side out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.special import gammaincinv, stdtrit

from blockspec.numerics.jackknife import FEWEST_UNITS, MOST_GROUPS, shift_by_skewness

if TYPE_CHECKING:
    from blockspec.spectra.spectrum import Estimate, Spectrum

ONE_SIGN = 0.8  # of the mean magnitude: such a mean is made of parts of one sign, and skewed
NUMBERS = ("trace", "root_mean_square", "largest", "smallest")


class Reach(NamedTuple):
    """How far the truth may lie below a value, and above it."""

    below: float
    above: float

    def and_(self, other: Reach) -> Reach:
        """Of two errors that are independent."""
        return Reach(*map(math.hypot, self, other))


def interval_of(spectrum: Spectrum, number: str, confidence: float) -> tuple[float, float]:
    """See :meth:`blockspec.Spectrum.interval`."""
    if number not in NUMBERS:
        raise ValueError(f"number is one of {NUMBERS}, got {number!r}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is between 0 and 1 (both excluded), got {confidence}")
    without = spectrum.left_out()
    if without is None or len(without[0]) < FEWEST_UNITS:
        return math.nan, math.nan
    if number in ("largest", "smallest"):
        extreme = np.max if number == "largest" else np.min
        value, residual, _ = getattr(spectrum, number)
        left_out, own = extreme(without[0], (1, 2)), Reach(residual, residual)
    else:
        function, back = MEANS[number]
        numel = spectrum.block.numel
        mean = spectrum.mean(lambda nodes: function(numel, nodes))
        left_out = back(spectrum.means_left_out(lambda nodes: function(numel, nodes)))
        value = float(back(mean.value))
        low, high = of_probes(spectrum, lambda nodes: function(numel, nodes), confidence)
        own = Reach(value - float(back(low)), float(back(high)) - value)
    reach = own.and_(of_data(value, left_out, confidence))
    return value - reach.below, value + reach.above


MEANS: dict[str, tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]] = {
    "trace": (lambda numel, nodes: numel * nodes, lambda mean: mean),
    "root_mean_square": (
        lambda _, nodes: nodes**2,
        lambda mean: np.sqrt(np.maximum(mean, 0.0)),
    ),
}
"""Number -> of which function of eigenvalues it is the mean, and what is made of the mean."""


def of_probes(
    spectrum: Spectrum, function: Callable[[np.ndarray], np.ndarray], confidence: float
) -> tuple[float, float]:
    """Ends of the interval that holds the mean of a function over the eigenvalues of the given
    batches.

    The variance of one probe is that of a mean over the sphere, ``2 var(f) / (P + 2)``.
    """
    value = spectrum.mean(function).value
    rest = (~spectrum.known) * spectrum.weights
    share = float(rest.sum()) / spectrum.num_probes
    if spectrum.exact or share == 0:
        return value, value
    values = function(spectrum.nodes)
    mean, square = ((rest * f).sum() / rest.sum() for f in (values, values**2))
    numel = share * spectrum.block.numel
    variance = share**2 * 2 * max(square - mean**2, 0.0) / ((numel + 2) * spectrum.num_probes)
    tails = (1 - confidence) / 2, (1 + confidence) / 2
    if variance == 0:
        return value, value
    if abs(value) < ONE_SIGN * spectrum.mean(lambda nodes: np.abs(function(nodes))).value:
        # the variance is known as well as so many squares of normal variables foretell
        parts = numel * square**2 / float((rest * values**4).sum() / rest.sum())
        degrees = spectrum.num_probes * max(parts, 1.0)
        reach = float(stdtrit(degrees, tails[1])) * math.sqrt(variance)
        return value - reach, value + reach
    shape = value**2 / variance
    most = max(float(np.abs(values).max()) / abs(value), 1.0)  # no mean is above the largest part
    # a variable that is hardly ever so small is hardly ever below what rounding leaves
    small = max(float(gammaincinv(shape, tails[0])), shape / most)
    low, high = shape / float(gammaincinv(shape, tails[1])), shape / small
    ends = sorted((value * low, value * high))
    return ends[0], ends[1]


def of_data(value: float, left_out: np.ndarray, confidence: float) -> Reach:
    """From the number's values (n,) without each group of data."""
    count = len(left_out)
    moves = left_out.mean() - left_out  # as the groups' own values lie, in the same order
    stderr = math.sqrt((count - 1) * float((moves**2).mean()))
    if stderr == 0:
        return Reach(0.0, 0.0)
    student = float(stdtrit(count - 1, (1 + confidence) / 2))
    moved = shift_by_skewness(moves, student)
    # where the number grows when units are left out, it is too large
    bias = (count - 1) * (float(left_out.mean()) - value)
    return Reach(
        (student + max(-moved, 0.0)) * stderr + max(bias, 0.0),
        (student + max(moved, 0.0)) * stderr + max(-bias, 0.0),
    )


def total_interval(
    value: Estimate, probes: int, units: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Ends of the interval around a number with both errors that holds that of the population, by
    Student's t; nan where one of the errors is not known.

    Args:
        value: Of :func:`blockspec.js0`, or an entry of the toolbox.
        probes: The samples that ``stderr`` rests on.
        units: Of data; there are at most 32 groups of them.
        confidence: Between 0 and 1.

    The degrees of freedom are those of Welch and Satterthwaite: a small error that is hardly known
    does not widen the interval of a large one that is.
    """
    if value.stderr is None or value.data_stderr is None:
        return math.nan, math.nan
    variances = np.array([value.stderr**2, value.data_stderr**2])
    freedom = np.array([max(probes - 1, 1), max(min(units, MOST_GROUPS) - 1, 1)])
    if not variances.any():
        return value.value, value.value
    degrees = variances.sum() ** 2 / float((variances**2 / freedom).sum())
    reach = float(stdtrit(degrees, (1 + confidence) / 2)) * math.sqrt(variances.sum())
    return value.value - reach, value.value + reach
