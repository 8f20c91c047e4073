"""What is done and to do for one block.

The idea. A block is done by runs: each run is the Lanczos recurrence of one probe, and its result
is a tridiagonal matrix. With fixed numbers, all runs of a block start at once, and that is all.
With a tolerance, they come in waves:

1. One probe runs until its spectrum stands still. Its result tells how noisy a probe is, so how
many are needed. 2. Where many are, the first probe goes on for a while, as long as that costs less
than the runs that it saves. Then its result is
   not used as a sample. It is given up for the eigenvalues that it has found: these are known from
   now on (see :mod:`blockspec.engine.deflation`), and all further probes run in the complement of
   their vectors, where they need fewer.
3. The missing probes run together, ``WAVE`` of them at most. After each wave the results say again
how many are missing. 4. Wherever the runs to come would take more products than the block has
parameters, all columns of its matrix are computed
   instead: they give every eigenvalue exactly.

Probes are numbered 0, 1, 2, ... in the order in which they start, whatever their results are used
for, because a probe's random vector depends on its number. Everything else is counted in runs:
``to_start`` and ``running``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from blockspec.engine.accuracy import Accuracy, probes_needed, stands_still
from blockspec.engine.deflation import (
    LARGEST,
    Deflation,
    deflation,
    longest_first_probe,
    pays,
)
from blockspec.model.blocks import Block
from blockspec.numerics.basis import rows_taken
from blockspec.numerics.columns import Columns
from blockspec.numerics.jackknife import MOST_GROUPS
from blockspec.numerics.lanczos import Lanczos, Tridiagonal
from blockspec.numerics.measures import NOTHING
from blockspec.numerics.probes import draw_probe
from blockspec.numerics.ranks import Ranks
from blockspec.numerics.units import LeftOut, Projections, left_out

# parameters: where numbers are chosen by tolerance, blocks this small would need more products
# otherwise; with a loose tolerance, larger ones than SMALLEST wait for what one probe says
SMALLEST, ALWAYS_EXACT = 32, 64
# times 1 / sqrt(P): about how far one probe's spectrum is from the block's, relative to its norm
SPREAD = 0.15
TYPICAL_STEPS = 40  # of a run that ends by itself, to foresee its memory
# parameters: larger blocks whose columns are computed after all keep no matrix for every unit (here
# 4 MiB in float32), but what their first probes have told of the units, which is less certain
WHOLE_BY_UNIT = 256
WAVE = 64  # runs of one block that are started before their results are looked at


@dataclass(frozen=True)
class Probing:
    """How probes are drawn and kept."""

    seed: int
    distribution: str
    reorthogonalize: bool
    storage: tuple[torch.dtype, torch.device] | None = None
    ranks: Ranks = field(default_factory=Ranks)
    by_unit: bool = False
    """Coefficients of units of data are kept, for the data's error."""
    parts: bool = False
    """Each of the ``ranks`` holds its part of every vector alone."""


@dataclass(eq=False)
class Job:
    """Work on one block that takes one product a sweep: the run of a probe, or all columns of the
    matrix (no probe).
    """

    block: Block
    probe: int | None
    recurrence: Lanczos | Columns
    projections: Projections | None = None
    """Of units of data; None where they are not wanted."""

    @property
    def length(self) -> int:
        """Krylov vectors, or columns, up to the one whose product comes next."""
        run = self.recurrence
        return 1 + (len(run) if isinstance(run, Columns) else len(run.alphas))


