"""What it costs to follow the top eigenvalue through a training: ``python -m benchmarks.tracking``.

A small GPT-2 is trained on random tokens in a loop of one's own. Updates and measurements are timed
apart, in the same run: the share is the time of the measurements over that of the updates.
"""

from __future__ import annotations

import pandas as pd
import torch
from jsonargparse import CLI
from transformers import GPT2Config, GPT2LMHeadModel

import blockspec
from benchmarks.record import clock, write

WINDOW, VOCABULARY = 64, 512


def trained(
    *, every: int, preconditioned: bool, updates: int, batch: int, fixed: int
) -> dict[str, object]:
    """A training that is followed: a row of the table."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": WINDOW}
    model = GPT2LMHeadModel(
        GPT2Config(**sizes, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = torch.randint(VOCABULARY, (fixed, WINDOW))
    objective = blockspec.Objective(model, [{"input_ids": data}], blockspec.losses.next_token)
    tracker = blockspec.track(
        objective, every=every, check=False, optimizer=optimizer if preconditioned else None
    )
    training = measuring = 0.0
    for step in range(1, updates + 1):
        windows = torch.randint(VOCABULARY, (batch, WINDOW))
        start = clock()
        optimizer.zero_grad()
        model(input_ids=windows, labels=windows).loss.backward()
        optimizer.step()
        training += clock() - start
        if step == 1:  # the first measurement is a full search, and no part of the share
            tracker(0)
            continue
        start = clock()
        tracker(step)
        measuring += clock() - start
    followed = tracker.table[tracker.table["step"] > 0]
    measurements = followed.drop_duplicates(["step", "matrix", "block"])
    return {
        "followed": "H and P^(-1/2) H P^(-1/2)" if preconditioned else "H",
        "every": every,
        "share of training's time": measuring / training,
        "products a measurement": measurements.groupby("step")["products"].sum().mean(),
        "not converged": float((~followed["converged"]).mean()),
    }


def main(*, updates: int = 60, batch: int = 16, fixed: int = 1) -> None:
    """Trains and prints the shares.

    Args:
        updates: Of each training.
        batch: Windows of 64 tokens in an update.
        fixed: Windows that the curvature is measured on.
    """
    rows = [
        trained(
            every=every, preconditioned=preconditioned, updates=updates, batch=batch, fixed=fixed
        )
        for preconditioned in (False, True)
        for every in (10, 1)
    ]
    title = f"{updates} updates of {batch * WINDOW} tokens, measured on {fixed * WINDOW}"
    write("tracking", {title: pd.DataFrame(rows)}, notes="CPU time, k = 1.")


if __name__ == "__main__":
    CLI(main)
