"""SGD, AdamW and AdaHessian at equal steps and at equal time: ``python -m benchmarks.optimizers``.

Two tasks: the tiny GPT-2 on the embedded text, and a ResNet14 on the digits. Every contestant is
tried with a grid of learning rates on one seed; the best one is run on three other seeds, and only
these runs are compared. Time is counted in gradients: what a step costs is measured first, all
contestants taking turns, and one that is compared at equal time gets as many steps as fit into the
time of ``num_steps`` of AdamW; its schedule ends there. The same command goes on where it was
stopped.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jsonargparse import CLI
from matplotlib.figure import Figure
from torch import nn

from benchmarks.record import in_turns, write
from blockspec.figures.style import save, styled
from blockspec.model.losses import Loss, classification
from language_models import compare_optimizers as language
from language_models.models import ModelSettings as LanguageModel
from language_models.train import DataSettings as LanguageData
from language_models.train import make_model, make_task
from training.checkpoints import write_json
from training.comparison import ComparisonSettings, compare
from training.curves import draw_curves, draw_rates
from training.optimizers import OptimizerSettings, make_optimizer
from training.trainer import TrainingSettings
from vision_models import compare_optimizers as vision
from vision_models.data import ShuffledBatches
from vision_models.models import ModelSettings as VisionModel
from vision_models.models import build
from vision_models.sources import DataSettings as VisionData
from vision_models.sources import open_images

# of one turn of the measurement of costs: what lies between two measurements of curvature with
# update_each=10
STEPS = 10


@dataclass(frozen=True)
class Contestant:
    """An optimizer: its settings; whether its steps are as many as fit into the time of the
    others.
    """

    settings: Mapping[str, Any]
    equal_time: bool = False


ADAHESSIAN = {
    "name": "adahessian",
    "betas": (0.9, 0.999),
    "spatial_averaging": "rows",
}  # the authors' betas
CONTESTANTS = {
    "SGD": Contestant({"name": "sgd", "momentum": 0.9}),
    "AdamW": Contestant({"name": "adamw", "betas": (0.9, 0.95)}),
    "AdaHessian": Contestant(ADAHESSIAN),
    "AdaHessian, equal time": Contestant(ADAHESSIAN, equal_time=True),
    "AdaHessian, every 10th step, equal time": Contestant(
        ADAHESSIAN | {"update_each": 10}, equal_time=True
    ),
}


@dataclass(frozen=True)
class Task:
    """What is learnt.

    first: gives a model in training, a batch and the loss, to time a step.
    train: (settings, folder) trains it.
    rates: the grid of each contestant.
    """

    num_steps: int
    weight_decay: float
    clip: float
    first: Callable[[], tuple[nn.Module, Any, Loss]]
    train: Callable[[TrainingSettings, Path], Any]
    rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


GPT2, TEXT = LanguageModel(), LanguageData()
RESNET, DIGITS = VisionModel("digits_resnet"), VisionData()


def first_gpt2() -> tuple[nn.Module, Any, Loss]:
    task = make_task(GPT2, TEXT, seed=0)
    return make_model(GPT2, task, seed=0).train(), task.batch_at(0), task.loss


def first_resnet() -> tuple[nn.Module, Any, Loss]:
    batches = ShuffledBatches(open_images(DIGITS, DIGITS.train_split, RESNET), DIGITS.batch_size)
    return build(RESNET).train(), batches(0), classification


def grids(
    sgd: Sequence[float], adamw: Sequence[float], adahessian: Sequence[float]
) -> dict[str, tuple[float, ...]]:
    rates = {"sgd": sgd, "adamw": adamw, "adahessian": adahessian}
    return {name: tuple(rates[it.settings["name"]]) for name, it in CONTESTANTS.items()}


TASKS = {
    "tiny GPT-2 on the embedded text": Task(
        num_steps=120,
        weight_decay=0.1,
        clip=1.0,
        first=first_gpt2,
        train=partial(language.train_one, GPT2, TEXT, None),
        rates=grids((0.03, 0.1, 0.3), (1e-3, 3e-3, 1e-2), (0.1, 0.3, 1.0)),
    ),
    "ResNet14 on the digits": Task(
        num_steps=60,
        weight_decay=5e-4,
        clip=0.0,
        first=first_resnet,
        train=partial(vision.train_one, RESNET, DIGITS),
        rates=grids((0.03, 0.1, 0.3), (3e-3, 1e-2, 3e-2), (0.1, 0.3, 1.0)),
    ),
}


def main(*, workers: int = 2, rounds: int = 7, out: str = "runs/optimizers") -> None:
    """Trains and compares: 10 minutes on two idle cores; writes a dated table and figure into
    ``benchmarks/results/``.

    Args:
        workers: Trainings at once, each on one thread.
        rounds: Measurements of the cost of a step.
        out: Folder of the trainings.
    """
    torch.set_num_threads(1)
    start = time.perf_counter()
    tables, curves, trials = {}, {}, {}
    for name, task in TASKS.items():
        folder = Path(out) / name.split()[0] / name.split()[1]
        costs = step_costs(task, folder / "costs.json", rounds=rounds)
        steps = num_steps(task, costs)
        comparison = ComparisonSettings(
            rates=dict(task.rates),
            num_steps=task.num_steps,
            weight_decay=task.weight_decay,
            clip=task.clip,
            workers=workers,
            tuning_seeds=(10,),
        )
        table = compare(partial(train_one, name, steps), comparison, out=folder).set_index(
            "optimizer"
        )
        table = table.rename(
            columns={
                "lr": "best learning rate",
                "mean": "held-out loss",
                "std": "its deviation",
                "count": "seeds",
            }
        )
        table.insert(0, "gradients a step", pd.Series(costs))
        table.insert(1, "steps", pd.Series(steps))
        table.insert(2, "gradients in all", table["gradients a step"] * table["steps"])
        tables[name], trials[name] = table, pd.read_parquet(folder / "trials.parquet")
        curves[name] = pd.read_parquet(folder / "curves.parquet")
        curves[name]["gradients"] = curves[name]["step"] * curves[name]["optimizer"].map(costs)
    minutes = (time.perf_counter() - start) / 60
    rates = "\n".join(
        f"- {name}: " + "; ".join(f"{c} {task.rates[c]}" for c in CONTESTANTS)
        for name, task in TASKS.items()
    )
    notes = (
        "Deviations are over seeds. AdaHessian averages its curvature over rows and kernels. Rates "
        "rise over a sixteenth of the "
        f"steps, then fall along a cosine to a tenth. Grids, tried on another seed:\n\n{rates}\n\n"
        f"{minutes:.0f} minutes with {workers} trainings at once."
    )
    path = write("optimizers", tables, notes=notes)
    figure = plot(trials, curves)
    save(figure, Path(out) / "figures", "optimizers")
    figure.savefig(path.with_suffix(".png"), dpi=150)


def step_costs(task: Task, known: Path, *, rounds: int) -> dict[str, float]:
    """Gradients that a step of each contestant costs, its update in it; read from ``known`` where a
    run goes on.
    """
    if known.is_file():
        return json.loads(known.read_text())
    model, batch, loss = task.first()
    turns = {"gradient": partial(gradients, model, batch, loss)}
    for name, contestant in CONTESTANTS.items():
        own = copy.deepcopy(model)
        turns[name] = partial(
            updates, own, make_optimizer(own, settings_of(contestant)), batch, loss
        )
    seconds = in_turns(turns, rounds=rounds)
    costs = {name: seconds[name] / seconds["gradient"] for name in CONTESTANTS}
    known.parent.mkdir(parents=True, exist_ok=True)
    write_json(known, costs)
    return costs


def settings_of(contestant: Contestant) -> OptimizerSettings:
    return OptimizerSettings(**({"lr": 1e-3} | dict(contestant.settings)))


def gradients(model: nn.Module, batch: Any, loss: Loss) -> None:
    for _ in range(STEPS):
        model.zero_grad()
        total, terms = loss(model, batch)
        (total / terms).backward()


def updates(model: nn.Module, optimizer: Any, batch: Any, loss: Loss) -> None:
    for _ in range(STEPS):
        with getattr(optimizer, "second_order", lambda model: nullcontext())(model):
            total, terms = loss(model, batch)
        getattr(optimizer, "probe", lambda loss: loss)(total / terms).backward()
        optimizer.step()
        optimizer.zero_grad()


def num_steps(task: Task, costs: Mapping[str, float]) -> dict[str, int]:
    """Steps of each contestant."""
    fitting = {name: round(task.num_steps * costs["AdamW"] / cost) for name, cost in costs.items()}
    return {
        name: fitting[name] if it.equal_time else task.num_steps for name, it in CONTESTANTS.items()
    }


def train_one(
    task: str, steps: Mapping[str, int], settings: TrainingSettings, folder: Path
) -> None:
    """A run of the contestant that is called ``settings.optimizer.name``."""
    name = settings.optimizer.name
    optimizer = dataclasses.replace(settings.optimizer, **CONTESTANTS[name].settings)
    settings = dataclasses.replace(
        settings,
        num_steps=steps[name],
        measure_every=max(1, steps[name] // 12),
        optimizer=optimizer,
        schedule=dataclasses.replace(settings.schedule, warmup=steps[name] // 16),
    )
    TASKS[task].train(settings, folder)


@styled
def plot(trials: Mapping[str, pd.DataFrame], curves: Mapping[str, pd.DataFrame]) -> Figure:
    """A row a task: final loss by learning rate; loss by step, at equal steps; loss by gradients,
    at equal time (mean and range of the seeds).
    """
    figure = Figure(figsize=(8.6, 2.9 * len(curves)), layout="constrained")
    rows = figure.subplots(len(curves), 3, sharey="row", squeeze=False)
    names = list(CONTESTANTS)
    for (title, table), (rates, steps, times) in zip(curves.items(), rows, strict=True):
        draw_rates(rates, trials[title], names)
        equal = [name for name in names if not CONTESTANTS[name].equal_time]
        draw_curves(steps, table[table["optimizer"].isin(equal)], names, x="step")
        draw_curves(times, table[table["optimizer"] != "AdaHessian"], names, x="gradients")
        rates.set_title(title)
        steps.set_title("equal steps")
        times.set_title("equal time")
        for axes in (rates, steps, times):
            axes.get_legend().remove()
        for axes in (steps, times):
            axes.set_ylabel("")
    figure.legend(
        *rows[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names)
    )
    return figure


if __name__ == "__main__":
    CLI(main)
