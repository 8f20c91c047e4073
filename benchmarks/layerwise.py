"""Products from the whole graph and a layer at a time: time and peak memory of one sweep over every
weight matrix: ``python -m benchmarks.layerwise``.

Each measurement is made in a process of its own, because the peak of a process never falls. Time is
that which the process computes, where one thread does all of it. Weights and vectors of the blocks
are allocated before the measurement begins and are not counted.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
from jsonargparse import CLI
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import blockspec
from benchmarks.record import clock, write
from benchmarks.sweep import matrices
from blockspec.numerics import memory
from blockspec.products.curvature import Products


@dataclass(frozen=True)
class Case:
    """A model on one sequence of random tokens.

    Args:
        layers: Number of layers.
        width: D.
        tokens: T.
        vocabulary: V.
        blocks: The first so many matrices; 0: all.
        llama: A Llama with 4 query heads a key head, and not a GPT-2.
    """

    layers: int
    width: int
    tokens: int
    vocabulary: int = 50257
    blocks: int = 0
    llama: bool = False


CASES = {
    "GPT-2, 2 layers, D=256, T=256, V=8192": Case(2, 256, 256, 8192),
    "GPT-2, 6 layers, D=256, T=256, V=8192": Case(6, 256, 256, 8192),
    "GPT-2, 24 layers, D=256, T=256, V=8192": Case(24, 256, 256, 8192),
    "GPT-2, 12 layers, D=768, T=1024": Case(12, 768, 1024),
    "Llama, 22 layers, D=2048, T=256": Case(22, 2048, 256, 32000, 3, True),
}
WAYS = ("whole", "layerwise")


def model_of(case: Case) -> nn.Module:
    """The model with random weights."""
    torch.manual_seed(0)
    if case.llama:
        heads = case.width // 64
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=case.width, num_hidden_layers=case.layers, num_attention_heads=heads,
                num_key_value_heads=heads // 4, intermediate_size=11 * case.width // 4,
                vocab_size=case.vocabulary, max_position_embeddings=case.tokens, use_cache=False,
            )
        )  # fmt: skip
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=case.layers, n_embd=case.width, n_head=case.width // 64, bos_token_id=0,
            vocab_size=case.vocabulary, n_positions=case.tokens, eos_token_id=0, use_cache=False,
        )
    )  # fmt: skip


def measured(case: Case, way: str, sweeps: int) -> dict[str, Any]:
    """Seconds of the last sweep, and bytes beyond weights and vectors."""
    tokens = torch.randint(case.vocabulary, (1, case.tokens))
    model = model_of(case)
    objective = blockspec.Objective(model, [{"input_ids": tokens}], blockspec.losses.next_token)
    blocks = matrices(objective)[: case.blocks or None]
    operator = Products(objective, guarded=False, products=way)
    requests = [(block, torch.randn(block.numel)) for block in blocks]
    results = 4 * sum(block.numel for block in blocks)
    with memory.watched(operator.device) as peak:
        for _ in range(sweeps):
            start = clock()
            operator.sweep(requests)
            seconds = clock() - start
    return {"blocks": len(blocks), "seconds": seconds, "peak": peak.growth - results}


def child(case: str, way: str, sweeps: int, threads: int) -> None:
    """Measures in this process, and prints."""
    torch.set_num_threads(threads)
    print(json.dumps(measured(Case(**json.loads(case)), way, sweeps)))


def in_a_process(case: Case, way: str, sweeps: int, threads: int) -> dict[str, Any]:
    """The same in a process of its own."""
    arguments = (json.dumps(asdict(case)), way, sweeps, threads)
    call = f"from benchmarks.layerwise import child; child(*{arguments!r})"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main(
    cases: tuple[str, ...] = tuple(CASES)[:3],
    ways: tuple[str, ...] = WAYS,
    sweeps: int = 2,
    threads: int = 1,
) -> None:
    """Measures and writes the table.

    Args:
        cases: Names of CASES, or beginnings of them.
        ways: whole, layerwise, or both.
        sweeps: Sweeps that are made, of which the last one is timed; the first one makes what
            they share.
        threads: Of torch.
    """
    rows = []
    for title, case in CASES.items():
        if not any(title.startswith(wanted) for wanted in cases):
            continue
        found = {way: in_a_process(case, way, sweeps, threads) for way in ways}
        row: dict[str, Any] = {"model": title, "blocks": found[ways[0]]["blocks"]}
        for way, numbers in found.items():
            row |= {
                f"{way} (s)": numbers["seconds"],
                f"{way} (MiB)": round(numbers["peak"] / 2**20),
            }
        if len(found) == len(WAYS):
            row["time, layerwise / whole"] = (
                found["layerwise"]["seconds"] / found["whole"]["seconds"]
            )
        rows.append(row)
    table = pd.DataFrame(rows).set_index("model")
    write("layerwise", {"One sweep over every weight matrix": table})


if __name__ == "__main__":
    CLI(main, as_positional=False)
