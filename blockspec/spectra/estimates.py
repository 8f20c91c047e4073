"""Numbers of many blocks, each with its standard error, and what they took."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from blockspec.model.pieces import Block
from blockspec.spectra.collection import Cost
from blockspec.spectra.spectrum import Estimate


class Estimates(Mapping[str, Estimate]):
    """Estimates by block name, in the order of the blocks; read-only.

    cost: products and gradients that they took. probes: of each block, how many samples its
        standard error rests on.
    positive: they are of numbers that cannot be negative.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        values: Sequence[Estimate],
        *,
        probes: Sequence[int],
        cost: Cost,
        positive: bool = False,
    ) -> None:
        self._values = {block.name: value for block, value in zip(blocks, values, strict=True)}
        self._blocks = tuple(blocks)
        self.probes = {block.name: count for block, count in zip(blocks, probes, strict=True)}
        self.cost = cost
        self.positive = positive

    def __getitem__(self, name: str) -> Estimate:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Estimates({self._values})"

    def interval(self, name: str, confidence: float = 0.95) -> tuple[float, float]:
        """Of one block; see :func:`interval`."""
        return interval(self[name], self.probes[name], confidence, positive=self.positive)

    def frame(self) -> pd.DataFrame:
        """A row a block: kind, layer, numel, value, stderr (nan where it cannot be known)."""
        return frame_of(self._blocks, self._values.values())


def frame_of(blocks: Sequence[Block], values: Iterable[Estimate]) -> pd.DataFrame:
    """A row a block, with its estimate."""
    rows = [
        (b.name, b.kind, b.layer, b.numel, v.value, np.nan if v.stderr is None else v.stderr)
        for b, v in zip(blocks, values, strict=True)
    ]
    table = pd.DataFrame(rows, columns=["block", "kind", "layer", "numel", "value", "stderr"])
    return table.astype({"layer": "Int64"}).set_index("block")


def interval(
    value: Estimate, samples: int, confidence: float = 0.95, *, positive: bool = False
) -> tuple[float, float]:
    """Ends of the interval by Student's t that holds the truth with this confidence; nan where it
    cannot be known.

    positive: take it on the logarithmic scale. Squared norms of few samples are skewed, like a
    chi-square with one degree of freedom where one eigenvalue dominates: of 8 samples, the plain
    interval then holds the truth in 85 %, this one in 91 %.
    """
    if value.stderr is None:
        return np.nan, np.nan
    if value.stderr == 0:
        return value.value, value.value
    reach = float(stdtrit(samples - 1, (1 + confidence) / 2)) * value.stderr
    if not positive:
        return value.value - reach, value.value + reach
    factor = np.exp(min(reach / value.value, 700.0))
    return value.value / factor, value.value * factor
