"""The training loop: ``train(model, batch_at, loss, ...)``, through accelerate, resumable after a
kill.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from training.checkpoints import Save, due_steps, last_checkpoint, save_weights, write_checkpoint
from training.following import Follower
from training.log import Log
from training.optimizers import (
    OptimizerSettings,
    ScheduleSettings,
    make_optimizer,
    set_learning_rate,
    share_of_peak,
)
from training.state import begin, finish, is_complete, latest_state, save_state

BatchAt = Callable[[int], Any]
Loss = Callable[[nn.Module, Any], tuple[Tensor, int]]
Measure = Callable[[nn.Module], Mapping[str, float]]

PRECISIONS = {"float32": "no", "bfloat16": "bf16"}  # ours -> accelerate's


@dataclass(frozen=True)
class TrainingSettings:
    """How long and how to train.

    Args:
        num_steps: Number of updates.
        micro_batches: Micro-batches in one update, over all processes; the gradient is that of the
            mean over all their loss terms.
        checkpoints: Fractions of training at which a checkpoint is written.
        measure_every: Steps between measurements on held-out data; 0 measures at checkpoints only.
        state_every: Steps between the states that a killed run goes on from; 0 keeps none.
        log_every: Steps between writes of the log (every step is in it).
        seed: Seed of initial weights, dropout and the order of the data.
        precision: float32, or bfloat16 for the forward pass (weights stay float32).
        device: auto (the GPU if there is one) or cpu.
        compile: Compile the model with torch.compile.
        tracker: Where the log goes as well: tensorboard (into the run's folder), wandb or none.
        optimizer: The optimizer.
        schedule: The learning rate over training.
    """

    num_steps: int = 1000
    micro_batches: int = 1
    checkpoints: tuple[float, ...] = (
        0.0,
        0.001,
        0.025,
        0.05,
        0.075,
        0.1,
        0.5,
        1.0,
    )  # up to 0.1: the paper's stages
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
    follow: Follower | None = None,
    progress: bool = True,
) -> Path:
    """Trains a model, and goes on from where an earlier call with the same ``out`` and settings was
    stopped.

    Args:
        model: Any module; its parameters that require gradients are trained.
        batch_at: ``batch_at(index)`` gives micro-batch number ``index``, always the same one: no
            order of data has to be stored, and it does not depend on the number of processes.
        loss: ``loss(model, batch) -> (sum of the loss terms, number of terms)``.
        settings: See ``TrainingSettings``.
        out: Folder of the run: ``step_<step>/`` checkpoints, ``log.jsonl``, ``settings.json``, and
            ``training_state/`` until it is complete.
        save: ``save(model, folder)`` writes the weights of a checkpoint.
        measure: Named numbers of the model (held-out loss, accuracy) at checkpoints and every
            ``measure_every`` steps.
        record: What else goes into each ``checkpoint.json`` (model and data settings).
        follow: Eigenvalues to follow; None: none.
        progress: Whether to show a progress bar.

    Returns:
        The folder of the last checkpoint, or ``out`` if there is none.

    Raises:
        ValueError: the settings are wrong, or ``out`` holds a run of other settings.
        FloatingPointError: the loss became infinite or NaN.
    """
    out = Path(out)
    accelerator = _make_accelerator(settings, out)
    _check(settings, accelerator)
    if follow is not None and settings.compile:
        raise ValueError(
            "compiled models cannot be differentiated twice: switch compile off to follow "
            "eigenvalues (track)"
        )
    content = {"training": dataclasses.asdict(settings), **(record or {})}
    begin(out, content, accelerator)
    if not is_complete(out):
        set_seed(settings.seed, device_specific=True)
        if settings.compile:
            model.compile()
        model.train()
        optimizer = make_optimizer(model, settings.optimizer)
        second_order = getattr(
            optimizer, "second_order", lambda model: nullcontext()
        )  # AdaHessian has these three
        probe = getattr(optimizer, "probe", lambda loss: loss)
        rescale = getattr(optimizer, "rescale", lambda factor: None)
        model, optimizer = accelerator.prepare(model, optimizer)
        own = (second_order, probe, rescale)
        loop = _Loop(
            accelerator,
            model,
            optimizer,
            batch_at,
            loss,
            settings,
            out,
            save,
            measure,
            content,
            *own,
            follow,
        )
        loop.run(latest_state(out, accelerator), progress=progress and accelerator.is_main_process)
        finish(out, accelerator)
    return last_checkpoint(out) or out


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Any], loss: Loss) -> float:
    """The mean over all loss terms of all batches, in eval mode."""
    training = model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        sums = [loss(model, send_to_device(batch, device)) for batch in batches]
    finally:
        model.train(training)
    return float(sum(total for total, _ in sums)) / sum(terms for _, terms in sums)


def _make_accelerator(settings: TrainingSettings, out: Path) -> Accelerator:
    if settings.tracker != "none" and importlib.util.find_spec(settings.tracker) is None:
        raise ValueError(
            f"the tracker {settings.tracker} is not installed: 'pip install {settings.tracker}', "
            "or tracker none"
        )
    return Accelerator(
        cpu=settings.device == "cpu",
        mixed_precision=PRECISIONS[settings.precision],
        log_with=None if settings.tracker == "none" else settings.tracker,
        project_dir=str(out),
    )


def _check(settings: TrainingSettings, accelerator: Accelerator) -> None:
    """Raises ValueError before anything is written."""
    due_steps(settings.checkpoints, settings.num_steps)
    if settings.num_steps < 1 or settings.log_every < 1:
        raise ValueError(
            f"num_steps is {settings.num_steps}, log_every {settings.log_every}; both must be at "
            "least 1"
        )
    processes = accelerator.num_processes
    if settings.micro_batches < 1 or settings.micro_batches % processes:
        raise ValueError(
            f"micro_batches is {settings.micro_batches}; a multiple of the {processes} processes "
            "is needed"
        )
    if settings.optimizer.name == "adahessian" and settings.compile:
        raise ValueError(
            "compiled models cannot be differentiated twice: switch compile off for adahessian"
        )


@dataclass
class _Loop:
    """What training needs, after accelerate has prepared it."""

    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    batch_at: BatchAt
    loss: Loss
    settings: TrainingSettings
    out: Path
    save: Save
    measure: Measure
    content: dict[str, Any]
    second_order: Callable[[nn.Module], AbstractContextManager]
    probe: Callable[[Tensor], Tensor]
    rescale: Callable[[Tensor], None]
    follow: Follower | None = None

    def run(self, first: int, *, progress: bool) -> None:
        """Trains from step ``first`` to the end. A step is the number of updates that were made."""
        settings, accelerator = self.settings, self.accelerator
        due = due_steps(settings.checkpoints, settings.num_steps)
        if self.follow is not None:
            model = accelerator.unwrap_model(self.model)
            self.follow.begin(model, self.optimizer, self.out, first)
        with (
            Log(self.out, first, settings.log_every, accelerator) as log,
            _progress(shown=progress) as bar,
        ):
            task = bar.add_task("", total=settings.num_steps, completed=first, loss="")
            for step in range(first, settings.num_steps + 1):
                if step in due or (settings.measure_every and step % settings.measure_every == 0):
                    self.stop_and_measure(step, log, is_due=step in due)
                if self.follow is not None and (found := self.follow(step)):
                    log.add({"step": step, **found})
                if step == settings.num_steps:
                    break
                if settings.state_every and step > first and step % settings.state_every == 0:
                    log.flush()
                    if self.follow is not None:
                        self.follow.save()
                    save_state(self.out, step, accelerator)
                log.add(self.update(step))
                bar.update(
                    task,
                    completed=step + 1,
                    loss=f"loss {log.loss:.3f}" if log.loss is not None else "",
                )
        if self.follow is not None:
            self.follow.end()

    def stop_and_measure(self, step: int, log: Log, *, is_due: bool) -> None:
        model = self.accelerator.unwrap_model(self.model)
        measured = dict(self.measure(model))
        log.add({"step": step, **measured})
        if not is_due:
            return
        log.flush()
        found = {"fraction": step / self.settings.num_steps, "loss": log.loss, **measured}
        record = {**found, "processes": self.accelerator.num_processes, **self.content}
        if self.accelerator.is_main_process:
            write_checkpoint(self.out, model, step=step, record=record, save=self.save)

    def update(self, step: int) -> dict[str, Any]:
        """One update; returns what goes into the log, in tensors where reading them would wait for
        the device.
        """
        settings = self.settings
        lr = settings.optimizer.lr * share_of_peak(step, settings.num_steps, settings.schedule)
        set_learning_rate(self.optimizer, lr)
        total, terms = self.gradient(step)
        norm = self.accelerator.clip_grad_norm_(
            self.model.parameters(), settings.optimizer.clip or math.inf
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"step": step, "loss": total / terms, "lr": lr, "gradient_norm": norm}

    def gradient(self, step: int) -> tuple[Tensor, Any]:
        """Leaves the gradient of the mean over all loss terms of all micro-batches; returns their
        sum and number.
        """
        processes = self.accelerator.num_processes
        here = self.settings.micro_batches // processes
        alone = (
            self.settings.micro_batches == 1
        )  # then the number of terms is known before the backward pass
        total, terms = torch.zeros((), device=self.accelerator.device), 0
        for micro in range(here):
            index = (step * here + micro) * processes + self.accelerator.process_index
            batch = send_to_device(self.batch_at(index), self.accelerator.device)
            with nullcontext() if micro == here - 1 else self.accelerator.no_sync(self.model):
                with self.second_order(self.model):
                    part, count = self.loss(self.model, batch)
                self.accelerator.backward(self.probe(part / count if alone else part))
            total, terms = total + part.detach(), terms + count
        if alone:
            return total, terms
        total, terms = self.accelerator.reduce(
            torch.stack([total, total.new_tensor(terms)]), reduction="sum"
        )
        gradients = [
            parameter.grad for parameter in self.model.parameters() if parameter.grad is not None
        ]
        # backward left the sum over the micro-batches, averaged over processes
        factor = processes / terms
        torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))
        self.rescale(factor)
        return total, terms


def _progress(*, shown: bool) -> Progress:
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    return Progress(*columns, disable=not shown)
