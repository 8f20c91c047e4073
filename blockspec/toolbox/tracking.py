"""The top eigenvalues at every step of a training, or at every n-th one.

The idea. Between two steps of training the matrix changes little, so the eigenvectors of the last
step are nearly those of this one. Two or three products correct them, where a search from nothing
takes fifty; see :mod:`blockspec.numerics.tracking`. How good a value is, is known at every step
from its residual, and where the residual is too large, more products follow.

A residual tells how good a pair is, not whether a better one lies elsewhere. Three things guard
against that: the first measurement is a full search, as :func:`blockspec.top_eigenpairs` makes it;
a few pairs more than are wanted are followed; and now and then a random vector is looked through.
"""

from __future__ import annotations

import logging
import math
import operator as numbers
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from blockspec.model.blocks import Block, partition
from blockspec.model.objective import Objective
from blockspec.model.training import refuse_wrapped, undisturbed
from blockspec.numerics.algorithms import Algorithm
from blockspec.numerics.files import whole_file
from blockspec.numerics.probes import draw_probe
from blockspec.numerics.restarts import Search
from blockspec.numerics.tracking import Ritz, refine
from blockspec.products.operators import Operator, forget, opened
from blockspec.products.preconditioning.operator import Preconditioned, sweep_sides
from blockspec.products.preconditioning.preconditioner import Preconditioner, unwrapped
from blockspec.products.requests import block_dtype
from blockspec.products.selection import OperatorSettings, open_operator
from blockspec.products.settings import takes
from blockspec.products.sweeps import driven
from blockspec.toolbox.eigenpairs import ORDERS
from blockspec.toolbox.localisation import Kinds, kinds_of, localised

logger = logging.getLogger(__name__)
VALUES, LOCALISATION = "tracking.parquet", "localisation.parquet"
Optimizers = torch.optim.Optimizer | Iterable[torch.optim.Optimizer]
LATER = 10**6  # numbers of random vectors that the first search does not reach
Draw = Callable[[int], Tensor]
FIRST_BASIS = 20  # vectors of the first search, or twice as many as are followed
FAR = 5  # updates between two measurements, from which on eigenvectors have turned far


