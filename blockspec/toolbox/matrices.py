"""Whole blocks of a curvature matrix, entry by entry."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from blockspec.model.blocks import Block
from blockspec.model.objective import Objective
from blockspec.numerics import memory
from blockspec.numerics.ranks import arrange
from blockspec.products.curvature import Products
from blockspec.products.requests import block_dtype, checked_blocks

AT_ONCE = 64  # products of one sweep: the pass over the data that they share is a small part then
ENTRIES_AT_ONCE = 2**26
SHARE = 0.25  # of the machine's memory that a matrix may take


def dense(
    objective: Objective,
    block: Block,
    other: Block | None = None,
    *,
    curvature: str = "hessian",
    limit: int | float | str = SHARE,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """(P, Q) float64 the block H_bc in rows b = ``block`` and columns c = ``other``; without ``other`` (P, P), exactly symmetric.

    Takes min(P, Q) products, with unit vectors. Entries are in the order of the block's vectors: its pieces flattened one after
    the other, as in ``torch.cat([piece.select(parameter).reshape(-1) ...])``.

    curvature: see :class:`blockspec.products.curvature.Products`.
    limit: memory that the matrix may take: bytes, a share of the machine (0.25) or a size (``"20GiB"``).
    progress: called with (products done, products in all).

    Raises ValueError for a matrix that does not fit, before any work.
    """
    other = block if other is None else other
    checked_blocks(objective, block)
    checked_blocks(objective, other)
    _check_size(block, other, memory.parse(limit, torch.device("cpu")))
    if other.numel > block.numel:
        return dense(objective, other, block, curvature=curvature, limit=limit, progress=progress).T
    products = Products(objective, curvature, ranks=arrange(1))
    objective.check()
    matrix = np.empty((other.numel, block.numel))
    together = max(1, min(AT_ONCE, ENTRIES_AT_ONCE // block.numel))
    for start in range(0, other.numel, together):
        stop = min(start + together, other.numel)
        units = torch.zeros(
            stop - start, other.numel, dtype=block_dtype(objective, other), device=objective.device
        )
        units[range(stop - start), range(start, stop)] = 1
        columns = products.columns([(other, unit) for unit in units], [block])
        for row, (column,) in zip(matrix[start:stop], columns, strict=True):
            row[:] = column.double().cpu().numpy()
        if progress is not None:
            progress(stop, other.numel)
    return (matrix + matrix.T) / 2 if block is other else matrix.T


def _check_size(block: Block, other: Block, limit: int) -> None:
    copies = 2 if block is other else 1
    needed = 8 * copies * block.numel * other.numel
    if needed <= limit:
        return
    raise ValueError(
        f"the block {block.name!r} x {other.name!r} has {block.numel:,} x {other.numel:,} entries, {memory.readable(needed)} in "
        f"float64; {memory.readable(limit)} are allowed, which hold a block of {math.isqrt(limit // 16):,} parameters. "
        "Cut it finer (by='head' or by='neuron'), take blockspec.estimate_spectra, or allow more with limit="
    )
