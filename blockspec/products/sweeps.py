"""Algorithms that ask for products, driven together: those of all blocks share the passes over the
data.

An algorithm of one block is a generator: it yields probes (K, P), is sent their products (K, P),
and returns its result. It knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from blockspec.model.blocks import Block
from blockspec.numerics.algorithms import Algorithm, Progress, R
from blockspec.products.operators import Operator


def run_together(
    algorithms: Mapping[Block, Algorithm[R]],
    operator: Operator,
    *,
    progress: Progress | None = None,
) -> dict[Block, R]:
    """The results of all algorithms; each round of products is one sweep.

    Args:
        progress: Called with (products done, None) after each sweep.
    """
    results: dict[Block, R] = {}
    asked: dict[Block, Tensor] = {}
    done = 0

    def resume(block: Block, answer: Tensor | None) -> None:
        try:
            asked[block] = (
                next(algorithms[block]) if answer is None else algorithms[block].send(answer)
            )
        except StopIteration as stop:
            results[block] = stop.value

    for block in algorithms:
        resume(block, None)
    while asked:
        questions, asked = asked, {}
        flat = operator.sweep(
            [(block, probe) for block, probes in questions.items() for probe in probes]
        )
        done += len(flat)
        for block, probes in questions.items():
            answer, flat = torch.stack(flat[: len(probes)]), flat[len(probes) :]
            resume(block, answer)
        if progress is not None:
            progress(done, None)
    return {block: results[block] for block in algorithms}
