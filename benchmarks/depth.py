"""Peak memory by depth, and what a plan says beforehand: ``python -m benchmarks.depth``.

Each row is a process of its own: it plans an estimate, makes it, and reads the peak of its resident
set, which the system counts. What stays between two layers grows with depth, whatever is done
within them: for each layer the tensor between it and the next one, its cotangent, and a tensor for
each direction under way. The first table names these bytes and takes them off.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import pandas as pd
import torch
from jsonargparse import CLI
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import blockspec
from benchmarks.record import write
from blockspec.engine.estimate import plan_spectra
from blockspec.numerics import memory

CPU = torch.device("cpu")
PROBES, STEPS = 1, 3
MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""What is free goes back to the system at once, so that a peak is one of tensors in use."""


@dataclass(frozen=True)
class Case:
    """A model on one batch of random tokens.

    Args:
        family: One of FAMILIES.
        layers: Number of layers.
        width: D.
        tokens: T.
        batch: B.
        way: whole or layerwise.
        blocks: Query matrices of the first so many layers; 0: every matrix of every layer.
        vocabulary: V.
    """

    family: str
    layers: int
    width: int
    tokens: int = 256
    batch: int = 1
    way: str = "layerwise"
    blocks: int = 0
    vocabulary: int = 1024

    @property
    def between(self) -> int:
        """Bytes between the layers: of hidden states, cotangents, and a tensor a direction."""
        return self.layers * (2 + self.blocks) * 4 * self.batch * self.tokens * self.width


FAMILIES = ("GPT-2", "Llama", "BERT")
SIZES = ((6, 96, 256, 1), (12, 192, 128, 2))  # layers, D, T, B


def model_of(case: Case) -> nn.Module:
    """The model with random weights."""
    torch.manual_seed(0)
    heads = case.width // 32
    if case.family == "GPT-2":
        return GPT2LMHeadModel(
            GPT2Config(
                n_layer=case.layers, n_embd=case.width, n_head=heads, n_positions=case.tokens,
                vocab_size=case.vocabulary, bos_token_id=0, eos_token_id=0, use_cache=False,
            )
        )  # fmt: skip
    sizes: dict[str, Any] = {
        "hidden_size": case.width,
        "num_hidden_layers": case.layers,
        "num_attention_heads": heads,
        "vocab_size": case.vocabulary,
        "max_position_embeddings": case.tokens,
        "use_cache": False,
    }
    if case.family == "Llama":
        sizes |= {"num_key_value_heads": heads // 3, "intermediate_size": 3 * case.width}
        return LlamaForCausalLM(LlamaConfig(**sizes))
    return BertForMaskedLM(BertConfig(intermediate_size=4 * case.width, **sizes))


def batch_of(case: Case) -> dict[str, Tensor]:
    """Random tokens; for BERT every second one is asked for."""
    ids = torch.randint(1, case.vocabulary, (case.batch, case.tokens))
    if case.family != "BERT":
        return {"input_ids": ids}
    labels = ids.clone()
    labels[:, ::2] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def measured(case: Case) -> dict[str, int]:
    """Bytes: in use before, the plan's peak, and the real one."""
    loss = blockspec.losses.masked_token if case.family == "BERT" else blockspec.losses.next_token
    model = model_of(case)
    objective = blockspec.Objective(model, [batch_of(case)], loss)
    all_blocks = blockspec.partition(model, include="*.weight*")
    chosen = [b for b in all_blocks if b.layer is not None and b.kind not in ("norm", "bias")]
    if case.blocks:
        chosen = [block for block in chosen if block.kind == "query"][: case.blocks]
    settings: dict[str, Any] = {"products": case.way, "check": False}
    blockspec.estimate_spectra(objective, chosen[:1], 1, 1, **settings)  # what is allocated once
    memory.trim()
    before = memory.resident()
    planned = plan_spectra(objective, chosen, num_probes=PROBES, num_steps=STEPS, **settings)
    with memory.watched(CPU) as peak:
        blockspec.estimate_spectra(objective, chosen, PROBES, STEPS, **settings)
    return {"before": before, "planned": planned.peak, "peak": peak.peak}


def child(case: Case, answer: Connection) -> None:
    """Measures in this process, and tells."""
    torch.set_num_threads(1)
    answer.send(measured(case))


def in_a_process(case: Case) -> dict[str, int]:
    """The same in a process of its own: a fork of one that has imported all and done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.depth"])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(case, there))
    process.start()
    found = dict(here.recv())
    process.join()
    print(case, found, file=sys.stderr, flush=True)
    return found


def by_depth(depths: tuple[int, ...], width: int) -> pd.DataFrame:
    """The peak over what was in use before, with and without what lies between layers."""
    rows = []
    for layers in depths:
        case = Case("GPT-2", layers, width, blocks=4)
        found = in_a_process(case)
        growth = found["peak"] - found["before"]
        rows.append(
            {
                "layers": layers,
                "peak over start (MiB)": growth / 2**20,
                "between layers (MiB)": case.between / 2**20,
                "rest (MiB)": (growth - case.between) / 2**20,
            }
        )
    table = pd.DataFrame(rows).set_index("layers")
    table["rest / that of the first"] = table["rest (MiB)"] / table["rest (MiB)"].iloc[0]
    return table.round(2)


def by_family(families: tuple[str, ...]) -> pd.DataFrame:
    """A plan's peak beside the measured one."""
    rows = []
    for family in families:
        for layers, width, tokens, batch in SIZES:
            for way in ("whole", "layerwise"):
                found = in_a_process(Case(family, layers, width, tokens, batch, way))
                planned, peak, before = (found[n] for n in ("planned", "peak", "before"))
                rows.append(
                    {
                        "model": f"{family}, {layers} layers, D={width}, {batch} x T={tokens}",
                        "products": way,
                        "plan (MiB)": round(planned / 2**20),
                        "peak (MiB)": round(peak / 2**20),
                        "plan / peak": round(planned / peak, 3),
                        "the same over start": round((planned - before) / (peak - before), 3),
                    }
                )
    return pd.DataFrame(rows).set_index("model")


def main(
    depths: tuple[int, ...] = (6, 12, 24, 48),
    width: int = 96,
    families: tuple[str, ...] = FAMILIES,
) -> None:
    """Measures and writes the tables.

    Args:
        depths: Numbers of layers.
        width: D, a multiple of 96.
        families: Of FAMILIES.
    """
    os.environ.update(MEMORY)
    tables = {
        f"A layer at a time, GPT-2, D={width}, T=256, 4 blocks": by_depth(depths, width),
        "What a plan says, and what the estimate took": by_family(families),
    }
    write("depth", {name: table for name, table in tables.items() if len(table)})


if __name__ == "__main__":
    CLI(main, as_positional=False)
