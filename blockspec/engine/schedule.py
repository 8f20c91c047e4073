"""Which products are asked for next: the jobs of all blocks, all of them through the same
sweeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from blockspec.engine.sampling import Sampling
from blockspec.engine.task import TYPICAL_STEPS, Job, Task
from blockspec.model.blocks import Block
from blockspec.products.operators import Operator


@dataclass(eq=False)
class Schedule:
    """All tasks and the jobs under way.

    ``budget`` (bytes) bounds what jobs under way take; None: all at once. ``sampling`` keeps what
    units of data have in the products; None: it is not asked for.
    """

    tasks: Sequence[Task]
    budget: int | None = None
    active: list[Job] = field(default_factory=list)
    products: int = 0
    sampling: Sampling | None = None

    def __post_init__(self) -> None:
        self._task = {task.block.name: task for task in self.tasks}

    def run(self, operator: Operator, *, after_sweep: Callable[[Schedule], None]) -> None:
        """Drives every task to its end."""
        self._admit()
        while self.active:
            if self.sampling is not None:
                results = self.sampling.sweep(self.active)
            else:
                results = operator.sweep(
                    [(job.block, job.recurrence.request) for job in self.active]
                )
            self.products += len(self.active)
            operator.ranks.together(
                [
                    job.recurrence.step(result)
                    for job, result in zip(self.active, results, strict=True)
                ]
            )
            del results
            self._retire()
            self._admit()
            after_sweep(self)

    def groups(self) -> Iterator[list[Task]]:
        """The tasks, as many at once as ``budget`` has room for one run of each, at least one."""
        group: list[Task] = []
        used = 0
        for task in self.tasks:
            size = task.job_bytes()
            if group and self.budget is not None and used + size > self.budget:
                yield group
                group, used = [], 0
            group.append(task)
            used += size
        yield group

    @property
    def remaining(self) -> int:
        """Products still to come, as far as is known: adaptive jobs are counted at their typical
        length.
        """
        return sum(self._left(job) for job in self.active) + sum(
            self.waiting(task) for task in self.tasks
        )

    def _left(self, job: Job) -> int:
        typical = (
            TYPICAL_STEPS
            if self._task[job.block.name].accuracy.num_steps is None
            else job.recurrence.remaining
        )
        return min(job.recurrence.remaining, max(typical, 1))

    def waiting(self, task: Task) -> int:
        """Products of jobs that have not been started."""
        if task.exact:
            return 0 if task.columns is not None else task.block.numel
        return task.to_start * (task.accuracy.num_steps or TYPICAL_STEPS)

    def _retire(self) -> None:
        still = []
        for job in self.active:
            task = self._task[job.block.name]
            if task.is_done(job):
                task.collect(job, None if self.sampling is None else self.sampling.changes(job))
            else:
                still.append(job)
        self.active = still

    def _admit(self) -> None:
        used = sum(self._task[job.block.name].job_bytes() for job in self.active) + sum(
            task.held_bytes for task in self.tasks
        )
        for task in self.tasks:
            if not task.waits:  # nearly all of very many, in nearly every sweep
                continue
            jobs = task.pending()
            while self.budget is None or not self.active or used + task.job_bytes() <= self.budget:
                job = next(jobs, None)
                if job is None:
                    break
                used += task.job_bytes()
                self.active.append(job)


def deal(blocks: Sequence[Block], parameters: Sequence[str], columns: int) -> list[list[Block]]:
    """Blocks for each group, balanced by what a product costs: it runs through the network above
    the block's first parameter, and once more for each parameter that it ends at.
    """
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