@dataclass(frozen=True)
class Tracking:
    """How eigenvalues are followed through training.

    Args:
        k: Eigenvalues of each block.
        which: Which ones: largest (algebraically: the edge of stability is about these), magnitude
            (by absolute value) or smallest (the most negative).
        every: Updates between two measurements.
        tolerance: Bound on each value's error, relative to its magnitude. The error is the
            residual, within which an eigenvalue lies, or three times its square over the gap to the
            rest of the spectrum, where that is smaller.
        guards: Pairs that are followed beside the k, so that one that overtakes is seen. If left
            out, one; two where 5 or more updates lie between two measurements, because
            eigenvectors turn far in between.
        max_rounds: Rounds of products of one measurement at most. What has a larger residual then
            is marked in the table.
        look_again: Measurements between two that look through a random vector as well, for what
            the followed ones do not see; 0: never.
        seed: Of the random vectors.
    """

    k: int = 1
    which: str = "largest"
    every: int = 1
    tolerance: float = 0.03
    guards: int | None = None
    max_rounds: int = 8
    look_again: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of range, before anything is measured."""
        if self.which not in ORDERS:
            raise ValueError(f"which is one of {tuple(ORDERS)}, got {self.which!r}")
        for name in ("k", "every", "max_rounds"):
            if numbers.index(getattr(self, name)) < 1:
                raise ValueError(f"{name} is a whole number >= 1, got {getattr(self, name)}")
        guards = 0 if self.guards is None else self.guards
        for name, number in (("guards", guards), ("look_again", self.look_again)):
            if numbers.index(number) < 0:
                raise ValueError(f"{name} is a whole number >= 0, got {number}")
        if not 0 < self.tolerance < 1:
            raise ValueError(
                "tolerance is relative to the eigenvalue, between 0 and 1 (both excluded), got "
                f"{self.tolerance}"
            )

    @property
    def followed(self) -> int:
        """Pairs of each block that are followed: the k and the guards."""
        guards = self.guards if self.guards is not None else 1 if self.every < FAR else 2
        return self.k + guards


@takes(tracking=Tracking, settings=OperatorSettings)
def track(
    objective: Objective | None,
    blocks: Sequence[Block] | Block | None = None,
    *,
    tracking: Tracking,
    settings: OperatorSettings,
    optimizer: Optimizers | None = None,
) -> Tracker:
    """Follows the top eigenvalues of blocks through a training, on fixed data.

    ::

        tracker = blockspec.track(objective, k=2, every=10)
        for step in range(num_steps):
            ...                       # one update
            tracker(step + 1)         # measures at every 10th step
        tracker.table                 # a row for each step, block and rank

    Nothing of the training is disturbed: weights, gradients, training flags and all random numbers
    are as without, bit by bit. A few examples do for the fixed data: a measurement costs one shared
    pass and two or three products over them for each matrix.

    Args:
        objective: The model in training, before it is wrapped or compiled, and fixed batches.
        blocks: From :func:`blockspec.partition`; None: the whole model, as one block.
        [settings]
        optimizer: The training's own, or several: P^(-1/2) H P^(-1/2), the curvature that it sees,
            is followed beside H, with P as it is at each measurement. It begins when the optimizer
            has taken a step.

    Raises:
        ValueError: A setting is out of range, ``k`` is more than a block's parameters, the model is
            a wrapped one, and as :func:`blockspec.estimate_spectra` does before its expensive part.
    """
    if objective is not None:
        refuse_wrapped(objective.model)
    if blocks is None:
        if objective is None:
            raise TypeError("blocks are needed where there is no objective")
        blocks = partition(objective.model, "model")
    chosen = (blocks,) if isinstance(blocks, Block) else tuple(blocks)
    for block in chosen:
        if block.numel < tracking.k:
            raise ValueError(
                f"k is at most the {block.numel} parameters of block {block.name!r}, got "
                f"{tracking.k}"
            )
    return Tracker(objective, chosen, tracking, settings, optimizer)


def _quiet(objective: Objective | None) -> AbstractContextManager[None]:
    return nullcontext() if objective is None else undisturbed(objective.model)


def _has_stepped(optimizer: Optimizers) -> bool:
    """Whether there is a state to read; SGD has none, and is the identity from the beginning."""
    several = optimizer if isinstance(optimizer, Iterable) else [optimizer]
    return all(one.state or type(one) is torch.optim.SGD for one in map(unwrapped, several))


def _search(draw: Draw, kept: int, tracking: Tracking) -> Algorithm[Ritz]:
    """The first measurement, from nothing."""
    search = Search(
        draw,
        kept,
        ORDERS[tracking.which],
        tolerance=tracking.tolerance,
        basis=max(2 * kept + 1, FIRST_BASIS),
        max_products=40 * kept + 100,
    )
    found = yield from search.run()
    taken, r = search.products, found.residuals
    return Ritz(found.values, found.vectors, r, r, taken, taken)


def _overlaps(
    vectors: Tensor, before: Tensor | None
) -> tuple[Sequence[float], Sequence[int | None]]:
    """For each row, the cosine with the nearest one of the measurement before, and the rank of
    that one.
    """
    if before is None:
        return [math.nan] * len(vectors), [None] * len(vectors)
    cosine, place = (vectors @ before.T).abs().max(dim=1)
    return cosine.clamp(max=1).tolist(), (place + 1).tolist()


@dataclass(eq=False)
class Followed:
    """One block of one matrix: what is carried from one measurement to the next."""

    block: Block
    kinds: Kinds
    vectors: Tensor | None = None
    measured: int = 0


class Tracker:
    """The top eigenvalues of blocks along a training; made by :func:`track`.

    Attributes:
        blocks: What is followed.
        tracking: How.
        products: Products of one vector with all batches so far.
    """

    def __init__(
        self,
        objective: Objective | None,
        blocks: tuple[Block, ...],
        tracking: Tracking,
        settings: OperatorSettings,
        optimizer: Optimizers | None = None,
    ) -> None:
        if optimizer is not None and objective is None:
            raise TypeError("optimizer= needs an objective, whose parameters it steps")
        self.objective, self.tracking = objective, tracking
        self._optimizer = optimizer
        with _quiet(objective):
            self._operator, self.blocks = open_operator(objective, blocks, settings)
        parameters = self._operator.parameters
        self._kinds = {block: kinds_of(block, objective, parameters) for block in self.blocks}
        self._followed: dict[str, list[Followed]] = {}
        self.products = 0
        self._values: list[dict[str, Any]] = []
        self._parts: list[dict[str, Any]] = []
        self._told: set[bool] = set()

    def __call__(self, step: int) -> dict[str, float]:
        """Measures where the step is due.

        Args:
            step: Number of updates that were made.

        Returns:
            The scalars of :meth:`measure`; empty where the step is not due.
        """
        return self.measure(step) if step % self.tracking.every == 0 else {}

    def measure(self, step: int) -> dict[str, float]:
        """Measures now.

        Args:
            step: Number of updates that were made.

        Returns:
            For a tracker of the training's own, by name:
            ``track/<matrix>/<block>/<rank>`` (rank 1 is the first), ``.../error`` (the largest,
            relative to its value), ``.../overlap`` and ``.../ipr`` of the first.
        """
        scalars: dict[str, float] = {}
        with _quiet(self.objective):
            forget(self._operator)
            followed = {
                (operator, one.block): one
                for operator in self._operators()
                for one in self._of(operator.curvature)
            }
            with opened(self._operator):  # all matrices share each pass over the data
                found = driven(
                    {side: self._algorithm(one, side[0]) for side, one in followed.items()},
                    lambda requests: sweep_sides(self._operator, requests),
                )
            for (operator, _), one in followed.items():
                ritz = found[operator, one.block]
                scalars |= self._note(step, operator.curvature, one, ritz)
        return scalars

    def _operators(self) -> Iterator[Operator]:
        """H, and what the optimizer makes of it now."""
        yield self._operator
        if self._optimizer is None or not _has_stepped(self._optimizer):
            return
        assert self.objective is not None
        preconditioner = Preconditioner.from_optimizer(self._optimizer, self.objective.model)
        operator = Preconditioned(self._operator, preconditioner)
        if operator.curvature not in self._followed:
            operator.check(self.blocks)
        yield operator

    def _of(self, matrix: str) -> list[Followed]:
        if matrix not in self._followed:
            self._followed[matrix] = [Followed(b, self._kinds[b]) for b in self.blocks]
        return self._followed[matrix]

    def _algorithm(self, one: Followed, operator: Operator) -> Algorithm[Ritz]:
        block, t = one.block, self.tracking
        one.measured += 1
        kept = min(t.followed, block.numel)

        def draw(number: int) -> Tensor:
            probe = draw_probe(block.name, block.numel, seed=t.seed, probe=number)
            return probe.to(operator.device, block_dtype(operator.parameters, block))

        if one.vectors is None:
            return _search(draw, kept, self.tracking)
        again = t.look_again and one.measured % t.look_again == 0
        return refine(
            one.vectors,
            t.k,
            ORDERS[t.which],
            kept=kept,
            tolerance=t.tolerance,
            max_rounds=t.max_rounds,
            scout=draw(LATER + one.measured) if again else None,
        )

    def _note(self, step: int, matrix: str, one: Followed, ritz: Ritz) -> dict[str, float]:
        """Adds a measurement of one block to the tables; its scalars."""
        block, k = one.block, self.tracking.k
        searched = one.vectors is None
        overlap, before = _overlaps(ritz.vectors[:k], one.vectors)
        one.vectors = ritz.vectors
        self.products += ritz.products
        values, residuals = ritz.values[:k], ritz.residuals[:k]
        errors = ritz.errors[:k]
        relative = errors / np.maximum(np.abs(values), np.finfo(float).tiny)
        converged = errors <= self.tracking.tolerance * np.abs(values)
        spread = localised(ritz.vectors[:k], one.kinds)
        common = {"step": step, "matrix": matrix, "block": block.name}
        for i in range(k):
            self._values.append(
                common
                | {
                    "kind": block.kind,
                    "layer": block.layer,
                    "numel": block.numel,
                    "rank": i + 1,
                    "value": values[i],
                    "residual": residuals[i],
                    "error": errors[i],
                    "converged": bool(converged[i]),
                    "overlap": overlap[i],
                    "rank_before": before[i],
                    "ipr": spread.whole[i],
                    "products": ritz.products,
                    "rounds": ritz.rounds,
                }
            )
            by_kind = zip(one.kinds.names, spread.shares[i], spread.parts[i], strict=True)
            for kind, share, part in by_kind:
                self._parts.append(
                    common | {"rank": i + 1, "kind": kind, "share": share, "ipr": part}
                )
        if not converged.all():
            self._tell(step, block, float(relative.max()), ritz, searched=searched)
        name = f"track/{matrix}/{block.name}"
        return {f"{name}/{i + 1}": float(value) for i, value in enumerate(values)} | {
            f"{name}/error": float(relative.max()),
            f"{name}/overlap": float(overlap[0]),
            f"{name}/ipr": float(spread.whole[0]),
        }

    def _tell(
        self, step: int, block: Block, relative: float, ritz: Ritz, *, searched: bool
    ) -> None:
        """Says once of the first search and once of what follows that something was missed; the
        table says it of every step.
        """
        if searched in self._told:
            return
        self._told.add(searched)
        bound = f"(tolerance {self.tracking.tolerance:.1%})"
        if searched:
            found = f"{ritz.products} products of the first search {bound}"
            remedy = "The next measurements go on from there. Allow a larger tolerance or fewer k"
        else:
            found = f"{ritz.rounds} rounds of products {bound}"
            remedy = "Allow more max_rounds or guards, or measure more often"
        logger.warning(
            f"step {step}, block {block.name!r}: an eigenvalue is known to {relative:.1%} only "
            f"after {found}. The column 'converged' marks such rows, this is said once. {remedy}"
        )

    @property
    def table(self) -> pd.DataFrame:
        """A row for each step, block and rank.

        Columns: step, matrix, block, kind, layer, numel, rank (1 is the first), value, residual (an
        eigenvalue lies within it of the value), error (estimate of the value's, see
        :class:`Tracking`), converged (whether the error is within the tolerance), overlap (cosine
        of the eigenvector with the nearest one of the measurement before), rank_before (the rank of
        that one; another one than ``rank`` is a crossing), ipr (inverse participation ratio),
        products and rounds of the block's measurement.
        """
        table = pd.DataFrame(self._values, columns=VALUE_COLUMNS)
        return table.astype({"layer": "Int64", "rank_before": "Int64"})

    @property
    def localisation(self) -> pd.DataFrame:
        """A row for each step, block, rank and kind of what the block consists of.

        Columns: step, matrix, block, rank, kind, share (of the eigenvector's squared length), ipr
        (inverse participation ratio of this part).
        """
        return pd.DataFrame(self._parts, columns=PART_COLUMNS)

    def go_on_from(self, folder: str | os.PathLike[str], step: int) -> None:
        """Takes over what an earlier part of a training has saved of the steps before this one."""
        for name, rows in ((VALUES, self._values), (LOCALISATION, self._parts)):
            if (path := Path(folder) / name).exists():
                before = pd.read_parquet(path)
                rows[:0] = cast(Any, before[before["step"] < step].to_dict("records"))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes both tables, ``tracking.parquet`` and ``localisation.parquet``, each whole or not
        at all.
        """
        for name, table in ((VALUES, self.table), (LOCALISATION, self.localisation)):
            with whole_file(Path(folder) / name) as partial:
                table.to_parquet(partial, index=False, compression="zstd")


VALUE_COLUMNS = (
    *("step", "matrix", "block", "kind", "layer", "numel", "rank", "value", "residual"),
    *("error", "converged", "overlap", "rank_before", "ipr", "products", "rounds"),
)
PART_COLUMNS = ("step", "matrix", "block", "rank", "kind", "share", "ipr")
