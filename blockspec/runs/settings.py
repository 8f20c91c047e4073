"""The settings of a run: what its numbers depend on, and what it may take."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from blockspec.engine.settings import EstimateSettings, Execution
from blockspec.products.preconditioning.preconditioner import Preconditioner

DTYPES = ("float32", "float64", "bfloat16")


@dataclass(frozen=True)
class BlockSettings:
    """Which blocks.

    Args:
        by: How parameters are cut into blocks: by tensor, matrix, head, neuron, layer or model; or
            a mapping of block names to patterns of parameter names.
        include: Keep the blocks whose names match one of these patterns, such as *attn*weight*. If
            left out, every block is kept.
        exclude: Leave out the blocks whose names match one of these patterns. If left out, none is.
        full: Measure the full matrix too, as a block that is named model.
        names: What the parts of your model are called: a mapping from a kind of block to endings of
            parameter names, for example '{"query": ["attn.my_q"], "mlp_in": ["ff.first"]}'. It is
            asked before the names that blockspec knows. If left out, the known names decide.
    """

    by: str | dict[str, str | list[str]] = "matrix"
    include: list[str] | str | None = None
    exclude: list[str] | str | None = None
    full: bool = True
    names: dict[str, str | list[str]] | None = None

    def __post_init__(self) -> None:
        _list_patterns(self, "include", "exclude")
        if self.names is not None:
            listed = {kind: [e] if isinstance(e, str) else e for kind, e in self.names.items()}
            object.__setattr__(self, "names", listed)


@dataclass(frozen=True)
class Resources(Execution):
    """What a run may take: the numbers depend on it by rounding alone.

    Args:
        device: Where the work is done: cpu, cuda, cuda:1 and so on. With auto, a GPU is taken if
            there is one.
        weights_device: Where the weights stay while device computes with one layer at a time: cpu,
            or disk, which maps them from the safetensors files of a Hugging Face folder without
            reading them. They are converted to dtype (float32 if left out) a layer at a time. If
            left out, the whole model lies on device.
        plan: Calibrate before the first stage, and print what the run will cost, as blockspec plan
            does. run.json records the plan and what the run took.
    """

    device: str = "auto"
    weights_device: Literal["cpu", "disk"] | None = None
    plan: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        find_device(self.device)
        if self.weights_device not in (None, "cpu", "disk"):
            raise ValueError(f"weights_device is cpu or disk, got {self.weights_device!r}")


@dataclass(frozen=True)
class RunSettings:
    """All that a run's numbers depend on.

    Args:
        model: A factory, written module:function, that returns (model, batches, loss); or the name
            or the folder of a Hugging Face model.
        model_args: Keyword arguments of the factory. Set one of them by --model_args.NAME value.
        checkpoints: Folders or files of checkpoints; patterns such as 'runs/step_*' are allowed.
            The factory is given each of them as checkpoint=. If left out, the model is measured as
            the factory returns it.
        blocks: Which blocks are measured.
        estimate: How well they are measured.
        batch_norm: Statistics of batch norms: eval takes the running ones, train those of each
            batch.
        dtype: Convert the model to this dtype first, for example float64. If left out, the model
            stays as it was loaded.
    """

    model: str
    model_args: dict[str, Any] = field(default_factory=dict)
    checkpoints: list[str] | str = field(default_factory=list)
    blocks: BlockSettings = field(default_factory=BlockSettings)
    estimate: EstimateSettings = field(default_factory=EstimateSettings)
    batch_norm: Literal["eval", "train"] = "eval"
    dtype: str | None = None

    def __post_init__(self) -> None:
        _list_patterns(self, "checkpoints")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype is one of {DTYPES}, got {self.dtype!r}")


def recorded(settings: RunSettings | EstimateSettings) -> dict[str, Any]:
    """The settings as run.json has them: a preconditioner by its name. What it holds is another at
    each step, and stands in the step's own entry.
    """
    plain = asdict(settings)
    estimate = plain.get("estimate", plain)
    if isinstance(given := estimate["precondition"], Preconditioner):
        estimate["precondition"] = given.name
    return plain


def _list_patterns(settings: object, *names: str) -> None:
    """A single pattern becomes a list of one, so that records of a run compare equal."""
    for name in names:
        if isinstance(pattern := getattr(settings, name), str):
            object.__setattr__(settings, name, [pattern])


def _gpu_of(process: int) -> str:
    if process >= (there := torch.cuda.device_count()):
        raise ValueError(
            f"process {process} of this machine (counted from 0) has no GPU of its own, because "
            f"there are {there}: start one process for each GPU, or compute on the CPU with "
            "--device cpu"
        )
    return f"cuda:{process}"


def find_device(name: str) -> str:
    """``auto`` is a GPU if there is one: that of this process, where there are several."""
    if name == "auto":
        own = int(os.environ.get("LOCAL_RANK", "0"))
        return _gpu_of(own) if torch.cuda.is_available() else "cpu"
    try:
        if torch.empty(1, device=name).is_meta:
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {name!r} cannot be used ({error}); devices here: cpu, or auto"
        ) from None
    return name
