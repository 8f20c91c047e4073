"""The settings of an estimate: the one list that functions, the command line, plug-ins and the
record of a run are fed from.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Literal

import torch

from blockspec.engine.accuracy import Accuracy
from blockspec.numerics.memory import parse
from blockspec.numerics.probes import DISTRIBUTIONS
from blockspec.products import precision as precisions
from blockspec.products.selection import OperatorSettings

Storage = tuple[torch.dtype, torch.device] | None
LEAST_TOLERANCE = 1e-12  # of float64: no number of steps gives less
TOLERANCE = 2e-3  # below it, a density over the whole range of eigenvalues does not change visibly
STORED = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class EstimateSettings(OperatorSettings):
    """What the numbers of an estimate depend on.

    Args:
        num_probes: Number of random start vectors of each block. With auto, each block gets as many
            as the tolerance needs; a large block needs one. The error of a mean falls with the
            square root of their number.
        num_steps: Number of Lanczos steps of each probe. With auto, a block takes steps until its
            spectrum no longer changes by more than the tolerance allows. A block with at most as
            many parameters as steps is done exactly: the result has all of its eigenvalues. With
            auto, a block is done exactly wherever that is cheaper.
        tolerance: Wasserstein-1 distance that is allowed between the estimated and the true
            spectrum, relative to the block's spectral norm. It is used where num_probes or
            num_steps is auto, and held in at least 95 % of seeds.
        seed: Seed of the probes, a whole number. The probes of a block do not depend on which other
            blocks are estimated beside it.
        distribution: How the entries of the probes are drawn: rademacher (+1 or -1) or gaussian.
        reorthogonalize: Keep every Krylov vector orthogonal to those before. Without this the
            estimate takes less memory, but converged eigenvalues may appear several times: do not
            count eigenvalues then.
        basis_dtype: Type of the Krylov vectors that are kept: float32, bfloat16 or float64. If left
            out, they have the type of the parameters.
        basis_device: Device where the Krylov vectors are kept, for example cpu. If left out, they
            are kept beside the parameters.
        precision: Precision of the products: tf32 or bfloat16, which are faster on GPUs that have
            them. The error that they cause is measured with two more products a block (eight for a
            small one), and is a part of the stated error. If left out, products have the precision
            of the parameters.
        data: How much of the data is used. all takes all of it. auto takes, for each block, as many
            units of the data (micro-batches, drawn at random) as the block needs, so that the total
            error of steps, probes and data is within the tolerance. It goes with num_probes and
            num_steps auto.
        data_errors: Measure the errors of the data too: how far the numbers may lie from those of
            the population that the batches are drawn from. This needs no further product. The units
            are the micro-batches as they go through the model; they must have been drawn
            independently. blockspec.spectra.data explains it.
    """

    num_probes: int | Literal["auto"] = 4
    num_steps: int | Literal["auto"] = 40
    tolerance: float = TOLERANCE
    seed: int = 0
    distribution: Literal["gaussian", "rademacher"] = "gaussian"
    reorthogonalize: bool = True
    basis_dtype: Literal["bfloat16", "float32", "float64"] | None = None
    basis_device: str | None = None
    precision: Literal["tf32", "bfloat16"] | None = None
    data: Literal["all", "auto"] = "all"
    data_errors: bool = True

    def __post_init__(self) -> None:
        """Raises ValueError or TypeError for a setting out of range, before anything is measured or
        written.
        """
        super().__post_init__()
        _ = self.accuracy
        _check_choice("distribution", self.distribution, DISTRIBUTIONS)
        if self.basis_dtype is not None:
            _check_choice("basis_dtype", self.basis_dtype, tuple(STORED))
        _check_choice("data", self.data, ("all", "auto"))
        if self.data == "auto" and not (self.reorthogonalize and self.data_errors):
            raise ValueError(
                "data='auto' needs the errors of the data: leave out data_errors=False and "
                "reorthogonalize=False"
            )
        if self.basis_device is not None:
            _check_device("basis_device", self.basis_device)
        precisions.check(self.precision)
        if not 0 <= operator.index(self.seed) < 2**63:
            raise ValueError(f"seed is a whole number from 0 to 2^63 - 1, got {self.seed}")

    @property
    def accuracy(self) -> Accuracy:
        """The same numbers, as the engine takes them: None for auto."""
        steps, probes = _count("num_steps", self.num_steps), _count("num_probes", self.num_probes)
        return Accuracy(steps, probes, _tolerance(self.tolerance))

    def storage(self, device: torch.device) -> Storage:
        """The dtype and device of the Krylov vectors; None: those of the parameters, on
        ``device``.
        """
        if self.basis_dtype is None and self.basis_device is None:
            return None
        return STORED[self.basis_dtype or "float32"], torch.device(self.basis_device or device)


@dataclass(frozen=True)
class Execution:
    """What an estimate may take; its numbers depend on this by rounding alone.

    Args:
        memory: Memory that the estimate may take: a number of bytes, a share of the device (0.8) or
            a size (20GiB). The micro-batch and the number of recurrences under way at once are
            chosen to fit. If left out, no bound is kept.
        columns: With several processes: into how many groups the blocks are dealt. The processes of
            one group split the batches. If left out, blocks are dealt where there are many, and
            batches are split otherwise.
        state_every: Seconds between two saved states. A killed estimate goes on from the last one.
    """

    memory: int | float | str | None = None
    columns: int | None = None
    state_every: float = 300.0

    def __post_init__(self) -> None:
        """Raises ValueError or TypeError for a setting out of range, before anything is measured or
        written.
        """
        if self.memory is not None:
            parse(self.memory, torch.device("cpu"))
        if self.columns is not None and operator.index(self.columns) < 1:
            raise ValueError(f"columns is a whole number >= 1, got {self.columns}")
        if not self.state_every >= 0:
            raise ValueError(f"state_every is a number of seconds >= 0, got {self.state_every}")


def _count(name: str, value: int | str) -> int | None:
    """A whole number >= 1, or None for "auto"."""
    if value == "auto":
        return None
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} is a whole number >= 1 or 'auto', got {value!r}") from None
    if number < 1:
        raise ValueError(f"{name} is a whole number >= 1 or 'auto', got {number}")
    return number


def _tolerance(tolerance: float) -> float:
    if not (math.isfinite(tolerance) and LEAST_TOLERANCE <= tolerance < 1):
        raise ValueError(
            f"tolerance is relative to the spectral norm, at least {LEAST_TOLERANCE} and below 1, "
            f"got {tolerance}"
        )
    return float(tolerance)


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is one of {allowed}, got {value!r}")


def _check_device(name: str, device: str) -> None:
    try:
        if torch.empty(1, device=device).is_meta:
            raise RuntimeError("the meta device holds no numbers")
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{name} {device!r} cannot be used ({error})") from None
