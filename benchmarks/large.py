"""Spectra of models that are large for the machine: ``python -m benchmarks.large --case 7B``.

A Llama with random weights, one sequence of random tokens, a few steps on a few matrices. The
weights of the 7B model are written to safetensors files first, in bfloat16 (13.5 GB, removed in the
end), and stay there: a layer at a time is computed in float32. The estimate runs in a process of
its own, whose peak is that of its whole life, weights, vectors and Python included.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import init_empty_weights
from jsonargparse import CLI
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import blockspec
from benchmarks.record import write
from blockspec.model.weights import map_weights
from blockspec.numerics import memory


@dataclass(frozen=True)
class Case:
    """A model and what is measured of it.

    Args:
        layers: Number of layers.
        width: D.
        inner: Width of the MLP.
        heads: Query heads.
        key_heads: Key and value heads.
        tokens: T.
        steps: Lanczos steps of the one probe of each block.
        blocks: Names of matrices in a layer.
        disk: Weights in bfloat16 on disk, and not in float32 in memory.
    """

    layers: int
    width: int
    inner: int
    heads: int
    key_heads: int
    tokens: int
    steps: int
    blocks: tuple[str, ...]
    disk: bool


CASES = {
    "tiny": Case(3, 64, 128, 4, 2, 16, 2, ("self_attn.q_proj.weight",), True),
    "1.1B": Case(
        22, 2048, 5632, 32, 4, 256, 5,
        ("self_attn.q_proj.weight", "self_attn.v_proj.weight", "mlp.down_proj.weight"), False,
    ),
    "7B": Case(32, 4096, 11008, 32, 32, 128, 3, ("self_attn.q_proj.weight",), True),
}  # fmt: skip
VOCABULARY = 32000
SIZE = 0.02  # of random weights


def config_of(case: Case) -> LlamaConfig:
    """The model's settings."""
    return LlamaConfig(
        hidden_size=case.width, num_hidden_layers=case.layers, intermediate_size=case.inner,
        num_attention_heads=case.heads, num_key_value_heads=case.key_heads,
        vocab_size=VOCABULARY, max_position_embeddings=case.tokens, use_cache=False,
    )  # fmt: skip


def empty_model(case: Case) -> nn.Module:
    """The model without memory for its weights."""
    with init_empty_weights(include_buffers=False):
        return LlamaForCausalLM(config_of(case))


def write_shards(case: Case, folder: Path) -> None:
    """Random weights, a file a layer."""
    folder.mkdir(parents=True)
    shapes = ((name, p.shape) for name, p in empty_model(case).named_parameters())
    generator = torch.Generator().manual_seed(0)
    for number, (_, named) in enumerate(groupby(shapes, key=lambda item: item[0].split(".")[:3])):
        tensors = {name: random_weights(shape, generator) for name, shape in named}
        save_file(tensors, folder / f"model-{number:03}.safetensors")


def random_weights(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Normal matrices; ones for norms."""
    tensor = torch.ones(shape, dtype=torch.bfloat16)
    return tensor.normal_(0, SIZE, generator=generator) if len(shape) > 1 else tensor


def measured(case: Case, folder: str, layer: int, check: bool) -> dict[str, Any]:
    """The estimate, in this process."""
    start = time.process_time(), time.perf_counter()
    settings: dict[str, Any] = {}
    if case.disk:
        model, settings = map_weights(empty_model(case), folder), {"dtype": torch.float32}
    else:
        torch.manual_seed(0)
        model = LlamaForCausalLM(config_of(case))
    tokens = torch.randint(VOCABULARY, (1, case.tokens), generator=torch.Generator().manual_seed(1))
    objective = blockspec.Objective(
        model, [{"input_ids": tokens}], blockspec.losses.next_token, **settings
    )
    blocks = blockspec.partition(model, include=[f"*.{layer}.{name}" for name in case.blocks])
    spectra = blockspec.estimate_spectra(
        objective, blocks, 1, case.steps, products="layerwise", check=check, progress=told
    )
    assert spectra.cost is not None
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "blocks": len(blocks),
        "peak": memory.highest(),
        "process time (s)": time.process_time() - start[0],
        "wall time (s)": time.perf_counter() - start[1],
        "largest": [s.largest.value for s in spectra.values()],
        "check": spectra.cost.check,
    }


def told(done: int, of: int | None) -> None:
    """A line a sweep."""
    print(f"{done} of {of} products, {memory.readable(memory.highest())}", file=sys.stderr)


def child(case: str, *arguments: Any) -> None:
    """Measures in this process, and prints."""
    print(json.dumps(measured(Case(**json.loads(case)), *arguments)))


def in_a_process(case: Case, *arguments: Any, threads: int) -> dict[str, Any]:
    """The same in a process of its own."""
    given = (json.dumps(asdict(case)), *arguments)
    call = f"import torch; torch.set_num_threads({threads}); from benchmarks.large import child; "
    command = [sys.executable, "-c", f"{call}child(*{given!r})"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def rows_of(found: dict[str, Any], case: Case) -> Iterator[tuple[str, Any]]:
    """What the table says."""
    yield "parameters", f"{found['parameters']:,}"
    yield "layers, tokens, blocks, steps", (case.layers, case.tokens, found["blocks"], case.steps)
    yield "peak of the process", memory.readable(found["peak"])
    for name in ("process time (s)", "wall time (s)"):
        yield name, round(found[name])
    yield "largest eigenvalues", [f"{value:.4g}" for value in found["largest"]]
    yield "check of the products", found["check"]


def main(
    case: str = "1.1B",
    layers: int | None = None,
    layer: int | None = None,
    check: bool = True,
    folder: Path = Path("benchmarks/results/large_model"),
    keep: bool = False,
    threads: int = 1,
) -> None:
    """Measures and writes the table.

    Args:
        case: 1.1B or 7B.
        layers: Number of layers; None: those of the case.
        layer: That the blocks are of; None: the last one.
        check: Compare a product with the gradient first, where memory allows it.
        folder: Where the files of weights are written to.
        keep: Leave the files there; files that are there already are used.
        threads: Of torch.
    """
    chosen = CASES[case]
    chosen = Case(**(asdict(chosen) | {"layers": layers or chosen.layers}))
    layer = chosen.layers - 1 if layer is None else layer
    try:
        if chosen.disk and not folder.exists():
            write_shards(chosen, folder)
        found = in_a_process(chosen, str(folder), layer, check, threads=threads)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    table = pd.DataFrame(rows_of(found, chosen), columns=["what", "found"])
    write(f"large_{case}_{chosen.layers}_layers", {f"Llama {case}": table})


if __name__ == "__main__":
    CLI(main, as_positional=False)
