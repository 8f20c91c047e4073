"""Spectra from a loop under accelerate: ``accelerate launch examples/accelerate_loop.py`` (seconds
on one core).

A tiny GPT-2 on the reference manual that comes with Python, as bytes. Every process calls
``record``; they share the products, and the first one writes.
"""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from jsonargparse import CLI
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from blockspec import Objective, losses, partition
from blockspec.integrations import record

WINDOW = 32


def windows(count: int, *, start: int) -> list[dict[str, Tensor]]:
    """Examples from the text, ``count`` windows from byte ``start``."""
    text = "".join(topics[name] for name in sorted(topics)).encode()[start : start + count * WINDOW]
    rows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().view(count, WINDOW)
    return [{"input_ids": row, "labels": row} for row in rows]


def main(
    out: Path | None = Path("runs/accelerate_loop"),
    *,
    measured: tuple[int, ...] = (0, 8),
    epochs: int = 1,
    num_steps: int = 20,
    seed: int = 0,
) -> list[float]:
    """Trains; returns this process's losses.

    Args:
        out: The folder of the spectra; null measures nothing.
        measured: Updates after which to measure.
        epochs: Passes over 128 windows.
        num_steps: Lanczos steps of a measurement.
        seed: Of everything.
    """
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available()
    )  # else two processes without a GPU do not find each other
    set_seed(seed)
    config = GPT2Config(
        vocab_size=256,
        n_positions=WINDOW,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    trained: Any = windows(128, start=0)
    loader = DataLoader(trained, batch_size=8, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    evaluated: Any = windows(16, start=200_000)
    held_out = list(DataLoader(evaluated, batch_size=8))  # the same on every process
    plain = accelerator.unwrap_model(model)
    objective, blocks = (
        Objective(plain, held_out, losses.next_token),
        partition(plain, include="*c_*.weight*"),
    )  # 1

    history: list[float] = []
    for _ in range(epochs):
        for batch in loader:
            if out is not None and len(history) in measured:  # 2
                record(out, len(history), objective, blocks, num_probes=2, num_steps=num_steps)  # 3
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            history.append(loss.item())
    return history


if __name__ == "__main__":
    CLI(main)
    PartialState().destroy_process_group()  # while Python still stands
