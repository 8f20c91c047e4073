"""Pictures of the Hessian's blocks of a tiny transformer, and the partition that gives each its
learning rate (Adam-mini).

A transformer of one layer (4 heads, D=16, FFN 32, vocabulary 8) learns a small language in which
each token follows from the one before. Query and key have a block for each head; value, attention
output and the MLP one for each output neuron; embedding and head one for each token:
``partition(model, "neuron")``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import blockspec
from blockspec.figures import toolbox as toolbox_plots
from blockspec.model.blocks import Block
from paper.block_diagonality import finding, shares, square, tidy
from paper.exhibit import Context, Exhibit, Finding, Scale, Tables, command, with_error

TOKENS, WINDOW, WIDTH, HIDDEN = 8, 16, 16, 32
PARTS = {  # kind -> title, number of parts
    "query": ("query (4 heads)", 4),
    "key": ("key (4 heads)", 4),
    "value": ("value (16 neurons)", WIDTH),
    "attention_output": ("attention output (16 neurons)", WIDTH),
    "mlp_in": ("MLP in (32 neurons)", HIDDEN),
    "mlp_out": ("MLP out (16 neurons)", WIDTH),
    "embedding": ("embedding (8 tokens)", TOKENS),
    "head": ("head (8 tokens)", TOKENS),
}
ROWS_ARE_OUTPUTS = ("embedding", "head")  # the others are Conv1D, which stores weights as (in, out)
CURVATURES = ("hessian", "ggn")


@dataclass(frozen=True)
class Settings:
    """What is trained and measured.

    Args:
        steps: Training steps of 16 sequences before.
        runs: Trainings, each with its own seed.
        batch: Sequences of 16 tokens that the Hessian is of.
        kinds: Of matrices.
    """

    steps: int = 100
    runs: int = 3
    batch: int = 16
    kinds: tuple[str, ...] = tuple(PARTS)


def tiny_transformer(seed: int) -> GPT2LMHeadModel:
    sizes = {
        "vocab_size": TOKENS,
        "n_positions": WINDOW,
        "n_embd": WIDTH,
        "n_layer": 1,
        "n_head": 4,
        "n_inner": HIDDEN,
    }
    config = GPT2Config(
        **sizes, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).double()


def language(count: int, seed: int) -> Tensor:
    """(count, WINDOW) tokens; each is followed by one of few."""
    generator = torch.Generator().manual_seed(seed)
    chances = (4 * torch.randn(TOKENS, TOKENS, generator=torch.Generator().manual_seed(1))).softmax(
        -1
    )
    tokens = torch.randint(TOKENS, (count, 1), generator=generator)
    for _ in range(WINDOW - 1):
        tokens = torch.cat(
            [tokens, torch.multinomial(chances[tokens[:, -1]], 1, generator=generator)], dim=1
        )
    return tokens


def train(gpt: GPT2LMHeadModel, steps: int) -> None:
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=3e-3)
    for step in range(steps):
        tokens = language(16, seed=step)
        gpt(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def measure(settings: Settings, context: Context) -> dict[str, pd.DataFrame]:
    entries, found = [], []
    for run in range(settings.runs):
        gpt = tiny_transformer(context.seed + run)
        train(gpt, settings.steps)
        held_out = [{"input_ids": language(settings.batch, seed=10**6)}]
        objective = blockspec.Objective(gpt, held_out, blockspec.losses.next_token)
        blocks = {
            block.kind: block for block in blockspec.partition(gpt, "matrix") if block.kind in PARTS
        }
        for kind in settings.kinds:
            for curvature in CURVATURES:
                matrix = _by_output(
                    blocks[kind], blockspec.dense(objective, blocks[kind], curvature=curvature)
                )
                row = {"kind": kind, "curvature": curvature, "seed": context.seed + run}
                found.append(
                    row
                    | shares(
                        matrix, np.repeat(np.arange(PARTS[kind][1]), len(matrix) // PARTS[kind][1])
                    )
                )
                if run == 0 and curvature == "hessian":
                    entries.append(tidy(matrix).assign(kind=kind))
    return {"shares": pd.DataFrame(found), "entries": pd.concat(entries, ignore_index=True)}


def _by_output(block: Block, matrix: np.ndarray) -> np.ndarray:
    """Rows and columns in the order of output neurons."""
    if block.kind in ROWS_ARE_OUTPUTS:
        return matrix
    width = HIDDEN if block.kind == "mlp_in" else WIDTH
    order = np.arange(block.numel).reshape(-1, width).T.ravel()
    return matrix[np.ix_(order, order)]


def draw(tables: Tables) -> dict[str, Figure]:
    pictures: Mapping[str, np.ndarray] = {
        PARTS[kind][0]: square(part) for kind, part in tables["entries"].groupby("kind", sort=False)
    }
    title = "Hessian of each matrix; tiny transformer: 1 layer, 4 heads, D=16, V=8"
    return {"adam_mini_blocks": toolbox_plots.hessian_blocks(pictures, title=title)}


def judge(tables: Tables) -> list[Finding]:
    return [_judge(kind, rows) for kind, rows in tables["shares"].groupby("kind", sort=False)]


def _judge(kind: str, rows: pd.DataFrame) -> Finding:
    hessian, ggn = (rows[rows["curvature"] == curvature] for curvature in CURVATURES)
    percent = 100 * ggn["off_blocks"]
    more = f"; of the Gauss-Newton matrix {with_error(percent.mean(), percent.sem())} %"
    return finding(f"{PARTS[kind][0]}: near block diagonal", hessian, more)


SETUP = (
    "One layer, 4 heads, D=16, FFN 32, vocabulary 8: the paper's sizes (query and key have 4 "
    "blocks of 64, the MLP 32 of 16); "
    "the language and the training (AdamW) are ours. Each matrix's Hessian, entry by entry, in "
    "float64."
)
EXHIBIT = Exhibit(
    name="adam_mini_blocks",
    title="Hessian blocks of a tiny transformer",
    source="Adam-mini (arXiv 2406.16793), pictures of the Hessian",
    measure=measure,
    draw=draw,
    judge=judge,
    scales={
        "small": Scale(Settings(), f"{SETUP} After 100 steps.", "Two minutes on one core."),
        "paper": Scale(
            Settings(steps=2000, runs=10, batch=64),
            f"{SETUP} After 2,000 steps.",
            "Half an hour on one core (estimated).",
        ),
    },
)

if __name__ == "__main__":
    command(EXHIBIT)
