"""Distances between blocks that Lanczos resolves, and what they say of groups of blocks.

``blockspec.js_distances`` smooths every node alike, so that in a bulk that few steps do not resolve
it compares the places of single Ritz values. Here two blocks are compared at the resolution of the
coarser one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from blockspec import Estimate, js0, js_distances
from blockspec.spectra.heterogeneity import PAPER_WIDTH
from blockspec.spectra.resolved import resolution
from blockspec.spectra.spectrum import Spectrum

RESOLVED, DEFAULT, KL, PUBLISHED = (
    "resolved Jensen-Shannon",
    "jensen-shannon",
    "symmetrised-kl",
    "symmetrised-kl as published",
)
DEFINITIONS = (RESOLVED, DEFAULT, KL, PUBLISHED)

Spectra = Mapping[str, Spectrum]


def coarsest(spectra: Spectra) -> float:
    """The width that Lanczos resolves in every block, in units of an eigenvalue."""
    return max(resolution(part) for part in spectra.values() if not part.is_zero)


def distances(spectra: Spectra, definition: str) -> pd.DataFrame:
    """Distances by one of ``DEFINITIONS``.

    symmetrised-kl has the floor 1e-258 and the 50,000 points of the published code, and the width
    :func:`coarsest`; as published, the width is sqrt(1e-5) in units of an eigenvalue, whatever
    Lanczos resolves.
    """
    return js_distances(spectra, **_options(spectra, definition))


def _options(spectra: Spectra, definition: str) -> dict[str, Any]:
    if definition == RESOLVED:
        return {"definition": "resolved"}
    if definition == PUBLISHED:
        return {"definition": KL, "width": PAPER_WIDTH}
    return {"definition": definition, "width": coarsest(spectra)}


def mean_distance(spectra: Spectra, definition: str) -> Estimate:
    """JS^0: the mean over all pairs, with a standard error by jackknife over probes."""
    return js0(spectra, **_options(spectra, definition))


def heterogeneity(spectra: Spectra) -> pd.DataFrame:
    """A row a definition: JS^0 and its standard error over probes."""
    means = {definition: mean_distance(spectra, definition) for definition in DEFINITIONS}
    return pd.DataFrame(
        [{"definition": d, "js0": mean.value, "stderr": mean.stderr} for d, mean in means.items()]
    )


def tidy(table: pd.DataFrame) -> pd.DataFrame:
    """Distances (blocks x blocks) as columns block, other, distance."""
    return (
        table.rename_axis("block")
        .reset_index()
        .melt("block", var_name="other", value_name="distance")
    )


def square(rows: pd.DataFrame) -> pd.DataFrame:
    """The reverse of :func:`tidy`."""
    names = rows["block"].unique()
    return rows.pivot(index="block", columns="other", values="distance").loc[names, names]


def over_pairs(table: pd.DataFrame) -> np.ndarray:
    """The distances below the diagonal."""
    return table.to_numpy()[np.tril_indices(len(table), -1)]


def nearness(table: pd.DataFrame, pairs: Collection[tuple[str, str]]) -> tuple[float, float]:
    """How near the pairs of a group are.

    Returns:
        Their median distance over that of all pairs, and the probability that a pair of the group
        is nearer than one outside it (ties count half): 1 / 2 if they are like the others.
    """
    rows, columns = np.tril_indices(len(table), -1)
    wanted = {frozenset(pair) for pair in pairs}
    inside = np.array(
        [
            frozenset((table.index[i], table.index[j])) in wanted
            for i, j in zip(rows, columns, strict=True)
        ]
    )
    values = over_pairs(table)
    ranks, n, m = rankdata(values), inside.sum(), (~inside).sum()
    farther = (ranks[inside].sum() - n * (n + 1) / 2) / (n * m)  # Mann-Whitney
    return float(np.median(values[inside]) / np.median(values)), float(1 - farther)
