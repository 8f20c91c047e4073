"""How many random probes an estimate takes: the settings that traces, diagonals and norms share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from blockspec.spectra.spectrum import estimate

FEWEST_SAMPLES = (
    8  # before a standard error of few samples, which may be small by chance, is believed
)


@dataclass(frozen=True)
class Sampling:
    """How long random probes are drawn.

    Args:
        num_probes: Products with random probes. Where there is a tolerance, this is the largest
            number of them.
        tolerance: End as soon as every standard error is below it, relative to the size of what is
            estimated, but not before 8 samples; between 0 and 1. If left out, all probes are drawn.
        seed: Of the probes, which are drawn on the CPU.
        data_errors: Measure also how far the numbers of the population that the batches are drawn
            from may lie. No product more is needed. The units are the micro-batches as they go
            through the model; they must have been drawn independently.
    """

    num_probes: int = 32
    tolerance: float | None = None
    seed: int = 0
    data_errors: bool = True

    def __post_init__(self) -> None:
        """Raises ValueError for numbers out of range."""
        self.check_fewest(1)
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise ValueError(
                f"tolerance is relative, between 0 and 1 (both excluded), got {self.tolerance}"
            )

    def check_fewest(self, fewest: int) -> None:
        """Raises ValueError where there are fewer probes than a method can do with."""
        if self.num_probes < fewest:
            raise ValueError(f"num_probes is at least {fewest}, got {self.num_probes}")

    @property
    def total(self) -> int | None:
        """The number of probes, where it is known before the work."""
        return self.num_probes if self.tolerance is None else None

    def met(self, samples: Sequence[float] | np.ndarray, norm: float) -> bool:
        """Whether the mean of the samples is known well enough, relative to the larger of its
        magnitude and ``norm``.
        """
        if self.tolerance is None or len(samples) < FEWEST_SAMPLES:
            return False
        mean, stderr, _ = estimate(np.asarray(samples))
        assert stderr is not None
        return stderr <= self.tolerance * max(abs(mean), norm)
