"""Numbers of many blocks, each with its standard error, and what they took."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from .blocks import Block
from .spectra import Cost, Estimate


class Estimates(Mapping[str, Estimate]):
    """Estimates by block name, in the order of the blocks; read-only.

    cost: products and gradients that they took. probes: of each block, how many samples its standard error rests on.
    """

    def __init__(self, blocks: Sequence[Block], values: Sequence[Estimate], *, probes: Sequence[int], cost: Cost) -> None:
        self._values = {block.name: value for block, value in zip(blocks, values, strict=True)}
        self._blocks = tuple(blocks)
        self.probes = {block.name: count for block, count in zip(blocks, probes, strict=True)}
        self.cost = cost

    def __getitem__(self, name: str) -> Estimate:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Estimates({self._values})"

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
