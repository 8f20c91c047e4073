"""Time to a stated accuracy, against other ways to the same spectra: ``python -m
benchmarks.peers``.

- the schedule of arXiv 2402.16788, its algorithm written anew in a few lines: one shared graph,
  every product run back to all parameters, 100 steps, 10 probes, the model's own functions;
- hessian-eigenthings with its defaults (80 steps, 10 probes), one operator a block, where it is
    installed.

Their sweeps are all alike: some are timed and multiplied by steps x probes. Errors are
Wasserstein-1 distances relative to the block's spectral norm: to all eigenvalues of blocks of 1,024
to 8,192 parameters, to a converged estimate of larger ones. Models are GPT-2s, trained for some
steps on the embedded text.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jsonargparse import CLI
from torch.nn.attention import SDPBackend, sdpa_kernel

import blockspec
from benchmarks.record import clock, in_turns, write
from benchmarks.sweep import Size, matrices, model_of
from blockspec.numerics.measures import wasserstein
from blockspec.products.curvature import Products
from language_models.batches import causal_batch, fixed_batches
from language_models.tokens import open_tokens

SWEEPS = {"paper": 100 * 10, "eigenthings": 80 * 10}  # steps times probes of each block, by default
TOLERANCE = 2e-3
SIZES = {
    "D=32": Size(2, 32, 2, 512, 4, 64),
    "D=16": Size(2, 16, 2, 512, 4, 64),  # its embedding has 8,192 parameters
    "large": Size(2, 256, 8, 512, 4, 128),
    "sweep": Size(12, 256, 8, 8192, 4, 128),
}


def trained(size: Size, steps: int) -> blockspec.Objective:
    """A GPT-2 after some steps on the embedded text, and one batch of text that it has not seen."""
    model = model_of(size)
    tokens = open_tokens("embedded", "train", window=size.tokens, vocabulary=size.vocabulary)
    batches = fixed_batches(
        tokens, causal_batch, num_batches=max(steps, 1), batch_size=size.batch, window=size.tokens
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in batches[:steps]:
        total, count = blockspec.losses.next_token(model, batch)
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    held_out = open_tokens("embedded", "val", window=size.tokens, vocabulary=size.vocabulary)
    batches = fixed_batches(
        held_out, causal_batch, num_batches=1, batch_size=size.batch, window=size.tokens
    )
    return blockspec.Objective(model, batches, blockspec.losses.next_token)


class Peers:
    """One product with every block, their way; the model's own functions under differentiable
    attention.
    """

    def __init__(self, objective: blockspec.Objective, blocks: list[blockspec.Block]) -> None:
        self.model = objective.model.eval()
        self.tokens = next(objective.batches())["input_ids"]
        self.parameters = [dict(self.model.named_parameters())[block.name] for block in blocks]
        self.vectors = [torch.randn_like(p) for p in self.parameters]
        self.operators = [self._operator(block.name) for block in blocks] if eigenthings() else []

    def loss(self) -> torch.Tensor:
        return mean_loss(self.model, self.tokens)

    def paper(self) -> None:
        with sdpa_kernel(SDPBackend.MATH):
            gradients = torch.autograd.grad(self.loss(), self.parameters, create_graph=True)
            for gradient, vector in zip(gradients, self.vectors, strict=True):
                torch.autograd.grad((gradient * vector).sum(), self.parameters, retain_graph=True)

    def eigenthings(self) -> None:
        with sdpa_kernel(SDPBackend.MATH):
            for operator, vector in zip(self.operators, self.vectors, strict=True):
                operator.matvec(vector.flatten())

    def _operator(self, name: str) -> Any:
        import hessian_eigenthings as peer

        return peer.HessianOperator(
            self.model, [self.tokens], mean_loss, param_filter=peer.match_names(name)
        )


def mean_loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens).logits[:, :-1]
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))


def eigenthings() -> bool:
    return importlib.util.find_spec("hessian_eigenthings") is not None


def ways(
    objective: blockspec.Objective, blocks: list[blockspec.Block]
) -> dict[str, Callable[[], object]]:
    peers = Peers(objective, blocks)
    vectors = [torch.randn(block.numel) for block in blocks]
    found: dict[str, Callable[[], object]] = {
        "blockspec": lambda: Products(objective).sweep(list(zip(blocks, vectors, strict=True))),
        "paper": peers.paper,
    }
    return found | ({"eigenthings": peers.eigenthings} if eigenthings() else {})


def sweeps(rounds: int) -> pd.DataFrame:
    """One product with every block at 12 layers."""
    objective = trained(SIZES["sweep"], 0)
    blocks = matrices(objective)
    seconds = in_turns(ways(objective, blocks), rounds=rounds)
    table = pd.DataFrame({"seconds": seconds}).rename_axis("way")
    table["ratio to blockspec"] = table["seconds"] / seconds["blockspec"]
    return table


def to_accuracy(
    size: Size, rounds: int, *, truth: Callable[..., Any], chosen: Callable[..., bool]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Seconds to the tolerance on every block, and each block's error."""
    objective = trained(size, 200)
    blocks = [block for block in matrices(objective) if chosen(block)]
    seconds = in_turns(ways(objective, blocks), rounds=rounds)
    start = clock()
    spectra = blockspec.estimate_spectra(objective, blocks, "auto", "auto", tolerance=TOLERANCE)
    ours = clock() - start
    assert spectra.cost is not None
    costs = {"blockspec": (ours, spectra.cost.products)}
    costs |= {
        way: (count * seconds[way], count * len(blocks))
        for way, count in SWEEPS.items()
        if way in seconds
    }
    times = (
        pd.DataFrame(costs, index=["seconds", "products"])
        .T.astype({"products": int})
        .rename_axis("way")
    )
    times["ratio to blockspec"] = times["seconds"] / ours
    times["certified"] = ["yes" if way == "blockspec" else "no" for way in times.index]
    references = truth(objective, blocks)
    rows = [
        {
            "block": block.name,
            "parameters": block.numel,
            "exact": s.exact,
            "deflated": 0 if s.exact else int(s.known[0].sum()),
            "probes": s.num_probes,
            "products of these": block.numel if s.exact else int(s.steps.sum()),
            "promised": s.error / s.norm,
            "error": wasserstein(
                (s.nodes.ravel(), s.weights.ravel() / s.num_probes), references[block.name]
            )
            / s.norm,
        }
        for block in blocks
        for s in [spectra[block.name]]
    ]
    return times, pd.DataFrame(rows).set_index("block")


