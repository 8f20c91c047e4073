"""Spectra from what a block's processes have found."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .accuracy import NOTHING, steps_error
from .blocks import Block
from .deflation import Deflation
from .lanczos import Tridiagonal
from .quadrature import cut, quadrature
from .spectra import Spectrum

MATRIX_ROUNDING = 128
"""Roundings of a forward and two backward passes move eigenvalues by this many eps of the norm, at most: up to 9e-6 were seen in
float32 on trained models (two CPUs). Symmetric ones do not show in ``Tridiagonal.asymmetry``."""


def lanczos_spectrum(
    block: Block,
    tridiagonals: Sequence[Tridiagonal],
    *,
    num_steps: int,
    dtype: torch.dtype,
    deflation: Deflation | None = None,
    **settings: object,
) -> Spectrum:
    """The spectrum of one block from the tridiagonal matrices of its K probes, padded to ``num_steps``, in the complement of a
    deflation, whose eigenvalues each row has too."""
    known, known_residuals = (NOTHING, NOTHING) if deflation is None else (deflation.values, deflation.residuals)
    leak = 0.0 if deflation is None else deflation.leak
    scale = max(*(float((np.abs(t.alphas) + t.betas).max()) for t in tridiagonals), *np.abs(known), 0.0)
    ended = [cut(t, 32 * torch.finfo(dtype).eps * scale) for t in tridiagonals]
    noise = MATRIX_ROUNDING * torch.finfo(dtype).eps * scale
    left = 1 - len(known) / block.numel
    rows = []
    for t in ended:
        nodes, weights, residuals = quadrature(t)
        row = (
            np.concatenate([known, nodes]),
            np.concatenate([np.full(len(known), 1 / block.numel), left * weights]),
            np.hypot(np.concatenate([known_residuals, np.hypot(residuals, leak)]), max(noise, t.asymmetry)),
            np.arange(len(known) + len(nodes)) < len(known),
        )
        rows.append(tuple(array[np.argsort(row[0], kind="stable")] for array in row))
    width = num_steps + len(known)

    def padded(which: int, mode: str) -> np.ndarray:
        return np.stack([np.pad(row[which], (0, width - len(row[which])), mode=mode) for row in rows])  # type: ignore[call-overload]

    return Spectrum(
        block=block,
        nodes=padded(0, "edge"),
        weights=padded(1, "constant"),
        residuals=padded(2, "edge"),
        known=padded(3, "constant"),
        steps=np.array([len(t.alphas) for t in ended]),
        breakdown=np.array([t.breakdown for t in ended]),
        orthogonality=np.array([np.nan if t.orthogonality is None else t.orthogonality for t in ended]),
        steps_error=left * np.array([steps_error(t) for t in ended]),
        exact=False,
        dtype=str(dtype).removeprefix("torch."),
        **settings,  # type: ignore[arg-type]
    )


def exact_spectrum(
    block: Block, eigenvalues: np.ndarray, *, shape: tuple[int, int], dtype: torch.dtype, **settings: object
) -> Spectrum:
    """The spectrum of a block whose P eigenvalues are all known: weight 1/P each, the same row for each probe.

    shape: (K, M) of the result, M >= P.
    """
    num_probes, num_steps = shape
    size = len(eigenvalues)
    assert size == block.numel <= num_steps
    rounding_noise = MATRIX_ROUNDING * torch.finfo(dtype).eps * float(np.abs(eigenvalues).max())

    def rows(values: np.ndarray, mode: str) -> np.ndarray:
        return np.tile(np.pad(values, (0, num_steps - size), mode=mode), (num_probes, 1))  # type: ignore[call-overload]

    return Spectrum(
        block=block,
        nodes=rows(np.sort(eigenvalues), "edge"),
        weights=rows(np.full(size, 1 / size), "constant"),
        residuals=rows(np.full(size, rounding_noise), "edge"),
        known=rows(np.full(size, True), "constant"),
        steps=np.full(num_probes, size),
        breakdown=np.full(num_probes, True),
        orthogonality=np.zeros(num_probes),
        steps_error=np.zeros(num_probes),
        exact=True,
        dtype=str(dtype).removeprefix("torch."),
        **settings,  # type: ignore[arg-type]
    )
