"""AdaHessian in a training loop of one's own, beside AdamW: ``python examples/adahessian_loop.py``
(a minute on one core).

Trains a tiny GPT-2 on bytes of Python's reference manual with both. ``python -m
paper.adahessian_functions`` draws what the running means are for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pydoc_data.topics import topics

import torch
from jsonargparse import CLI
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from blockspec.optim import AdaHessian

BATCH, WINDOW = 8, 64


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256,
        n_positions=WINDOW,
        n_embd=64,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def batches(steps: int, seed: int) -> Iterator[dict[str, Tensor]]:
    text = torch.frombuffer(bytearray("".join(topics.values()).encode()), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(text) - WINDOW, (BATCH,), generator=generator)
        windows = torch.stack([text[start : start + WINDOW] for start in starts])
        yield {"input_ids": windows, "labels": windows}


def train_adamw(model: GPT2LMHeadModel, steps: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for batch in batches(steps, seed=0):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def train_adahessian(model: GPT2LMHeadModel, steps: int, lr: float, update_each: int) -> None:
    optimizer = AdaHessian(
        model.named_parameters(), lr=lr, update_each=update_each, spatial_averaging="rows"
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for batch in batches(steps, seed=0):
        with optimizer.second_order(model):  # a line more than for AdamW
            loss = model(**batch).loss
            optimizer.backward(loss)  # and one that differs
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel) -> float:
    """Other windows of the same text; nats per byte."""
    model.eval()
    losses = [model(**batch).loss.item() for batch in batches(20, seed=1)]
    model.train()
    return sum(losses) / len(losses)


def main(steps: int = 300, lr_adamw: float = 1e-3, lr_adahessian: float = 0.15) -> None:
    """AdamW and AdaHessian on a tiny GPT-2.

    Args:
        steps: Updates, of 8 x 64 bytes each.
        lr_adamw: Peak learning rate of AdamW.
        lr_adahessian: Peak learning rate of AdaHessian.
    """
    torch.set_num_threads(1)
    runs = {
        "AdamW": lambda model: train_adamw(model, steps, lr_adamw),
        "AdaHessian": lambda model: train_adahessian(model, steps, lr_adahessian, 1),
        "AdaHessian, update_each=10": lambda model: train_adahessian(
            model, steps, lr_adahessian, 10
        ),
    }
    for name, train in runs.items():
        model = tiny_gpt2()
        start = time.perf_counter()
        train(model)
        seconds = time.perf_counter() - start
        print(f"{name:28} loss {held_out_loss(model):.3f} nats per byte after {seconds:.0f} s")


if __name__ == "__main__":
    CLI(main)
