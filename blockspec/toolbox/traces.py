"""Traces of blocks by random probes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from blockspec.model.blocks import Block
from blockspec.model.objective import Objective
from blockspec.numerics.algorithms import Algorithm, Progress
from blockspec.numerics.jackknife import jackknife_error
from blockspec.numerics.lanczos import ROUNDING
from blockspec.numerics.probes import draw_probe
from blockspec.numerics.progress import shows_progress
from blockspec.numerics.units import without_each
from blockspec.products.operators import Operator
from blockspec.products.requests import block_dtype
from blockspec.products.selection import OperatorSettings, check_of, open_operator
from blockspec.products.settings import takes
from blockspec.products.shares import Shares
from blockspec.products.sweeps import Watch, run_together
from blockspec.products.union import Union
from blockspec.spectra.collection import Cost
from blockspec.spectra.estimates import Estimates, Signs, signs_of
from blockspec.spectra.spectrum import Estimate, estimate
from blockspec.toolbox.sampling import FEWEST_SAMPLES, Sampling

CORRELATION, OF_SHARE = 2.0, 4.0
"""By how much the variance of the mean of leave-one-out samples is larger than their spread says,
since they share their probes: ``CORRELATION`` and ``OF_SHARE`` for each pair over the parameters.

On 11 spectra, 95 % intervals without both held the truth in 74 to 95 % of trials, with the former
alone in 0.92 in the mean where 18 pairs served 40 parameters, and with both in 0.96 to 0.98 in the
mean for 4 to 30 pairs of 40 and 200 parameters; at worst in 0.86.
"""


@shows_progress("traces")
@takes(sampling=Sampling, settings=OperatorSettings)
def trace(
    objective: Objective | None,
    blocks: Sequence[Block] | Block,
    method: str = "hutchinson",
    *,
    sampling: Sampling,
    settings: OperatorSettings,
    progress: Progress | None = None,
) -> Estimates:
    """Traces of blocks of a curvature matrix, each with its standard error.

    ``"hutchinson"`` (1990) is the mean of v'Hv. One product of the full matrix serves all blocks:
    ``v_b' (H v)_b`` has the mean tr H_bb, since the cross terms ``v_b' H_bc v_c`` have the mean 0;
    they add ``||H_bc||_F^2`` to its variance. The traces of a partition add up to that of the whole
    with the same seed, whichever the partition.

    ``"hutch++"`` (Meyer, Musco, Musco, Woodruff 2021) finds the dominant subspace with a third of
    the products, traces it exactly with a third, and probes what is left with a third. In
    ``"xtrace"`` (Epperly, Tropp, Webber 2024) every probe serves for both, and is left out in turn.
    These two are better where few eigenvalues dominate. They take products of every block by
    itself; a block with at most ``num_probes`` parameters is done exactly. Their memory is 2
    (hutch++) or 4 (xtrace) vectors of a block for each of their probes.

    Args:
        objective: What is differentiated. None where ``curvature`` is an operator that belongs to
            no model.
        blocks: From :func:`blockspec.partition`; they may overlap.
        method: ``"hutchinson"``, ``"hutch++"`` or ``"xtrace"``.
        [settings]
        progress: Called with (products done, products in all or None where that is unknown).

    The size that ``tolerance`` is relative to is the larger of the trace's magnitude and a
    Frobenius norm: of the block; for Hutchinson's method, of the block's rows in the union of the
    blocks.

    Returns:
        A mapping from block name to :class:`blockspec.Estimate`, with ``to_frame()``, ``cost``,
        ``probes`` and ``interval(name)``. The unit is that of an eigenvalue. ``data_stderr`` is
        the error of the data, None where fewer than 8 units (micro-batches) went through the
        model; by the same probes, so that few of them make it a little too large.

    Raises:
        ValueError: A setting is out of range; and as :func:`blockspec.estimate_spectra` does.
    """
    if method not in METHODS:
        raise ValueError(f"method is one of {tuple(METHODS)}, got {method!r}")
    function, fewest = METHODS[method]
    sampling.check_fewest(fewest)
    operator, blocks = open_operator(objective, blocks, settings)
    shares = Shares(operator, wanted=sampling.data_errors)
    results = function(shares, blocks, sampling, progress)
    return Estimates(
        blocks,
        [result.estimate for result in results],
        probes=[result.probes for result in results],
        cost=Cost(operator.gradients, operator.products, check_of(operator)),
        signs=[result.signs for result in results],
        units=shares.units,
    )


class Result(NamedTuple):
    """An estimate, the number of samples that it rests on, and their signs, where they are
    independent.
    """

    estimate: Estimate
    probes: int
    signs: Signs = Signs()


def _hutchinson(
    shares: Shares, blocks: Sequence[Block], sampling: Sampling, progress: Progress | None
) -> list[Result]:
    union = Union(shares.operator, blocks)
    samples = [
        sample._replace(product=torch.empty(0))  # only sums are kept
        for sample in hutchinson_samples(union, shares, sampling, progress)
    ]
    sums = np.array([sample.sums for sample in samples])
    values = certain(union, shares.operator, sampling, sums)
    without = without_groups(samples, shares)
    if without is not None:
        values = [with_data(v, w) for v, w in zip(values, without.T, strict=True)]
    return [Result(v, len(sums), signs_of(s)) for v, s in zip(values, sums.T, strict=True)]


def with_data(value: Estimate, left_out: np.ndarray) -> Estimate:
    """The estimate with its error of the data, from the values (n,) without each group."""
    return value._replace(data_stderr=jackknife_error(value.value, left_out))


class Sample(NamedTuple):
    """Of one probe: (P,) v * Hv; its (n,) sums over the blocks; (g, n) what each of g groups of
    units has in them, None where units are not told apart.
    """

    product: Tensor
    sums: np.ndarray
    shares: np.ndarray | None


def without_groups(samples: Sequence[Sample], shares: Shares) -> np.ndarray | None:
    """(g, n) mean of the probes' sums over the blocks, without each group of data."""
    parts = [sample.shares for sample in samples if sample.shares is not None]
    return without_each(np.mean(parts, axis=0), shares.terms) if parts else None