def dense_truth(
    objective: blockspec.Objective, blocks: list[blockspec.Block]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """All eigenvalues of each block."""
    truth = {}
    for block in blocks:
        values = np.linalg.eigvalsh(blockspec.dense(objective, block))
        truth[block.name] = (values, np.full(len(values), 1 / len(values)))
    return truth


def converged(
    objective: blockspec.Objective, blocks: list[blockspec.Block]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """150 steps of 3 other probes."""
    spectra = blockspec.estimate_spectra(objective, blocks, 3, 150, seed=1)
    return {
        name: (s.nodes.ravel(), s.weights.ravel() / s.num_probes) for name, s in spectra.items()
    }


def main(rounds: int = 3, threads: int = 1) -> None:
    """Measures and writes the tables.

    Args:
        rounds: Turns that are timed.
        threads: Of torch.
    """
    torch.set_num_threads(threads)
    tables = {"One product with every block, 12 layers, D=256, V=8192": sweeps(rounds)}
    for name in ("D=32", "D=16"):
        times, errors = to_accuracy(
            SIZES[name], rounds, truth=dense_truth, chosen=lambda b: 1024 <= b.numel <= 8192
        )
        tables[f"Time to 2e-3 on every block of 1,024 to 8,192 parameters, {name}"] = times
        tables[f"The same, block by block, against all eigenvalues, {name}"] = errors
    times, errors = to_accuracy(
        SIZES["large"], rounds, truth=converged, chosen=lambda b: b.numel >= 65_536
    )
    tables["Time to 2e-3 on every block of 65,536 and more parameters"] = times
    tables["The same, block by block, against 150 steps of 3 other probes"] = errors
    write("peers", tables)


if __name__ == "__main__":
    CLI(main)
