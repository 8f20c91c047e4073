"""What one product with every block costs, in gradients of the same objective: ``python -m
benchmarks.sweep``.

Side by side in one run: shared graph with each product pruned to its block (what blockspec does), a
graph of its own per block, a shared graph with every product run back to all parameters (what the
code of arXiv 2402.16788 does), and one full product. A gradient is a forward and a backward pass of
the model as it comes, with its fused attention.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jsonargparse import CLI
from transformers import GPT2Config, GPT2LMHeadModel

import blockspec
from benchmarks.record import in_turns, write
from blockspec.engine.results import lanczos_spectrum
from blockspec.numerics.basis import Basis
from blockspec.numerics.lanczos import Lanczos, tridiagonalize
from blockspec.products.curvature import Products


@dataclass(frozen=True)
class Size:
    layers: int
    width: int
    heads: int
    vocabulary: int
    batch: int
    tokens: int


SIZES = {
    "2 layers, D=64, V=256": Size(2, 64, 2, 256, 4, 64),
    "4 layers, D=128, V=2048": Size(4, 128, 4, 2048, 4, 128),
    "6 layers, D=256, V=8192": Size(6, 256, 8, 8192, 4, 128),
    "12 layers, D=256, V=8192": Size(12, 256, 8, 8192, 4, 128),
}


def model_of(size: Size) -> GPT2LMHeadModel:
    """A GPT-2 of that size."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=size.layers, n_embd=size.width, n_head=size.heads, vocab_size=size.vocabulary,
        n_positions=size.tokens, bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def objective_of(size: Size) -> blockspec.Objective:
    """It on random tokens; costs do not depend on them, nor on the weights."""
    model = model_of(size)
    tokens = torch.randint(size.vocabulary, (size.batch, size.tokens))
    return blockspec.Objective(model, [{"input_ids": tokens}], blockspec.losses.next_token)


def matrices(objective: blockspec.Objective) -> list[blockspec.Block]:
    """Every weight matrix, whole: 4 a layer and the embedding."""
    blocks = blockspec.partition(objective.model, "tensor", include="*.weight")
    return [block for block in blocks if "ln_" not in block.name and "wpe" not in block.name]


class Contest:
    """The ways to multiply every block with a vector."""

    def __init__(self, objective: blockspec.Objective) -> None:
        self.objective = objective
        self.parameters = objective.parameters()
        self.blocks = matrices(objective)
        self.vectors = {b.name: torch.randn(self.parameters[b.name].shape) for b in self.blocks}
        self.whole = blockspec.partition(objective.model, "model")[0]

    def gradient(self) -> None:
        for batch in self.objective.batches():
            torch.autograd.grad(self.objective.loss_sum(batch)[0], list(self.parameters.values()))

    def shared_and_pruned(self) -> list[torch.Tensor]:
        return Products(self.objective).sweep(
            [(b, self.vectors[b.name].flatten()) for b in self.blocks]
        )

    def graph_per_block(self) -> list[torch.Tensor]:
        products = Products(self.objective)
        return [products.sweep([(b, self.vectors[b.name].flatten())])[0] for b in self.blocks]

    def back_to_all_parameters(self) -> list[torch.Tensor]:
        results = []
        wanted = [self.parameters[b.name] for b in self.blocks]
        with self.objective.prepared():
            for batch in self.objective.batches():
                total, count = self.objective.loss_sum(batch)
                gradients = torch.autograd.grad(total, wanted, create_graph=True)
                for i, block in enumerate(self.blocks):
                    inner = (gradients[i] * self.vectors[block.name]).sum()
                    results.append(
                        torch.autograd.grad(inner, wanted, retain_graph=True)[i].flatten() / count
                    )
        return results

    def full_product(self) -> None:
        Products(self.objective).sweep([(self.whole, torch.randn(self.whole.numel))])

    def agree(self) -> float:
        """Largest relative difference between the three ways."""
        ours, others = (
            self.shared_and_pruned(),
            (self.graph_per_block(), self.back_to_all_parameters()),
        )
        return max(
            float((a - b).norm() / a.norm())
            for other in others
            for a, b in zip(ours, other, strict=True)
        )


