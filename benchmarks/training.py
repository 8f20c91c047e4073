"""What the trainer costs beside a bare PyTorch loop: ``python -m benchmarks.training``.

Both train the same model on the same batches with AdamW, clipping and a cosine. They take turns, so that a busy machine
harms both alike, and the quickest turn of each counts. Writes a dated JSON file into ``benchmarks/results/``.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from language_models.models import ModelSettings
from language_models.train import DataSettings, Task, make_model, make_task
from training.command import run_command
from training.optimizers import OptimizerSettings, ScheduleSettings
from training.trainer import TrainingSettings, train

PACKAGES = ("torch", "transformers", "accelerate")


def bare_loop(model: nn.Module, task: Task, *, steps: int, lr: float, device: torch.device) -> None:
    """What one would write by hand, and no more; the loss is read every ten steps, as the trainer does."""
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


def benchmark(
    *,
    steps: int = 100,
    turns: int = 5,
    lr: float = 1e-3,
    model: ModelSettings = ModelSettings(),
    data: DataSettings = DataSettings(),
    out: str = "benchmarks/results",
) -> float:
    """Times both and prints seconds per step.

    Args:
        steps: Updates in one turn.
        turns: Turns of each.
        lr: Learning rate.
        model: The model.
        data: The data.
        out: Folder of the dated results.

    Returns:
        Time of the trainer / time of the bare loop.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = make_task(model, data, seed=0)
    runs = {
        "bare loop": lambda network: bare_loop(network, task, steps=steps, lr=lr, device=device),
        "trainer": lambda network: trainer(network, task, steps=steps, lr=lr),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            network = make_model(model, task, seed=0)
            start = time.perf_counter()
            run(network)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first one warms up
                seconds[name].append((time.perf_counter() - start) / steps)
    best = {name: min(values) for name, values in seconds.items()}
    ratio = best["trainer"] / best["bare loop"]
    for name, value in best.items():
        print(f"{name:10} {1000 * value:8.2f} ms a step")
    print(f"{'ratio':10} {ratio:8.3f}")
    now = datetime.datetime.now(datetime.UTC)
    result = {
        "command": sys.argv,
        "date": now.isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {device}",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "seconds_per_step": seconds,
        "ratio": ratio,
    }
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"training_{now:%Y%m%d_%H%M%S}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return ratio


if __name__ == "__main__":
    run_command(benchmark)
