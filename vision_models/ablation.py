"""PyHessian's study (arXiv 1912.07145): residual networks by depth, with and without batch norm and
shortcuts.

``python -m vision_models.ablation`` on the digits: minutes. ``--config
vision_models/configs/ablation/cifar10.yaml``: the paper's settings.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from blockspec.engine.settings import EstimateSettings
from blockspec.runs.run import BlockSettings, Resources, RunSettings, measure
from blockspec.spectra.collection import Spectra, read_table, spectra_of, write_parquet
from blockspec.spectra.spectrum import Spectrum
from training.checkpoints import list_checkpoints, read_record
from training.command import run_command
from training.optimizers import OptimizerSettings, ScheduleSettings
from training.trainer import TrainingSettings
from vision_models import factories
from vision_models.ablation_figures import draw
from vision_models.models import ModelSettings, build
from vision_models.sources import DataSettings
from vision_models.train import train

VARIANTS: dict[str, dict[str, Any]] = {
    "all": {},
    "no batch norm": {"batch_norm": False},
    "no residual": {"residual": False},
    "neither": {"batch_norm": False, "residual": False},
    "no batch norm in stage 1": {"batch_norm": [False, True, True]},
    "no batch norm in stage 2": {"batch_norm": [True, False, True]},
    "no batch norm in stage 3": {"batch_norm": [True, True, False]},
}
STAGES = {
    "stem": "[bc]*",  # conv1, and bn1 where there is one
    "stage 1": "layer1.*",
    "stage 2": "layer2.*",
    "stage 3": "layer3.*",
    "head": "fc.*",
}
TOP = 5  # eigenvalues in the table
FACTORY = "vision_models.factories:checkpoint"
DIGITS = TrainingSettings(
    num_steps=150,
    checkpoints=(0.0, 0.1, 0.4, 1.0),
    state_every=0,
    device="cpu",
    tracker="none",
    optimizer=OptimizerSettings(name="sgd", lr=0.05, momentum=0.9, weight_decay=5e-4, clip=0.0),
    schedule=ScheduleSettings(shape="cosine", warmup=20),
)


@dataclass(frozen=True)
class Measuring:
    """What is measured of each checkpoint.

    Args:
        count: The first so many training images, without augmentation. The author of PyHessian
            found 4096 to be enough on CIFAR-10; the paper took all.
        batch_size: Images in a batch.
        batch_norm: eval (running statistics, as in the paper) or train (statistics of the batch).
        num_probes: Random start vectors, for the whole network and for each stage.
        num_steps: Lanczos steps; the paper took 100.
        device: auto (the GPU if there is one) or cpu.
    """

    count: int = 256
    batch_size: int = 256
    batch_norm: Literal["eval", "train"] = "eval"
    num_probes: int = 2
    num_steps: int = 25
    device: str = "auto"


@dataclass(frozen=True)
class Network:
    depth: int
    variant: str
    settings: Mapping[str, Any]

    @property
    def folder(self) -> str:
        return f"depth{self.depth}_{self.variant.replace(' ', '_')}"


def ablation(
    *,
    out: str = "runs/ablation",
    depths: tuple[int, ...] = (8, 14),
    variants: tuple[str, ...] = ("all", "no batch norm", "no residual", "neither"),
    model: dict[str, Any] = {"channels": 1},  # noqa: B006
    data: DataSettings = DataSettings(),
    training: TrainingSettings = DIGITS,
    measuring: Measuring = Measuring(),
    workers: int = 2,
) -> pd.DataFrame:
    """Trains each network, and measures trace, top eigenvalues and density of the whole and of each
    stage along the training.

    A second call does what is missing. A network whose loss becomes infinite is measured up to
    there.

    Args:
        out: Folder for the networks, ``ablation.parquet`` and ``figures/``.
        depths: Layers with weights: 6 n + 2.
        variants: all, no batch norm, no residual, neither, no batch norm in stage 1, … 2, … 3.
        model: What else ``cifar_resnet`` takes: classes, channels, width.
        data: The data.
        training: The training.
        measuring: What is measured.
        workers: Networks at once, each on one thread; take 1 on a GPU.

    Returns:
        A line for each block of each checkpoint of each network.
    """
    if unknown := [name for name in variants if name not in VARIANTS]:
        raise ValueError(f"no variant {unknown[0]!r}: there are {', '.join(VARIANTS)}")
    networks = [
        Network(depth, name, {**model, "depth": depth, **VARIANTS[name]})
        for depth in depths
        for name in variants
    ]
    for network in networks:
        build(_model(network))  # a depth that does not fit is found before the work
    # spawned, for a forked process cannot use a GPU, nor threads that its parent has started
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        jobs = [
            pool.submit(examine, network, Path(out), data, training, measuring)
            for network in networks
        ]
        for network, job in zip(networks, jobs, strict=True):
            job.result()
            print(f"{network.folder}: done", flush=True)
    return collect(networks, Path(out))


def train_network(
    network: Network, out: Path, data: DataSettings, training: TrainingSettings
) -> Path:
    """Trains a network, to its end or to where it diverges; returns the folder of its last
    checkpoint.
    """
    folder = out / network.folder
    try:
        train(out=str(folder), model=_model(network), data=data, training=training, progress=False)
    except FloatingPointError as error:
        (folder / "diverged.json").write_text(
            json.dumps({"error": str(error)}) + "\n", encoding="utf-8"
        )
    return list_checkpoints(folder)[-1]


def examine(
    network: Network,
    out: Path,
    data: DataSettings,
    training: TrainingSettings,
    measuring: Measuring,
) -> None:
    """Trains a network and measures its checkpoints."""
    folder = train_network(network, out, data, training).parent
    settings = RunSettings(
        model=FACTORY,
        model_args={"count": measuring.count, "batch_size": measuring.batch_size},
        checkpoints=[str(path) for path in list_checkpoints(folder)],
        blocks=BlockSettings(by={name: [pattern] for name, pattern in STAGES.items()}, full=True),
        estimate=EstimateSettings(num_probes=measuring.num_probes, num_steps=measuring.num_steps),
        batch_norm=measuring.batch_norm,
    )
    measure(
        settings,
        factories.checkpoint,
        folder / "spectra",
        resources=Resources(device=measuring.device),
    )


def collect(networks: list[Network], out: Path) -> pd.DataFrame:
    """Writes the table and the figures of networks that have been examined."""
    spectra = {
        (network.depth, network.variant): _spectra(out / network.folder) for network in networks
    }
    lines = [
        {
            "depth": n.depth,
            "variant": n.variant,
            "step": step,
            **_record(out / n.folder, step),
            **numbers(spectrum),
        }
        for n in networks
        for step, found in spectra[n.depth, n.variant].items()
        for spectrum in found.values()
    ]
    table = pd.DataFrame(lines)
    write_parquet(table, out / "ablation.parquet")
    draw(table, spectra, out / "figures")
    return table


def numbers(spectrum: Spectrum) -> dict[str, Any]:
    """Trace and extreme eigenvalues of a block, each with how far to trust it."""
    trace, probe = spectrum.trace, int(np.argmin(spectrum.residuals[:, -1]))
    # One probe's values: those of all probes together would hold each eigenvalue several times.
    used = spectrum.weights[probe] > 0
    top = [row[used][::-1][:TOP] for row in (spectrum.nodes[probe], spectrum.residuals[probe])]
    found = {
        "block": spectrum.block.name,
        "parameters": spectrum.block.numel,
        "smallest": spectrum.smallest.value,
    }
    found |= {
        "trace": trace.value,
        "trace_stderr": np.nan if trace.stderr is None else trace.stderr,
    }
    return found | {
        f"{name}_{i + 1}": float(value)
        for i, pair in enumerate(zip(*top, strict=True))
        for name, value in zip(("eigenvalue", "residual"), pair, strict=True)
    }


def _model(network: Network) -> ModelSettings:
    return ModelSettings("cifar_resnet", dict(network.settings))


def _spectra(folder: Path) -> dict[int, Spectra]:
    table = read_table(folder / "spectra" / "spectra.parquet")
    return {
        step: spectra_of(table[table["step"] == step])
        for step in sorted(table["step"].unique().tolist())
    }


def _record(folder: Path, step: int) -> dict[str, Any]:
    """Loss and accuracy on held-out images, as the trainer measured them."""
    record = read_record(folder / f"step_{step:06d}")
    measured = {name: record.get(name, np.nan) for name in ("held_out_loss", "accuracy")}
    return {**measured, "diverged": (folder / "diverged.json").is_file()}


if __name__ == "__main__":
    run_command(ablation)
