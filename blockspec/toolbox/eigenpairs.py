"""Extreme eigenpairs of a block by Lanczos with thick restarts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from blockspec.model.blocks import Block
from blockspec.model.objective import Objective
from blockspec.numerics.algorithms import Progress
from blockspec.numerics.jackknife import jackknife_errors
from blockspec.numerics.measures import NOTHING
from blockspec.numerics.probes import draw_probe
from blockspec.numerics.progress import shows_progress
from blockspec.numerics.restarts import Found, Search
from blockspec.numerics.units import without_each
from blockspec.products.requests import block_dtype
from blockspec.products.selection import OperatorSettings, check_of, open_operator
from blockspec.products.settings import takes
from blockspec.products.shares import Shares, Sketch
from blockspec.products.sweeps import Watch, run_together
from blockspec.spectra.collection import Cost
from blockspec.spectra.data import told_of_units
from blockspec.spectra.spectrum import RitzValue

ORDERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "magnitude": np.abs,
    "largest": np.positive,
    "smallest": np.negative,
}
"""``which`` -> what is to be large."""


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """k eigenpairs of one block, the wanted ones first.

    Args:
        values: (k,) Ritz values.
        vectors: (k, P) orthonormal Ritz vectors, as the block's vectors are laid out.
        residuals: (k,) ``||H u - value u||``: an eigenvalue lies within it of the value.
        converged: (k,) residual at most the tolerance times the value itself, or times a hundredth
            of what lies at the other end of the spectrum where that is more.
        complete: A search from another random vector, orthogonal to these, has found nothing that
            belongs among them: no copy of a repeated eigenvalue is missing. Or all of a small block
            was searched.
        products: Products of the block with a vector that the search took.
        data_stderrs: (k,) standard errors of the values over the sample of data; None where there
            are fewer than 8 units (micro-batches), or they were not told apart.
        units: Of data; 0 where they were not told apart.
    """

    block: Block
    values: np.ndarray
    vectors: Tensor = field(repr=False)
    residuals: np.ndarray
    converged: np.ndarray
    complete: bool
    products: int
    cost: Cost
    which: str
    curvature: str
    data_stderrs: np.ndarray | None = None
    units: int = 0

    @property
    def ritz_values(self) -> list[RitzValue]:
        """The values with their residuals and errors of the data."""
        errors = [None] * len(self.values) if self.data_stderrs is None else self.data_stderrs
        rows = zip(self.values, self.residuals, errors, strict=True)
        return [RitzValue(float(v), float(r), None if e is None else float(e)) for v, r, e in rows]

    def __repr__(self) -> str:
        shown = ", ".join(f"{value:.4g}" for value in self.values[:SHOWN])
        more = ", ..." if len(self.values) > SHOWN else ""
        return (
            f"Eigenpairs of {self.block.name!r} ({self.curvature}; {self.which}): {shown}{more}; "
            f"{int(self.converged.sum())} of {len(self.values)} converged, {self.products} "
            f"products; {told_of_units({self.units})})"
        )


SHOWN = 8  # values in a repr


@shows_progress("eigenpairs")
@takes(settings=OperatorSettings)
def top_eigenpairs(
    objective: Objective | None,
    block: Block,
    k: int = 1,
    which: str = "magnitude",
    *,
    tolerance: float = 1e-3,
    basis: int | None = None,
    max_products: int | None = None,
    seed: int = 0,
    data_errors: bool = True,
    settings: OperatorSettings,
    progress: Progress | None = None,
) -> Eigenpairs:
    """The k extreme eigenpairs of a block of a curvature matrix, or of the full one
    (``partition(model, "model")[0]``).

    Args:
        which: ``"magnitude"``, ``"largest"`` (algebraically) or ``"smallest"`` (the most negative).
        tolerance: Bound on each pair's residual, relative to the value itself, so that a bulk is
            resolved under a large outlier and opposite to one; where a value is small, relative to
            a hundredth of what lies at the other end of the spectrum. The error of a well separated
            eigenvalue is of the order of its square. The end of a dense bulk is slow, and the
            smallest eigenvalue of a positive matrix is slowest: with neighbours a thousandth of the
            norm away, and a residual of 1e-5 of the norm, it takes 120 to 180 products whatever
            ``basis`` is, and with magnitudes over four decades more than 440. A ``tolerance`` of
            0.1 takes 20 to 180 of them. (To know how far a spectrum reaches,
            ``estimate_spectra`` gives ``smallest`` with its residual.)
        basis: Vectors (P,) that are kept at once, at most; None: ``max(2 k + 1, 20)``, as ARPACK
            does. Lanczos is restarted with the best of them (thick restarts: Wu, Simon 2000), fully
            reorthogonalised. After convergence the search goes on, orthogonal to what was found,
            from a new random vector until nothing better can be there: a Krylov space holds one
            vector of each eigenspace only.
        [settings]
        data_errors: Measure also how far the eigenvalues of the population that the batches are
            drawn from may lie: the Rayleigh quotients of single units, and what their products
            have outside of the vectors, which is what few data add to an extreme eigenvalue. It
            takes k products more, where there are at least 8 units (micro-batches).
        max_products: None: ``40 k + 400``. What has not converged then is marked, and a warning
            says so.
        progress: Called with (products done, None).

    Raises:
        ValueError: Settings out of range, and as :func:`blockspec.estimate_spectra` does.
    """
    if which not in ORDERS:
        raise ValueError(f"which is one of {tuple(ORDERS)}, got {which!r}")
    if not 1 <= k <= block.numel:
        raise ValueError(
            f"k is between 1 and the {block.numel} parameters of block {block.name!r}, got {k}"
        )
    if not 0 < tolerance < 1:
        raise ValueError(
            "tolerance is relative to the norm of the matrix, between 0 and 1 (both excluded), "
            f"got {tolerance}"
        )
    if basis is not None and basis < k + 2:
        raise ValueError(f"basis is at least k + 2 = {k + 2} vectors, got {basis}")
    if max_products is not None and max_products < 1:
        raise ValueError(f"max_products is at least 1, got {max_products}")
    operator, _ = open_operator(objective, block, settings)
    dtype, device = block_dtype(operator.parameters, block), operator.device

    def draw(number: int) -> Tensor:
        probe = draw_probe(
            block.name, block.numel, seed=seed, probe=number, distribution="gaussian"
        )
        return probe.to(device, dtype)

    most = max_products or 40 * k + 400
    search = Search(
        draw,
        k,
        ORDERS[which],
        tolerance=tolerance,
        basis=basis or max(2 * k + 1, 20),
        max_products=most,
    )
    shares = Shares(operator, wanted=data_errors)
    watch = Watch(shares, lambda block, probe, product: NOTHING)  # only counts the units
    found = run_together({block: search.run()}, operator, progress=progress, watch=watch)[block]
    if not found.converged.all() or not found.complete:
        _warn(block, found, search)
    errors = _data_stderrs(shares, block, found, which) if watch.rounds else None
    cost = Cost(operator.gradients, operator.products, check_of(operator))
    return Eigenpairs(
        block=block,
        products=search.products,
        cost=cost,
        which=which,
        curvature=operator.curvature,
        data_stderrs=errors,
        units=shares.units,
        **vars(found),
    )


def _data_stderrs(shares: Shares, block: Block, found: Found, which: str) -> np.ndarray | None:
    """(k,) by the jackknife over groups of data, from one product with each vector."""
    vectors, k = found.vectors, len(found.vectors)
    sketch = Sketch(block.name, block.numel, vectors.device)

    def each(number: int, parts: list[Tensor]) -> np.ndarray:
        inside = (vectors @ parts[0]).double().cpu().numpy()
        return np.concatenate([inside, sketch(parts[0])])

    _, kept = shares.sweep([(block, vector) for vector in vectors], each)
    if kept is None:
        return None
    sums = np.stack(kept, axis=1)  # (n, k, k + S)
    rows = np.concatenate(
        [without_each(sums, shares.terms), sums.sum(0)[None] / shares.terms.sum()]
    )
    own = np.stack([sketch(vector) for vector in vectors])
    values = _values(rows[..., :k], rows[..., k:] - rows[..., :k] @ own, found.values, which)
    return jackknife_errors(values[-1], values[:-1])


def _values(inside: np.ndarray, outside: np.ndarray, values: np.ndarray, which: str) -> np.ndarray:
    """(n, k) eigenvalues to second order: those of each (k, k) projection on the vectors, moved
    outwards by what the products have outside of them (n, k, S), against a bulk at zero.
    """
    order = np.argsort(values)
    own = np.empty(inside.shape[:2])
    own[:, order] = np.linalg.eigvalsh((inside + inside.transpose(0, 2, 1)) / 2)
    outwards = {"largest": 1.0, "smallest": -1.0}.get(which, np.sign(values))
    half = np.abs(own) / 2
    return own + outwards * (np.sqrt(half**2 + (outside**2).sum(-1)) - half)


def _warn(block: Block, found: Found, search: Search) -> None:
    missing = int((~found.converged).sum())
    what = (
        f"{missing} of {search.k} eigenpairs have not converged"
        if missing
        else "repeated eigenvalues may be missing"
    )
    relative = float((found.residuals / search.own_scale(found.values)).max())
    warnings.warn(
        f"{block.name!r}: {what} after {search.products} products (relative residual "
        f"{relative:.1e}, tolerance {search.tolerance:.1e}); allow more max_products or a larger "
        "basis",
        stacklevel=3,
    )