def certain(
    union: Union, operator: Operator, sampling: Sampling, sums: np.ndarray
) -> list[Estimate]:
    """Of samples (K, n) of Rademacher probes, their means, where equal ones are no proof of
    exactness: each of a few probes may have missed the same thing. A Gaussian probe then says how
    large the matrix is, and so the standard error at most.
    """
    values = [estimate(block) for block in sums.T]
    count = len(sums)
    equal = np.ptp(sums, axis=0) <= ROUNDING[union.dtype] * np.abs(sums).max(axis=0)
    if count < 2 or not equal.any():
        return values
    probe = union.probe(count, seed=sampling.seed, distribution="gaussian")
    (product,) = operator.sweep([(union.block, probe)])
    stderrs = np.sqrt(2 * union.sums(product.square()) / count)
    return [
        Estimate(value.value, float(stderr)) if same else value
        for value, stderr, same in zip(values, stderrs, equal, strict=True)
    ]


def hutchinson_samples(
    union: Union, shares: Shares, sampling: Sampling, progress: Progress | None
) -> Iterator[Sample]:
    """Probe after probe, until the sums over the blocks are known well enough."""
    sums: list[np.ndarray] = []
    squares: list[np.ndarray] = []
    for group in union.products(shares, sampling.num_probes, seed=sampling.seed):
        for probe, product, parts in group:
            if sampling.tolerance is not None:
                squares.append(union.sums(product.square()))
            sample = product.mul_(probe)
            sums.append(union.sums(sample))
            yield Sample(sample, sums[-1], parts)
        if progress is not None:
            progress(len(sums), sampling.total)
        if sampling.tolerance is not None:
            norms = np.sqrt(np.mean(squares, axis=0))
            norms = norms.clip(
                min=ROUNDING[union.dtype] * norms.max() / sampling.tolerance
            )  # blocks of zeros
            if all(
                sampling.met(block, norm)
                for block, norm in zip(np.array(sums).T, norms, strict=True)
            ):
                return


