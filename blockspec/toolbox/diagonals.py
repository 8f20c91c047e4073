"""The diagonal of a curvature matrix by random probes, and its means over blocks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from blockspec.model.blocks import Block
from blockspec.model.objective import Objective
from blockspec.products.selection import OperatorSettings, open_operator
from blockspec.products.settings import takes
from blockspec.products.union import Union
from blockspec.spectra.collection import Cost
from blockspec.spectra.estimates import Estimates, frame_of
from blockspec.spectra.spectrum import estimate
from blockspec.toolbox.traces import checked_sampling, hutchinson_samples


@dataclass(frozen=True, eq=False)
class Diagonal:
    """The diagonal, entry by entry and on average.

    values: parameter name -> estimate of the diagonal, in the parameter's shape; 0 outside of the blocks.
    stderrs: their standard errors over probes; None for one probe.
    means: block name -> mean of the diagonal over the block.
    sums: (K, n) each probe's sum over each block.
    """

    values: dict[str, Tensor] = field(repr=False)
    stderrs: dict[str, Tensor] | None = field(repr=False)
    means: Estimates
    sums: np.ndarray = field(repr=False)
    blocks: tuple[Block, ...] = field(repr=False)

    def grouped(self, key: Callable[[Block], Hashable] = lambda block: block.kind) -> pd.DataFrame:
        """Mean and standard error over the parameters of all blocks with the same key: their kind, if left out. Errors of
        blocks are correlated, so theirs do not follow from those of the blocks."""
        groups: dict[Hashable, list[int]] = {}
        for place, block in enumerate(self.blocks):
            groups.setdefault(key(block), []).append(place)
        rows = {}
        for name, places in groups.items():
            numel = sum(self.blocks[place].numel for place in places)
            mean = estimate(self.sums[:, places].sum(1) / numel)
            rows[name] = (
                len(places),
                numel,
                mean.value,
                np.nan if mean.stderr is None else mean.stderr,
            )
        return pd.DataFrame.from_dict(
            rows, orient="index", columns=["blocks", "numel", "value", "stderr"]
        )

    def frame(self) -> pd.DataFrame:
        """A row a block: kind, layer, numel, mean, stderr."""
        return frame_of(self.blocks, self.means.values())


@takes(settings=OperatorSettings)
def diagonal(
    objective: Objective | None,
    blocks: Sequence[Block] | Block,
    *,
    num_probes: int = 32,
    tolerance: float | None = None,
    seed: int = 0,
    settings: OperatorSettings,
    progress: Callable[[int], None] | None = None,
) -> Diagonal:
    """The diagonal: mean of ``v * (H v)`` over Rademacher probes v (Bekas, Kokiopoulou, Saad 2007); the variance of an entry is
    the sum of the squares of the other entries of its row, so single entries need many probes and means over blocks few.

    blocks: whose means are wanted, from :func:`blockspec.partition`; blocks of several partitions may be given at once
        (``[*partition(model, "head"), *partition(model, "neuron")]``). Parameters outside of them are left alone.
    num_probes: full products, one each.
    tolerance: None, or end when the standard error of every block's mean is below it, relative to the larger of the mean's
        magnitude and the Frobenius norm of the block's rows over the number of its parameters; then ``num_probes`` is the most.
    [settings]
    seed, progress: as for :func:`blockspec.trace`, whose probes these are: the mean times ``numel`` is the trace.
    """
    sampling = checked_sampling(num_probes, tolerance, seed, progress)
    operator, blocks = open_operator(objective, blocks, settings)
    union = Union(operator, blocks)
    mean = torch.zeros(union.block.numel, dtype=union.dtype, device=union.device)
    spread = torch.zeros_like(mean)
    sums: list[np.ndarray] = []
    for sample, sample_sums in hutchinson_samples(union, operator, sampling):
        sums.append(sample_sums)
        before = sample - mean  # Welford (1962): one pass, no cancellation
        mean.add_(before, alpha=1 / len(sums))
        spread.addcmul_(before, sample - mean)
    count = len(sums)
    stderrs = union.tensors((spread / (count * (count - 1))).sqrt()) if count > 1 else None
    sizes = np.array([block.numel for block in blocks])
    means = [estimate(column) for column in (np.array(sums) / sizes).T]
    cost = Cost(operator.gradients, operator.products)
    by_block = Estimates(blocks, means, probes=[count] * len(blocks), cost=cost)
    return Diagonal(union.tensors(mean), stderrs, by_block, np.array(sums), blocks)
