"""AdaHessian in a training loop of one's own, beside AdamW: ``python examples/adahessian_loop.py`` (a minute on one core).

Trains a tiny GPT-2 on bytes of Python's reference manual with both, and draws what their running means are for: a
bumpy function of two variables on which AdaHessian sticks without them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib.pyplot as plt
import numpy as np
import torch
from jsonargparse import CLI
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from blockspec.optim import AdaHessian

BATCH, WINDOW = 8, 64


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=256, n_positions=WINDOW, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
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
    optimizer = AdaHessian(model.named_parameters(), lr=lr, update_each=update_each, spatial_averaging="rows")
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


def bumpy(x: Tensor, y: Tensor) -> Tensor:
    return x**2 + y**2 + x * y + 0.5 * (torch.sin(5 * x) ** 2 + torch.sin(5 * y) ** 2)


def path_over_bumps(betas: tuple[float, float], steps: int = 100) -> np.ndarray:
    """(steps + 1, 2): the points that AdaHessian visits from (-2, -1)."""
    point = torch.tensor([-2.0, -1.0], dtype=torch.float64, requires_grad=True)
    optimizer = AdaHessian([point], lr=0.5, betas=betas)
    visited = [point.tolist()]
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.backward(bumpy(*point))
        optimizer.step()
        visited.append(point.tolist())
    return np.array(visited)


def draw_bumps(path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.6), sharex=True, sharey=True, layout="constrained")
    axis = torch.linspace(-3, 3, 301)
    heights = bumpy(*torch.meshgrid(axis, axis, indexing="xy"))
    for panel, betas in zip(panels, ((0.0, 0.0), (0.9, 0.9)), strict=True):
        visited = path_over_bumps(betas)
        panel.contourf(axis, axis, heights, levels=30, cmap="Blues_r")
        panel.plot(*visited.T, ".-", color="tab:orange", linewidth=0.8, markersize=4)
        panel.plot(*visited[-1], "o", color="tab:red")
        x, y = visited[-1]
        panel.set(title=f"betas {betas}: ends at ({x:.2f}, {y:.2f})", xlabel="x", xlim=(-3, 3), ylim=(-3, 3))
    panels[0].set_ylabel("y")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(
    steps: int = 300, lr_adamw: float = 1e-3, lr_adahessian: float = 0.15, figure: Path = Path("adahessian_bumps.png")
) -> None:
    """AdamW and AdaHessian on a tiny GPT-2, and a figure of AdaHessian on a bumpy function.

    Args:
        steps: Updates, of 8 x 64 bytes each.
        lr_adamw: Peak learning rate of AdamW.
        lr_adahessian: Peak learning rate of AdaHessian.
        figure: Where the figure goes.
    """
    torch.set_num_threads(1)
    runs = {
        "AdamW": lambda model: train_adamw(model, steps, lr_adamw),
        "AdaHessian": lambda model: train_adahessian(model, steps, lr_adahessian, 1),
        "AdaHessian, update_each=10": lambda model: train_adahessian(model, steps, lr_adahessian, 10),
    }
    for name, train in runs.items():
        model = tiny_gpt2()
        start = time.perf_counter()
        train(model)
        seconds = time.perf_counter() - start
        print(f"{name:28} loss {held_out_loss(model):.3f} nats per byte after {seconds:.0f} s")
    draw_bumps(figure)
    print(f"drew {figure}")


if __name__ == "__main__":
    CLI(main)