def _block_by_block(
    algorithm: Callable[[Probes, Sampling], Algorithm[Result]],
    read: Read,
    shares: Shares,
    blocks: Sequence[Block],
    sampling: Sampling,
    progress: Progress | None,
) -> list[Result]:
    operator = shares.operator
    algorithms, reads = {}, {}
    for block in blocks:
        probes = Probes(
            block, block_dtype(operator.parameters, block), operator.device, sampling.seed
        )
        exactly = block.numel <= sampling.num_probes
        algorithms[block] = exact_trace(probes) if exactly else algorithm(probes, sampling)
        reads[block] = _of_units if exactly else read
    watch = Watch(
        shares, lambda block, probe, product: _rows_dot(probe[None], product[None]).cpu().numpy()
    )
    results = run_together(algorithms, operator, progress=progress, watch=watch)
    for block, rounds in watch.rounds.items():
        parts = reads[block]([kept[..., 0] for kept in rounds])
        value = with_data(results[block].estimate, without_each(parts, shares.terms))
        results[block] = results[block]._replace(estimate=value)
    return list(results.values())


Read = Callable[[list[np.ndarray]], np.ndarray]
"""From (n, K) each group's part of v'Hv in every round of an algorithm: (n,) its part of the
trace.
"""


def _of_units(rounds: list[np.ndarray]) -> np.ndarray:
    """Of unit vectors."""
    return rounds[0].sum(1)


def _of_basis_and_rest(rounds: list[np.ndarray]) -> np.ndarray:
    """Of hutch++: behind the sketch come the basis and the probes of the rest."""
    return rounds[1].sum(1) + np.concatenate(rounds[2:], axis=1).mean(1)


def _of_probes(rounds: list[np.ndarray]) -> np.ndarray:
    """Of xtrace: probes and basis take turns, and the probes alone are Hutchinson's. Its trace of
    a group is noisier than xtrace's would be, so that the error is on the safe side.
    """
    return np.concatenate(rounds[::2], axis=1).mean(1)


@dataclass(frozen=True)
class Probes:
    """Where the random vectors of one block come from."""

    block: Block
    dtype: torch.dtype
    device: torch.device
    seed: int
    distribution: str = "rademacher"

    def draw(self, start: int, stop: int) -> Tensor:
        """(stop - start, P) those with these numbers."""
        drawn = torch.empty(stop - start, self.block.numel, dtype=self.dtype, device=self.device)
        for row, number in zip(drawn, range(start, stop), strict=True):
            probe = draw_probe(
                self.block.name,
                self.block.numel,
                seed=self.seed,
                probe=number,
                distribution=self.distribution,
            )
            row.copy_(probe)
        return drawn


def exact_trace(probes: Probes) -> Algorithm[Result]:
    """From the products with all unit vectors."""
    size = probes.block.numel
    matrix = yield torch.eye(size, dtype=probes.dtype, device=probes.device)
    return Result(Estimate(float(matrix.diagonal().sum(dtype=torch.float64)), 0.0), size)


def hutch_plus_plus(probes: Probes, sampling: Sampling) -> Algorithm[Result]:
    """Algorithm 1 of Meyer et al. (2021), its last part ended by the tolerance."""
    third = sampling.num_probes // 3
    sketch = yield probes.draw(0, third)
    norm = float(_rows_dot(sketch, sketch).mean().sqrt())
    basis = extend(sketch[:0], sketch)
    dominant = _rows_dot(basis, (yield basis)).sum().item()
    together = third if sampling.tolerance is None else FEWEST_SAMPLES
    samples: list[float] = []
    while len(samples) < third and not sampling.met(np.array(samples) + dominant, norm):
        start = third + len(samples)
        rest = probes.draw(start, min(start + together, 2 * third))
        rest -= (rest @ basis.T) @ basis
        samples += _rows_dot(rest, (yield rest)).tolist()
    value, stderr, _ = estimate(np.array(samples))
    signs = signs_of(np.array(samples), beside=dominant)
    return Result(Estimate(dominant + value, stderr), len(samples), signs)


