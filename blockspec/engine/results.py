"""Spectra from what a block's processes have found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from blockspec.engine.accuracy import steps_error
from blockspec.engine.deflation import Deflation
from blockspec.engine.task import Task
from blockspec.model.blocks import Block
from blockspec.numerics.lanczos import Tridiagonal
from blockspec.numerics.measures import NOTHING, transport
from blockspec.numerics.quadrature import cut, quadrature, ritz_pairs
from blockspec.numerics.units import LeftOut
from blockspec.spectra.data import Sample
from blockspec.spectra.singles import proven
from blockspec.spectra.spectrum import Spectrum

MATRIX_ROUNDING = 128
"""Roundings of a forward and two backward passes move eigenvalues by this many eps of the norm, at
most: up to 9e-6 were seen in float32 on trained models (two CPUs). Symmetric ones do not show in
``Tridiagonal.asymmetry``.
"""
SYMMETRIC_ROUNDING = 3.0
"""What rounding is taken to add to a matrix, relative to the part of it that is not symmetric. Of
the bias of a key in attention, whose curvature is zero, 0.27 to 0.39 are not symmetric.
"""


def spectrum_of(
    task: Task, curvature: str, precision_error: float = 0.0, units: int = 0
) -> Spectrum:
    """The spectrum of a block whose work is done.

    Where its products are less symmetric than rounding leaves those of a sound matrix, rounding has
    a part in the error too: sums that cancel have nothing else.

    Args:
        task: Of the block.
        curvature: Which matrix.
        precision_error: See :class:`blockspec.Spectrum`; it is measured, and holds rounding too.
        units: Of data; 0 where they were not told apart.
    """
    found = _spectrum_of(task, curvature, precision_error, units)
    return found if precision_error else replace(found, precision_error=_rounding(task, found))


def _rounding(task: Task, spectrum: Spectrum) -> float:
    """Expected distance between the spectra of the products and of the matrix without rounding; 0
    where no more of it is seen than residuals hold.
    """
    size, dtype = task.block.numel, task.dtype
    usual = MATRIX_ROUNDING * torch.finfo(dtype).eps
    whole = math.sqrt(max(spectrum.moment(2).value, 0.0))
    if task.columns is not None:
        skew = task.columns.asymmetry / math.sqrt(size)  # of the product with a random vector
        return min(SYMMETRIC_ROUNDING * skew, whole) if skew > usual * whole else 0.0
    storage = task.probing.storage
    if storage is not None and storage[0].itemsize < dtype.itemsize:
        return 0.0  # it is that of the vectors, as they are kept
    lengths = []
    for t in task.results():
        known = usual + 10 * (t.orthogonality or 0.0)
        if t.asymmetry <= known * spectrum.norm:
            return 0.0
        lengths.append(t.asymmetry * math.sqrt(size / max(len(t.alphas) - 2, 1)))
    return min(SYMMETRIC_ROUNDING * max(lengths, default=0.0), whole)


def _spectrum_of(task: Task, curvature: str, precision_error: float, units: int) -> Spectrum:
    settings: dict[str, Any] = {
        "precision_error": precision_error,
        "dtype": task.dtype,
        "curvature": curvature,
        "reorthogonalized": task.probing.reorthogonalize,
        "distribution": task.probing.distribution,
        "seed": task.probing.seed,
        "units": units,
    }
    if task.columns is None:
        return _of_probes(task, settings)
    size = task.block.numel
    probes, steps = task.accuracy.num_probes or 1, task.accuracy.num_steps or size
    found = exact_spectrum(
        task.block,
        task.columns.eigenvalues(),
        shape=(1, size) if task.accuracy.adaptive else (probes, steps),
        asymmetry=task.columns.asymmetry,
        **settings,
    )
    if task.columns_left_out is not None:
        return replace(found, sample=_exact_sample(task.columns_left_out, found))
    if task.left_out:
        return replace(found, sample=transported(_of_probes(task, settings), found))
    return found


def _of_probes(task: Task, settings: Mapping[str, Any]) -> Spectrum:
    results = task.results()
    found = lanczos_spectrum(
        task.block,
        results,
        num_steps=task.accuracy.num_steps or max(len(t.alphas) for t in results),
        deflation=task.deflation,
        left_out=task.results_left_out(),
        **settings,
    )
    # with fixed numbers, weights are those of the probes: sums of them are moments; and what one
    # probe says of single eigenvalues is likely, not certain enough for an error that is promised
    several = task.accuracy.adaptive and found.num_probes > 1
    return found.with_exact_weights() if several else found


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
    left_out: Sequence[LeftOut] = (),
    **settings: object,
) -> Spectrum:
    """The spectrum of one block from the tridiagonal matrices of its K probes, padded to
    ``num_steps``, in the complement of a deflation, whose eigenvalues each row has too.

    ``left_out``: the same of every probe without each group of units of data.
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
    rows, without = [], []
    for number, t in enumerate(ended):
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
        if left_out:
            part = _beside(left_out[number], nodes, weights)
            without.append(_with_known(part, deflation, left, order))
    arrays = _padded(rows, num_steps + len(known))
    single = proven(
        arrays["nodes"], arrays["weights"], arrays["residuals"], _across(ended[0]), block.numel
    )
    return Spectrum(
        block=block,
        **arrays,
        single=single,
        steps=np.array([len(t.alphas) for t in ended]),
        breakdown=np.array([t.breakdown for t in ended]),
        orthogonality=np.array(
            [np.nan if t.orthogonality is None else t.orthogonality for t in ended]
        ),
        steps_error=left * np.array([steps_error(t) for t in ended]),
        exact=False,
        dtype=str(dtype).removeprefix("torch."),
        sample=_sample(without, arrays["nodes"], arrays["weights"]),
        **settings,  # type: ignore[arg-type]
    )


