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
from blockspec.numerics.jackknife import FEWEST_UNITS
from blockspec.numerics.ranks import Ranks
from blockspec.numerics.units import Layout, changes
from blockspec.products.units import ByUnit, Unit


@dataclass(eq=False)
class Sampling:
    """Asks an operator for products, and keeps of every group of units its coefficients along the
    Krylov vectors.

    Args:
        operator: Tells units apart.
        ranks: Processes that split the units; each one keeps its own coefficients until a job ends.
        layout: Of the groups; None before the first sweep.
    """

    operator: ByUnit
    ranks: Ranks
    layout: Layout | None = None
    _own: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=int))
    _cut: tuple[int | None] | None = None

    def sweep(self, jobs: Sequence[Job]) -> list[Tensor]:
        """The products of all jobs; those whose units are wanted get a row of projections."""
        requests = [(job.block, job.recurrence.vector) for job in jobs]
        if self.too_few:
            return self.operator.sweep(requests)

        def along(number: int, parts: list[Tensor]) -> Tensor | None:
            job = jobs[number]
            return None if job.projections is None else job.recurrence.along(parts[0])

        results, units = self.operator.sweep_by_unit(requests, along)
        self._arrange(units)
        for number, job in enumerate(jobs):
            if job.projections is not None:
                rows = [unit.values[number] for _, unit in units]
                job.projections.rows.append(self._grouped(rows, job))
        return results

    @property
    def too_few(self) -> bool:
        """The units are known, and they are too few for an error."""
        return self.layout is not None and self.layout.units < FEWEST_UNITS

    def changes(self, job: Job) -> np.ndarray | None:
        """(n, m, m) by which the job's small matrix changes without each group; None where its
        units are not wanted.
        """
        if job.projections is None or self.layout is None or self.too_few:
            return None
        own = torch.from_numpy(job.projections.matrices())
        return changes(self.ranks.sums([own])[0].numpy(), self.layout.terms)

    @property
    def units(self) -> int:
        """How many units there are; 0 where that is not known yet."""
        return 0 if self.layout is None else self.layout.units

    def _grouped(self, rows: list[Tensor], job: Job) -> Tensor:
        """(n, j) sums over each group's own units; zeros of groups that other processes have."""
        assert self.layout is not None
        length = len(rows[0]) if rows else job.length
        dtype = job.recurrence.vector.dtype
        sums = torch.zeros(len(self.layout.terms), length, dtype=dtype)
        if rows:
            sums.index_add_(0, torch.from_numpy(self._own), torch.stack(rows).cpu().to(dtype))
        return sums

    def _arrange(self, units: Sequence[tuple[int, Unit]]) -> None:
        """Puts units into groups: once, and again where the micro-batch was halved on the way,
        which all processes do together.
        """
        if self._cut == (self.operator.micro_batch,):
            return
        own = [
            (number, self.ranks.row, place, unit.terms)
            for place, (number, unit) in enumerate(units)
        ]
        told = sorted(unit for part in self.ranks.of_column(own) for unit in part)
        terms = [unit[-1] for unit in told]
        if self.layout is None:
            self.layout = Layout.of(terms)
        groups = self.layout.groups(terms)
        self._own = groups[[unit[1] == self.ranks.row for unit in told]]
        self._cut = (self.operator.micro_batch,)
