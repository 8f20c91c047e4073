"""All parameters that some blocks hold, as one vector: one product with it serves every block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from blockspec.model.blocks import Block, Piece, gather
from blockspec.numerics.probes import draw_probe
from blockspec.products.operators import Operator
from blockspec.products.requests import block_dtype
from blockspec.products.shares import Shares

PROBED_AT_ONCE = 2**27  # entries of all probes of one sweep: 512 MiB in float32
MOST_AT_ONCE = (
    8  # probes of one sweep: the pass over the data that they share has become cheap beside them
)
SHORTEST = 8  # entries of a strip: shorter ones are too many
MANY_BLOCKS = 100  # from which one pass with their numbers is faster than a sum for each


class Product(NamedTuple):
    """A probe v (P,), H v (P,), and of each of g groups of units the sums (g, n) of v * H v over
    the n blocks; None where units are not told apart.
    """

    probe: Tensor
    product: Tensor
    shares: np.ndarray | None


class Union:
    """The parameters that the blocks, which may overlap, have pieces of; whole tensors, so that
    products need no copies.
    """

    def __init__(self, operator: Operator, blocks: Sequence[Block]) -> None:
        held = {name for block in blocks for name in block.parameters}
        self.parameters = {name: p for name, p in operator.parameters.items() if name in held}
        numel = sum(p.numel() for p in self.parameters.values())
        self.block = Block(
            "union", "other", None, numel, tuple(Piece(name) for name in self.parameters)
        )
        self.blocks = blocks
        self.device = operator.device
        self.dtype = block_dtype(operator.parameters, self.block)
        self._inside = self._mask()

    def _mask(self) -> Tensor | None:
        """(P,) 1 where a block has the entry, 0 elsewhere; None where the blocks have all of
        them.
        """
        tensors = {
            name: torch.zeros_like(p, requires_grad=False) for name, p in self.parameters.items()
        }
        for block in self.blocks:
            for piece in block.pieces:
                tensor = tensors[piece.parameter]
                piece.fill(tensor, torch.ones_like(piece.select(tensor)))
        mask = gather(self.block, tensors)
        return None if mask.all() else mask

    @cached_property
    def _labels(self) -> Tensor | None:
        """(P,) the number of each entry's block, and of entries of none the last; None where there
        are few blocks, which are summed one by one, or they overlap.
        """
        many = len(self.blocks) >= MANY_BLOCKS
        return self._labels_of_entries() if many and self._disjoint else None

    @property
    def _disjoint(self) -> bool:
        return sum(block.numel for block in self.blocks) == self.covered

    def _labels_of_entries(self) -> Tensor:
        tensors = {
            name: torch.full_like(p, len(self.blocks), dtype=torch.int32, requires_grad=False)
            for name, p in self.parameters.items()
        }
        for number, block in enumerate(self.blocks):
            for piece in block.pieces:
                tensor = tensors[piece.parameter]
                piece.fill(tensor, torch.full_like(piece.select(tensor), number))
        return gather(self.block, tensors)

    @cached_property
    def _strips(self) -> tuple[Tensor, int] | None:
        """(S,) the number of each strip's block, and of strips of none the last, and how long a
        strip is: the union is cut into the longest ones of equal length that no border of a block
        cuts. None where those are short, or blocks overlap.
        """
        if not self._disjoint:
            return None
        labels = self._labels_of_entries()
        borders = (labels[1:] != labels[:-1]).nonzero().ravel().cpu().numpy() + 1
        length = math.gcd(len(labels), int(np.gcd.reduce(borders)))
        return (labels[::length].clone(), length) if length >= SHORTEST else None

    @property
    def covered(self) -> int:
        """Entries that at least one block has."""
        return self.block.numel if self._inside is None else int(self._inside.count_nonzero())

    def probe(self, number: int, *, seed: int, distribution: str = "rademacher") -> Tensor:
        """(P,) random entries, +1 or -1 unless told otherwise, 0 outside of the blocks.

        They depend on the seed, the number and the parameters' names alone, however these are cut
        into blocks.
        """
        parts = [
            draw_probe(name, p.numel(), seed=seed, probe=number, distribution=distribution)
            for name, p in self.parameters.items()
        ]
        vector = torch.cat(parts).to(self.device, self.dtype)
        return vector if self._inside is None else vector.mul_(self._inside)

    def products(self, shares: Shares, num_probes: int, *, seed: int) -> Iterator[list[Product]]:
        """Of the probes 0 ... K - 1, in groups that share a pass over the data."""
        for start in range(0, num_probes, together := self.at_once(MOST_AT_ONCE)):
            probes = [
                self.probe(k, seed=seed) for k in range(start, min(start + together, num_probes))
            ]

            def each(number: int, parts: list[Tensor], probes: list[Tensor] = probes) -> np.ndarray:
                return self.dots(parts[0], probes[number])

            results, kept = shares.sweep([(self.block, probe) for probe in probes], each)
            shared = [None] * len(probes) if kept is None else kept
            yield [Product(*row) for row in zip(probes, results, shared, strict=True)]

    def at_once(self, most: int) -> int:
        """Products of one sweep whose results may be kept together."""
        return max(1, min(most, PROBED_AT_ONCE // self.block.numel))

    def tensors(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector (P,) as views in the shapes of the parameters."""
        parts = vector.split([p.numel() for p in self.parameters.values()])
        return {
            name: part.view(p.shape)
            for (name, p), part in zip(self.parameters.items(), parts, strict=True)
        }

    def dots(self, vector: Tensor, other: Tensor) -> np.ndarray:
        """(n,) dot products of the vectors' parts in each block, for errors of the data: a few
        operations, as there is one for every unit and probe. Strips are summed in the vectors' own
        precision, and what they sum up to in float64.
        """
        if self._strips is None:
            return self.sums(vector * other)
        labels, length = self._strips
        strips = (vector * other).view(-1, length).sum(1)
        return self._by_label(labels, strips)

    def _by_label(self, labels: Tensor, values: Tensor) -> np.ndarray:
        """(n,) sums of the values of each block's label, float64."""
        found = values.new_zeros(len(self.blocks) + 1, dtype=torch.float64)
        return found.index_add_(0, labels, values.double())[:-1].cpu().numpy()

    def sums(self, vector: Tensor) -> np.ndarray:
        """(n,) sum of the vector's entries over each block, float64."""
        if self._labels is not None:
            return self._by_label(self._labels, vector)
        tensors = self.tensors(vector)
        sums = [
            sum(p.select(tensors[p.parameter]).sum(dtype=torch.float64) for p in block.pieces)
            for block in self.blocks
        ]
        return torch.stack([torch.as_tensor(s) for s in sums]).cpu().numpy()
