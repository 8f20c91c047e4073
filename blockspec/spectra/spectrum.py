"""The spectrum of one block: quadrature nodes and weights, and what is read off them: moments,
extreme eigenvalues, densities.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from blockspec.model.pieces import Block
from blockspec.numerics.density import evened, gaussians, node_widths, spacing
from blockspec.numerics.flat_tops import drawn, flat_tops, uncertain
from blockspec.numerics.jackknife import jackknife_error
from blockspec.numerics.measures import CONFIDENCE, noisy
from blockspec.spectra.data import Sample
from blockspec.spectra.intervals import interval_of
from blockspec.spectra.notebook import html
from blockspec.spectra.singles import with_exact_weights

# eigenvalues closer to zero than this, relative to the largest one, are one point on the default
# scale
RESOLUTION = 1e-4


class Estimate(NamedTuple):
    """A number with its two standard errors, which are never mixed silently.

    Attributes:
        value: The number.
        stderr: Over probes, for the given batches. None where it cannot be known (one probe), 0
            where the value is exact. Over K probes it has K - 1 degrees of freedom: intervals take
            Student's t.
        data_stderr: Over the sample of data: how far the value for the whole population may lie.
            None where it cannot be known (fewer than 8 units of data, or it was not measured).
    """

    value: float
    stderr: float | None
    data_stderr: float | None = None

    @property
    def total_stderr(self) -> float | None:
        """Of both; None where one of them is not known."""
        if self.stderr is None or self.data_stderr is None:
            return None
        return math.hypot(self.stderr, self.data_stderr)

    def scaled(self, factor: float) -> Estimate:
        """The number times a positive factor, with its errors."""
        return Estimate(*(None if x is None else factor * x for x in self))  # type: ignore[arg-type]

    def __float__(self) -> float:
        return self.value


class RitzValue(NamedTuple):
    """An approximate eigenvalue: a true one, of the given batches, lies within ``residual`` of
    ``value``.

    ``data_stderr`` is its standard error over the sample of data; None where it cannot be known.
    """

    value: float
    residual: float
    data_stderr: float | None = None

    def __float__(self) -> float:
        return self.value


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The spectrum of one block as K quadratures: ``sum_i weights[k, i] f(nodes[k, i])`` estimates
    tr f(H_bb) / P.

    Args:
        block: Name, kind, layer, numel (P).
        nodes: (K, M) Ritz values in ascending order, in units of the loss over squared parameters.
        weights: (K, M) quadrature weights; each row sums to 1. Places that an ended probe did not
            use have weight 0 and repeat its last node.
        residuals: (K, M) an eigenvalue lies within residual of the node.
        known: (K, M) True where a node is an eigenvalue that has its exact weight 1/P, the same in
            all rows, because its vector is known; only the rest is noisy. Left out: everywhere
            where ``exact``, else nowhere.
        single: (K, M) True where two probes together have proven that a node is an eigenvalue that
            stands there once; see :meth:`with_exact_weights`.
        apart: (K, M) of a mixture of blocks: the mean of the gaps between a node and its neighbours
            of its own block. Else None: what the nodes say.
        steps: (K,) Lanczos steps done; without those of a probe that found what is known, and is no
            part of this.
        breakdown: (K,) True where the probe ended in an invariant subspace: its nodes are
            eigenvalues.
        orthogonality: (K,) max |Q'Q - I| of the Krylov basis; nan where it was not kept.
        steps_error: (K,) how far each probe's quadrature is from the probe's spectral measure:
            Wasserstein-1 distance, in units of an eigenvalue; see
            :func:`blockspec.engine.accuracy.steps_error`.
        reorthogonalized: False: converged eigenvalues may appear several times; do not count them.
        exact: True: all P eigenvalues, weight 1/P each; nothing is estimated.
        curvature, dtype, distribution, seed: Which matrix, in which precision, and how the probes
            were drawn.
        precision_error: Expected distance between the spectra of the products as they were computed
            (``tf32``, ``bfloat16``) and in the parameters' precision; 0 where that was used.
        units: Units of data (micro-batches) that went through the model; 0 where they were not told
            apart. Neighbours were put together into groups where there were many.
        sample: The same without each group of data, from which the data's errors come; None where
            units of data were not told apart.
    """

    block: Block
    nodes: np.ndarray
    weights: np.ndarray
    residuals: np.ndarray
    steps: np.ndarray
    breakdown: np.ndarray
    orthogonality: np.ndarray
    steps_error: np.ndarray
    reorthogonalized: bool
    exact: bool
    curvature: str
    dtype: str
    distribution: str
    seed: int
    precision_error: float = 0.0
    known: np.ndarray = field(default=None)  # type: ignore[arg-type]
    single: np.ndarray = field(default=None)  # type: ignore[arg-type]
    apart: np.ndarray | None = None
    units: int = 0
    sample: Sample | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.known is None:
            object.__setattr__(self, "known", np.full(self.nodes.shape, self.exact))
        if self.single is None:
            object.__setattr__(self, "single", np.full(self.nodes.shape, False))

    @property
    def num_probes(self) -> int:
        return len(self.nodes)

    def __repr__(self) -> str:
        block, trace = self.block, self.trace
        error = "" if trace.stderr is None else f" ± {trace.stderr:.2g}"
        how = (
            "all of them"
            if self.exact
            else f"{self.num_probes} probe(s) of up to {int(self.steps.max())} steps"
        )
        return (
            f"Spectrum of {block.name!r} ({block.kind}, {block.numel:,} parameters; "
            f"{self.curvature}): eigenvalues from {self.smallest.value:.3g} to "
            f"{self.largest.value:.3g}, {how}; trace {trace.value:.3g}{error}"
        )

    def plot(self, **options: Any) -> Any:
        """A figure of this block; see :func:`blockspec.figures.tails.tails_by_block`."""
        return drawing("tails").tails_by_block({self.block.name: self}, **options)

    def to_frame(self) -> pd.DataFrame:
        """A row a node: probe, index, node, weight, residual."""
        probes, places = self.nodes.shape
        rows = {"probe": np.repeat(np.arange(probes), places)}
        rows |= {"index": np.tile(np.arange(places), probes), "node": self.nodes.ravel()}
        rows |= {"weight": self.weights.ravel(), "residual": self.residuals.ravel()}
        return pd.DataFrame(rows)

    def _repr_html_(self) -> str:
        """The numbers, each with its error for the given batches and that of the data."""
        numbers = {"largest": self.largest, "smallest": self.smallest, "trace": self.trace}
        rows: dict[str, tuple[float | None, ...]] = {name: (*n,) for name, n in numbers.items()}
        rows["distance to the true spectrum"] = (None, self.error, self.data_error)
        table = pd.DataFrame.from_dict(
            rows, orient="index", columns=["value", "±", "± of the data"]
        )
        return html(repr(self), table)

    @property
    def is_zero(self) -> bool:
        """The block has no curvature at all: the loss does not depend on it, or only linearly."""
        return not self.nodes.any()

    @property
    def trace(self) -> Estimate:
        """Trace of the block; unit of an eigenvalue. ``with_exact_weights().trace`` has less noise,
        and is no longer the mean over nodes and weights that the table holds.
        """
        return self.moment(1).scaled(self.block.numel)

    @property
    def largest(self) -> RitzValue:
        """The algebraically largest Ritz value of all probes: a lower bound, up to its residual and
        rounding.
        """
        return self._ritz(np.argmax(self.nodes), np.max)

    @property
    def smallest(self) -> RitzValue:
        """The algebraically smallest (most negative) Ritz value of all probes."""
        return self._ritz(np.argmin(self.nodes), np.min)

    @property
    def norm(self) -> float:
        """Spectral norm, as far as it is known: the largest Ritz value in magnitude."""
        return float(np.abs(self.nodes).max())

    @property
    def error(self) -> float:
        """The estimated spectrum is within this Wasserstein-1 distance of the true one, in units of
        an eigenvalue, with 95 % confidence. Divide by :attr:`norm` to compare with a tolerance.

        It is made of the error of the steps, estimated from above, the residuals of eigenvalues
        that are known one by one, and the noise of the probes.
        They are independent: they add like the legs of a right triangle (``python -m
        benchmarks.coverage`` tries it). 0 for exact spectra; reduced precision adds its own error
        to all.
        """
        precision = CONFIDENCE * self.precision_error
        if self.exact:
            return precision
        rest = ~self.known
        share = float(self.weights[rest].sum()) / self.num_probes
        seen = noisy(
            self.nodes[rest],
            self.weights[rest],
            self.residuals[rest],
            share * self.block.numel,
            self.num_probes,
        )
        noise = share * seen.noise(self.num_probes)
        moved = (self.weights * self.residuals)[self.known].sum() / self.num_probes
        return math.hypot(self.steps_error.mean() + moved, noise) + precision

    @property
    def data_error(self) -> float | None:
        """The spectrum of the population that the data is a sample of is within this Wasserstein-1
        distance of that of the data, with 95 % confidence; None where there are fewer than 8 units
        of data, or they were not told apart.
        """
        return self.foretold_data_error(1.0)

    def foretold_data_error(self, growth: float) -> float | None:
        """What :attr:`data_error` is expected to be with so many times the units."""
        if self.sample is None:
            return None
        slow = self.units < self.block.numel
        return self.sample.distance(self.nodes, self.weights, slow=slow, growth=growth)

    @property
    def total_error(self) -> float | None:
        """:attr:`error` and :attr:`data_error` together, which are independent: the estimated
        spectrum is within this Wasserstein-1 distance of that of the population, with 95 %
        confidence.
        """
        data = self.data_error
        return None if data is None else math.hypot(self.error, data)

    def without_groups(self) -> list[Spectrum]:
        """What it would be without each group of data; empty where these were not told apart."""
        found = self.left_out()
        if found is None:
            return []
        parts = []
        for nodes, weights in zip(*found, strict=True):
            order = np.argsort(nodes, axis=1)
            arrays = {"nodes": nodes, "weights": weights, "residuals": self.residuals}
            arrays |= {"known": self.known, "single": self.single}
            arrays |= {} if self.apart is None else {"apart": self.apart}
            rows: dict[str, Any] = {
                name: np.take_along_axis(array, order, 1) for name, array in arrays.items()
            }
            parts.append(replace(self, **rows, sample=None))
        return parts

    def with_exact_weights(self) -> Spectrum:
        """The same with the weight 1 / P for eigenvalues that every probe has found, where they are
        known to be single ones; see :mod:`blockspec.spectra.singles`.

        Traces, densities and distances then have less noise, and their errors say so;
        :func:`blockspec.norms` makes use of it by itself. A probe's moments are no longer those of
        its start vector. With several probes, single means proven. With one it means likely, all of
        them together: a pair among many single eigenvalues is taken for one of them, and the error
        does not hold that.
        """
        return with_exact_weights(self)

    def left_out(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Nodes and weights, both (n, K, M), without each group of data, place by place."""
        if self.sample is None:
            return None
        return self.nodes + self.sample.nodes, self.weights + self.sample.weights

    def _ritz(self, place: np.intp, extreme: Callable[..., np.ndarray]) -> RitzValue:
        value, residual = float(self.nodes.flat[place]), float(self.residuals.flat[place])
        if (without := self.left_out()) is None:
            return RitzValue(value, residual)
        return RitzValue(value, residual, jackknife_error(value, extreme(without[0], (1, 2))))

    def interval(self, number: str, confidence: float = 0.95) -> tuple[float, float]:
        """Ends of the interval that holds the number of the population that the data is a sample
        of, with both errors; see :mod:`blockspec.spectra.intervals`.

        Args:
            number: ``"trace"``, ``"root_mean_square"`` (of the eigenvalues), ``"largest"`` or
                ``"smallest"``.
            confidence: Between 0 and 1.

        Returns:
            nan where the error of the data is not known: fewer than 8 units.
        """
        return interval_of(self, number, confidence)

    def moment(self, k: int) -> Estimate:
        """tr(H^k) / P: the mean over probes of ``v' H^k v`` with v of norm 1; exact per probe for k
        <= 2M - 1, without known eigenvalues.
        """
        return self.mean(lambda nodes: nodes**k)

    def mean(self, function: Callable[[np.ndarray], np.ndarray]) -> Estimate:
        """tr f(H) / P for a function f of an array of eigenvalues."""
        found = estimate((self.weights * function(self.nodes)).sum(1), exact=self.exact)
        without = self.means_left_out(function)
        return (
            found
            if without is None
            else found._replace(data_stderr=jackknife_error(found.value, without))
        )

    def means_left_out(self, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray | None:
        """(n,) :meth:`mean` without each group of data; None where these were not told apart."""
        if (without := self.left_out()) is None:
            return None
        nodes, weights = without
        return (weights * function(nodes)).sum(2).mean(1)

    def cdf(self, points: np.ndarray) -> np.ndarray:
        """(G,) share of the eigenvalues that are at most ``points`` (G,), mean over probes."""
        order = np.argsort(self.nodes, axis=None)
        cumulated = (
            np.concatenate([[0.0], np.cumsum(self.weights.ravel()[order])]) / self.num_probes
        )
        return cumulated[np.searchsorted(self.nodes.ravel()[order], points, side="right")]

    @property
    def linear(self) -> float:
        """Where the default scale turns from linear to logarithmic: the median magnitude of the
        eigenvalues, but at least ``RESOLUTION`` of the largest; 1 for a block of zeros. (It is the
        mean of the middle fifth, by magnitude: where half of the eigenvalues are zero, the median
        would jump between runs.)
        """
        sizes = np.abs(self.nodes).ravel()
        order = np.argsort(sizes)
        below = np.cumsum(self.weights.ravel()[order]) / self.num_probes
        inside = np.diff(np.clip(np.concatenate([[0.0], below]), 0.4, 0.6))
        return max(5 * float(sizes[order] @ inside), RESOLUTION * self.norm) or 1.0

    def grid(self, points: int = 2000, *, linear: float | None = None) -> np.ndarray:
        """(points,) eigenvalues that cover the spectrum and its smoothed edges, even on the scale
        asinh(x / linear).
        """
        linear = linear or self.linear
        reach = 5 * self.widths(linear)
        low, high = (self.nodes - reach).min(), (self.nodes + reach).max()
        return linear * np.sinh(
            np.linspace(np.arcsinh(low / linear), np.arcsinh(high / linear), points)
        )

    def widths(self, linear: float) -> np.ndarray:
        """(K, M) how wide each node is drawn on a scale that is linear up to ``linear``, in units
        of an eigenvalue.
        """
        apart = spacing(self.nodes) if self.apart is None else self.apart
        counts = self.weights * self.block.numel * self.num_probes
        widths = node_widths(self.nodes, self.residuals, apart, counts, linear)
        return evened(self.nodes, self.weights, widths)

    def flat_tops(self, widths: np.ndarray, linear: float) -> np.ndarray:
        """(n, 2) ends of the stretches on which the density, with these widths (K, M), is no more
        than flat: its peaks there may be noise. See :mod:`blockspec.numerics.flat_tops`.
        """
        variances = uncertain(
            self.nodes, self.weights, self.residuals, linear, self.block.numel
        ) * (~self.known / self.num_probes**2)
        return flat_tops(self.nodes, self.weights / self.num_probes, widths, variances, linear)

    def densities(
        self, grid: np.ndarray, width: float | None = None, *, linear: float | None = None
    ) -> np.ndarray:
        """(K, G) the density of each probe; see :meth:`density`.

        Their spread over probes is its error bar.
        """
        if width is None:
            linear = linear or self.linear
            widths = self.widths(linear)
            tops = self.flat_tops(widths, linear)
            rows = zip(self.nodes, self.weights, widths, strict=True)
            return np.stack([drawn(*row, tops, grid) for row in rows])
        if width <= 0:
            raise ValueError(f"width is a positive number in units of an eigenvalue, got {width}")
        pairs = zip(self.nodes, self.weights, strict=True)
        return np.stack([gaussians(n, w, grid, width) for n, w in pairs])

    def density(
        self, grid: np.ndarray, width: float | None = None, *, linear: float | None = None
    ) -> np.ndarray:
        """(G,) spectral density at the eigenvalues ``grid`` (G,), mean over probes; it integrates
        to 1 over all eigenvalues.

        Args:
            grid: In any order.
            width: Standard deviation of a Gaussian kernel in units of an eigenvalue. If left out,
                each node is a Gaussian of a twentieth of its value, or around zero of ``linear``,
                and where Lanczos has not converged at least as wide as the gaps between nodes.
                Peaks that may be noise are drawn as flat tops. Figures show the same curve. A
                single width that suits the outliers hides the bulk: it is never the default.
            linear: See :attr:`linear`, its default; only used where ``width`` is left out.
        """
        return self.densities(grid, width, linear=linear).mean(0)


def drawing(module: str) -> Any:
    """The module of figures of that name, imported when something is drawn. Figures lie above
    spectra; this is the one way up, for ``.plot()``.
    """
    return import_module(f"blockspec.figures.{module}")


def estimate(samples: np.ndarray, *, exact: bool = False) -> Estimate:
    """Mean and standard error of K independent samples."""
    if exact:
        return Estimate(float(samples[0]), 0.0)
    stderr = float(samples.std(ddof=1) / math.sqrt(len(samples))) if len(samples) > 1 else None
    return Estimate(float(samples.mean()), stderr)
