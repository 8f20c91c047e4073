"""The sums of a pass over the batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from blockspec.model.blocks import Block


class Totals:
    """For each (block b, v (P_b,), targets): the sum over batches of H_cb v (P_c,), of each target.

    Args:
        requests: What is asked for.
        summed: False: nothing is summed.
    """

    def __init__(
        self, requests: Sequence[tuple[Block, Tensor, Sequence[Block]]], *, summed: bool
    ) -> None:
        self._requests = requests
        self._sums: list[list[Tensor | None]] = [
            [None] * len(targets) if summed else [] for _, _, targets in requests
        ]

    def add(self, number: int, parts: Sequence[Tensor], *, kept: bool) -> None:
        """Adds one batch's products with a request, in place.

        Args:
            number: Of the request.
            parts: In each target. Those of the first batch become the sum themselves: for a large
                model, a new tensor takes as long as a good part of the product.
            kept: Somebody else keeps them, so that they may not be changed.
        """
        sums, like = self._sums[number], self._requests[number][1]
        for place, total in enumerate(sums):
            part = parts[place].to(like)
            if total is None:
                sums[place] = part.clone() if kept else part
            else:
                total += part

    def flat(self) -> Iterator[Tensor]:
        """One after the other; zeros where there were no batches."""
        for sums, (_, vector, targets) in zip(self._sums, self._requests, strict=True):
            for target, part in zip(targets, sums, strict=bool(sums)):
                yield vector.new_zeros(target.numel) if part is None else part