def densities(blocks: int = 50, probes: int = 10, steps: int = 100, points: int = 50_000) -> float:
    """Seconds for the densities of many blocks on a fine grid."""
    generator = torch.Generator().manual_seed(0)
    settings: dict[str, Any] = {
        "curvature": "hessian",
        "reorthogonalized": True,
        "distribution": "gaussian",
        "seed": 0,
    }
    seconds = 0.0
    for index in range(blocks):
        bulk = torch.randn(2000, generator=generator, dtype=torch.float64) * 1e-2
        values = torch.cat([bulk, torch.rand(20, generator=generator, dtype=torch.float64)])
        starts = torch.randn(probes, len(values), generator=generator, dtype=torch.float64)
        results = tridiagonalize(values.__mul__, starts, steps)
        block = blockspec.Block(str(index), "other", None, len(values))
        spectrum = lanczos_spectrum(
            block, results, num_steps=steps, dtype=torch.float64, **settings
        )
        start = time.perf_counter()
        spectrum.density(spectrum.grid(points))
        seconds += time.perf_counter() - start
    return seconds


def orthogonalisation(numel: int = 65_536, step: int = 40) -> float:
    """Seconds of one process's own work in its step number ``step``."""
    generator = torch.Generator().manual_seed(0)
    process = Lanczos(torch.randn(numel, generator=generator), step + 1)
    assert isinstance(process._basis, Basis)
    for _ in range(step):
        process.advance(torch.randn(numel, generator=generator))
    product = torch.randn(numel, generator=generator)
    start = time.perf_counter()
    process.advance(product)
    return time.perf_counter() - start


def main(rounds: int = 3, threads: int = 1) -> None:
    """Measures and writes the table.

    Args:
        rounds: Turns that are timed, each of every way at every size.
        threads: Of torch.
    """
    torch.set_num_threads(threads)
    rows = []
    for title, size in SIZES.items():
        contest = Contest(objective_of(size))
        assert contest.agree() < 1e-3
        ways = (
            "gradient",
            "shared_and_pruned",
            "graph_per_block",
            "back_to_all_parameters",
            "full_product",
        )
        seconds = in_turns({way: getattr(contest, way) for way in ways}, rounds=rounds)
        ours, unit = seconds["shared_and_pruned"], seconds["gradient"]
        rows.append(
            {
                "model": title,
                "blocks": len(contest.blocks),
                "gradient (s)": unit,
                "every block (gradients)": ours / unit,
                "a block (gradients)": ours / unit / len(contest.blocks),
                "full product (gradients)": seconds["full_product"] / unit,
                "graph per block / ours": seconds["graph_per_block"] / ours,
                "back to all / ours": seconds["back_to_all_parameters"] / ours,
            }
        )
    table = pd.DataFrame(rows).set_index("model")
    block = table["gradient (s)"].iloc[-1] * table["a block (gradients)"].iloc[-1]
    own = orthogonalisation()
    others = pd.DataFrame(
        {
            "measure": [
                "densities: 50 blocks, 1000 nodes, 50,000 points (s)",
                "orthogonalisation in step 40 of 65,536 parameters (s)",
                "its share of a step at 12 layers",
            ],
            "value": [densities(), own, own / (own + block)],
        }
    ).set_index("measure")
    growth = table["every block (gradients)"] * table["gradient (s)"]
    ratio = growth.iloc[-1] / growth.iloc[-2]
    notes = f"Twice the layers (6 to 12, D=256) cost {ratio:.2f} x for all blocks."
    write(
        "sweep", {"One product with every block": table, "Beside the products": others}, notes=notes
    )


if __name__ == "__main__":
    CLI(main)