def xtrace(probes: Probes, sampling: Sampling) -> Algorithm[Result]:
    """Algorithm 2.1 of Epperly, Tropp, Webber (2024), with probes added until the tolerance is
    met.
    """
    most = sampling.num_probes // 2
    drawn = images = basis = basis_images = probes.draw(0, 0)
    samples = np.empty(0)
    while len(drawn) < most:
        count = (
            most if sampling.tolerance is None else min(max(FEWEST_SAMPLES, 2 * len(drawn)), most)
        )
        new = probes.draw(len(drawn), count)
        new_images = yield new
        new_basis = extend(basis, new_images)
        drawn, images = torch.cat([drawn, new]), torch.cat([images, new_images])
        basis = torch.cat([basis, new_basis])
        basis_images = torch.cat([basis_images, (yield new_basis)])
        samples = leave_one_out(drawn, images, basis, basis_images)
        factor = math.sqrt(CORRELATION + OF_SHARE * len(drawn) / drawn.shape[1])
        samples = samples.mean() + factor * (samples - samples.mean())
        if sampling.met(samples, float(_rows_dot(images, images).mean().sqrt())):
            break
    return Result(estimate(samples), len(samples))


def leave_one_out(drawn: Tensor, images: Tensor, basis: Tensor, basis_images: Tensor) -> np.ndarray:
    """(n,) for each probe: the trace in the space of all other images, and the probe's sample of
    the rest.

    Args:
        drawn, images: (n, P) probes and their products; basis, basis_images: (r, P) orthonormal
            basis of the images and its products.
    """
    within = _small(basis, basis_images)  # (r, r)
    within = (within + within.T) / 2
    coordinates, projections = _small(basis, images), _small(basis, drawn)  # (r, n)
    direct = _rows_dot(drawn, images).cpu().numpy()
    lost = np.zeros_like(coordinates)  # unit vectors that are in no other image
    if len(basis) == len(drawn):
        lost = np.linalg.inv(coordinates).T
        lost /= np.linalg.norm(lost, axis=0)
    kept = projections - lost * (lost * projections).sum(0)
    dominant = np.trace(within) - (lost * (within @ lost)).sum(0)
    return dominant + direct - 2 * (kept * coordinates).sum(0) + (kept * (within @ kept)).sum(0)


def extend(basis: Tensor, vectors: Tensor) -> Tensor:
    """Orthonormal rows (at most as many as ``vectors``) that span what ``vectors`` (n, P) have
    beyond ``basis`` (r, P).
    """
    sizes = vectors.norm(dim=1, keepdim=True)
    rest = vectors / sizes.clamp(min=torch.finfo(sizes.dtype).tiny)
    for _ in range(2):
        rest = rest - (rest @ basis.T) @ basis
    columns, triangle = torch.linalg.qr(rest.T)
    independent = triangle.diagonal().abs() > ROUNDING[vectors.dtype]
    rows = columns.T[independent]
    rows = rows - (rows @ basis.T) @ basis
    return torch.linalg.qr(rows.T)[0].T.contiguous() if len(rows) else rows


def _small(rows: Tensor, others: Tensor) -> np.ndarray:
    return (rows @ others.T).double().cpu().numpy()


def _dot(block: Block, probe: Tensor, product: Tensor) -> np.ndarray:
    """(1,)"""
    return _rows_dot(probe[None], product[None]).cpu().numpy()


def _rows_dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1, dtype=torch.float64)


METHODS: dict[str, tuple[Callable[..., list[Result]], int]] = {
    "hutchinson": (_hutchinson, 1),
    "hutch++": (partial(_block_by_block, hutch_plus_plus, _of_basis_and_rest), 3),
    "xtrace": (
        partial(_block_by_block, xtrace, _of_probes),
        8,
    ),  # both samples of two probes would be equal
}
"""Method -> function, and the fewest products that it can do with."""
