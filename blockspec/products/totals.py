"""The sums of a pass over the batches, and over the processes that split them: one message a sweep,
in which each process also says how it went.

The sum of a whole vector's products is whole on every process. Of a :class:`Portion`, each process
has its portion of the sum, which is put together batch by batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockspec.model.blocks import Block
from blockspec.numerics.basis import fresh
from blockspec.numerics.portions import Portion
from blockspec.numerics.ranks import Ranks
from blockspec.products.finiteness import is_finite

Request = tuple[Block, Tensor | Portion, Sequence[Block]]
"""Where a vector lies, the vector, and the blocks that its product is wanted in; of a portion that
is its own block.
"""


class Totals:
    """For each (block b, v (P_b,), targets): the sum over batches of H_cb v (P_c,), of each target.

    Args:
        requests: What is asked for.
        summed: False: nothing is summed.
    """

    def __init__(self, requests: Sequence[Request], *, summed: bool) -> None:
        self._requests = requests
        self._sums: list[list[Tensor | None]] = [
            [None] * len(targets) if summed else [] for _, _, targets in requests
        ]

    def add(self, number: int, parts: Sequence[Tensor], *, kept: bool) -> None:
        """Adds one batch's products with a request, in place; of a portion those of all processes,
        which do this together.

        Args:
            number: Of the request.
            parts: In each target. Those of the first batch become the sum themselves: for a large
                model, a new tensor takes as long as a good part of the product.
            kept: Somebody else keeps them, so that they may not be changed.
        """
        sums, like = self._sums[number], self._requests[number][1]
        for place, total in enumerate(sums):
            if isinstance(like, Portion):
                part, own = like.of_sum(parts[place]), True
            else:
                part, own = parts[place].to(like), not kept
            if total is None:
                sums[place] = part if own else part.clone()
            else:
                total += part

    def restore(self, sums: Iterable[Sequence[Tensor]]) -> None:
        """Goes on from these sums of whole vectors, if there are any."""
        for number, parts in enumerate(sums):
            vector = self._requests[number][1]
            assert isinstance(vector, Tensor)
            self._sums[number] = [fresh(part).to(vector) for part in parts]

    def now(self) -> Iterator[list[Tensor]]:
        """The sums so far, of whole vectors, request by request; made when they are asked for."""
        return self._filled()

    def over(self, ranks: Ranks, terms: float, *, exhausted: bool) -> Sums:
        """The sums over all processes, by one message: one that is out of memory takes part in it,
        so that the others need not wait, and all begin anew.

        Args:
            ranks: The processes.
            terms: Loss terms of this one.
            exhausted: Whether it is out of memory.
        """
        spread = [isinstance(vector, Portion) for _, vector, _ in self._requests]
        pairs = list(zip(self._filled(), spread, strict=True))
        bad = [own and not all(map(is_finite, parts)) for parts, own in pairs]
        words = torch.tensor([terms, exhausted, *bad], dtype=torch.float64)
        sent = [part for parts, own in pairs if not own for part in parts]
        *summed, words = ranks.sums([*sent, words])
        found = iter(summed)
        products = [parts if own else [next(found) for _ in parts] for parts, own in pairs]
        whole_terms, out_of_memory, *wrong = words.tolist()
        return Sums(products, whole_terms, out_of_memory, wrong)

    def _filled(self) -> Iterator[list[Tensor]]:
        """Of each request; zeros where there were no batches."""
        for sums, (_, vector, targets) in zip(self._sums, self._requests, strict=True):
            yield [
                _zeros(vector, target) if part is None else part
                for target, part in zip(targets, sums, strict=bool(sums))
            ]


def _zeros(vector: Tensor | Portion, target: Block) -> Tensor:
    if isinstance(vector, Portion):
        return torch.zeros_like(vector.part)
    return vector.new_zeros(target.numel)


@dataclass(frozen=True, eq=False)
class Sums:
    """What all processes have found.

    Args:
        products: Of each request, summed over loss terms.
        terms: Their number.
        exhausted: How many processes were out of memory.
        wrong: Of each request, on how many processes a portion is not finite.
    """

    products: list[list[Tensor]]
    terms: float
    exhausted: float
    wrong: Sequence[float]

    def means(self, requests: Sequence[Request]) -> list[list[Tensor]]:
        """The products over the loss terms, which are finite on all processes."""
        for (block, _, _), found, wrong in zip(requests, self.products, self.wrong, strict=True):
            if wrong or not all(is_finite(part.div_(self.terms)) for part in found):
                raise ValueError(
                    f"a product with block {block.name!r} holds NaN or infinite values; check the "
                    "checkpoint and the data, or use a wider dtype (model.double()). A root or a "
                    "norm of exactly 0 has no second derivative, though PyTorch gives it a "
                    "gradient: add a small number within it"
                )
        return self.products


def compare(ranks: Ranks, requests: Sequence[Request]) -> None:
    """Raises ValueError where processes that share a pass ask for other products: a sum of products
    of other vectors has no meaning.
    """
    own = [(source.name, len(targets), _trace_of(v)) for source, v, targets in requests]
    if len({str(told) for told in ranks.of_column(own)}) > 1:
        raise ValueError(
            "the processes ask for products with different vectors or blocks: every process "
            "has to make the same call, "
            "with the same seed and the same numbers of probes and steps"
        )


def _trace_of(vector: Tensor | Portion) -> str:
    """What tells a vector from others, from its first entries; of a portion, every process has
    others.
    """
    if isinstance(vector, Portion):
        return str(vector.numel)
    first = vector[:64].double().cpu()
    return f"{len(vector)} {float(first @ torch.arange(1.0, len(first) + 1).double()):.6g}"
