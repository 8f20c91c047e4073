"""What a step of AdaHessian costs, in gradients of the same loss: ``python -m
benchmarks.adahessian``.

A gradient is a forward and a backward pass of the model with its default attention, without an
update. Everything takes turns, and the median over the turns of the ratio to that turn's gradient
counts, so that a busy machine harms all alike. The AdaHessian of ``torch_optimizer`` takes part
where it is installed.
"""

from __future__ import annotations

import importlib.util
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from jsonargparse import CLI
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.record import PACKAGES, clock, write
from blockspec.optim import AdaHessian, keep_freed_memory

LR = 1e-3  # small enough that no contestant leaves the region where all numbers are ordinary


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=512,
        n_positions=64,
        n_embd=64,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config).train()


class Contest:
    """The same model and batch for all; every method does one step of its loop."""

    def __init__(self, batch_size: int) -> None:
        self.model = tiny_gpt2()
        self.tokens = torch.randint(512, (batch_size, 64))
        self.start = {name: value.clone() for name, value in self.model.state_dict().items()}

    def loss(self) -> Tensor:
        return self.model(input_ids=self.tokens, labels=self.tokens).loss

    def gradient(self) -> None:
        self.model.zero_grad()
        self.loss().backward()

    def adamw(self) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR)

        def step() -> None:
            optimizer.zero_grad()
            self.loss().backward()
            optimizer.step()

        return step

    def ours(self, **settings: Any) -> Callable[[], None]:
        optimizer = AdaHessian(self.model.parameters(), lr=LR, **settings)

        def step() -> None:
            optimizer.zero_grad()
            with optimizer.second_order(self.model):
                loss = self.loss()
            optimizer.backward(loss)
            optimizer.step()

        return step

    def create_graph(self, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        def step() -> None:
            optimizer.zero_grad()
            with sdpa_kernel(SDPBackend.MATH):
                loss = self.loss()
            loss.backward(create_graph=True)
            optimizer.step()

        return step

    def contestants(self) -> dict[str, tuple[Callable[[], None], int]]:
        """Name -> (one step, steps per turn)."""
        parameters = self.model.parameters
        found: dict[str, tuple[Callable[[], None], int]] = {
            "AdamW": (self.adamw(), 5),
            "AdaHessian, update_each=1": (self.ours(update_each=1), 2),
            "AdaHessian, update_each=10": (self.ours(update_each=10), 10),
            "AdaHessian, num_probes=2": (self.ours(num_probes=2), 2),
            "AdaHessian, loss.backward(create_graph=True)": (
                self.create_graph(AdaHessian(parameters(), lr=LR)),
                2,
            ),
        }
        if importlib.util.find_spec("torch_optimizer"):
            import torch_optimizer

            theirs = torch_optimizer.Adahessian(parameters(), lr=LR)
            found["torch_optimizer.Adahessian, loss.backward(create_graph=True)"] = (
                self.create_graph(theirs),
                2,
            )
        return found


def seconds(step: Callable[[], None], times: int) -> float:
    start = clock()
    for _ in range(times):
        step()
    return (clock() - start) / times


def measure(contest: Contest, turns: int) -> dict[str, list[float]]:
    """Name -> cost of a step in gradients, one number per turn; the cost of a gradient itself is in
    seconds.
    """
    contestants = contest.contestants()
    costs: dict[str, list[float]] = {name: [] for name in ("gradient", *contestants)}
    for turn in range(turns + 2):
        for name, (step, times) in contestants.items():
            before = seconds(contest.gradient, 5)
            cost = seconds(step, times)
            gradient = (before + seconds(contest.gradient, 5)) / 2
            contest.model.load_state_dict(contest.start)
            if turn >= 2:  # the first ones allocate
                costs["gradient"].append(gradient)
                costs[name].append(cost / gradient)
    return costs


def table(costs: dict[str, list[float]]) -> pd.DataFrame:
    rows = {
        name: statistics.quantiles(values, n=4)
        for name, values in costs.items()
        if name != "gradient"
    }
    found = pd.DataFrame.from_dict(
        rows, orient="index", columns=["lower quartile", "gradients", "upper quartile"]
    )
    return found[["gradients", "lower quartile", "upper quartile"]].rename_axis("step")


def main(batch_size: int = 8, turns: int = 15) -> None:
    """Cost of AdaHessian's step on a tiny GPT-2 (2 layers, D=64, V=512, T=64).

    Args:
        batch_size: Sequences of 64 tokens in the batch.
        turns: Measurements of each contestant.
    """
    warnings.filterwarnings("ignore", message="Using backward.. with create_graph=True")
    torch.set_num_threads(1)
    keep_freed_memory()
    costs = measure(Contest(batch_size), turns)
    milliseconds = 1e3 * statistics.median(costs["gradient"])
    notes = (
        f"Medians of {turns} turns, CPU time. One gradient: {milliseconds:.1f} ms. "
        "No dropout, float32."
    )
    peers = tuple(name for name in ("torch_optimizer",) if importlib.util.find_spec(name))
    title = f"Tiny GPT-2: 2 layers, D=64, V=512, T=64, B={batch_size}"
    write("adahessian", {title: table(costs)}, notes=notes, packages=(*PACKAGES, *peers))


if __name__ == "__main__":
    CLI(main)
