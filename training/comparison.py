"""Optimizers side by side on one task: tuned learning rates, several seeds.

Every optimizer is tried with every learning rate of its grid on some seeds; the rate with the best
mean is then run on other seeds, and only these runs are compared. Everything else is the same for
all.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from training.checkpoints import write_json
from training.curves import draw
from training.log import read_log
from training.optimizers import OptimizerSettings, ScheduleSettings
from training.trainer import TrainingSettings

TrainOne = Callable[[TrainingSettings, Path], Any]
DIVERGED = "diverged.json"


@dataclass(frozen=True)
class ComparisonSettings:
    """What is compared.

    Args:
        rates: Learning rates that are tried, by optimizer. The table says where the best one is the
            first or last.
        num_steps: Updates of every run.
        warmup: Steps of linear growth of the learning rate, before it falls along a cosine to a
            tenth.
        weight_decay: Weight decay of matrices, for all optimizers.
        momentum: Momentum of sgd.
        betas: Decay of the running means of the others.
        clip: Largest norm of the gradient, for all optimizers; 0 switches clipping off.
        tuning_seeds: Seeds of the runs that choose the learning rate; they are not compared.
        seeds: Seeds of the runs that are compared: of the initial weights and the order of the
            data.
        measure_every: Steps between measurements of the held-out loss.
        precision: float32 or bfloat16.
        device: auto (the GPU if there is one) or cpu.
        workers: Runs at once, each on one thread; take 1 on a GPU.
    """

    rates: dict[str, tuple[float, ...]] = field(
        default_factory=lambda: {"adam": (1e-3, 3e-3, 1e-2, 3e-2), "sgd": (1e-1, 3e-1, 1.0, 3.0)}
    )
    num_steps: int = 300
    warmup: int = 20
    weight_decay: float = 0.0
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    tuning_seeds: tuple[int, ...] = (
        10,
        11,
    )  # with one seed, a rate at the edge of stability can win by luck
    seeds: tuple[int, ...] = (1, 2, 3)
    measure_every: int = 25
    precision: str = "float32"
    device: str = "auto"
    workers: int = 2


@dataclass(frozen=True)
class Run:
    """One training; ``tuning`` runs choose a learning rate and are not compared."""

    folder: Path
    optimizer: str
    lr: float
    seed: int
    tuning: bool

    @property
    def final_loss(self) -> float:
        """The last held-out loss; infinite if the run diverged."""
        if (self.folder / DIVERGED).is_file():
            return math.inf
        return float(read_log(self.folder)["held_out_loss"].dropna().iloc[-1])


def compare(
    train_one: TrainOne, comparison: ComparisonSettings, *, out: Path | str
) -> pd.DataFrame:
    """Runs what is not done yet, and writes the tables and the figure.

    Args:
        train_one: ``train_one(settings, folder)`` trains the model and logs ``held_out_loss``; it
            can be pickled.
        comparison: What is compared.
        out: Folder for ``runs/``, ``optimizers`` and ``trials`` (parquet and csv),
            ``curves.parquet`` and ``figures/``.

    Returns:
        One line per optimizer: learning rate, mean and standard deviation over seeds of the final
        held-out loss, and the gap to the best optimizer.
    """
    _check(comparison)
    out = Path(out)
    trials = [
        _run(out, name, lr, seed, tuning=True)
        for name, rates in comparison.rates.items()
        for lr in rates
        for seed in comparison.tuning_seeds
    ]
    with _pool(comparison) as pool:
        _train_all(pool, train_one, trials, comparison, title="learning rates")
        best = best_rates(_trials(trials))
        compared = [
            _run(out, name, lr, seed, tuning=False)
            for name, lr in best.items()
            for seed in comparison.seeds
        ]
        _train_all(pool, train_one, compared, comparison, title="seeds")
    tried, table, curves = (
        _trials(trials + compared),
        _table(compared, comparison),
        _curves(compared),
    )
    for name, frame in {"trials": tried, "optimizers": table, "curves": curves}.items():
        frame.to_parquet(out / f"{name}.parquet")
        frame.to_csv(out / f"{name}.csv", index=False)
    draw(tried, curves, out / "figures")
    return table


def best_rates(trials: pd.DataFrame) -> dict[str, float]:
    """Of each optimizer, the learning rate with the lowest mean of the final losses."""
    means = trials.groupby(["optimizer", "lr"], sort=False)["final_loss"].mean()
    groups: Any = means.groupby(level="optimizer", sort=False)
    return {name: float(mean.idxmin()[1]) for name, mean in groups}


def _check(comparison: ComparisonSettings) -> None:
    if not comparison.rates or not all(comparison.rates.values()):
        raise ValueError(
            f"rates are {comparison.rates}; each optimizer needs one learning rate at least"
        )
    if (
        not comparison.seeds
        or not comparison.tuning_seeds
        or set(comparison.seeds) & set(comparison.tuning_seeds)
    ):
        raise ValueError(
            f"seeds are {comparison.seeds}, tuning_seeds {comparison.tuning_seeds}; both need one "
            "at least, none "
            "may be in both: the rates were chosen by the second"
        )


def _run(out: Path, optimizer: str, lr: float, seed: int, *, tuning: bool) -> Run:
    return Run(out / "runs" / f"{optimizer}_lr{lr:g}_seed{seed}", optimizer, lr, seed, tuning)


def _settings(run: Run, comparison: ComparisonSettings) -> TrainingSettings:
    shared = {
        name: getattr(comparison, name) for name in ("weight_decay", "momentum", "betas", "clip")
    }
    same = {
        name: getattr(comparison, name)
        for name in ("num_steps", "measure_every", "precision", "device")
    }
    return TrainingSettings(
        **same,
        checkpoints=() if run.tuning else (0.0, 1.0),
        seed=run.seed,
        tracker="none",
        optimizer=OptimizerSettings(name=cast(Any, run.optimizer), lr=run.lr, **shared),
        schedule=ScheduleSettings(warmup=comparison.warmup),
    )


def _train(train_one: TrainOne, run: Run, comparison: ComparisonSettings) -> None:
    """Trains one run to its end, or to where it diverges, which is a result too."""
    if (run.folder / DIVERGED).is_file():
        return
    try:
        train_one(_settings(run, comparison), run.folder)
    except FloatingPointError as error:
        write_json(run.folder / DIVERGED, {"error": str(error)})


def _pool(comparison: ComparisonSettings) -> ProcessPoolExecutor:
    # spawned, for a forked process cannot use a GPU, nor threads that its parent has started
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(comparison.workers, context, initializer=_begin_worker)


def _begin_worker() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _train_all(
    pool: ProcessPoolExecutor,
    train_one: TrainOne,
    runs: Sequence[Run],
    comparison: ComparisonSettings,
    *,
    title: str,
) -> None:
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    jobs = [pool.submit(_train, train_one, run, comparison) for run in runs]
    with Progress(*columns) as bar:
        for job in bar.track(as_completed(jobs), total=len(jobs)):
            job.result()


def _trials(runs: Sequence[Run]) -> pd.DataFrame:
    """One line per run."""
    columns = ("optimizer", "lr", "seed", "tuning", "final_loss")
    return pd.DataFrame([{name: getattr(run, name) for name in columns} for run in runs])


def _table(compared: Sequence[Run], comparison: ComparisonSettings) -> pd.DataFrame:
    groups = _trials(compared).groupby(["optimizer", "lr"], sort=False)["final_loss"]
    table = groups.agg(["mean", "std", "count"]).reset_index()
    edges = {name: (min(rates), max(rates)) for name, rates in comparison.rates.items()}
    table["at_edge_of_grid"] = [
        lr in edges[name] for name, lr in zip(table["optimizer"], table["lr"], strict=True)
    ]
    table["gap"] = table["mean"] - table["mean"].min()
    return table


def _curves(compared: Sequence[Run]) -> pd.DataFrame:
    """Held-out and training loss of the compared runs, by step."""
    logs = [
        read_log(run.folder).assign(optimizer=run.optimizer, lr=run.lr, seed=run.seed)
        for run in compared
    ]
    columns = ["optimizer", "lr", "seed", "step", "loss", "held_out_loss"]
    return pd.concat(logs, ignore_index=True)[columns]
