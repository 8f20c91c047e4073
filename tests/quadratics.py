"""Objectives with spectra of one's own choice: half a quadratic form for every block."""

import torch
from torch import nn

from blockspec import Objective, estimate_spectra, partition


class Quadratic(nn.Module):
    """``sum over blocks of w' A w / 2``; a parameter, so a block, for every matrix."""

    def __init__(self, matrices, dtype):
        super().__init__()
        self.weights = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(len(a), dtype=dtype)) for name, a in matrices.items()}
        )
        self.matrices = {name: a.to(dtype) for name, a in matrices.items()}

    def forward(self):
        return sum(w @ self.matrices[name] @ w for name, w in self.weights.items()) / 2


def objective_of(matrices, *, dtype=torch.float64, scale=1.0):
    """The objective whose diagonal blocks ``weights.<name>`` are ``scale`` times these matrices;
    others are zero.
    """
    return Objective(
        Quadratic(matrices, dtype), [torch.zeros(1)], lambda model, batch: (scale * model(), 1)
    )


def spectra_of(matrices, *, num_probes=4, num_steps=10, dtype=torch.float64, scale=1.0, **settings):
    """Their spectra, by the names of the matrices."""
    objective = objective_of(matrices, dtype=dtype, scale=scale)
    return estimate_spectra(
        objective, partition(objective.model, "tensor"), num_probes, num_steps, **settings
    )


def matrix_of(eigenvalues, *, seed=0):
    """A symmetric matrix with these eigenvalues in a random orthonormal basis."""
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(
        torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    )
    return basis @ torch.diag(values) @ basis.T


def decaying(size, *, seed=0):
    """Eigenvalues as a network has them: a bulk of both signs around zero and a few outliers;
    ascending.
    """
    values = (
        torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.01
    )
    values[: size // 20] += torch.linspace(0.2, 2, size // 20, dtype=torch.float64)
    return values.sort().values
