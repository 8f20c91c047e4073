"""Long contexts: a product through attention with matrices and without: ``python -m
benchmarks.attention``.

One layer: 12 heads of 64, causal, one example. A product is the gradient of an inner product of the
layer's gradient, by q, k and v; the loss is not linear in the output, so that all of attention's
second derivative is in it. Each measurement has a process of its own, whose peak of memory is that
of the graph and one product. Matrices are PyTorch's MATH backend.

A model: every matrix of GPT-2 at 1024 tokens, one product each, in one sweep.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pandas as pd
import torch
from jsonargparse import CLI
from torch import Tensor

import blockspec
from benchmarks.record import clock, in_turns, write
from benchmarks.sweep import Size, objective_of
from blockspec.model import lengths
from blockspec.model.attention import attention
from blockspec.numerics import memory
from blockspec.numerics.probes import draw_probe
from blockspec.products.curvature import Products

HEADS, WIDTH = 12, 64
NEVER = 10**9  # tokens


def with_matrices(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """What the MATH backend computes."""
    return torch._scaled_dot_product_attention_math(q, k, v, is_causal=causal)[0]


def without(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """What is measured."""
    return attention(q, k, v, causal=causal)


KINDS: dict[str, Callable[..., Tensor]] = {"matrices": with_matrices, "without": without}


def layer(kind: str, tokens: int, causal: bool, rounds: int) -> tuple[float, float, float]:
    """CPU seconds of the graph and of a product (the fastest), and the peak of memory in bytes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    inputs = [torch.randn(1, HEADS, tokens, WIDTH, requires_grad=True) for _ in range(3)]
    with memory.watched(torch.device("cpu")) as peak:
        start = clock()
        views = [t.view_as(t) for t in inputs]
        loss = KINDS[kind](*views, causal=causal).square().sum()
        gradient = torch.autograd.grad(loss, views, create_graph=True)
        graph = clock() - start
        seconds = []
        for _ in range(rounds):
            start = clock()
            torch.autograd.grad(gradient, inputs, inputs, retain_graph=True)
            seconds.append(clock() - start)
    return graph, min(seconds), float(peak.growth)


def layers(tokens: list[int], most: int, causal: bool, rounds: int) -> pd.DataFrame:
    """A row for each number of tokens; matrices up to ``most`` of them."""
    rows = []
    for count in tokens:
        found = {}
        for kind in KINDS if count <= most else ("without",):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                found[kind] = pool.submit(layer, kind, count, causal, rounds).result()
        graph, product, peak = found["without"]
        row = {
            "tokens": count,
            "graph (s)": graph,
            "product (s)": product,
            "peak (MiB)": peak / 2**20,
        }
        if "matrices" in found:
            row |= {
                "with matrices: graph (s)": found["matrices"][0],
                "product (s) ": found["matrices"][1],
                "peak (MiB) ": found["matrices"][2] / 2**20,
                "time of a product": product / found["matrices"][1],
                "memory": peak / found["matrices"][2],
            }
        rows.append(row)
        print(row, flush=True)  # the long ones come last
    return pd.DataFrame(rows).fillna("")


def sweeps(size: Size, rounds: int) -> pd.DataFrame:
    """One product with every matrix of a model, graphs included."""
    objective = objective_of(size)
    blocks = [
        block
        for block in blockspec.partition(objective.model, by="tensor")
        if len(block.parameters) == 1
        and objective.parameters()[block.parameters[0]].dim() == 2
        and "wpe" not in block.name
    ]
    requests = [(block, draw_probe(block.name, block.numel, probe=0)) for block in blocks]

    def sweep(tokens_from: tuple[int, int]) -> None:
        lengths.LONG = {"cpu": tokens_from}
        Products(objective).sweep(requests)

    chosen = lengths.LONG["cpu"]
    times = in_turns(
        {"without": lambda: sweep(chosen), "matrices": lambda: sweep((NEVER, NEVER))}, rounds=rounds
    )
    row = {
        "layers": size.layers,
        "tokens": size.tokens,
        "matrices": len(blocks),
        "sweep (s)": times["without"],
        "with matrices (s)": times["matrices"],
        "ratio": times["without"] / times["matrices"],
    }
    print(row, flush=True)
    return pd.DataFrame([row])


def main(
    tokens: list[int] = [1024, 2048, 4096, 8192, 16384],  # noqa: B006
    most: int = 4096,
    depth: int = 12,
    rounds: int = 2,
) -> None:
    """tokens: of the layer; most: of the layer with matrices; depth: layers of the model; rounds:
    of each timing.
    """
    gpt2 = Size(depth, 768, 12, 50257, 1, 1024)
    short = [count for count in tokens if count <= most]
    tables = {
        "GPT-2: a product with every matrix": sweeps(gpt2, rounds),
        "One layer, causal": layers(tokens, most, True, rounds),
        "One layer, every query sees every key": layers(short, most, False, rounds),
    }
    write("attention", tables)


if __name__ == "__main__":
    CLI(main)
