"""From which number of tokens on a GPU should attend without matrices, and in strips of how many
rows: ``python -m benchmarks.attention_gpu``.

``blockspec.model.lengths`` takes matrices up to 2,048 tokens on a GPU, and strips have 64 rows;
both numbers were chosen without a GPU. One layer of 12 heads of 64, causal; a product is the
derivative of its gradient.
"""

from __future__ import annotations

import time

import pandas as pd
import torch
from jsonargparse import CLI

from benchmarks.attention import KINDS
from benchmarks.gpt2_gpu import synchronise
from benchmarks.record import write
from blockspec.model.attention import strips
from blockspec.model.patching import patched
from blockspec.products.precision import reduced_multiplication

HEADS, WIDTH = 12, 64


def milliseconds(kind: str, batch: int, tokens: int, device: torch.device, rounds: int) -> float:
    """Of a product, the fastest."""
    shape = (batch, HEADS, tokens, WIDTH)
    inputs = [torch.randn(shape, device=device, requires_grad=True) for _ in range(3)]
    views = [t.view_as(t) for t in inputs]
    loss = KINDS[kind](*views, causal=True).square().sum()
    gradient = torch.autograd.grad(loss, views, create_graph=True)
    taken = []
    for _ in range(rounds):
        synchronise(device)
        start = time.perf_counter()
        torch.autograd.grad(gradient, inputs, inputs, retain_graph=True)
        synchronise(device)
        taken.append(1000 * (time.perf_counter() - start))
    return min(taken)


def main(
    tokens: list[int] = [256, 512, 1024, 2048],  # noqa: B006
    batches: list[int] = [1, 8],  # noqa: B006
    rows: list[int] = [64, 256, 1024],  # noqa: B006
    rounds: int = 5,
) -> None:
    """Measures and writes the table, in milliseconds.

    Args:
        tokens: Lengths of a sequence.
        batches: Sequences at once.
        rows: Of a strip.
        rounds: Products, of which the fastest counts.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = []
    for precision in (None, "tf32"):
        for batch, count in [(batch, count) for batch in batches for count in tokens]:
            row = {"precision": precision or "float32", "sequences": batch, "tokens": count}
            with reduced_multiplication(precision, device):
                matrices = {"matrices": milliseconds("matrices", batch, count, device, rounds)}
                for size in [size for size in rows if size <= count]:
                    with patched([(strips, "ROWS", size)]):
                        found = milliseconds("without", batch, count, device, rounds)
                    matrices[f"strips of {size}"] = found
            table.append(row | matrices)
    write("attention_gpu", {"A product, ms": pd.DataFrame(table).fillna("")})


if __name__ == "__main__":
    CLI(main, as_positional=False)
