"""Objectives whose whole matrix is of one's own choice: half a quadratic form of all blocks
together.
"""

import numpy as np
import torch
from torch import nn

from blockspec import Objective, partition


class Coupled(nn.Module):
    """``w' A w / 2`` with w cut into parameters ``parts.0``, ``parts.1`` ... of these sizes."""

    def __init__(self, matrix, sizes):
        super().__init__()
        self.parts = nn.ParameterList([torch.zeros(size, dtype=matrix.dtype) for size in sizes])
        self.matrix = matrix

    def forward(self):
        w = torch.cat(list(self.parts))
        return w @ self.matrix @ w / 2


def coupled(matrix, sizes):
    """The objective and its blocks."""
    model = Coupled(matrix, sizes)
    return Objective(model, [torch.zeros(1)], lambda model, batch: (model(), 1)), partition(
        model, "tensor"
    )


def matrix_with_decay(size, *, power=1.0, seed=0):
    """Symmetric, indefinite, with eigenvalues that fall like i^-power in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    values = torch.arange(1, size + 1, dtype=torch.float64) ** -power
    values[1::3] *= -1
    return basis @ torch.diag(values) @ basis.T


def cut(matrix, sizes):
    """[b][c] the blocks of a matrix."""
    return [rows.split(sizes, dim=1) for rows in matrix.split(sizes)]


def holds(interval, truth):
    low, high = interval
    return low <= truth <= high


def assert_coverage(hits):
    """hits: (trials, ...) booleans; each column is right in 90 to 99 % of the trials."""
    share = np.mean(hits, axis=0)
    assert np.all((share >= 0.9) & (share <= 0.99)), share
