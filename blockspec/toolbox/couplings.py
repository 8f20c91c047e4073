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
from blockspec.numerics.jackknife import jackknife_error
from blockspec.numerics.probes import draw_probe
from blockspec.numerics.progress import shows_progress
from blockspec.numerics.units import without_each
from blockspec.products.operators import Operator
from blockspec.products.requests import block_dtype
from blockspec.products.selection import OperatorSettings, check_of, open_operator
from blockspec.products.settings import takes
from blockspec.products.shares import SIZE, Shares, Sketch
from blockspec.products.union import Union
from blockspec.spectra.collection import Cost
from blockspec.spectra.data import told_of_units
from blockspec.spectra.estimates import SQUARES, interval
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
        left_out: (g + 1, n, n) the mean over probes without each of g groups of data, and in the
            last place with all of them, from sketches of the products: right to a few per cent.
            None where units of data were not told apart, or are fewer than 8.
        units: Of data; 0 where they were not told apart.
    """

    blocks: tuple[Block, ...]
    samples: np.ndarray = field(repr=False)
    curvature: str
    cost: Cost
    left_out: np.ndarray | None = field(default=None, repr=False)
    units: int = 0

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
        low, high = interval(squared, len(self.samples), confidence, signs=SQUARES)
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
        probes and more, the jackknife takes most of that away and gives the standard error. Noise
        of few data looks like coupling: the error of the data includes what it adds.
        """
        total = self.samples.sum((1, 2))
        off = total - np.trace(self.samples, axis1=1, axis2=2)
        data = self._share_data_stderr()
        if not total.any():
            return Estimate(0.0, None if len(total) < 2 else 0.0, data)
        value = float(off.sum() / total.sum())
        if len(total) < 2:
            return Estimate(value, None, data)
        left_out = (off.sum() - off) / (total.sum() - total)
        corrected = len(total) * value - (len(total) - 1) * float(left_out.mean())
        stderr = math.sqrt((len(total) - 1) * left_out.var())
        return Estimate(min(max(corrected, 0.0), 1.0), stderr, data)

    def _share_data_stderr(self) -> float | None:
        if self.left_out is None:
            return None
        total = self.left_out.sum((1, 2))
        within = np.trace(self.left_out, axis1=1, axis2=2)
        shares = 1 - np.divide(within, total, out=np.ones_like(total), where=total > 0)
        return jackknife_error(float(shares[-1]), shares[:-1])

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
        left_out = None if self.left_out is None else member @ self.left_out @ member.T
        samples = member @ self.samples @ member.T
        return replace(self, blocks=blocks, samples=samples, left_out=left_out)

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
        data = "" if share.data_stderr is None else f" (data ± {share.data_stderr:.2g})"
        told = f"{share.value:.3g} ± {error}{data} of the squared norm lies off the block diagonal;"
        told += f" {told_of_units({self.units})}."
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
    data_errors: bool = True,
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
        data_errors: As for :func:`blockspec.trace`.
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
    shape = (sampling.num_probes, len(blocks), len(blocks))
    samples, left_out = np.empty(shape), None
    requests = [(probe, place) for probe in range(num_probes) for place in range(len(blocks))]
    shares = Shares(operator, wanted=data_errors)
    for done, (probe, place), column, without in _columns(shares, union, requests, seed):
        samples[probe, :, place] = column
        if without is not None:
            left_out = np.zeros((len(without), *shape[1:])) if left_out is None else left_out
            left_out[:, :, place] += without / num_probes
        if progress is not None:
            progress(done, len(requests))
    return Coupling(
        blocks,
        (samples + samples.transpose(0, 2, 1)) / 2,
        operator.curvature,
        Cost(operator.gradients, operator.products, check_of(operator)),
        None if left_out is None else (left_out + left_out.transpose(0, 2, 1)) / 2,
        shares.units,
    )


Column = tuple[int, tuple[int, int], np.ndarray, np.ndarray | None]


def _columns(
    shares: Shares,
    union: Union,
    requests: Sequence[tuple[int, int]],
    seed: int,
) -> Iterator[Column]:
    """For each (probe, block c): products done, the request, ``||H_bc v||^2`` (n,) of all blocks b,
    and (g + 1, n) the same without each group of data, and with all of them, by sketches.
    """
    operator, together = shares.operator, union.at_once(MOST_AT_ONCE)
    sketches = [Sketch(block.name, block.numel, operator.device) for block in union.blocks]

    def each(number: int, parts: list[torch.Tensor]) -> np.ndarray:
        return np.concatenate([sketch(p) for sketch, p in zip(sketches, parts, strict=True)])

    for start in range(0, len(requests), together):
        group = requests[start : start + together]
        sources = [
            (union.blocks[place], _probe(operator, union.blocks[place], probe, seed))
            for probe, place in group
        ]
        columns, kept = shares.columns(sources, union.blocks, each)
        for number, (request, parts) in enumerate(zip(group, columns, strict=True)):
            sums = torch.stack([part.square().sum(dtype=torch.float64) for part in parts])
            without = None
            if kept is not None:
                without = _squared(kept[number], shares.terms, union.blocks)
            yield start + number + 1, request, sums.cpu().numpy(), without


def _squared(sketches: np.ndarray, terms: np.ndarray, blocks: Sequence[Block]) -> np.ndarray:
    """(g + 1, n) squared norms of the blocks' parts of sketches: without each of g groups, and with
    all of them.
    """
    mean = sketches.sum(0) / terms.sum()
    rows = np.vstack([without_each(sketches, terms), mean])
    starts = np.cumsum([0, *(min(block.numel, SIZE) for block in blocks[:-1])])
    return np.add.reduceat(rows**2, starts, axis=1)


def _probe(operator: Operator, block: Block, number: int, seed: int) -> torch.Tensor:
    probe = draw_probe(block.name, block.numel, seed=seed, probe=number, distribution="gaussian")
    return probe.to(operator.device, block_dtype(operator.parameters, block))
