"""A vector that is spread over processes, and what goes between them and whole vectors.

Where a model is too large for one process, so are the vectors of its blocks. Each process then
keeps a portion of every Krylov vector, brings together what it computes with for as long as it
takes (:meth:`Portion.whole`), and gives away what it has computed: each process gets the sum of all
processes' vectors at its own portion (:meth:`Portion.of_sum`, a reduce-scatter). All processes do
this together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from blockspec.numerics.ranks import Ranks


@dataclass(frozen=True, eq=False)
class Portion:
    """This process's portion of a vector.

    Args:
        part: (p,) the entries ``ranks.share(numel)``.
        numel: Of the whole vector.
        ranks: The processes that hold the others, which are all there are.
    """

    part: Tensor
    numel: int
    ranks: Ranks

    def whole(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The entries from ``start`` to before ``stop`` of the whole vector."""
        stop = self.numel if stop is None else stop
        found = self.part.new_empty(stop - start, device=self.ranks.carrier(self.part))
        for row in range(self.ranks.rows):
            share = self.ranks.share(self.numel, row)
            first, last = max(start, share.start), min(stop, share.stop)
            if first >= last:
                continue
            piece = found[first - start : last - start]
            if row == self.ranks.row:
                piece.copy_(self.part[first - share.start : last - share.start])
            dist.broadcast(piece, row)
        return found.to(self.part.device)

    def of_sum(self, vector: Tensor) -> Tensor:
        """(p,) of the sum of all processes' ``vector`` (P,)."""
        sent = vector.to(self.ranks.carrier(vector), self.part.dtype)
        found = sent.new_empty(len(self.part))
        dist.reduce_scatter(found, [sent[part] for part in self._shares])
        return found.to(self.part.device)

    @property
    def _shares(self) -> list[slice]:
        return [self.ranks.share(self.numel, row) for row in range(self.ranks.rows)]


def along(chunks: Sequence[Tensor], vector: Tensor, ranks: Ranks) -> Tensor:
    """(m,) products of m vectors, of which each process has its portions in ``chunks`` (rows, p),
    with its own ``vector`` (P,), which is another one on each process.

    The portions stay where they are, because there are more of them: each process gets its portion
    of every vector, and what it finds goes back.
    """
    shares = [ranks.share(len(vector), row) for row in range(ranks.rows)]
    sizes = [share.stop - share.start for share in shares]
    own = sizes[ranks.row]
    sent = vector.to(ranks.carrier(vector))
    received = sent.new_empty(ranks.rows * own)
    dist.all_to_all_single(received, sent, [own] * ranks.rows, sizes)
    parts = received.view(ranks.rows, own)
    products = torch.cat([parts @ rows.to(parts).T for rows in chunks], 1)
    found = torch.empty_like(products[0])
    dist.reduce_scatter(found, list(products))
    return found.to(vector)
