"""Families of spectra to try error bars on: eigenvalues of matrices of any size, as a network has
them and as it has not.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

SINGLES = 300  # eigenvalues, the largest in magnitude, that are never put together
GROUPS = 500  # that the rest of a large matrix is put into

Family = Callable[[int, np.random.Generator], np.ndarray]
"""(P, random numbers) -> (P,) eigenvalues; only those of adversarial families are random."""


def _middles(size: int) -> np.ndarray:
    return (np.arange(size) + 0.5) / size


def semicircle(size: int, radius: float = 1.0) -> np.ndarray:
    """Quantiles of Wigner's law, by inverting its distribution function on a grid."""
    x = np.linspace(-1, 1, 4001)
    below = 0.5 + (x * np.sqrt(1 - x * x) + np.arcsin(x)) / np.pi
    return radius * np.interp(_middles(size), below, x)


def marchenko_pastur(size: int, ratio: float = 0.5) -> np.ndarray:
    """Quantiles of the law of sample covariances of ``ratio`` variables a sample."""
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    angle = np.linspace(0, np.pi, 4001)
    x = (low + high) / 2 - (high - low) / 2 * np.cos(angle)
    mass = np.sin(angle) ** 2 / x
    below = np.concatenate([[0], np.cumsum((mass[1:] + mass[:-1]) / 2)])
    return np.interp(_middles(size), below / below[-1], x) / high


def with_outliers(bulk: np.ndarray, outliers: np.ndarray) -> np.ndarray:
    """The bulk, with outliers in the place of evenly chosen ones of its eigenvalues."""
    values = bulk.copy()
    values[np.linspace(0, len(bulk) - 1, len(outliers)).astype(int)] = outliers
    return values


def trained(size: int) -> np.ndarray:
    """Magnitudes over four decades, one in ten negative, and eight outliers."""
    values = 0.05 * 10 ** (-4 * _middles(size)) * np.where(np.arange(size) % 10 == 0, -1, 1)
    return with_outliers(values, np.linspace(0.2, 1, 8))


def repeated(size: int, times: int) -> np.ndarray:
    bulk = 0.05 * 10 ** (-4 * _middles(size))
    return with_outliers(bulk, np.repeat(np.linspace(0.3, 1, 8), times))


def heavy_tails(size: int) -> np.ndarray:
    values = np.tan(np.pi * (_middles(size) - 0.5))
    return values / np.abs(values).max()


