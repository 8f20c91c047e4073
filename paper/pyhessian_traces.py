"""Curvature of residual networks with and without batch norm and shortcuts (PyHessian)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

import blockspec
from blockspec.figures.style import RUN_MARKERS, RUNS, styled
from blockspec.runs.settings import find_device
from blockspec.spectra.collection import Spectra, read_table, spectra_of
from paper.exhibit import Context, Exhibit, Finding, Scale, Tables, command, with_error
from training.checkpoints import read_record
from training.optimizers import ScheduleSettings
from training.trainer import TrainingSettings
from vision_models import factories
from vision_models.ablation import (
    DIGITS,
    STAGES,
    VARIANTS,
    Measuring,
    Network,
    ablation,
    train_network,
)
from vision_models.ablation_figures import plot_course, plot_densities
from vision_models.sources import DataSettings

DIGIT_IMAGES = DataSettings()
SHORT = replace(DIGITS, checkpoints=(0.0, 0.1, 1.0))
FEW_STEPS = Measuring(count=128, batch_size=128, num_probes=1, num_steps=15)
CIFAR10 = DataSettings(source="hub", name="cifar10", batch_size=128, augment="cifar", workers=4)


@dataclass(frozen=True)
class Settings:
    """What is trained and measured.

    Args:
        depths: Layers with weights, from the shallow network to the deep one.
        variants: Of ``vision_models.ablation.VARIANTS``.
        model: What else the network takes.
        data: Its data.
        training: Its training.
        seeds: Trainings of each network, of which the traces are measured.
        num_probes: Of the traces.
        count: Training images of the traces.
        measuring: The spectra of the first seed's checkpoints.
    """

    depths: tuple[int, ...] = (20, 32)
    variants: tuple[str, ...] = ("all", "no batch norm", "no residual", "neither")
    model: Mapping[str, Any] = field(default_factory=lambda: {"channels": 1, "width": 8})
    data: DataSettings = DIGIT_IMAGES
    training: TrainingSettings = SHORT
    seeds: int = 3
    num_probes: int = 16
    count: int = 128
    measuring: Measuring = FEW_STEPS


def networks(settings: Settings) -> list[Network]:
    return [
        Network(depth, variant, {**settings.model, "depth": depth, **VARIANTS[variant]})
        for depth in settings.depths
        for variant in settings.variants
    ]


def folder_of(context: Context, seed: int) -> Path:
    """Where the networks of a seed are."""
    return context.runs / "ablation" / f"seed_{seed}"


def measure(settings: Settings, context: Context) -> dict[str, pd.DataFrame]:
    rows = []
    for seed in range(context.seed, context.seed + settings.seeds):
        training = replace(settings.training, seed=seed)
        for network in networks(settings):
            checkpoint = train_network(network, folder_of(context, seed), settings.data, training)
            row = {"depth": network.depth, "variant": network.variant, "seed": seed}
            rows += [row | found for found in _traces(checkpoint, settings, context)]
    first = folder_of(context, context.seed)
    course = ablation(
        out=str(first),
        depths=settings.depths,
        variants=settings.variants,
        model=dict(settings.model),
        data=settings.data,
        training=replace(settings.training, seed=context.seed),
        measuring=replace(settings.measuring, device=context.device),
        workers=context.workers,
    )
    spectra = [_whole_spectra(network, first) for network in networks(settings)]
    return {
        "traces": pd.DataFrame(rows),
        "course": course,
        "spectra": pd.concat(spectra, ignore_index=True),
    }


def _traces(checkpoint: Path, settings: Settings, context: Context) -> list[dict[str, Any]]:
    """Of the whole network and of its stages, from the same probes; with what the trainer
    measured.
    """
    model, batches, loss = factories.checkpoint(
        str(checkpoint), count=settings.count, batch_size=settings.count
    )
    objective = blockspec.Objective(model.to(find_device(context.device)), batches, loss)
    blocks = blockspec.partition(model, "model") + blockspec.partition(model, STAGES)
    found = blockspec.trace(objective, blocks, num_probes=settings.num_probes, seed=context.seed)
    record = read_record(checkpoint)
    measured = {
        "fraction": record["fraction"],
        "accuracy": record["accuracy"],
        "loss": objective.value(),
    }
    return [
        {"block": name, "trace": trace.value, "stderr": trace.stderr, **measured}
        for name, trace in found.items()
    ]


def _whole_spectra(network: Network, out: Path) -> pd.DataFrame:
    table = read_table(out / network.folder / "spectra" / "spectra.parquet")
    return table[table["block"] == "model"].assign(depth=network.depth, variant=network.variant)


def by_network(table: pd.DataFrame) -> dict[tuple[int, str], dict[int, Spectra]]:
    """(depth, variant) -> step -> spectra."""
    return {
        key: {step: spectra_of(stage) for step, stage in rows.groupby("step")}
        for key, rows in table.groupby(["depth", "variant"], sort=False)
    }


@styled
def plot_traces(traces: pd.DataFrame) -> Figure:
    """Trace at the end of training and test accuracy, of each variant: every seed, and a bar at the
    mean; a column a depth.
    """
    depths, variants = (list(traces[name].unique()) for name in ("depth", "variant"))
    whole = traces[traces["block"] == "model"]
    figure = Figure(figsize=(2.2 * len(depths) + 0.8, 3.6), layout="constrained")
    axes = figure.subplots(2, len(depths), sharex=True, sharey="row", squeeze=False)
    for column, depth in zip(axes.T, depths, strict=True):
        rows = whole[whole["depth"] == depth]
        places = rows["variant"].map(variants.index)
        for place, name, colour, marker in zip(
            column, ("trace", "accuracy"), RUNS, RUN_MARKERS, strict=False
        ):
            place.plot(places, rows[name], marker, color=colour, alpha=0.6, markersize=3)
            place.plot(
                range(len(variants)),
                rows.groupby("variant")[name].mean()[variants],
                "_",
                color=colour,
                markersize=16,
            )
            place.set_xlim(-0.6, len(variants) - 0.4)
        column[0].set_title(f"depth {depth}")
        column[1].set_xticks(range(len(variants)), variants, rotation=40, ha="right")
    axes[0, 0].set_ylim(0, None)
    axes[0, 0].set_ylabel("trace of the Hessian\n(loss / parameter²)")
    axes[1, 0].set_ylabel("accuracy on test images")
    return figure


def draw(tables: Tables) -> dict[str, Figure]:
    return {
        "pyhessian_traces": plot_traces(tables["traces"]),
        "pyhessian_traces_largest": plot_course(tables["course"], "eigenvalue_1"),
        "pyhessian_traces_densities": plot_densities(by_network(tables["spectra"])),
    }


def judge(tables: Tables) -> list[Finding]:
    whole = tables["traces"][tables["traces"]["block"] == "model"]
    shallow, deep = (int(f(whole["depth"])) for f in (min, max))
    return [
        _trace_finding(whole, shallow, "lower", -1),
        _trace_finding(whole, deep, "higher", 1),
        *(
            _accuracy_finding(whole, variant, shallow, deep)
            for variant in ("no batch norm", "no residual")
        ),
    ]


def _trace_finding(whole: pd.DataFrame, depth: int, word: str, sign: int) -> Finding:
    """Without batch norm against with, paired by seed."""
    table = whole[whole["depth"] == depth].pivot(index="seed", columns="variant", values="trace")
    difference = table["no batch norm"] - table["all"]
    each = " against ".join(
        with_error(table[name].mean(), table[name].sem()) for name in ("no batch norm", "all")
    )
    accuracy = whole[whole["depth"] == depth].groupby("variant")["accuracy"].mean()
    return Finding(
        f"the trace of ResNet{depth} is {word} without batch norm",
        f"{each} with it, difference {with_error(difference.mean(), difference.sem())} (standard "
        f"errors, {len(table)} trainings)",
        "agrees" if sign * difference.mean() > 2 * difference.sem() else "disagrees",
        "the difference must be two standard errors from 0; test accuracy "
        f"{100 * accuracy['no batch norm']:.1f} % without, "
        f"{100 * accuracy['all']:.1f} % with it, at the end of a short training on digits",
    )


def _accuracy_finding(whole: pd.DataFrame, variant: str, shallow: int, deep: int) -> Finding:
    """How much accuracy the deep network loses by the change beyond what the shallow one does."""
    table = 100 * whole.pivot_table(index="seed", columns=["depth", "variant"], values="accuracy")
    lost = {depth: table[depth, "all"] - table[depth, variant] for depth in (shallow, deep)}
    more = lost[deep] - lost[shallow]
    each = ", ".join(
        f"{with_error(lost[depth].mean(), lost[depth].sem())} points at depth {depth}"
        for depth in lost
    )
    return Finding(
        f"{variant} costs test accuracy, and the more, the deeper the network",
        f"it costs {each} (standard errors over {len(table)} trainings)",
        "agrees" if more.mean() > 2 * more.sem() else "disagrees",
        "the cost must grow from the shallow to the deep network by two standard errors",
    )


SETUP = (
    "Residual networks as they are, without batch norm, without shortcuts, and without both; SGD "
    "with momentum 0.9. Trace by "
    "Hutchinson's method of the network and of its stages, largest eigenvalue and density by "
    "Lanczos; batch norm with running "
    "statistics."
)
EXHIBIT = Exhibit(
    name="pyhessian_traces",
    title="Traces, largest eigenvalues and densities without batch norm and shortcuts",
    source="PyHessian (arXiv 1912.07145)",
    measure=measure,
    draw=draw,
    judge=judge,
    scales={
        "small": Scale(
            Settings(),
            f"{SETUP} ResNet20 and ResNet32 of width 8 (the paper's: 16) on 8x8 digits, 150 steps.",
            "Eight minutes on one core.",
        ),
        "paper": Scale(
            Settings(
                depths=(20, 32, 38, 56),
                variants=tuple(VARIANTS),
                model={"channels": 3},
                data=CIFAR10,
                training=TrainingSettings(
                    num_steps=70_200,  # 180 epochs
                    checkpoints=(0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 1.0),
                    measure_every=3900,
                    state_every=1950,
                    tracker="none",
                    optimizer=replace(DIGITS.optimizer, lr=0.1),
                    schedule=ScheduleSettings(
                        shape="steps", milestones=(31_200, 46_800), factor=0.1
                    ),
                ),
                seeds=1,
                num_probes=64,
                count=4096,
                measuring=Measuring(count=4096, batch_size=512, num_probes=4, num_steps=100),
            ),
            f"{SETUP} CIFAR-10, 180 epochs, the paper's depths and stage-wise removal.",
            "Not run. Estimated: 28 trainings of a quarter to three quarters of an hour on one "
            "H100; minutes a checkpoint.",
        ),
    },
)

if __name__ == "__main__":
    command(EXHIBIT)
