"""The training loop: ``train(model, batch_at, loss, ...)``, through accelerate, resumable after a kill."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from training.checkpoints import Save, due_steps, save_weights, write_checkpoint
from training.log import Log
from training.optimizers import OptimizerSettings, ScheduleSettings, make_optimizer, set_learning_rate, share_of_peak
from training.state import begin, latest_state, save_state

BatchAt = Callable[[int], Any]
Loss = Callable[[nn.Module, Any], tuple[Tensor, int]]
Measure = Callable[[nn.Module], Mapping[str, float]]


@dataclass(frozen=True)
class TrainingSettings:
    """How long and how to train.

    Args:
        num_steps: Number of updates.
        micro_batches: Micro-batches in one update, over all processes; their gradients are averaged per loss term.
        checkpoints: Fractions of training at which a checkpoint is written.
        measure_every: Steps between measurements on held-out data; 0 measures at checkpoints only.
        state_every: Steps between the states that a killed run goes on from; 0 keeps none.
        log_every: Steps between writes of the log (every step is in it).
        seed: Seed of initial weights, dropout and the order of the data.
        precision: float32, or bfloat16 for the forward pass (weights stay float32).
        device: auto (the GPU if there is one) or cpu.
        compile: Compile the model with torch.compile.
        tracker: Where losses are shown beside the run's own log: tensorboard, wandb or none.
        optimizer: The optimizer.
        schedule: The learning rate over training.
    """

    num_steps: int = 1000
    micro_batches: int = 1
    checkpoints: tuple[float, ...] = (0.0, 0.001, 0.025, 0.05, 0.075, 0.1, 0.5, 1.0)  # up to 0.1: the paper's stages
    measure_every: int = 0
    state_every: int = 500
    log_every: int = 10
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu"] = "auto"
    compile: bool = False
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)


def make_accelerator(settings: TrainingSettings, out: Path) -> Accelerator:
    return Accelerator(
        cpu=settings.device == "cpu",
        mixed_precision={"float32": "no", "bfloat16": "bf16"}[settings.precision],
        log_with=None if settings.tracker == "none" else settings.tracker,
        project_dir=str(out),
    )


@torch.no_grad()
def mean_loss(model: nn.Module, batches: list[Any], loss: Loss) -> float:
    """The mean over all loss terms of all batches, in eval mode."""
    training = model.training
    model.eval()
    try:
        sums = [loss(model, send_to_device(batch, next(model.parameters()).device)) for batch in batches]
    finally:
        model.train(training)
    return float(sum(total for total, _ in sums)) / sum(terms for _, terms in sums)


def _progress(*, shown: bool) -> Progress:
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[loss]}"))
    return Progress(*columns, disable=not shown)


@dataclass
class _Loop:
    """What one update needs, after accelerate has prepared it."""

    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    batch_at: BatchAt
    loss: Loss
    settings: TrainingSettings

    def update(self, step: int) -> dict[str, Any]:
        """One update; returns what goes into the log, as tensors where reading them would wait for the device."""
        settings = self.settings
        lr = settings.optimizer.lr * share_of_peak(step, settings.num_steps, settings.schedule)
        set_learning_rate(self.optimizer, lr)
        total, terms = self.gradient(step)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if settings.optimizer.clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, settings.optimizer.clip, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"step": step, "loss": total / terms, "lr": lr, "gradient_norm": norm}

    def gradient(self, step: int) -> tuple[Tensor, Any]:
        """Leaves the gradient of the mean over all loss terms of all micro-batches in ``.grad``."""
        processes = self.accelerator.num_processes
        here = self.settings.micro_batches // processes
        alone = self.settings.micro_batches == 1  # then the mean is known before the backward pass
        total, terms = torch.zeros((), device=self.accelerator.device), 0
        for micro in range(here):
            index = (step * here + micro) * processes + self.accelerator.process_index
            batch = send_to_device(self.batch_at(index), self.accelerator.device)
            with nullcontext() if micro == here - 1 else self.accelerator.no_sync(self.model):
                part, count = self.loss(self.model, batch)
                self.backward(part / count if alone else part)
            total, terms = total + part.detach(), terms + count
        if alone:
            return total, terms
        sums = self.accelerator.reduce(torch.stack([total.double(), total.new_tensor(terms).double()]), reduction="sum")
        # backward gave the sum over micro-batches, averaged over processes
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, (processes / sums[1]).to(gradients[0].dtype))
        return sums[0], sums[1]

    def backward(self, loss: Tensor) -> None:
        if self.settings.optimizer.name == "adahessian":
            self.optimizer.optimizer.backward(loss)
        else:
            self.accelerator.backward(loss)


def check_settings(settings: TrainingSettings, *, num_processes: int) -> None:
    if settings.num_steps < 1:
        raise ValueError(f"num_steps is {settings.num_steps}; it must be at least 1")
    if settings.micro_batches < 1 or settings.micro_batches % num_processes:
        raise ValueError(
            f"micro_batches is {settings.micro_batches}; it must be a multiple of the number of processes, {num_processes}"
        )
    if settings.optimizer.name == "adahessian" and settings.micro_batches > 1:
        raise ValueError("adahessian differentiates twice and takes one micro-batch on one process; set micro_batches to 1")


def train(
    model: nn.Module,
    batch_at: BatchAt,
    loss: Loss,
    *,
    settings: TrainingSettings,
    out: Path | str,
    save: Save = save_weights,
    measure: Measure = lambda model: {},
    record: Mapping[str, Any] | None = None,
) -> Path:
    """Trains a model, and goes on from where an earlier call with the same ``out`` and settings was stopped.

    Args:
        model: Any module; its parameters that require gradients are trained.
        batch_at: ``batch_at(index)`` gives micro-batch number ``index``, always the same one: no order of data has to be
            stored, and it does not depend on the number of processes.
        loss: ``loss(model, batch) -> (sum of the loss terms, number of terms)``.
        settings: See ``TrainingSettings``.
        out: Folder of the run: ``step_<step>/`` checkpoints, ``log.jsonl``, ``state/``, ``settings.json``.
        save: ``save(model, folder)`` writes the weights of a checkpoint.
        measure: Named numbers of the model (held-out loss, accuracy) at checkpoints and every ``measure_every`` steps.
        record: What else goes into each ``checkpoint.json`` (model and data settings).

    Returns:
        The folder of the last checkpoint (``out`` if none was asked for).

    Raises:
        ValueError: the settings are wrong, or ``out`` holds a run of other settings.
        FloatingPointError: the loss became infinite or NaN.
    """
    out = Path(out)
    settings_record = {"training": dataclasses.asdict(settings), **(record or {})}
    accelerator = make_accelerator(settings, out)
    check_settings(settings, num_processes=accelerator.num_processes)
    due = due_steps(settings.checkpoints, settings.num_steps)
    begin(out, settings_record, accelerator)
    if accelerator.log_with:
        accelerator.init_trackers("tracker")
    set_seed(settings.seed, device_specific=True)
    if settings.compile:
        model.compile()
    model.train()
    model, optimizer = accelerator.prepare(model, make_optimizer(model, settings.optimizer))
    loop = _Loop(accelerator, model, optimizer, batch_at, loss, settings)
    first = latest_state(out, accelerator)
    last = out
    with Log(out, first, settings.log_every, accelerator) as log, _progress(shown=accelerator.is_main_process) as bar:
        task = bar.add_task("", total=settings.num_steps, completed=first, loss="")
        for step in range(first, settings.num_steps + 1):
            is_due = step in due
            if is_due or (settings.measure_every and step % settings.measure_every == 0):
                measured = dict(measure(accelerator.unwrap_model(model)))
                log.add({"step": step, **measured})
            if is_due and accelerator.is_main_process:
                content = {"fraction": step / settings.num_steps, "loss": log.loss, **measured, **settings_record}
                last = write_checkpoint(out, accelerator.unwrap_model(model), step=step, record=content, save=save)
            if step == settings.num_steps:
                break
            if settings.state_every and step > first and step % settings.state_every == 0:
                log.flush()
                save_state(out, step, accelerator)
            log.add(loop.update(step))
            bar.update(task, completed=step + 1, loss=f"loss {log.loss:.3f}" if log.loss else "")
    return last
