"""The jackknife: how much a number would differ on another sample of units of data.

The number is computed again without each unit. The spread of these values says how far the number
lies from that of another sample (Tukey 1958). It is on the safe side: its mean is at least the
variance, for any function of independent units (Efron and Stein 1981).
"""

from __future__ import annotations

import math

import numpy as np

FEWEST_UNITS = 8  # before a standard error over units is believed
MOST_GROUPS = 32  # that units are put into: 31 degrees of freedom, and memory that has a bound


def jackknife_stderr(left_out: np.ndarray) -> float | None:
    """Standard error over units of a number, from its values (n,) without each of them; None where
    the units are too few.
    """
    if len(left_out) < FEWEST_UNITS:
        return None
    return math.sqrt((len(left_out) - 1) * float(np.var(left_out)))


def jackknife_error(value: float, left_out: np.ndarray) -> float | None:
    """Root mean square error over samples of units: :func:`jackknife_stderr` and, where the number
    is no mean over units, its bias.

    An extreme eigenvalue is further out on few data than on many, and a second moment larger. The
    bias is how much the number grows when a unit is left out, times the units that are left.
    """
    stderr = jackknife_stderr(left_out)
    if stderr is None:
        return None
    return math.hypot(stderr, (len(left_out) - 1) * (float(np.mean(left_out)) - value))


def jackknife_errors(values: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """:func:`jackknife_error` of many numbers (...,) at once, from their values (n, ...) without
    each unit; nan where the units are too few.
    """
    rest = len(left_out) - 1
    if rest + 1 < FEWEST_UNITS:
        return np.full(np.shape(values), np.nan)
    return np.hypot(np.sqrt(rest * left_out.var(0)), rest * (left_out.mean(0) - values))


def shift_by_skewness(moves: np.ndarray, student: float) -> float:
    """By how many standard errors the end of an interval lies further out on the side of a heavy
    tail (Johnson 1978); negative where that is the lower side.

    Args:
        moves: (n,) by what each group moves a number, of mean zero and not all zero.
        student: Quantile of Student's t with n - 1 degrees of freedom.
    """
    skewness = float((moves**3).mean() / (moves**2).mean() ** 1.5)
    return skewness * (2 * student**2 + 1) / (6 * math.sqrt(len(moves)))
