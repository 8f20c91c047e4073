"""Cutting a batch into micro-batches: which of its tensors carry examples, and which are shared by
them.

A batch holds tensors with one row per example (tokens, labels, images) beside others that all
examples use (a mask over positions, class weights). Their shapes do not tell them apart: a mask (T,
T) beside T examples looks like another T rows, and cut like them it makes another function of the
batch, in silence. So a way of cutting is tried before it is trusted: the loss of two neighbouring
parts must be the sum of both parts' losses, and so must the number of its terms. Tensors of one
length are first taken for examples all together, then all but one, then all but two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from itertools import chain, combinations, islice, pairwise
from typing import Any

import torch
from torch import Tensor

from blockspec.numerics import memory

Path = tuple[Hashable, ...]
Evaluate = Callable[[Any], tuple[Tensor, float]]
"""A batch -> (sum of its loss terms, their number)."""

MOST_SHARED = 2  # tensors of the examples' length that are tried as shared by all examples
MOST_TRIED = 24  # ways of cutting one batch
EPSILONS = 1000.0  # of the loss's dtype: sums in another order, kernels for another batch size
TOLERANCES = (1e-6, 0.03)  # least (models that compute in float32 inside) and most, relative


class NoExamplesError(ValueError):
    """A batch cannot be cut."""


@dataclass(frozen=True)
class Carriers:
    """Where the examples of a batch are.

    Args:
        paths: To the tensors with one row per example, from the batch inwards.
        length: Number of examples.
    """

    paths: frozenset[Path]
    length: int

    def part(self, batch: Any, start: int, stop: int) -> Any:
        """The batch with the examples from ``start`` to before ``stop`` alone."""
        return _walk(batch, lambda at, tensor: tensor[start:stop] if at in self.paths else tensor)

    def cut(self, batch: Any, size: int) -> Iterator[Any]:
        """The batch in parts of at most ``size`` examples."""
        for start in range(0, self.length, size):
            yield self.part(batch, start, start + size)


def carriers(batch: Any, size: int, evaluate: Evaluate | None) -> Carriers:
    """Where the examples of ``batch`` are, for parts of ``size`` examples.

    Without ``evaluate`` nothing can be tried, and shapes must do, if they leave no doubt.

    Raises:
        NoExamplesError: No way of cutting leaves the loss as it was. What ``evaluate`` raises on
            the whole batch is raised as it is.
    """
    ways = list(islice(_candidates(batch), MOST_TRIED))
    if evaluate is None:
        if ways and ways[0].length > 1 and _unambiguous(ways[0], batch):
            return ways[0]
        raise NoExamplesError(
            f"micro_batch={size} cannot be used: the model is spread over processes "
            "(fully_shard), where no way to cut a batch is tried, and the shapes "
            f"{_named_shapes(batch)} do not tell which tensors carry examples: pass smaller "
            "batches, with micro_batch=None"
        )
    for way in ways:
        if way.length > 1 and _adds_up(way, batch, min(size, way.length // 2), evaluate):
            return way
    total, _ = evaluate(batch)  # an error of the loss itself comes first
    again, _ = evaluate(batch)
    if ways and not (torch.isfinite(total).all() and torch.equal(total, again)):
        return ways[0]  # NaN or random numbers: the objective's own check tells
    raise NoExamplesError(
        f"micro_batch={size} cannot be used: no way to cut a batch of tensors "
        f"{_named_shapes(batch)} along first dimensions "
        f"leaves its loss ({total.item():.6g}) as it was. The loss mixes the examples of a batch "
        "(contrastive terms), or "
        "the examples lie along another dimension or in something that is no tensor. Pass smaller "
        "batches, with "
        "micro_batch=None"
    )


def longest(batch: Any) -> int:
    """The most examples that a batch may have, from its shapes alone; 1 where it has no tensors
    with rows.
    """
    return max((len(tensor) for _, tensor in leaves(batch) if tensor.dim()), default=1)


def _candidates(batch: Any) -> Iterator[Carriers]:
    """Ways of cutting, the likeliest first: by the length that most tensors have, square tensors
    shared before others.
    """
    rows = {path: tensor.shape for path, tensor in leaves(batch) if tensor.dim()}
    lengths = [shape[0] for shape in rows.values()]
    for length in sorted(dict.fromkeys(lengths), key=lengths.count, reverse=True):
        paths = [path for path, shape in rows.items() if shape[0] == length]
        paths.sort(key=lambda path: rows[path][1:2] != rows[path][:1])
        most = min(MOST_SHARED, len(paths) - 1)
        for shared in chain.from_iterable(combinations(paths, n) for n in range(most + 1)):
            yield Carriers(frozenset(paths) - frozenset(shared), length)


def _adds_up(way: Carriers, batch: Any, size: int, evaluate: Evaluate) -> bool:
    ends = [0, size, min(2 * size, way.length)]
    try:
        both, both_count = evaluate(way.part(batch, 0, ends[2]))
        parts = [evaluate(way.part(batch, a, b)) for a, b in pairwise(ends)]
    except Exception as error:  # whatever a model says to a batch that is none
        if memory.is_exhausted(error):  # shapes must do, if they leave no doubt
            return _unambiguous(way, batch)
        return False
    low, high = TOLERANCES
    tolerance = min(max(EPSILONS * torch.finfo(both.dtype).eps, low), high)
    apart = abs(both.item() - sum(total.item() for total, _ in parts))
    size_of_terms = sum(abs(total.item()) for total, _ in parts)
    count = sum(n for _, n in parts)
    whole = both_count % 1 == count % 1 == 0  # sums of weights are rounded
    counted = math.isclose(both_count, count, rel_tol=0.0 if whole else tolerance)
    return apart <= tolerance * size_of_terms and counted


def _unambiguous(way: Carriers, batch: Any) -> bool:
    """Whether the length of the examples is that of no other dimension, so that no tensor is taken
    for another.
    """
    others = [shape[1:] if path in way.paths else shape for path, shape in _shapes(batch).items()]
    return all(way.length not in shape for shape in others)


def _shapes(batch: Any) -> dict[Path, tuple[int, ...]]:
    return {path: tuple(tensor.shape) for path, tensor in leaves(batch)}


def _named_shapes(batch: Any) -> dict[str, tuple[int, ...]]:
    return {"/".join(map(str, path)): shape for path, shape in _shapes(batch).items()}


def leaves(batch: Any) -> list[tuple[Path, Tensor]]:
    """The tensors of a batch, with the way to each."""
    found: list[tuple[Path, Tensor]] = []

    def note(path: Path, tensor: Tensor) -> Tensor:
        found.append((path, tensor))
        return tensor

    _walk(batch, note)
    return found


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same nest with another tensor in each tensor's place; its holders are new ones."""
    return _walk(value, lambda _, tensor: function(tensor))


def _walk(value: Any, function: Callable[[Path, Tensor], Tensor], path: Path = ()) -> Any:
    """The same nest of mappings, tuples, lists and dataclasses with another tensor in each tensor's
    place.
    """
    if isinstance(value, Tensor):
        return function(path, value)
    if isinstance(value, MutableMapping):  # of its own class, which losses may read by attributes
        filled = copy(value)
        for name, item in value.items():
            filled[name] = _walk(item, function, (*path, name))
        return filled
    if isinstance(value, Mapping):
        return {name: _walk(item, function, (*path, name)) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_walk(item, function, (*path, i)) for i, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if is_dataclass(value) and not isinstance(value, type):
        changed = copy(value)
        for field in fields(value):
            item = _walk(getattr(value, field.name), function, (*path, field.name))
            object.__setattr__(changed, field.name, item)  # it may be frozen
        return changed
    return value