@dataclass(eq=False)
class Task:
    """What is done and to do for one block.

    Attributes:
        turned: What makes a vector of the operator's products of one of the parameters.
        next_probe: Number of the probe that is started next.
        to_start: Runs that are known to be needed and not started.
        running: Runs under way.
        tridiagonals: Results by number of the probe; without that of a probe that was given up.
        deflation: What a probe was given up for.
        exact: All eigenvalues are computed: they cost fewer products.
        columns: Where they are computed, once that has begun.
        left_out: By probe, its quadrature without each group of data.
        columns_left_out: (n, P) all eigenvalues without each group of data.
    """

    block: Block
    dtype: torch.dtype
    device: torch.device
    accuracy: Accuracy
    probing: Probing
    turned: Callable[[Block, Tensor], Tensor] = lambda block, vector: vector
    next_probe: int = 0
    to_start: int = 0
    running: int = 0
    tridiagonals: dict[int, Tridiagonal] = field(default_factory=dict)
    deflation: Deflation | None = None
    exact: bool = False
    columns: Columns | None = None
    left_out: dict[int, LeftOut] = field(default_factory=dict)
    columns_left_out: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.to_start = self.accuracy.num_probes or 1
        enough = (SPREAD / self.accuracy.tolerance) ** 2
        small = min(max(enough, SMALLEST), ALWAYS_EXACT)
        fewest = small if self.accuracy.adaptive else 0
        self.exact = self.block.numel <= max(fewest, self.accuracy.num_steps or 0)

    @property
    def known(self) -> np.ndarray:
        """(c,) eigenvalues in whose complement the probes are."""
        return NOTHING if self.deflation is None else self.deflation.values

    @property
    def waits(self) -> bool:
        """Whether a job is known to be needed and not started."""
        return self.columns is None if self.exact else self.to_start > 0

    def pending(self) -> Iterator[Job]:
        """Starts the jobs that are known to be needed and not started, one at each step of the
        iteration.
        """
        if self.exact and self.waits:
            yield self.begin_columns()
        while not self.exact and self.waits:
            job = self.run(self.next_probe)
            self.next_probe += 1
            self.to_start -= 1
            self.running += 1
            yield job

    def begin_columns(self) -> Job:
        """The job of all columns, at its beginning."""
        self.columns = Columns(self.block.numel, dtype=self.dtype, device=self.device)
        whole = self.probing.by_unit and (
            self.block.numel <= WHOLE_BY_UNIT or not self.accuracy.adaptive
        )
        return Job(self.block, None, self.columns, Projections() if whole else None)

    def run(self, probe: int) -> Job:
        """The job of one probe, at its beginning."""
        p = self.probing
        recurrence = Lanczos(
            self.probe(probe),
            self.accuracy.num_steps or self.accuracy.max_steps,
            reorthogonalize=p.reorthogonalize,
            deflated=None if self.deflation is None else self.deflation.vectors,
            storage=p.storage,
            ranks=p.ranks,
            by_unit=p.by_unit,
            beside=self.probe(1) if self._has_one_beside(probe) else None,
            parts=p.parts,
        )
        return Job(self.block, probe, recurrence, Projections() if p.by_unit else None)

    def _has_one_beside(self, probe: int) -> bool:
        """Whether that probe is followed beside the next one, so that both together can tell single
        eigenvalues from repeated ones: the first of those whose number is fixed.
        """
        p, several = self.probing, (self.accuracy.num_probes or 1) > 1
        return probe == 0 and several and p.reorthogonalize and p.storage is None

    def probe(self, probe: int) -> Tensor:
        """(P,) the start vector of that number."""
        p = self.probing
        start = draw_probe(
            self.block.name, self.block.numel, seed=p.seed, probe=probe, distribution=p.distribution
        )
        return self.turned(self.block, start.to(self.device, self.dtype))

    def is_done(self, job: Job) -> bool:
        """Whether a job has come to its end, or its spectrum stands still."""
        run = job.recurrence
        if run.done or isinstance(run, Columns) or self.accuracy.num_steps is not None:
            return run.done
        found, numel = run.tridiagonal(), self.block.numel
        if not stands_still(found, numel, self.accuracy, self.known):
            return False
        return not (self._may_deflate and pays(found, numel, self.accuracy))

    def collect(self, job: Job, changed: np.ndarray | None = None) -> None:
        """Takes the result of a job that is done, and after the last one of a wave decides what
        comes next.

        Args:
            job: Of this block.
            changed: (n, m, m) by which its small matrix changes without each group of data.
        """
        if isinstance(job.recurrence, Columns):
            if changed is not None:
                matrix = job.recurrence.matrix()
                self.columns_left_out = np.linalg.eigvalsh(matrix + changed)
            job.recurrence.eigenvalues()
            return
        assert job.probe is not None
        self.running -= 1
        if self._may_deflate:
            found = deflation(job.recurrence, self.block.numel, self.accuracy, changed)
            if found is not None:
                self.deflation, beyond = found
                self._go_on(beyond)
                if not (self.exact and changed is not None):
                    return
                self.deflation = None  # all columns follow; this run tells of the units of data
        self.tridiagonals[job.probe] = job.recurrence.finish()
        if changed is not None:
            self.left_out[job.probe] = left_out(self.tridiagonals[job.probe], changed)
        if self.accuracy.num_probes is None and self.running == 0 and self.to_start == 0:
            self._go_on(self._needed() - len(self.tridiagonals))

    def _needed(self) -> int:
        """Probes whose results the tolerance needs.

        A probe that broke down may have missed what it is orthogonal to, where probes are no
        Gaussian ones: a second one looks again.
        """
        results = self.results()
        needed = probes_needed(results, self.block.numel, self.accuracy, self.known)
        return max(needed, 2) if results[0].breakdown else needed

    def _go_on(self, missing: int) -> None:
        """With so many more runs, as far as is known, or with all columns where that is cheaper."""
        done = self.next_probe * self._steps
        affordable = max(0, self.accuracy.max_products - done) // self._steps
        self.to_start = max(0, min(missing, WAVE, affordable))
        self.exact = self.block.numel <= self._steps * min(missing, affordable)
        if self.deflation is not None and (self.exact or self.to_start == 0):
            self.deflation = replace(self.deflation, vectors=self.deflation.vectors[:0].clone())

    @property
    def _steps(self) -> int:
        """Steps that the next run takes, as far as is known: as the longest one so far."""
        typical = 1 if self.deflation is None else self.deflation.steps
        return max((len(t.alphas) for t in self.tridiagonals.values()), default=typical)

    @property
    def _may_deflate(self) -> bool:
        """Whether this is the first run, the number of probes is free, and Ritz vectors can be made
        from what a run keeps.
        """
        return (
            self._is_first
            and self.accuracy.num_probes is None
            and self.probing.reorthogonalize
            and self.probing.storage is None
        )

    @property
    def _is_first(self) -> bool:
        return not self.tridiagonals and self.deflation is None

    def results(self) -> list[Tridiagonal]:
        """The tridiagonal matrices in the order of the probes."""
        return [self.tridiagonals[probe] for probe in sorted(self.tridiagonals)]

    def results_left_out(self) -> list[LeftOut]:
        """The same without each group of data; empty where that was not asked for."""
        return [self.left_out[probe] for probe in sorted(self.left_out)]

    def job_bytes(self) -> int:
        """Memory that one more job takes at the end of its last sweep: its vector, the product, and
        what it keeps.
        """
        size = self.block.numel * self.dtype.itemsize
        if self.exact:
            columns = Columns.bytes_of(self.block.numel, self.dtype)
            return 2 * size + columns + self._unit_bytes(self.block.numel)
        if self.probing.parts:
            size //= self.probing.ranks.rows
        if not self.probing.reorthogonalize:
            return 3 * size
        dtype = self.probing.storage[0] if self.probing.storage else self.dtype
        kept = self.block.numel * dtype.itemsize
        steps = self.accuracy.num_steps or TYPICAL_STEPS
        if self.accuracy.num_steps is None and self._may_deflate and self.block.numel <= LARGEST:
            steps = max(steps, longest_first_probe(self.block.numel, self.accuracy))
        steps = rows_taken(steps, self.block.numel // self.probing.ranks.rows)
        shared = steps * kept // self.probing.ranks.rows
        if self.probing.by_unit and self.probing.ranks.rows > 1 and not self.probing.parts:
            shared += steps * kept  # each process keeps all of every vector too
        return 2 * size + shared + self._unit_bytes(steps)

    def _unit_bytes(self, steps: int) -> int:
        """Memory of the coefficients of units along so many vectors."""
        return self.probing.by_unit * MOST_GROUPS * self.dtype.itemsize * steps * (steps + 1) // 2

    @property
    def waiting_bytes(self) -> int:
        """Memory of all jobs that are known to be needed and not started, at once."""
        return self.job_bytes() * (1 if self.exact else self.to_start)

    @property
    def result_bytes(self) -> int:
        """Memory that the spectrum takes: nodes, weights, residuals, and as much to make them."""
        steps = self.accuracy.num_steps or TYPICAL_STEPS
        return 6 * 8 * (self.accuracy.num_probes or 1) * steps

    @property
    def held_bytes(self) -> int:
        """Memory that is held beside that of jobs."""
        beside = self._has_one_beside(0) and not self.exact and 0 not in self.tridiagonals
        held = 0 if self.deflation is None else self.deflation.vectors.nbytes
        holders = self.probing.ranks.rows if self.probing.parts else 1
        return held + beside * self.block.numel * self.dtype.itemsize // holders
