"""Curvature along steps and rounding errors, against what the loss does: ``python -m
benchmarks.directional``.

- A step of AdamW and of Muon on a small GPT-2 that was trained on the embedded text: predicted and
  measured change of the loss, and the share of d'Hd within blocks.
- Quantisation of that GPT-2 and of a ResNet14 that was trained on the digits: Spearman's
  correlation of each ranking of matrices with the damage that was measured, and the loss under a
  budget of bits beside uniform bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd
import torch
from jsonargparse import CLI

import blockspec
from benchmarks.peers import SIZES, trained
from benchmarks.record import write
from blockspec.toolbox.directions import next_step
from blockspec.toolbox.sensitivity import RANKINGS, sensitivity
from language_models.batches import causal_batch
from language_models.batches import fixed_batches as token_batches
from language_models.tokens import open_tokens
from vision_models.data import fixed_batches
from vision_models.digits import digits as open_digits
from vision_models.models import ModelSettings, build

OPTIMIZERS: dict[str, Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    "Muon": lambda parameters: torch.optim.Muon([p for p in parameters if p.dim() == 2], lr=2e-3),
}


def language_model(steps: int) -> blockspec.Objective:
    """A GPT-2 after some steps on the embedded text; every sequence is a unit of data."""
    size = SIZES["D=32"]
    model = trained(size, steps).model
    held_out = open_tokens("embedded", "val", window=size.tokens, vocabulary=size.vocabulary)
    batches = token_batches(
        held_out, causal_batch, num_batches=8, batch_size=size.batch, window=size.tokens
    )
    return blockspec.Objective(model, batches, blockspec.losses.next_token, micro_batch=1)


def image_model(steps: int) -> blockspec.Objective:
    """A ResNet14 after some steps on the digits."""
    model = build(ModelSettings("digits_resnet"))
    batches = list(fixed_batches(open_digits("train"), count=8 * 64, batch_size=64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for step in range(steps):
        total, count = blockspec.losses.classification(model, batches[step % len(batches)])
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    held_out = fixed_batches(open_digits("test"), count=2 * 64, batch_size=64)
    return blockspec.Objective(
        model.eval(), held_out, blockspec.losses.classification, micro_batch=8
    )


def steps_of_optimizers(objective: blockspec.Objective) -> pd.DataFrame:
    """A row an optimizer: its second step at the same weights, after one that fills its state."""
    blocks = blockspec.partition(objective.model)
    rows = {}
    for name, make in OPTIMIZERS.items():
        optimizer = make(objective.parameters().values())
        direction = next_step(optimizer, objective)
        found = blockspec.directional(objective, blocks, direction)
        measured = found.measured
        assert measured is not None
        rows[name] = {
            "predicted": found.predicted.value,
            "data_stderr": found.predicted.data_stderr,
            "measured": measured.value,
            "slope": found.slope.value,
            "bend": found.bend.value,
            "within_share": found.within_share,
            "products": found.cost.products,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("optimizer")


def quantisation(
    name: str, objective: blockspec.Objective, bits: tuple[int, ...], budget: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Correlations by bit width, and the budget's outcome."""
    blocks = blockspec.partition(objective.model, exclude="*bias*")
    found = sensitivity(objective, blocks, bits)
    rows: list[Any] = []
    for chosen in (*((width,) for width in bits), bits):
        correlations = found.correlations(chosen)
        label = ", ".join(map(str, chosen))
        rows.append(
            {"what": f"{name}, {label} bits"} | correlations[[*RANKINGS, "predicted"]].to_dict()
        )
    dealt = found.allocate(budget)
    uniform = dealt.map(lambda _: int(budget))
    outcome = pd.DataFrame(
        {
            "model": [name],
            "mean_bits": [budget],
            "dealt_measured": [found.measure(dealt)],
            "uniform_measured": [found.measure(uniform)],
            "matrices": [len(dealt)],
        }
    )
    return pd.DataFrame(rows), outcome


def main(language_steps: int = 600, image_steps: int = 200, budget: float = 3.0) -> None:
    """Args:
    language_steps: Training steps of the GPT-2.
    image_steps: Training steps of the ResNet.
    budget: Mean bits a weight.
    """
    language, image = language_model(language_steps), image_model(image_steps)
    tables = {"steps": steps_of_optimizers(language)}
    parts = [
        quantisation(name, objective, (2, 3, 4), budget)
        for name, objective in (("GPT-2", language), ("ResNet14", image))
    ]
    tables["rankings"] = pd.concat([part[0] for part in parts]).set_index("what")
    tables["budget"] = pd.concat([part[1] for part in parts]).set_index("model")
    write("directional", tables)


if __name__ == "__main__":
    CLI(main)
