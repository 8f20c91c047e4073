"""How far a curvature matrix is from block diagonal: Frobenius norms of all blocks, on and off the
diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch

from blockspec.model.blocks import Block
from blockspec.model.objective import Objective
from blockspec.numerics.algorithms import Progress
from blockspec.numerics.probes import draw_probe
from blockspec.numerics.progress import shows_progress
from blockspec.products.operators import Operator
from blockspec.products.requests import block_dtype
from blockspec.products.selection import OperatorSettings, check_of, open_operator
from blockspec.products.settings import takes
from blockspec.products.union import Union
from blockspec.spectra.collection import Cost
from blockspec.spectra.estimates import interval
from blockspec.spectra.notebook import html
from blockspec.spectra.spectrum import Estimate, estimate
from blockspec.toolbox.sampling import Sampling

MOST_AT_ONCE = 16  # products of one sweep


@dataclass(frozen=True, eq=False)
class Coupling:
    """Squared Frobenius norms of the blocks H_bc between n disjoint blocks, from K probes.

    Args:
        samples: (K, n, n) symmetric; each probe's estimates of ``||H_bc||_F^2``.
        blocks: What rows and columns stand for.
        curvature: Of which matrix.
        cost: What it took.
    """

    blocks: tuple[Block, ...]
    samples: np.ndarray = field(repr=False)
    curvature: str
    cost: Cost

    @property
    def squared_norms(self) -> pd.DataFrame:
        """(n, n) estimates of ``||H_bc||_F^2``; without bias."""
        return self._table(self.samples.mean(0))

    @property
    def squared_stderrs(self) -> pd.DataFrame:
        """(n, n) their standard errors; nan for one probe."""
        count = len(self.samples)
        if count < 2:
            return self._table(np.full(self.samples.shape[1:], np.nan))
        return self._table(self.samples.std(0, ddof=1) / math.sqrt(count))

    @property
    def norms(self) -> pd.DataFrame:
        """(n, n) estimates of ``||H_bc||_F``."""
        return self._table(np.sqrt(self.samples.mean(0)))

    @property
    def stderrs(self) -> pd.DataFrame:
        """(n, n) standard errors of :attr:`norms`, to first order."""
        norms = self.norms
        return self.squared_stderrs / (2 * norms.where(norms > 0, 1.0))

    def interval(self, row: str, column: str, confidence: float = 0.95) -> tuple[float, float]:
        """Of ``||H_bc||_F``; see :func:`blockspec.spectra.estimates.interval`."""
        place = self._names.index(row), self._names.index(column)
        squared = estimate(self.samples[:, *place])
        low, high = interval(squared, len(self.samples), confidence, one_sign=True)
        return math.sqrt(low), math.sqrt(high)

    @property
    def relative(self) -> pd.DataFrame:
        """(n, n) ``||H_bc|| / sqrt(||H_bb|| ||H_cc||)``: 1 on the diagonal; at most about 1 off it
        where the matrix is positive semi-definite (Cauchy-Schwarz), however different the blocks'
        own scales are. 0 for blocks of zeros.
        """
        norms = self.norms.to_numpy()
        own = np.sqrt(np.outer(norms.diagonal(), norms.diagonal()))
        return self._table(np.divide(norms, own, out=np.zeros_like(norms), where=own > 0))

    @property
    def off_diagonal_share(self) -> Estimate:
        """Share of the squared Frobenius norm that lies off the block diagonal: 0 for a block
        diagonal matrix.

        A share of few random samples is biased: with one probe it can be twice the truth. With two
        probes and more, the jackknife takes most of that away and gives the standard error.
        """
        total = self.samples.sum((1, 2))
        off = total - np.trace(self.samples, axis1=1, axis2=2)
        if not total.any():
            return Estimate(0.0, None if len(total) < 2 else 0.0)
        value = float(off.sum() / total.sum())
        if len(total) < 2:
            return Estimate(value, None)
        left_out = (off.sum() - off) / (total.sum() - total)
        corrected = len(total) * value - (len(total) - 1) * float(left_out.mean())
        stderr = math.sqrt((len(total) - 1) * left_out.var())
        return Estimate(min(max(corrected, 0.0), 1.0), stderr)

    def grouped(self, key: Callable[[Block], Hashable]) -> Coupling:
        """The same between groups of blocks, those with equal ``key(block)``: their squared norms
        add up. For example ``lambda block: block.kind`` or ``lambda block: block.layer``.
        """
        groups: dict[Hashable, list[int]] = {}
        for place, block in enumerate(self.blocks):
            groups.setdefault(key(block), []).append(place)
        member = np.zeros((len(groups), len(self.blocks)))
        for row, places in zip(member, groups.values(), strict=True):
            row[places] = 1
        blocks = tuple(
            _merged(str(name), [self.blocks[p] for p in places]) for name, places in groups.items()
        )
        return replace(self, blocks=blocks, samples=member @ self.samples @ member.T)

    def to_frame(self) -> pd.DataFrame:
        """A row a pair of blocks: row, column, their kinds and layers, norm, stderr, squared_norm,
        squared_stderr, relative.
        """
        columns = {"norm": self.norms, "stderr": self.stderrs}
        columns |= {
            "squared_norm": self.squared_norms,
            "squared_stderr": self.squared_stderrs,
            "relative": self.relative,
        }
        pairs = pd.MultiIndex.from_product([self._names, self._names], names=["row", "column"])
        table = pd.DataFrame(
            {name: square.to_numpy().ravel() for name, square in columns.items()}, index=pairs
        ).reset_index()
        for side in ("row", "column"):
            for what in ("kind", "layer"):
                table[f"{side}_{what}"] = table[side].map(
                    {block.name: getattr(block, what) for block in self.blocks}
                )
        return table.astype({"row_layer": "Int64", "column_layer": "Int64"})

    def _repr_html_(self) -> str:
        share = self.off_diagonal_share
        error = "not known" if share.stderr is None else f"{share.stderr:.2g}"
        told = f"{share.value:.3g} ± {error} of the squared norm lies off the block diagonal."
        return html(f"{told} Relative norms of the blocks:", self.relative)

    @property
    def _names(self) -> list[str]:
        return [block.name for block in self.blocks]

    def _table(self, values: np.ndarray) -> pd.DataFrame:
        return pd.DataFrame(values, index=self._names, columns=self._names)


def _merged(name: str, blocks: Sequence[Block]) -> Block:
    kinds, layers = {block.kind for block in blocks}, {block.layer for block in blocks}
    kind = kinds.pop() if len(kinds) == 1 else "other"
    layer = layers.pop() if len(layers) == 1 else None
    pieces = tuple(piece for block in blocks for piece in block.pieces)
    return Block(name, kind, layer, sum(block.numel for block in blocks), pieces)


@shows_progress("coupling")
@takes(settings=OperatorSettings)
def coupling(
    objective: Objective | None,
    blocks: Sequence[Block],
    num_probes: int = 8,
    *,
    seed: int = 0,
    settings: OperatorSettings,
    progress: Progress | None = None,
) -> Coupling:
    """Frobenius norms of all cross blocks H_bc: the mean of ``||H_bc v||^2`` over Gaussian probes v
    on block c. One product of the full matrix with a probe that lives on c gives column c for all b
    at once, and both halves of the symmetric matrix are averaged.

    Args:
        blocks: Disjoint, from :func:`blockspec.partition`; what lies outside of them is left out of
            every number.
        num_probes: Of each block: the estimate takes ``num_probes * len(blocks)`` full products.
            Where one eigenvalue of ``H_cb H_bc`` dominates, a squared norm has a relative standard
            error of up to ``sqrt(2 / num_probes)``, and less where more share it. Sums of many
            blocks, such as :attr:`Coupling.off_diagonal_share`, are known better.
        seed: As for :func:`blockspec.trace`.
        [settings]
        progress: Called with (products done, products in all).

    Raises:
        ValueError: Overlapping blocks, and as :func:`blockspec.estimate_spectra` does.
    """
    sampling = Sampling(num_probes, seed=seed)
    operator, blocks = open_operator(objective, blocks, settings)
    union = Union(operator, blocks)
    if sum(block.numel for block in blocks) > union.covered:
        raise ValueError(
            "blocks overlap (is 'model' beside its parts?): coupling needs disjoint ones, e.g. of "
            "one partition"
        )
    samples = np.empty((sampling.num_probes, len(blocks), len(blocks)))
    requests = [(probe, place) for probe in range(num_probes) for place in range(len(blocks))]
    for done, (probe, place), column in _columns(operator, union, requests, seed):
        samples[probe, :, place] = column
        if progress is not None:
            progress(done, len(requests))
    symmetric = (samples + samples.transpose(0, 2, 1)) / 2
    return Coupling(
        blocks,
        symmetric,
        operator.curvature,
        Cost(operator.gradients, operator.products, check_of(operator)),
    )


def _columns(
    operator: Operator,
    union: Union,
    requests: Sequence[tuple[int, int]],
    seed: int,
) -> Iterator[tuple[int, tuple[int, int], np.ndarray]]:
    """For each (probe, block c): products done, the request, and ``||H_bc v||^2`` (n,) of all
    blocks b.
    """
    together = union.at_once(MOST_AT_ONCE)
    for start in range(0, len(requests), together):
        group = requests[start : start + together]
        sources = [
            (union.blocks[place], _probe(operator, union.blocks[place], probe, seed))
            for probe, place in group
        ]
        columns = operator.columns(sources, union.blocks)
        for done, (request, parts) in enumerate(zip(group, columns, strict=True), start + 1):
            yield (
                done,
                request,
                torch.stack([part.square().sum(dtype=torch.float64) for part in parts])
                .cpu()
                .numpy(),
            )


def _probe(operator: Operator, block: Block, number: int, seed: int) -> torch.Tensor:
    probe = draw_probe(block.name, block.numel, seed=seed, probe=number, distribution="gaussian")
    return probe.to(operator.device, block_dtype(operator.parameters, block))
