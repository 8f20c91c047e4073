"""Spectra from what a block's processes have found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from blockspec.engine.accuracy import steps_error
from blockspec.engine.deflation import Deflation
from blockspec.model.blocks import Block
from blockspec.numerics.lanczos import Tridiagonal
from blockspec.numerics.measures import NOTHING
from blockspec.numerics.quadrature import cut, quadrature
from blockspec.spectra.spectrum import Spectrum

MATRIX_ROUNDING = 128
"""Roundings of a forward and two backward passes move eigenvalues by this many eps of the norm, at
most: up to 9e-6 were seen in float32 on trained models (two CPUs). Symmetric ones do not show in
``Tridiagonal.asymmetry``.
"""

PADDING: dict[str, Literal["edge", "constant"]] = {
    "nodes": "edge",
    "weights": "constant",
    "residuals": "edge",
    "known": "constant",
}


def lanczos_spectrum(
    block: Block,
    tridiagonals: Sequence[Tridiagonal],
    *,
    num_steps: int,
    dtype: torch.dtype,
    deflation: Deflation | None = None,
    **settings: object,
) -> Spectrum:
    """The spectrum of one block from the tridiagonal matrices of its K probes, padded to
    ``num_steps``, in the complement of a deflation, whose eigenvalues each row has too.
    """
    known, known_residuals = (
        (NOTHING, NOTHING) if deflation is None else (deflation.values, deflation.residuals)
    )
    leak = 0.0 if deflation is None else deflation.leak
    scale = max(
        *(float((np.abs(t.alphas) + t.betas).max()) for t in tridiagonals), *np.abs(known), 0.0
    )
    ended = [cut(t, 32 * torch.finfo(dtype).eps * scale) for t in tridiagonals]
    noise = MATRIX_ROUNDING * torch.finfo(dtype).eps * scale
    left = 1 - len(known) / block.numel
    rows = []
    for t in ended:
        nodes, weights, residuals = quadrature(t)
        row = {
            "nodes": np.concatenate([known, nodes]),
            "weights": np.concatenate([np.full(len(known), 1 / block.numel), left * weights]),
            "residuals": np.hypot(
                np.concatenate([known_residuals, np.hypot(residuals, leak)]),
                max(noise, t.asymmetry) + scale * (t.orthogonality or 0.0),
            ),
            "known": np.arange(len(known) + len(nodes)) < len(known),
        }
        order = np.argsort(row["nodes"], kind="stable")
        rows.append({name: array[order] for name, array in row.items()})
    return Spectrum(
        block=block,
        **_padded(rows, num_steps + len(known)),
        steps=np.array([len(t.alphas) for t in ended]),
        breakdown=np.array([t.breakdown for t in ended]),
        orthogonality=np.array(
            [np.nan if t.orthogonality is None else t.orthogonality for t in ended]
        ),
        steps_error=left * np.array([steps_error(t) for t in ended]),
        exact=False,
        dtype=str(dtype).removeprefix("torch."),
        **settings,  # type: ignore[arg-type]
    )


def exact_spectrum(
    block: Block,
    eigenvalues: np.ndarray,
    *,
    shape: tuple[int, int],
    dtype: torch.dtype,
    **settings: object,
) -> Spectrum:
    """The spectrum of a block whose P eigenvalues are all known: weight 1/P each, the same row for
    each probe.

    Args:
        shape: (K, M) of the result, M >= P.
    """
    num_probes, num_steps = shape
    size = len(eigenvalues)
    assert size == block.numel <= num_steps
    rounding_noise = MATRIX_ROUNDING * torch.finfo(dtype).eps * float(np.abs(eigenvalues).max())

    row = {
        "nodes": np.sort(eigenvalues),
        "weights": np.full(size, 1 / size),
        "residuals": np.full(size, rounding_noise),
        "known": np.full(size, True),
    }
    return Spectrum(
        block=block,
        **_padded([row] * num_probes, num_steps),
        steps=np.full(num_probes, size),
        breakdown=np.full(num_probes, True),
        orthogonality=np.zeros(num_probes),
        steps_error=np.zeros(num_probes),
        exact=True,
        dtype=str(dtype).removeprefix("torch."),
        **settings,  # type: ignore[arg-type]
    )


def _padded(rows: Sequence[Mapping[str, np.ndarray]], width: int) -> dict[str, Any]:
    """Arrays (K, width) out of K rows by name: the last node is repeated, with weight zero."""
    return {
        name: np.stack([np.pad(row[name], (0, width - len(row[name])), mode=mode) for row in rows])
        for name, mode in PADDING.items()
    }