def bulk_and_outliers(size: int, random: np.random.Generator) -> np.ndarray:
    """A bulk of a random width, place and shape, and up to 40 outliers with a random power law, of
    both signs.
    """
    count = int(random.integers(1, min(40, size // 4)))
    outliers = np.arange(1, count + 1) ** -random.uniform(0, 2) * random.choice([-1, 1], count)
    if random.random() < 0.5:
        outliers = np.abs(outliers)
    width = 10 ** random.uniform(-4, -0.3)
    shape = random.choice(["semicircle", "uniform", "normal", "decades"])
    middles = _middles(size)
    bulk = {
        "semicircle": semicircle(size),
        "uniform": 2 * middles - 1,
        "normal": random.standard_normal(size) / 4,
        "decades": 10 ** (-3 * middles),
    }[shape]
    return with_outliers(width * (bulk + random.choice([0.0, random.uniform(-2, 2)])), outliers)


def clusters(size: int, random: np.random.Generator) -> np.ndarray:
    """Up to six clusters at random places, with random shares and widths."""
    count = int(random.integers(2, 7))
    places, widths = random.uniform(-1, 1, count), 10 ** random.uniform(-5, -1, count)
    chosen = random.choice(count, size, p=random.dirichlet(np.full(count, 0.5)))
    return places[chosen] + widths[chosen] * random.uniform(-1, 1, size)


FAMILIES: dict[str, Family] = {
    "semicircle": lambda p, _: semicircle(p),
    "Marchenko-Pastur": lambda p, _: marchenko_pastur(p),
    "uniform": lambda p, _: 2 * _middles(p) - 1,
    "projection of rank P/2": lambda p, _: (np.arange(p) % 2).astype(float),
    "plus and minus one": lambda p, _: np.where(np.arange(p) % 2, 1.0, -1.0),
    "rank P/10": lambda p, _: np.where(np.arange(p) < p // 10, semicircle(p) + 1.2, 0.0),
    "half zero": lambda p, _: np.where(np.arange(p) % 2, marchenko_pastur(p), 0.0),
    "power law 1": lambda p, _: np.arange(1, p + 1.0) ** -1,
    "power law 2": lambda p, _: np.arange(1, p + 1.0) ** -2,
    "exponential": lambda p, _: 0.9 ** np.arange(p),
    "Cauchy": lambda p, _: heavy_tails(p),
    "trained": lambda p, _: trained(p),
    "initial": lambda p, _: with_outliers(semicircle(p, 0.3), np.array([1.0])),
    "narrow bulk, 30 outliers": lambda p, _: with_outliers(
        semicircle(p, 1.5e-3), 1 / np.arange(1, min(30, p // 3) + 1)
    ),
    "narrow bulk, one outlier": lambda p, _: with_outliers(semicircle(p, 1e-3), np.array([1.0])),
    "outliers three times": lambda p, _: repeated(p, 3),
    "outliers of both signs": lambda p, _: with_outliers(
        semicircle(p, 0.05), np.linspace(-1, 1, 12)
    ),
    "two narrow clusters": lambda p, _: np.where(np.arange(p) % 3, 1.0, -0.5) + semicircle(p, 0.01),
    "random bulk and outliers": bulk_and_outliers,
    "random clusters": clusters,
}


def lognormal(size: int, random: np.random.Generator) -> np.ndarray:
    values = np.exp(2.5 * random.standard_normal(size))
    return values / values.max()


def pareto(size: int, random: np.random.Generator) -> np.ndarray:
    values = (1 - random.random(size)) ** -1.2 * random.choice([-1, 1], size, p=[0.2, 0.8])
    return values / np.abs(values).max()


def stairs(size: int, random: np.random.Generator) -> np.ndarray:
    """Steps of very unequal widths and heights."""
    heights = np.sort(random.random(6)) ** 3
    return np.repeat(heights / heights[-1], size // 6 + 1)[:size]


def one_pair_on_top(size: int, random: np.random.Generator) -> np.ndarray:
    """Single outliers, of which the largest stands there twice."""
    values = with_outliers(1e-3 * (2 * _middles(size) - 1), random.random(20) * 0.5)
    values[:2] = 1.0
    return values


HELD_OUT: dict[str, Family] = {
    "log-normal": lognormal,
    "Pareto": pareto,
    "stairs": stairs,
    "one pair on top": one_pair_on_top,
}
"""Drawn anew each time, and never looked at when a rule or a constant was chosen."""


def grouped(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) distinct places and how many eigenvalues each stands for: of a large matrix, all but the
    largest are put into groups, each with the mean of its eigenvalues. Small repeated ones stay
    apart, because a start vector sees only one direction of them.
    """
    places, counts = np.unique(values, return_counts=True)
    few = counts <= 16
    places = np.concatenate([places[~few], np.repeat(places[few], counts[few])])
    counts = np.concatenate([counts[~few], np.ones(int(counts[few].sum()), int)])
    if len(places) <= SINGLES + GROUPS:
        return places, counts
    order = np.argsort(-np.abs(places) - 10.0 * (counts > 16), kind="stable")
    single, rest = order[:SINGLES], order[SINGLES:]
    rest = rest[np.argsort(places[rest])]
    bounds = np.linspace(0, len(rest), GROUPS + 1).astype(int)[:-1]
    sizes = np.add.reduceat(counts[rest], bounds)
    means = np.add.reduceat(places[rest] * counts[rest], bounds) / sizes
    return np.concatenate([places[single], means]), np.concatenate([counts[single], sizes])
