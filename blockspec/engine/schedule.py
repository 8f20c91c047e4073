"""Which products are asked for next: one process per (block, probe), all of them through the same sweeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from blockspec.engine.accuracy import Accuracy, probes_needed, stands_still
from blockspec.engine.deflation import LARGEST, Deflation, deflation, longest_first_probe, pays
from blockspec.model.blocks import Block
from blockspec.numerics.columns import Columns
from blockspec.numerics.lanczos import Lanczos, Tridiagonal
from blockspec.numerics.measures import NOTHING
from blockspec.numerics.probes import draw_probe
from blockspec.numerics.ranks import Ranks
from blockspec.products.operators import Operator

ALWAYS_EXACT = 64  # parameters: where numbers are chosen by tolerance, blocks this small would need more products otherwise
TYPICAL_STEPS = 40  # of an adaptive process, to foresee its memory


@dataclass(frozen=True)
class Probing:
    """How probes are drawn and kept."""

    seed: int
    distribution: str
    reorthogonalize: bool
    storage: tuple[torch.dtype, torch.device] | None = None
    ranks: Ranks = field(default_factory=Ranks)


@dataclass(eq=False)
class Job:
    """One process on one block: a probe's Lanczos, or all columns of a small block (probe -1)."""

    block: Block
    probe: int
    process: Lanczos | Columns


@dataclass(eq=False)
class Task:
    """What is done and to do for one block."""

    block: Block
    dtype: torch.dtype
    device: torch.device
    accuracy: Accuracy
    probing: Probing
    wanted: int = (
        0  # probes, as far as is known, the one that was given up for a deflation among them
    )
    started: int = 0
    tridiagonals: dict[int, Tridiagonal] = field(default_factory=dict)
    columns: Columns | None = None
    deflation: Deflation | None = None
    exact: bool = False  # all eigenvalues are computed: they cost fewer products

    def __post_init__(self) -> None:
        self.wanted = self.accuracy.num_probes or 1
        self.exact = self.block.numel <= max(
            ALWAYS_EXACT if self.accuracy.adaptive else 0, self.accuracy.num_steps or 0
        )

    @property
    def known(self) -> np.ndarray:
        """(c,) eigenvalues in whose complement the probes are."""
        return NOTHING if self.deflation is None else self.deflation.values

    def pending(self) -> Iterator[Job]:
        """Starts the jobs that are known to be needed and not started, one at each step of the iteration."""
        if self.exact and self.columns is None:
            yield self.begin_columns()
        while not self.exact and self.started < self.wanted:
            job = self.lanczos(self.started)
            self.started += 1
            yield job

    def begin_columns(self) -> Job:
        """The job of all columns, at its beginning."""
        self.columns = Columns(self.block.numel, dtype=self.dtype, device=self.device)
        return Job(self.block, -1, self.columns)

    def lanczos(self, probe: int) -> Job:
        """The job of one probe, at its beginning."""
        p = self.probing
        steps = self.accuracy.num_steps or self.accuracy.max_steps
        deflated = None if self.deflation is None else self.deflation.vectors
        process = Lanczos(
            self.probe(probe),
            steps,
            reorthogonalize=p.reorthogonalize,
            deflated=deflated,
            storage=p.storage,
            ranks=p.ranks,
        )
        return Job(self.block, probe, process)

    def probe(self, probe: int) -> Tensor:
        """(P,) the start vector of that number."""
        p = self.probing
        start = draw_probe(
            self.block.name, self.block.numel, seed=p.seed, probe=probe, distribution=p.distribution
        )
        return start.to(self.device, self.dtype)

    def is_done(self, job: Job) -> bool:
        """Whether a job's process has come to its end, or stands still."""
        process = job.process
        if process.done or isinstance(process, Columns) or self.accuracy.num_steps is not None:
            return process.done
        found = process.tridiagonal()
        if not stands_still(found, self.block.numel, self.accuracy, self.known):
            return False
        return (
            job.probe > 0
            or not self._may_deflate
            or not pays(found, self.block.numel, self.accuracy)
        )

    def collect(self, job: Job) -> None:
        """Takes the result of a job that is done, and decides whether more probes are needed."""
        if isinstance(job.process, Columns):
            return
        given_up = 0 if self.deflation is None else 1
        if (
            self.accuracy.num_probes is not None
            or len(self.tridiagonals) + 1 < self.wanted - given_up
        ):
            self.tridiagonals[job.probe] = job.process.finish()
            return
        if (
            job.probe == 0
            and self._may_deflate
            and (found := deflation(job.process, self.block.numel, self.accuracy))
        ):
            self.deflation, beyond = found
            self.wanted = 1 + min(beyond, self.accuracy.max_probes)
        else:
            self.tridiagonals[job.probe] = job.process.finish()
            needed = probes_needed(self.results(), self.block.numel, self.accuracy, self.known)
            self.wanted = max(self.wanted, given_up + min(needed, self.accuracy.max_probes))
        self.exact = self.block.numel <= self._longest * (self.wanted - self.started)
        if self.deflation is not None and (self.exact or self.started == self.wanted):
            self.deflation = replace(self.deflation, vectors=self.deflation.vectors[:0].clone())

    @property
    def _longest(self) -> int:
        """Steps of the longest process."""
        return max(
            [
                0 if self.deflation is None else self.deflation.steps,
                *(len(t.alphas) for t in self.tridiagonals.values()),
            ]
        )

    @property
    def _may_deflate(self) -> bool:
        """Whether the number of probes is free, and Ritz vectors can be made from what a process keeps."""
        return (
            self.accuracy.num_probes is None
            and self.probing.reorthogonalize
            and self.probing.storage is None
        )

    def results(self) -> list[Tridiagonal]:
        """The tridiagonal matrices in the order of the probes."""
        return [self.tridiagonals[probe] for probe in sorted(self.tridiagonals)]

    def job_bytes(self) -> int:
        """Memory that one more job takes at the end of its last sweep: its vector, the product, and what it keeps."""
        size = self.block.numel * self.dtype.itemsize
        if self.exact:
            return (2 + self.block.numel) * size
        if not self.probing.reorthogonalize:
            return 3 * size
        kept = (
            self.block.numel
            * (self.probing.storage[0] if self.probing.storage else self.dtype).itemsize
        )
        steps = self.accuracy.num_steps or TYPICAL_STEPS
        if (
            self.accuracy.num_steps is None
            and self._may_deflate
            and self._is_first
            and self.block.numel <= LARGEST
        ):
            steps = max(steps, longest_first_probe(self.block.numel, self.accuracy))
        return 2 * size + steps * kept // self.probing.ranks.rows

    @property
    def _is_first(self) -> bool:
        return not self.tridiagonals and self.deflation is None

    @property
    def held_bytes(self) -> int:
        """Memory that is held beside that of jobs."""
        return 0 if self.deflation is None else self.deflation.vectors.nbytes


