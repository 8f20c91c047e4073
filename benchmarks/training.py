"""What the trainer costs beside a bare PyTorch loop: ``python -m benchmarks.training``.

Both train the same model on the same batches with AdamW, clipping and a cosine. They take turns, so
that a busy machine harms both alike.
"""

from __future__ import annotations

import math
import tempfile

import pandas as pd
import torch
from jsonargparse import CLI
from torch import nn

from benchmarks.record import PACKAGES, in_turns, write
from language_models.models import ModelSettings
from language_models.train import DataSettings, Task, make_model, make_task
from training.optimizers import OptimizerSettings, ScheduleSettings
from training.trainer import TrainingSettings, train


def bare_loop(model: nn.Module, task: Task, *, steps: int, lr: float, device: torch.device) -> None:
    """What one would write by hand, and no more; the loss is read every ten steps, as the trainer
    does.
    """
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        tokens = task.batch_at(step)["input_ids"].to(device)
        logits = model(input_ids=tokens).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            loss.item()


def trainer(model: nn.Module, task: Task, *, steps: int, lr: float) -> None:
    """The trainer without checkpoints and states, with its log."""
    settings = TrainingSettings(
        num_steps=steps,
        checkpoints=(),
        state_every=0,
        tracker="none",
        optimizer=OptimizerSettings(lr=lr),
        schedule=ScheduleSettings(),
    )
    with tempfile.TemporaryDirectory() as folder:
        train(model, task.batch_at, task.loss, settings=settings, out=folder, progress=False)


def main(*, steps: int = 100, turns: int = 5, lr: float = 1e-3) -> None:
    """Times both, and writes a dated table into ``benchmarks/results/``.

    Args:
        steps: Updates in one turn.
        turns: Turns of each, after one to warm up.
        lr: Learning rate.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = ModelSettings()
    task = make_task(model, DataSettings(), seed=0)

    def fresh() -> nn.Module:
        return make_model(model, task, seed=0)

    seconds = in_turns(
        {
            "bare loop": lambda: bare_loop(fresh(), task, steps=steps, lr=lr, device=device),
            "trainer": lambda: trainer(fresh(), task, steps=steps, lr=lr),
        },
        rounds=turns,
    )
    table = pd.DataFrame(
        {"ms a step": {name: 1e3 * value / steps for name, value in seconds.items()}}
    )
    table["over the bare loop"] = table["ms a step"] / table["ms a step"]["bare loop"]
    write(
        "training",
        {f"The tiny GPT-2 on the embedded text, {steps} steps a turn": table.rename_axis("loop")},
        notes=f"Medians of {turns} turns; CPU time, where one thread does all.",
        packages=(*PACKAGES, "accelerate"),
    )


if __name__ == "__main__":
    CLI(main)