def _across(first: Tridiagonal) -> np.ndarray | None:
    """(m,) inner products of the Ritz vectors with the start vector of the next probe."""
    return None if first.beside is None else ritz_pairs(first)[1].T @ first.beside


def _beside(part: LeftOut, nodes: np.ndarray, weights: np.ndarray) -> LeftOut:
    """Place by place beside the quadrature of the probe (m,).

    A run that was cut at its end has fewer places than its units were followed for: what changed is
    carried over to them.
    """
    if part.nodes.shape[1] == len(nodes):
        return part
    moved = [transport(n, w, nodes, weights) for n, w in zip(part.nodes, part.weights, strict=True)]
    return LeftOut(np.stack(moved), np.broadcast_to(weights, (len(moved), len(weights))))


def _with_known(
    part: LeftOut, deflation: Deflation | None, left: float, order: np.ndarray
) -> LeftOut:
    """(n, c + m) with the known eigenvalues of a deflation, in this order."""
    known = np.empty((len(part.nodes), 0))
    if deflation is not None:
        assert deflation.left_out is not None
        known = deflation.left_out
    shares = np.full(known.shape, (1 - left) / max(known.shape[1], 1))
    nodes = np.concatenate([known, part.nodes], 1)
    weights = np.concatenate([shares, left * part.weights], 1)
    return LeftOut(nodes[:, order], weights[:, order])


def _sample(parts: Sequence[LeftOut], nodes: np.ndarray, weights: np.ndarray) -> Sample | None:
    """Of K probes with these nodes and weights, (K, M) both, to which the parts are padded."""
    if not parts:
        return None

    def padded(name: Literal["nodes", "weights"]) -> np.ndarray:
        arrays = [getattr(part, name) for part in parts]
        width = nodes.shape[1]
        ends = [((0, 0), (0, width - array.shape[1])) for array in arrays]
        return np.stack(
            [np.pad(a, end, mode=PADDING[name]) for a, end in zip(arrays, ends, strict=True)], 1
        )

    return Sample.of(nodes, weights, (padded("nodes"), padded("weights")))


def _exact_sample(left_out: np.ndarray, whole: Spectrum) -> Sample:
    """From all eigenvalues (n, P) without each group; the rows of an exact spectrum are equal."""
    part = LeftOut(left_out, np.full(left_out.shape, 1 / left_out.shape[1]))
    sample = _sample([part], whole.nodes, whole.weights)
    assert sample is not None
    return sample


def transported(probes: Spectrum, whole: Spectrum) -> Sample:
    """What units of data change in a block whose eigenvalues are all known, as its probes have
    seen it: every eigenvalue moves as the same share of the probes' spectrum does.
    """
    row, shares = whole.nodes[0], whole.weights[0]

    def carried(part: Spectrum) -> np.ndarray:
        return transport(part.nodes.ravel(), part.weights.ravel(), row, shares)

    still = carried(probes)
    nodes = np.stack([row + carried(part) - still for part in probes.without_groups()])
    weights = np.broadcast_to(shares, nodes.shape)
    return Sample.of(whole.nodes, whole.weights, (nodes[:, None], weights[:, None]))


def exact_spectrum(
    block: Block,
    eigenvalues: np.ndarray,
    *,
    shape: tuple[int, int],
    dtype: torch.dtype,
    asymmetry: float = 0.0,
    **settings: object,
) -> Spectrum:
    """The spectrum of a block whose P eigenvalues are all known: weight 1/P each, the same row for
    each probe.

    Args:
        shape: (K, M) of the result, M >= P.
        asymmetry: Norm of what was not symmetric.
    """
    num_probes, num_steps = shape
    size = len(eigenvalues)
    assert size == block.numel <= num_steps
    rounding_noise = MATRIX_ROUNDING * torch.finfo(dtype).eps * float(np.abs(eigenvalues).max())

    row = {
        "nodes": np.sort(eigenvalues),
        "weights": np.full(size, 1 / size),
        "residuals": np.full(size, max(rounding_noise, asymmetry)),
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