@dataclass(eq=False)
class Schedule:
    """All tasks and the jobs under way. ``budget`` (bytes) bounds what jobs under way take; None: all at once."""

    tasks: Sequence[Task]
    budget: int | None = None
    active: list[Job] = field(default_factory=list)
    products: int = 0

    def __post_init__(self) -> None:
        self._task = {task.block.name: task for task in self.tasks}

    def run(self, operator: Operator, *, after_sweep: Callable[[Schedule], None]) -> None:
        """Drives every task to its end."""
        self._admit()
        while self.active:
            results = operator.sweep([(job.block, job.process.vector) for job in self.active])
            self.products += len(self.active)
            operator.ranks.together(
                [job.process.step(result) for job, result in zip(self.active, results, strict=True)]
            )
            del results
            self._retire()
            self._admit()
            after_sweep(self)

    def groups(self) -> Iterator[list[Task]]:
        """The tasks, as many at once as ``budget`` has room for one process of each, at least one."""
        group: list[Task] = []
        for task in self.tasks:
            if (
                group
                and self.budget is not None
                and sum(t.job_bytes() for t in (*group, task)) > self.budget
            ):
                yield group
                group = []
            group.append(task)
        yield group

    @property
    def remaining(self) -> int:
        """Products still to come, as far as is known: adaptive jobs are counted at their typical length."""
        return sum(self._left(job) for job in self.active) + sum(
            self.waiting(task) for task in self.tasks
        )

    def _left(self, job: Job) -> int:
        typical = (
            TYPICAL_STEPS
            if self._task[job.block.name].accuracy.num_steps is None
            else job.process.remaining
        )
        return min(job.process.remaining, max(typical, 1))

    def waiting(self, task: Task) -> int:
        """Products of jobs that have not been started."""
        if task.exact:
            return 0 if task.columns else task.block.numel
        return (task.wanted - task.started) * (task.accuracy.num_steps or TYPICAL_STEPS)

    def _retire(self) -> None:
        still = []
        for job in self.active:
            task = self._task[job.block.name]
            if task.is_done(job):
                task.collect(job)
            else:
                still.append(job)
        self.active = still

    def _admit(self) -> None:
        used = sum(self._task[job.block.name].job_bytes() for job in self.active) + sum(
            task.held_bytes for task in self.tasks
        )
        for task in self.tasks:
            jobs = task.pending()
            while self.budget is None or not self.active or used + task.job_bytes() <= self.budget:
                job = next(jobs, None)
                if job is None:
                    break
                used += task.job_bytes()
                self.active.append(job)


def deal(blocks: Sequence[Block], parameters: Sequence[str], columns: int) -> list[list[Block]]:
    """Blocks for each column, balanced by what a product costs: it runs through the network above the block's first
    parameter, and once more for each parameter that it ends at."""
    depth = {name: i / len(parameters) for i, name in enumerate(parameters)}

    def cost(block: Block) -> float:
        return (
            1.1
            - min(depth[name] for name in block.parameters)
            + len(block.parameters) / len(parameters)
        )

    hands: list[list[Block]] = [[] for _ in range(columns)]
    loads = [0.0] * columns
    for block in sorted(blocks, key=cost, reverse=True):
        lightest = loads.index(min(loads))
        hands[lightest].append(block)
        loads[lightest] += cost(block)
    return hands
