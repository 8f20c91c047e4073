"""How localised vectors are: on how many parameters, and on which kinds of block.

The inverse participation ratio of a vector x of length 1 is ``sum x_i^4``. It is 1 for a vector
with a single entry and 1/n for one that is spread evenly over n entries, so its inverse counts the
parameters that take part. Of a kind of block it is that of the vector's part there, at length 1.
"""

from __future__ import annotations

from collections.abc import Mapping
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
        index: (P,) each parameter's place in ``names``.
    """

    names: tuple[str, ...]
    index: Tensor


def kinds_of(block: Block, objective: Objective | None, parameters: Mapping[str, Tensor]) -> Kinds:
    """The kinds of what a block consists of.

    Args:
        block: Any block: one matrix has one kind, the whole model has many.
        objective: Its model is cut by matrix to learn the kinds; None: the block's own kind is all
            that is known.
        parameters: Of the operator.
    """
    device = next(iter(parameters.values())).device
    if objective is None:
        return Kinds((block.kind,), torch.zeros(block.numel, dtype=torch.long, device=device))
    parts = [
        b for b in partition(objective.model, "matrix") if set(b.parameters) <= set(parameters)
    ]
    names = tuple(dict.fromkeys(part.kind for part in parts))
    numbers = {name: torch.zeros(p.shape, device=p.device) for name, p in parameters.items()}
    for part in parts:
        place = torch.full((part.numel,), float(names.index(part.kind)), device=device)
        for name, tensor in scatter(part, place, numbers).items():
            numbers[name] += tensor
    index = gather(block, numbers).long()
    present = index.unique()
    renamed = torch.zeros(len(names), dtype=torch.long, device=device)
    renamed[present] = torch.arange(len(present), device=device)
    return Kinds(tuple(names[i] for i in present.tolist()), renamed[index.to(device)])


def inverse_participation(vectors: Tensor) -> np.ndarray:
    """(n,) of each row of ``vectors`` (n, P), between 1 / P and 1; NaN for a row of zeros."""
    squares = vectors.double().square()
    return (squares.square().sum(1) / squares.sum(1).square()).cpu().numpy()


def by_kind(vectors: Tensor, kinds: Kinds) -> tuple[np.ndarray, np.ndarray]:
    """How each row of ``vectors`` (n, P) is spread over the kinds.

    Returns:
        (n, kinds) the share of the row's squared length, and (n, kinds) the inverse participation
        ratio of its part; NaN where there is no part.
    """
    squares = vectors.double().square()
    empty = squares.new_zeros(len(vectors), len(kinds.names))
    mass = empty.index_add(1, kinds.index, squares)
    fourth = empty.index_add(1, kinds.index, squares.square())
    share = mass / mass.sum(1, keepdim=True)
    return share.cpu().numpy(), (fourth / mass.square()).cpu().numpy()
