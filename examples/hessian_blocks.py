"""Pictures of the Hessian's diagonal blocks, as in Adam-mini (arXiv 2406.16793): ``python examples/hessian_blocks.py``, seconds.

A transformer of one layer (4 heads, D=16, FFN 32, vocabulary 8) learns a small language in which each token follows from the one
before. Query and key have a block for each head; value, attention output and the MLP one for each output neuron; embedding and
head one for each token: this is the partition that Adam-mini gives a learning rate each, and ``partition(model, "neuron")``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jsonargparse import CLI
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import blockspec
from blockspec import toolbox_plots
from blockspec.blocks import Block

TOKENS, WINDOW = 8, 16
TITLES = {
    "query": "query (4 heads)",
    "key": "key (4 heads)",
    "value": "value (16 neurons)",
    "attention_output": "attention output (16 neurons)",
    "mlp_in": "MLP in (32 neurons)",
    "mlp_out": "MLP out (16 neurons)",
    "embedding": "embedding (8 tokens)",
    "head": "head (8 tokens)",
}


def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": TOKENS, "n_positions": WINDOW, "n_embd": 16, "n_layer": 1, "n_head": 4, "n_inner": 32}
    config = GPT2Config(**sizes, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, use_cache=False)
    return GPT2LMHeadModel(config).double()


def language(count: int, seed: int) -> Tensor:
    """(count, WINDOW) tokens; each is followed by one of few."""
    generator = torch.Generator().manual_seed(seed)
    chances = (4 * torch.randn(TOKENS, TOKENS, generator=torch.Generator().manual_seed(1))).softmax(-1)
    tokens = torch.randint(TOKENS, (count, 1), generator=generator)
    for _ in range(WINDOW - 1):
        tokens = torch.cat([tokens, torch.multinomial(chances[tokens[:, -1]], 1, generator=generator)], dim=1)
    return tokens


def train(gpt: GPT2LMHeadModel, steps: int) -> None:
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=3e-3)
    for step in range(steps):
        tokens = language(16, seed=step)
        gpt(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def by_output(block: Block, matrix: np.ndarray, width: int) -> np.ndarray:
    """Rows and columns in the order of output neurons: Conv1D stores weights as (in, out)."""
    order = np.arange(block.numel).reshape(-1, width).T.ravel()
    return matrix[np.ix_(order, order)]


def main(steps: int = 100, out: str = "runs/hessian_blocks", curvature: str = "hessian") -> None:
    """Draws the Hessian of each matrix.

    Args:
        steps: Training steps before.
        out: Folder of the figure.
        curvature: hessian, ggn, fisher, or residual.
    """
    torch.set_num_threads(1)
    gpt = model()
    train(gpt, steps)
    objective = blockspec.Objective(gpt, [{"input_ids": language(16, seed=10**6)}], blockspec.losses.next_token)
    matrices = {}
    for block in blockspec.partition(gpt, "matrix"):
        if block.kind in TITLES:
            matrix = blockspec.dense(objective, block, curvature=curvature)
            rows_are_outputs = block.kind in ("embedding", "head")
            width = {"mlp_in": 32}.get(block.kind, 16)
            matrices[TITLES[block.kind]] = matrix if rows_are_outputs else by_output(block, matrix, width)
    matrices = {title: matrices[title] for title in TITLES.values()}
    title = f"Hessian of each matrix after {steps} steps; tiny transformer: 1 layer, 4 heads, D=16, V=8"
    figure = toolbox_plots.hessian_blocks(matrices, title=title.replace("Hessian", curvature.capitalize()))
    print(toolbox_plots.save(figure, Path(out), f"{curvature}_blocks"))


if __name__ == "__main__":
    CLI(main)
