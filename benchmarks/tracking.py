"""What it costs to follow the top eigenvalue through a training: ``python -m benchmarks.tracking``.

GPT-2s are trained on the embedded text, the smallest as ``embedded_tiny.yaml`` says. Updates and
measurements are timed apart, in the same run: the share is the time of the measurements over that
of the updates. The first measurement is a full search, and no part of it.

The floor is what PyTorch alone takes for the same windows, in the same run: a forward pass and a
backward pass with a graph, and a product for each matrix. No measurement can do with less. What is
above it are further products, which the eigenvectors' turning asks for, and all that is around.
"""

from __future__ import annotations

from statistics import median

import pandas as pd
import torch
from jsonargparse import CLI
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import blockspec
from benchmarks.record import clock, write
from blockspec.model.losses import Loss
from language_models.batches import Batch
from language_models.models import ModelSettings
from language_models.train import DataSettings, Task, make_model, make_task
from training.optimizers import (
    OptimizerSettings,
    ScheduleSettings,
    make_optimizer,
    set_learning_rate,
    share_of_peak,
)

WINDOW = 64
OPTIMIZER = OptimizerSettings(lr=3e-3)
SCHEDULE = ScheduleSettings(warmup=50)
LENGTH = 1000  # updates of the whole training, for the schedule


class Training:
    """The training loop of language_models without what is beside it."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        self.task, self.model = task, model
        self.optimizer = make_optimizer(model, OPTIMIZER)
        model.train()

    def update(self, step: int) -> None:
        set_learning_rate(self.optimizer, OPTIMIZER.lr * share_of_peak(step, LENGTH, SCHEDULE))
        total, terms = self.task.loss(self.model, self.task.batch_at(step))
        (total / terms).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


def bare(model: nn.Module, loss: Loss, batch: Batch, *, rounds: int = 7) -> tuple[float, float]:
    """Seconds of a graph and of one product in it by PyTorch alone; medians."""
    parameters = list(model.parameters())
    direction = [torch.randn_like(p) for p in parameters]
    model.eval()
    graphs, products = [], []
    with sdpa_kernel(SDPBackend.MATH):  # the others cannot be differentiated twice
        for _ in range(rounds):
            start = clock()
            total, _ = loss(model, batch)
            gradients = torch.autograd.grad(total, parameters, create_graph=True)
            middle = clock()
            torch.autograd.grad(gradients, parameters, direction, retain_graph=True)
            graphs.append(middle - start)
            products.append(clock() - middle)
    model.train()
    return median(graphs), median(products)


def followed(
    model: ModelSettings, *, every: int, preconditioned: bool, begin: int, updates: int, fixed: int
) -> dict[str, object]:
    """A training that is followed after its first ``begin`` updates: a row of the table."""
    task = make_task(model, DataSettings(num_tokens=WINDOW), seed=0)
    run = Training(task, make_model(model, task, seed=0))
    for step in range(begin):
        run.update(step)
    windows = {name: tensor[:fixed] for name, tensor in task.held_out()[0].items()}
    tracker = blockspec.track(
        blockspec.Objective(run.model, [windows], task.loss),
        every=every,
        check=False,
        optimizer=run.optimizer if preconditioned else None,
    )
    training = measuring = 0.0
    for step in range(begin, begin + updates + 1):
        start = clock()
        run.update(step)
        end = clock()
        if step == begin:
            tracker.measure(begin)
            continue
        training += end - start
        tracker(step)
        measuring += clock() - end
    table = tracker.table[tracker.table["step"] > begin]
    measurements = table.drop_duplicates(["step", "matrix", "block"])
    by_step = measurements.groupby("step")
    products, sweeps = by_step["products"].sum().mean(), by_step["rounds"].max().mean()
    graph, product = bare(run.model, task.loss, windows)
    floor = graph + (2 if preconditioned else 1) * product
    size = task.data.batch_size * WINDOW
    return {
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "followed": "H and P^(-1/2) H P^(-1/2)" if preconditioned else "H",
        "from update": begin,
        "every": every,
        "share of training's time": measuring / training,
        "floor of the share": floor * updates / every / training,
        "products a measurement": products,
        "sweeps a measurement": sweeps,
        "tokens of products over those of training": products * fixed * WINDOW / (size * every),
        "ms of an update": 1e3 * training / updates,
        "ms of a measurement": 1e3 * measuring / table["step"].nunique(),
        "bare: ms of a graph": 1e3 * graph,
        "bare: ms of a product": 1e3 * product,
        "not converged": float((~table["converged"]).mean()),
    }


def main(*, updates: int = 40, fixed: int = 1, wide_updates: int = 20) -> None:
    """Trains and prints the shares.

    Args:
        updates: Of each training of the tiny GPT-2 (2 layers, width 64).
        fixed: Windows of 64 tokens that the curvature is measured on; an update has 16.
        wide_updates: Of each training of a wider one (4 layers, width 256).
    """
    tiny, wide = ModelSettings(), ModelSettings(num_layers=4, num_heads=4, width=256)
    rows = [
        followed(
            tiny,
            every=every,
            preconditioned=preconditioned,
            begin=begin,
            updates=updates,
            fixed=fixed,
        )
        for begin in (0, 100)
        for preconditioned in (False, True)
        for every in (10, 1)
    ]
    rows += [
        followed(
            wide, every=every, preconditioned=True, begin=50, updates=wide_updates, fixed=fixed
        )
        for every in (10, 1)
        if wide_updates
    ]
    title = f"updates of {16 * WINDOW} tokens, measured on {fixed * WINDOW}"
    write("tracking", {title: pd.DataFrame(rows)}, notes="CPU time, k = 1.")


if __name__ == "__main__":
    CLI(main)
