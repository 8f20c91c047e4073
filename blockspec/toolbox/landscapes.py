"""The loss along one or two directions of parameter space."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from blockspec.model.blocks import Block, gather, partition, scatter
from blockspec.model.objective import Objective
from blockspec.numerics.algorithms import Progress
from blockspec.numerics.probes import draw_probe
from blockspec.numerics.progress import shows_progress
from blockspec.products.requests import checked_blocks
from blockspec.products.selection import OperatorSettings
from blockspec.products.settings import takes
from blockspec.toolbox.eigenpairs import top_eigenpairs
from blockspec.toolbox.moves import shifted

UNSCALED = (
    "norm",
    "bias",
)  # kinds that a filter-normalised direction leaves alone, as in the authors' code


@dataclass(frozen=True, eq=False)
class Landscape:
    """Losses on a line or in a plane through the parameters.

    Args:
        steps: For each of the one or two directions, (n,) multiples of it.
        losses: (n,) or (n, m) the objective at ``parameters + steps[0][i] d_0 (+ steps[1][j]
            d_1)``; inf or nan where it is that.
        names: What the directions are.
    """

    steps: tuple[np.ndarray, ...] = field(repr=False)
    losses: np.ndarray = field(repr=False)
    names: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        """A row a point: a column for the multiple of each direction, by its name, and ``loss``."""
        grid = np.meshgrid(*self.steps, indexing="ij")
        names = (
            self.names
            if len(set(self.names)) == len(self.names)
            else [f"{i} {name}" for i, name in enumerate(self.names)]
        )
        return pd.DataFrame(
            {name: axis.ravel() for name, axis in zip(names, grid, strict=True)}
            | {"loss": self.losses.ravel()}
        )


@shows_progress("landscape", "points")
@takes(settings=OperatorSettings)
def landscape(
    objective: Objective,
    block: Block,
    directions: str | Sequence[Tensor] = "eigenvectors",
    *,
    dimensions: int = 2,
    radius: float | Sequence[float] | None = None,
    points: int = 21,
    seed: int = 0,
    settings: OperatorSettings,
    progress: Progress | None = None,
) -> Landscape:
    """The loss around the parameters, along one or two directions within a block
    (``partition(model, "model")[0]``: all of them).

    The parameters are put back bit by bit, also when something raises.

    Args:
        directions: ``"eigenvectors"``: of the largest eigenvalues in magnitude, of length 1, as in
            PyHessian (arXiv 1912.07145). ``"random"``: filter-normalised Gaussian ones (Li et al.,
            arXiv 1712.09913): each block of ``partition(model, "neuron")`` (a head, a neuron, a
            token) has the norm of its parameters, and so has each filter of a convolution and each
            row of a matrix of unknown role; norms and biases stay. Or one or two vectors (P,) as
            the block's vectors are laid out, taken as they are.
        dimensions: 1 or 2, where directions are named.
        radius: The largest multiple of each direction; None: 0.5 for eigenvectors, as PyHessian
            takes, else 1.
        points: Along each direction, from -radius to radius; an odd number has the parameters
            themselves in the middle.
        seed: Of the directions.
        [settings]
        progress: Called with (points done, points in all).
    """
    (block,) = checked_blocks(objective.parameters(), block)
    if points < 2:
        raise ValueError(f"points is at least 2, got {points}")
    if isinstance(directions, str):
        if directions not in DIRECTIONS:
            raise ValueError(
                f"directions is one of {tuple(DIRECTIONS)} or one or two vectors, got "
                f"{directions!r}"
            )
        if dimensions not in (1, 2):
            raise ValueError(f"dimensions is 1 or 2, got {dimensions}")
        function, length = DIRECTIONS[directions]
        objective.check()
        names, vectors = function(objective, block, dimensions, seed, settings)
    else:
        names, vectors, length = (
            [f"direction {i + 1}" for i in range(len(directions))],
            list(directions),
            1.0,
        )
        _check_vectors(block, vectors)
    given = length if radius is None else radius
    radii = [float(given)] * len(vectors) if isinstance(given, (int, float)) else list(given)
    if len(radii) != len(vectors) or not all(0 < r < math.inf for r in radii):
        raise ValueError(
            f"radius is a positive number, or one for each of the {len(vectors)} directions, got "
            f"{radius!r}"
        )
    steps = tuple(np.linspace(-r, r, points) for r in radii)
    losses = np.empty([points] * len(vectors))
    parameters = {name: objective.parameters()[name] for name in block.parameters}
    for done, place in enumerate(np.ndindex(*losses.shape), start=1):
        multiples = [float(axis[i]) for axis, i in zip(steps, place, strict=True)]
        change = sum(step * vector for step, vector in zip(multiples, vectors, strict=True))
        assert isinstance(change, Tensor)
        with shifted(parameters, scatter(block, change.to(objective.device), parameters)):
            losses[place] = objective.value()
        if progress is not None:
            progress(done, losses.size)
    return Landscape(steps, losses, tuple(names))


def _eigenvectors(
    objective: Objective, block: Block, dimensions: int, seed: int, settings: OperatorSettings
) -> tuple[list[str], list[Tensor]]:
    pairs = top_eigenpairs(objective, block, dimensions, seed=seed, **vars(settings))
    return [f"eigenvector of {value:.3g}" for value in pairs.values], list(pairs.vectors)


def _random(
    objective: Objective, block: Block, dimensions: int, seed: int, settings: OperatorSettings
) -> tuple[list[str], list[Tensor]]:
    vectors = [filter_normalised(objective, block, seed=seed, number=i) for i in range(dimensions)]
    return [f"random direction {i + 1}" for i in range(dimensions)], vectors


DIRECTIONS: Mapping[str, tuple[Callable[..., tuple[list[str], list[Tensor]]], float]] = {
    "eigenvectors": (_eigenvectors, 0.5),
    "random": (_random, 1.0),
}
"""Name -> function, and the radius that suits its lengths."""


def filter_normalised(
    objective: Objective, block: Block, *, seed: int = 0, number: int = 0
) -> Tensor:
    """(P,) a Gaussian direction, each filter of which has the norm of the filter's parameters; 0
    for norms and biases, and for parameters outside of the block.

    A filter is what makes one output: a block of ``partition(model, "neuron")``, and where that
    leaves a tensor of two or more axes whole (convolutions, matrices of unknown roles), one row of
    it.
    """
    parameters = {name: p.detach() for name, p in objective.parameters().items()}
    direction = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for neuron in partition(objective.model, "neuron"):
        if neuron.kind in UNSCALED:
            continue
        drawn = draw_probe(
            neuron.name, neuron.numel, seed=seed, probe=number, distribution="gaussian"
        )
        cut = _split(neuron, drawn, parameters)
        if _is_whole(neuron, parameters):
            (piece,) = neuron.pieces
            weight = parameters[piece.parameter]
            direction[piece.parameter].copy_(_like_rows(cut[0].view(weight.shape), weight))
            continue
        drawn *= float(gather(neuron, parameters).norm() / drawn.norm())
        for piece, values in zip(neuron.pieces, cut, strict=True):
            piece.fill(direction[piece.parameter], values.to(direction[piece.parameter]))
    return gather(block, direction)


def _is_whole(neuron: Block, parameters: Mapping[str, Tensor]) -> bool:
    """Whether it is a tensor with several filters in it."""
    first = neuron.pieces[0]
    return len(neuron.pieces) == 1 and first.axis is None and parameters[first.parameter].dim() > 1


def _like_rows(drawn: Tensor, weight: Tensor) -> Tensor:
    """The drawn tensor with every row's norm that of the weight's row."""
    drawn, axes = drawn.to(weight), tuple(range(1, weight.dim()))
    norms = [torch.linalg.vector_norm(t, dim=axes, keepdim=True) for t in (weight, drawn)]
    return drawn * (norms[0] / norms[1])


def _split(block: Block, vector: Tensor, parameters: Mapping[str, Tensor]) -> Sequence[Tensor]:
    return vector.split(
        [math.prod(piece.select(parameters[piece.parameter]).shape) for piece in block.pieces]
    )


def _check_vectors(block: Block, vectors: Sequence[Tensor]) -> None:
    if len(vectors) not in (1, 2):
        raise ValueError(f"one or two directions are possible, got {len(vectors)}")
    for vector in vectors:
        if vector.shape != (block.numel,):
            raise ValueError(
                f"a direction in block {block.name!r} is a vector of shape ({block.numel},), got "
                f"{tuple(vector.shape)}: "
                "blockspec.model.blocks.gather(block, tensors) makes one of tensors in the shapes "
                "of the parameters"
            )
        if not 0 < (length := float(vector.norm())) < math.inf:
            raise ValueError(
                f"a direction in block {block.name!r} has the norm {length}: a landscape needs a "
                "positive, finite one"
            )
