"""All parameters that some blocks hold, as one vector: one product with it serves every block."""

from __future__ import annotations

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
        disjoint = sum(block.numel for block in self.blocks) == self.covered
        if len(self.blocks) < MANY_BLOCKS or not disjoint:
            return None
        tensors = {
            name: torch.full_like(p, len(self.blocks), dtype=torch.int32, requires_grad=False)
            for name, p in self.parameters.items()
        }
        for number, block in enumerate(self.blocks):
            for piece in block.pieces:
                tensor = tensors[piece.parameter]
                piece.fill(tensor, torch.full_like(piece.select(tensor), number))
        return gather(self.block, tensors)

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
                return self.sums(parts[0] * probes[number])

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

    def sums(self, vector: Tensor) -> np.ndarray:
        """(n,) sum of the vector's entries over each block, float64."""
        if self._labels is not None:
            found = vector.new_zeros(len(self.blocks) + 1, dtype=torch.float64)
            return found.index_add_(0, self._labels, vector.double())[:-1].cpu().numpy()
        tensors = self.tensors(vector)
        sums = [
            sum(p.select(tensors[p.parameter]).sum(dtype=torch.float64) for p in block.pieces)
            for block in self.blocks
        ]
        return torch.stack([torch.as_tensor(s) for s in sums]).cpu().numpy()
