"""The published setting on one GPU: ``python -m benchmarks.gpt2_gpu``.

GPT-2 124M (random weights: the cost does not depend on them), T = 1024, the 25 blocks of arXiv
2402.16788, 491,520 tokens of the embedded text, in float32, tf32 and bfloat16: time of a sweep over
all blocks, measured on a part of the batches, share of the GPU's measured matrix rate, peak memory,
error that the precision causes, and the time to a tolerance, projected from the number of steps
that the first window takes.
"""

from __future__ import annotations

import time

import pandas as pd
import torch
from jsonargparse import CLI

import blockspec
from benchmarks.record import write
from benchmarks.sweep import Size, model_of
from blockspec.engine.estimate import plan_spectra
from blockspec.numerics import memory
from blockspec.products.curvature import Products
from blockspec.products.precision import reduced_multiplication
from language_models.batches import causal_batch, fixed_batches
from language_models.tokens import open_tokens

LAYERS = (0, 3, 7, 11)
PARTS = ("attn.c_attn.weight/*", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def published_blocks(model: torch.nn.Module, layers: int = 12) -> list[blockspec.Block]:
    """Those of the paper that a model of so many layers has."""
    there = [layer for layer in LAYERS if layer < layers]
    names = [f"transformer.h.{layer}.{part}" for layer in there for part in PARTS]
    return list(blockspec.partition(model, include=["transformer.wte.weight", *names]))


def matrix_rate(device: torch.device, *, size: int) -> float:
    """Floating-point operations per second of a large product of matrices."""
    a = torch.randn(size, size, device=device)
    a @ a
    synchronise(device)
    start = time.perf_counter()
    for _ in range(10):
        a @ a
    synchronise(device)
    return 10 * 2 * size**3 / (time.perf_counter() - start)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured(
    objective: blockspec.Objective,
    blocks: list[blockspec.Block],
    precision: str | None,
    tolerance: float,
    batches: int,
) -> dict:
    """One sweep over all blocks and over the objective's batches, and what follows from it for so
    many of them.
    """
    device = objective.device
    plan = plan_spectra(objective, blocks, 1, 1, precision=precision, memory=0.9)
    scale = batches / sum(1 for _ in objective.whole_batches())
    vectors = [(block, torch.randn(block.numel, device=device)) for block in blocks]
    products = Products(objective, precision=precision)
    with memory.watched(device) as peak:
        start = time.perf_counter()
        products.sweep(vectors)
        synchronise(device)
        seconds = (time.perf_counter() - start) * scale
    window = next(objective.batches(1))
    first = blockspec.Objective(objective.model, [window], objective.loss)
    spectra = blockspec.estimate_spectra(
        first, blocks, "auto", "auto", tolerance=tolerance, precision=precision, memory=0.9
    )
    sweeps = max(int(s.steps.max()) for s in spectra.values())
    flops = float(plan.table["flops"].sum()) * scale
    with reduced_multiplication(precision, device):
        rate = matrix_rate(device, size=8192 if device.type == "cuda" else 512)
    return {
        "precision": precision or "float32",
        "a sweep (s)": seconds,
        "share of the matrix rate": flops / seconds / rate,
        "peak memory (GiB)": peak.peak / 2**30,
        "error of the precision, largest, relative": max(
            s.precision_error / s.norm for s in spectra.values() if s.norm
        ),
        "products on one window to the tolerance": sum(
            int(s.steps.sum()) for s in spectra.values()
        ),
        "steps of the slowest block": sweeps,
        "projected to the tolerance, at most (min)": sweeps * seconds / 60,
        "planned for a sweep (s)": plan.seconds * scale,
        "planned peak (GiB)": plan.peak / 2**30,
        "examples at once": plan.micro_batch or "all",
    }


def main(
    batches: int = 60,
    measured_batches: int = 12,
    batch_size: int = 8,
    tokens: int = 1024,
    layers: int = 12,
    width: int = 768,
    heads: int = 12,
    vocabulary: int = 50257,
    tolerance: float = 2e-3,
) -> None:
    """Measures and writes the table.

    Args:
        batches: Of the objective.
        measured_batches: So many of them are measured.
        batch_size: Windows in a batch.
        tokens: Of a window.
        layers: Of the model; the published setting has 12.
        width: Of the model.
        heads: Of the model.
        vocabulary: Of the model; the text uses the first 512.
        tolerance: Wasserstein-1, relative to the block's norm.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: torch.nn.Module = model_of(
        Size(layers, width, heads, vocabulary, batch_size, tokens)
    ).to(device)
    text = open_tokens("embedded", "train", window=tokens, vocabulary=vocabulary)
    data = fixed_batches(
        text, causal_batch, num_batches=measured_batches, batch_size=batch_size, window=tokens
    )
    objective = blockspec.Objective(model, data, blockspec.losses.next_token)
    blocks = published_blocks(model, layers)
    rows = [
        measured(objective, blocks, precision, tolerance, batches)
        for precision in (None, "tf32", "bfloat16")
    ]
    title = (
        f"{len(blocks)} blocks, {batches * batch_size * tokens:,} tokens, tolerance {tolerance:g}"
    )
    write("gpt2_gpu", {title: pd.DataFrame(rows).set_index("precision").T.rename_axis("what")})


if __name__ == "__main__":
    CLI(main)
