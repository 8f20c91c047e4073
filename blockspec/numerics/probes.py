"""Probes: the random start vectors."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

DISTRIBUTIONS = ("gaussian", "rademacher")


def draw_probe(
    name: str, numel: int, *, seed: int = 0, probe: int = 0, distribution: str = "gaussian"
) -> Tensor:
    """(numel,) float32 on the CPU: depends on the block's name, the seed and the probe's number
    alone.

    ``"gaussian"`` entries (the default) almost surely have a part along every eigenvector: what
    they do not see is not there. With ``"rademacher"`` entries (+1 or -1) the variance of ``v' f(A)
    v`` is ``2 sum_{i != j} f(A)_ij^2``, less than the ``2 ||f(A)||_F^2`` of Gaussian ones
    (Hutchinson 1990; Avron and Toledo 2011), so that traces and diagonals take them. But half of
    them are orthogonal to an eigenvector such as (e_i - e_j) / sqrt(2), and a spectrum would lack
    its eigenvalue.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution is one of {DISTRIBUTIONS}, got {distribution!r}")
    digest = hashlib.sha256(f"{seed}\0{name}\0{probe}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    if distribution == "gaussian":
        return torch.randn(numel, generator=generator)
    return torch.empty(numel).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
