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
from blockspec.numerics.algorithms import Progress
from blockspec.numerics.progress import shows_progress
from blockspec.products.selection import OperatorSettings, check_of, open_operator
from blockspec.products.settings import takes
from blockspec.products.shares import Shares
from blockspec.products.union import Union
from blockspec.spectra.collection import Cost
from blockspec.spectra.estimates import Estimates, frame_of, signs_of
from blockspec.spectra.spectrum import estimate
from blockspec.toolbox.sampling import Sampling
from blockspec.toolbox.traces import (
    Sample,
    certain,
    hutchinson_samples,
    with_data,
    without_groups,
)


@dataclass(frozen=True, eq=False)
class Diagonal:
    """The diagonal, entry by entry and on average.

    Args:
        values: Parameter name -> estimate of the diagonal, in the parameter's shape; 0 outside of
            the blocks.
        stderrs: Their standard errors over probes; None for one probe.
        means: Block name -> mean of the diagonal over the block.
        sums: (K, n) each probe's sum over each block.
        left_out: (g, n) the mean over probes of these, without each of g groups of data; None where
            units of data were not told apart, or are fewer than 8.
    """

    values: dict[str, Tensor] = field(repr=False)
    stderrs: dict[str, Tensor] | None = field(repr=False)
    means: Estimates
    sums: np.ndarray = field(repr=False)
    blocks: tuple[Block, ...] = field(repr=False)
    left_out: np.ndarray | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        total = sum(block.numel for block in self.blocks)
        return (
            f"Diagonal of {len(self.blocks)} blocks ({total:,} parameters), {len(self.sums)} "
            f"probe(s); means by block: {self.means!r}"
        )

    def grouped(self, key: Callable[[Block], Hashable] = lambda block: block.kind) -> pd.DataFrame:
        """Mean and standard errors over the parameters of all blocks with the same key: their kind,
        if left out. Errors of blocks are correlated, so theirs do not follow from those of the
        blocks.
        """
        groups: dict[Hashable, list[int]] = {}
        for place, block in enumerate(self.blocks):
            groups.setdefault(key(block), []).append(place)
        rows = {}
        for name, places in groups.items():
            numel = sum(self.blocks[place].numel for place in places)
            mean = estimate(self.sums[:, places].sum(1) / numel)
            if self.left_out is not None:
                mean = with_data(mean, self.left_out[:, places].sum(1) / numel)
            rows[name] = (len(places), numel, *mean)
        columns = ["blocks", "numel", "value", "stderr", "data_stderr"]
        table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
        return table.astype({"stderr": float, "data_stderr": float})

    def to_frame(self) -> pd.DataFrame:
        """A row a block: kind, layer, numel, mean, stderr, data_stderr."""
        return frame_of(self.blocks, self.means.values())


@shows_progress("diagonal")
@takes(sampling=Sampling, settings=OperatorSettings)
def diagonal(
    objective: Objective | None,
    blocks: Sequence[Block] | Block,
    *,
    sampling: Sampling,
    settings: OperatorSettings,
    progress: Progress | None = None,
) -> Diagonal:
    """The diagonal of a curvature matrix: the mean of ``v * (H v)`` over Rademacher probes v
    (Bekas, Kokiopoulou, Saad 2007).

    The variance of an entry is the sum of the squares of the other entries of its row. Single
    entries therefore need many probes, and means over blocks few. The probes are those of
    :func:`blockspec.trace` with the same seed: a block's mean times its ``numel`` is its trace.

    Args:
        objective: What is differentiated. None where ``curvature`` is an operator that belongs to
            no model.
        blocks: Whose means are wanted, from :func:`blockspec.partition`. Blocks of several
            partitions may be given at once (``[*partition(model, "head"), *partition(model,
            "neuron")]``). Parameters outside of them are left alone.
        [settings]
        progress: Called with (products done, products in all or None where that is unknown).

    The size that ``tolerance`` is relative to is the larger of the mean's magnitude and the
    Frobenius norm of the block's rows over the number of its parameters.

    Returns:
        The diagonal in the shapes of the parameters, and its mean over each block, with standard
        errors.

    Raises:
        ValueError: A setting is out of range; and as :func:`blockspec.estimate_spectra` does.
    """
    operator, blocks = open_operator(objective, blocks, settings)
    union = Union(operator, blocks)
    mean = torch.zeros(union.block.numel, dtype=union.dtype, device=union.device)
    spread = torch.zeros_like(mean)
    shares = Shares(operator, wanted=sampling.data_errors)
    samples: list[Sample] = []
    for sample in hutchinson_samples(union, shares, sampling, progress):
        samples.append(sample._replace(product=torch.empty(0)))
        before = sample.product - mean  # Welford (1962): one pass, no cancellation
        mean.add_(before, alpha=1 / len(samples))
        spread.addcmul_(before, sample.product - mean)
    count, sums = len(samples), np.array([sample.sums for sample in samples])
    stderrs = union.tensors(_stderrs(union, spread, count)) if count > 1 else None
    sizes = np.array([block.numel for block in blocks])
    left_out = without_groups(samples, shares)
    totals = certain(union, operator, sampling, sums)
    if left_out is not None:
        totals = [with_data(t, without) for t, without in zip(totals, left_out.T, strict=True)]
    means = [total.scaled(1 / size) for total, size in zip(totals, sizes, strict=True)]
    cost = Cost(operator.gradients, operator.products, check_of(operator))
    by_block = Estimates(
        blocks,
        means,
        probes=[count] * len(blocks),
        cost=cost,
        signs=[signs_of(samples) for samples in sums.T],  # of traces, but for a factor
        units=shares.units,
    )
    return Diagonal(union.tensors(mean), stderrs, by_block, sums, blocks, left_out)


def _stderrs(union: Union, spread: Tensor, count: int) -> Tensor:
    """(P,) from the sums of squared deviations.

    Samples of an entry may be equal by chance; so the mean variance of its parameter tensor counts
    with one degree of freedom beside the entry's own.
    """
    pooled = torch.cat(
        [part.mean().expand(part.numel()) for part in union.tensors(spread).values()]
    )
    return ((spread + pooled / (count - 1)) / count**2).sqrt()
