"""The data's part of an estimate: beside every sum of products, what single units of data have in
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from blockspec.engine.task import Job
from blockspec.numerics.ranks import Ranks
from blockspec.numerics.units import changes
from blockspec.products.shares import Groups
from blockspec.products.units import ByUnit


@dataclass(eq=False)
class Sampling:
    """Asks an operator for products, and keeps of every group of units its coefficients along the
    Krylov vectors.

    Args:
        operator: Tells units apart.
        ranks: Processes that split the units; each one keeps its own coefficients until a job ends.
    """

    operator: ByUnit
    ranks: Ranks
    groups: Groups = field(init=False)

    def __post_init__(self) -> None:
        self.groups = Groups(self.ranks)

    def sweep(self, jobs: Sequence[Job]) -> list[Tensor]:
        """The products of all jobs; those whose units are wanted get a row of projections."""
        requests = [(job.block, job.recurrence.request) for job in jobs]
        if self.groups.too_few:
            return self.operator.sweep(requests)

        def along(number: int, parts: list[Tensor]) -> Tensor | None:
            job = jobs[number]
            return None if job.projections is None else job.recurrence.along(parts[0])

        results, units = self.operator.sweep_by_unit(requests, along)
        own = self.groups.own(units, self.operator.micro_batch)
        for number, job in enumerate(jobs):
            if job.projections is not None:
                rows = [unit.values[number] for _, unit in units]
                job.projections.rows.append(self._grouped(own, rows, job))
        return results

    def changes(self, job: Job) -> np.ndarray | None:
        """(n, m, m) by which the job's small matrix changes without each group; None where its
        units are not wanted.
        """
        layout = self.groups.layout
        if job.projections is None or layout is None or self.groups.too_few:
            return None
        own = torch.from_numpy(job.projections.matrices())
        return changes(self.ranks.sums([own])[0].numpy(), layout.terms)

    def _grouped(self, own: np.ndarray, rows: list[Tensor], job: Job) -> Tensor:
        """(n, j) sums over each group's own units; zeros of groups that other processes have."""
        layout = self.groups.layout
        assert layout is not None
        length = len(rows[0]) if rows else job.length
        dtype = job.recurrence.vector.dtype
        sums = torch.zeros(len(layout.terms), length, dtype=dtype)
        if rows:
            sums.index_add_(0, torch.from_numpy(own), torch.stack(rows).cpu().to(dtype))
        return sums
