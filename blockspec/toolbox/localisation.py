"""How localised vectors are: on how many parameters, and on which kinds of block.

The inverse participation ratio of a vector x of length 1 is ``sum x_i^4``. It is 1 for a vector
with a single entry and 1/n for one that is spread evenly over n entries, so its inverse counts the
parameters that take part. Of a kind of block it is that of the vector's part there, at length 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blockspec.model.blocks import Block, gather, partition, scatter
from blockspec.model.objective import Objective


@dataclass(frozen=True, eq=False)
class Kinds:
    """Which kind each parameter of a block is of.

    Args:
        names: (n,) the kinds.
        parts: For a vector (P,) of the block, its parts: the place of each one's kind in ``names``,
            and its numbers. They are disjoint and complete.
    """

    names: tuple[str, ...]
    parts: Callable[[Tensor], list[tuple[int, Tensor]]]


def kinds_of(block: Block, objective: Objective | None, parameters: Mapping[str, Tensor]) -> Kinds:
    """The kinds of what a block consists of.

    Args:
        block: Any block: one matrix has one kind, the whole model has many.
        objective: Its model is cut by matrix to learn the kinds; None: the block's own kind is all
            that is known.
        parameters: Of the operator.
    """
    if objective is None:
        return Kinds((block.kind,), lambda vector: [(0, vector)])
    own = [b for b in partition(objective.model, "matrix") if set(b.parameters) <= set(parameters)]
    if all(piece.whole for piece in block.pieces):
        return _of_whole_tensors(block, own, parameters)
    return _of_entries(block, own, parameters)


def _of_whole_tensors(block: Block, parts: list[Block], parameters: Mapping[str, Tensor]) -> Kinds:
    """Where the block is of whole tensors, the matrices are cut from views of its vector."""
    held = set(block.parameters)
    parts = [part for part in parts if set(part.parameters) <= held]
    names = tuple(dict.fromkeys(part.kind for part in parts))
    pieces = [(names.index(part.kind), piece) for part in parts for piece in part.pieces]
    shapes = {name: parameters[name].shape for name in block.parameters}

    def cut(vector: Tensor) -> list[tuple[int, Tensor]]:
        sizes = [shape.numel() for shape in shapes.values()]
        views = {
            name: values.view(shape)
            for (name, shape), values in zip(shapes.items(), vector.split(sizes), strict=True)
        }
        return [(kind, piece.select(views[piece.parameter])) for kind, piece in pieces]

    return Kinds(names, cut)


def _of_entries(block: Block, parts: list[Block], parameters: Mapping[str, Tensor]) -> Kinds:
    """Where the block cuts tensors in its own way, each entry is asked for its kind once."""
    names = tuple(dict.fromkeys(part.kind for part in parts))
    numbers = {name: torch.zeros(p.shape, device=p.device) for name, p in parameters.items()}
    device = next(iter(numbers.values())).device
    for part in parts:
        place = torch.full((part.numel,), float(names.index(part.kind)), device=device)
        for name, tensor in scatter(part, place, numbers).items():
            numbers[name] += tensor
    index = gather(block, numbers).long()
    places = [torch.nonzero(index == number)[:, 0] for number in index.unique()]
    present = tuple(names[number] for number in index.unique().tolist())
    return Kinds(present, lambda vector: [(i, vector[own]) for i, own in enumerate(places)])


@dataclass(frozen=True, eq=False)
class Localisation:
    """How vectors are spread, whole and over kinds of block.

    Args:
        whole: (n,) inverse participation ratio of each vector.
        shares: (n, kinds) of the vector's squared length.
        parts: (n, kinds) inverse participation ratio of its part; NaN where there is no part.
    """

    whole: np.ndarray
    shares: np.ndarray
    parts: np.ndarray


def localised(vectors: Tensor, kinds: Kinds) -> Localisation:
    """How each row of ``vectors`` (n, P) is spread over its entries and over the kinds."""
    mass = np.zeros((len(vectors), len(kinds.names)))
    fourth = np.zeros_like(mass)
    for row, vector in enumerate(vectors):
        places, sums = [], []
        for place, part in kinds.parts(vector):
            squares = part.reshape(-1).square()
            places.append(place)
            sums.append(torch.stack([squares.sum(), squares.dot(squares)]))
        found = torch.stack(sums).double().cpu().numpy()
        np.add.at(mass[row], places, found[:, 0])
        np.add.at(fourth[row], places, found[:, 1])
    with np.errstate(invalid="ignore", divide="ignore"):
        whole = fourth.sum(1) / mass.sum(1) ** 2
        return Localisation(whole, mass / mass.sum(1, keepdims=True), fourth / mass**2)
