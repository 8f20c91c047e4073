"""Whole blocks of a curvature matrix, entry by entry."""

from __future__ import annotations

import math

import numpy as np
import torch

from blockspec.model.blocks import Block
from blockspec.model.objective import Objective
from blockspec.numerics import memory
from blockspec.numerics.algorithms import Progress
from blockspec.numerics.progress import shows_progress
from blockspec.products.operators import Operator
from blockspec.products.requests import block_dtype
from blockspec.products.selection import OperatorSettings, open_operator
from blockspec.products.settings import takes

AT_ONCE = 64  # products of one sweep: the pass over the data that they share is a small part then
ENTRIES_AT_ONCE = 2**26
SHARE = 0.25  # of the machine's memory that a matrix may take


@shows_progress("matrix")
@takes(settings=OperatorSettings)
def dense(
    objective: Objective | None,
    block: Block,
    other: Block | None = None,
    *,
    settings: OperatorSettings,
    limit: int | float | str = SHARE,
    progress: Progress | None = None,
) -> np.ndarray:
    """(P, Q) float64 the block H_bc in rows b = ``block`` and columns c = ``other``; without
    ``other`` (P, P), exactly symmetric.

    Takes min(P, Q) products, with unit vectors. Entries are in the order of the block's vectors:
    its pieces flattened one after the other, as in ``torch.cat([piece.select(parameter).reshape(-1)
    ...])``.

    Args:
        [settings]
        limit: Memory that the matrix may take: bytes, a share of the machine (0.25) or a size
            (``"20GiB"``).
        progress: Called with (products done, products in all).

    Raises:
        ValueError: A matrix that does not fit, before any work.
    """
    other = block if other is None else other
    _check_size(block, other, memory.parse(limit, torch.device("cpu")))
    operator, _ = open_operator(objective, [block] if block is other else [block, other], settings)
    if other.numel > block.numel:  # by symmetry, the columns of the smaller block do
        return _columns(operator, block, other, progress)
    matrix = _columns(operator, other, block, progress)
    return (matrix + matrix.T) / 2 if block is other else matrix.T


def _columns(
    operator: Operator, source: Block, target: Block, progress: Progress | None
) -> np.ndarray:
    """(Q, P) the columns of H that belong to ``source`` (Q parameters), in its rows ``target`` (P),
    transposed.
    """
    dtype = block_dtype(operator.parameters, source)
    matrix = np.empty((source.numel, target.numel))
    together = max(1, min(AT_ONCE, ENTRIES_AT_ONCE // target.numel))
    for start in range(0, source.numel, together):
        stop = min(start + together, source.numel)
        units = torch.zeros(stop - start, source.numel, dtype=dtype, device=operator.device)
        units[range(stop - start), range(start, stop)] = 1
        columns = operator.columns([(source, unit) for unit in units], [target])
        for row, (column,) in zip(matrix[start:stop], columns, strict=True):
            row[:] = column.double().cpu().numpy()
        if progress is not None:
            progress(stop, source.numel)
    return matrix


def _check_size(block: Block, other: Block, limit: int) -> None:
    copies = 2 if block is other else 1
    needed = 8 * copies * block.numel * other.numel
    if needed <= limit:
        return
    raise ValueError(
        f"the block {block.name!r} x {other.name!r} has {block.numel:,} x {other.numel:,} entries, "
        f"{memory.readable(needed)} in "
        f"float64; {memory.readable(limit)} are allowed, which hold a block of "
        f"{math.isqrt(limit // 16):,} parameters. "
        "Cut it finer (by='head' or by='neuron'), take blockspec.estimate_spectra, or allow more "
        "with limit="
    )
