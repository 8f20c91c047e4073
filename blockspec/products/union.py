"""All parameters that some blocks hold, as one vector: one product with it serves every block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from blockspec.model.blocks import Block, Piece, gather
from blockspec.numerics.probes import draw_probe
from blockspec.products.operators import Operator
from blockspec.products.requests import block_dtype

PROBED_AT_ONCE = 2**27  # entries of all probes of one sweep: 512 MiB in float32
MOST_AT_ONCE = (
    8  # probes of one sweep: the pass over the data that they share has become cheap beside them
)


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

    def products(
        self, operator: Operator, num_probes: int, *, seed: int
    ) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """(v, H v) of the probes 0 ... K - 1, in groups that share a pass over the data."""
        for start in range(0, num_probes, together := self.at_once(MOST_AT_ONCE)):
            probes = [
                self.probe(k, seed=seed) for k in range(start, min(start + together, num_probes))
            ]
            results = operator.sweep([(self.block, probe) for probe in probes])
            yield list(zip(probes, results, strict=True))

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
        tensors = self.tensors(vector)
        sums = [
            sum(p.select(tensors[p.parameter]).sum(dtype=torch.float64) for p in block.pieces)
            for block in self.blocks
        ]
        return torch.stack([torch.as_tensor(s) for s in sums]).cpu().numpy()
