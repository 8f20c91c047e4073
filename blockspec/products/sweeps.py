"""Algorithms that ask for products, driven together: those of all blocks share the passes over the
data.

An algorithm of one block is a generator: it yields probes (K, P), is sent their products (K, P),
and returns its result. It knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from blockspec.model.blocks import Block
from blockspec.numerics.algorithms import Algorithm, Progress, R
from blockspec.numerics.measures import NOTHING
from blockspec.products.operators import Operator
from blockspec.products.shares import Shares

Key = TypeVar("Key", bound=Hashable)


@dataclass(eq=False)
class Watch:
    """Keeps of the products of each block what groups of units have in them.

    Args:
        shares: Asks the operator.
        keep: ``keep(block, probe, product)`` of a unit's product (P,): what to keep of it.
        rounds: Of each block and each of its rounds, (n, K, ...) of the round's K probes; empty
            where units are not told apart.
    """

    shares: Shares
    keep: Callable[[Block, Tensor, Tensor], np.ndarray]
    rounds: dict[Block, list[np.ndarray]] = field(default_factory=dict)

    def sweep(self, requests: Sequence[tuple[Block, Tensor]]) -> list[Tensor]:
        """The products; what was kept is a round more of every block."""

        def each(number: int, parts: list[Tensor]) -> np.ndarray:
            return self.keep(*requests[number], parts[0])

        found, kept = self.shares.sweep(requests, each)
        by_block: dict[Block, list[np.ndarray]] = {}
        for (block, _), part in zip(requests, kept or [], strict=kept is not None):
            by_block.setdefault(block, []).append(part)
        for block, parts in by_block.items():
            self.rounds.setdefault(block, []).append(np.stack(parts, axis=1))
        return found


def run_together(
    algorithms: Mapping[Block, Algorithm[R]],
    operator: Operator,
    *,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> dict[Block, R]:
    """The results of all algorithms; each round of products is one sweep.

    Args:
        progress: Called with (products done, None) after each sweep.
        watch: Is told what units of data have in the products.
    """
    watch = watch or Watch(Shares(operator, wanted=False), lambda block, probe, product: NOTHING)
    return driven(algorithms, watch.sweep, progress=progress)


def driven(
    algorithms: Mapping[Key, Algorithm[R]],
    sweep: Callable[[Sequence[tuple[Key, Tensor]]], list[Tensor]],
    *,
    progress: Progress | None = None,
) -> dict[Key, R]:
    """The results of all algorithms; each round of products is one call of ``sweep``.

    Args:
        algorithms: What each is of -> the algorithm.
        sweep: For each (key, v (P,)): the product with v (P,).
        progress: Called with (products done, None) after each sweep.
    """
    results: dict[Key, R] = {}
    asked: dict[Key, Tensor] = {}
    done = 0

    def resume(key: Key, answer: Tensor | None) -> None:
        try:
            asked[key] = next(algorithms[key]) if answer is None else algorithms[key].send(answer)
        except StopIteration as stop:
            results[key] = stop.value

    for key in algorithms:
        resume(key, None)
    while asked:
        questions, asked = asked, {}
        flat = sweep([(key, probe) for key, probes in questions.items() for probe in probes])
        done += len(flat)
        for key, probes in questions.items():
            own, flat = flat[: len(probes)], flat[len(probes) :]
            # a single row is not copied: of a large model that takes as long as arithmetic
            resume(key, own[0][None] if len(own) == 1 else torch.stack(own))
        if progress is not None:
            progress(done, None)
    return {key: results[key] for key in algorithms}
