"""A fast part of ``python -m benchmarks.coverage``: what is said of errors is true, on spectra of
the benchmark and on some that no constant was chosen with.
"""

import numpy as np
import pytest

from benchmarks import coverage
from benchmarks.coverage import row, trials
from benchmarks.families import FAMILIES, with_outliers

LEAST, LOOSEST = 0.93, 2.5


def middles(size):
    return (np.arange(size) + 0.5) / size


def lognormal(size, random):
    values = np.exp(2.5 * random.standard_normal(size))
    return values / values.max()


def pareto(size, random):
    values = (1 - random.random(size)) ** -1.2 * random.choice([-1, 1], size, p=[0.2, 0.8])
    return values / np.abs(values).max()


def stairs(size, random):
    """Steps of very unequal widths and heights."""
    heights = np.sort(random.random(6)) ** 3
    return np.repeat(heights / heights[-1], size // 6 + 1)[:size]


def one_pair_on_top(size, random):
    """Single outliers, of which the largest stands there twice."""
    values = with_outliers(1e-3 * (2 * middles(size) - 1), random.random(20) * 0.5)
    values[:2] = 1.0
    return values


OWN = {f.__name__: f for f in (lognormal, pareto, stairs, one_pair_on_top)}
CHOSEN = (
    "trained", "projection of rank P/2", "outliers three times", "power law 2", "half zero",
    "narrow bulk, 30 outliers",
)  # fmt: skip


def covered(family, size, claim, seeds):
    tolerance = float(claim.split()[1]) if claim.startswith("auto") else None
    return row(trials(family, size, claim, seeds), tolerance)


def test_fixed_numbers_of_the_benchmark_s_families():
    """Each cell of 100 seeds, and how loose they are."""
    found = {family: covered(family, 500, "2,30", 100) for family in CHOSEN}
    for family, cell in found.items():
        assert cell["within the error"] >= LEAST, (family, cell)
    assert np.median([cell["looseness"] for cell in found.values()]) <= LOOSEST


def test_spectra_that_nobody_tuned_on(monkeypatch):
    """Drawn anew for each seed; all families together, and none of them far below."""
    monkeypatch.setattr(coverage, "FAMILIES", FAMILIES | OWN)
    found = [covered(family, 200, claim, 40) for family in OWN for claim in ("1,10", "4,20")]
    assert np.mean([cell["within the error"] for cell in found]) >= LEAST
    assert min(cell["within the error"] for cell in found) >= 0.85
    assert max(cell["worst"] for cell in found) < 2


@pytest.mark.parametrize(
    ("size", "tolerance", "seeds"), [(300, 2e-3, 4), (3000, 1e-2, 8), (100_000, 1e-2, 8)]
)
def test_auto_holds_its_tolerance(monkeypatch, size, tolerance, seeds):
    monkeypatch.setattr(coverage, "FAMILIES", FAMILIES | OWN)
    families = ("random bulk and outliers", *OWN)
    found = [covered(family, size, f"auto {tolerance:g}", seeds) for family in families]
    for what in ("within the error", "within the tolerance"):
        assert np.mean([cell[what] for cell in found]) >= LEAST
