"""What an estimate will cost, before it is made: a short calibration on one micro-batch, and
arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from blockspec.engine.schedule import Schedule
from blockspec.model.blocks import Block
from blockspec.numerics import memory
from blockspec.products.calibration import Calibrated
from blockspec.products.operators import Operator

MARGIN = 1.05  # on measured growth: allocators round up


@dataclass(frozen=True)
class Plan:
    """The cost of an estimate.

    Args:
        table: A row a block: products (one vector through all batches), gradients (the same in
            units of one gradient of the whole objective), flops, seconds, basis (bytes of Krylov
            vectors).
        gradient_seconds: One gradient of the whole objective.
        seconds: In total, the shared passes included; adaptive numbers of steps and probes are
            counted at their typical values.
        micro_batch: Examples at once; None: batches as they come.
        peak: Bytes at most, what is in use already included; limit: what it may be, or None.
        passes: Sweeps over the data, where the processes do not all fit at once.
        told: How products are made, and why, in words.
    """

    table: pd.DataFrame
    gradient_seconds: float
    seconds: float
    micro_batch: int | None
    peak: int
    limit: int | None
    passes: int
    told: str = "from the whole graph"

    @property
    def products(self) -> int:
        """Of one vector with all batches, over all blocks."""
        return int(self.table["products"].sum())


def plan(schedule: Schedule, operator: Operator, *, limit: int | None = None) -> Plan:
    """Calibrates on the first micro-batch and adds up."""
    operator = _calibrated(operator)
    if limit is not None:
        schedule.budget = fit(schedule, operator, limit)
    blocks = [task.block for task in schedule.tasks]
    count, costs = operator.num_batches(), operator.calibrate(blocks)
    table = _table(schedule, costs.blocks, costs.gradient, count)
    at_once = int(table["basis"].sum())
    passes = 1 if schedule.budget is None else -(-at_once // max(schedule.budget, 1))
    sweeps = passes * max(table["products"] / [max(task.to_start, 1) for task in schedule.tasks])
    vectors = at_once if schedule.budget is None else min(at_once, schedule.budget)
    kept = count <= operator.graphs  # one linearisation serves every sweep
    graphs = (count if kept else 1) * int(MARGIN * _growth(operator, blocks, None))
    peak = memory.used(operator.device) + graphs + vectors
    total = float(table["seconds"].sum() + (1 if kept else sweeps) * count * costs.shared)
    gradient = costs.gradient * count
    return Plan(
        table, gradient, total, operator.micro_batch, peak, limit, int(passes), operator.told
    )


def _table(
    schedule: Schedule, costs: Mapping[str, tuple[float, float]], gradient: float, count: int
) -> pd.DataFrame:
    rows = []
    for task in schedule.tasks:
        number = schedule.waiting(task)
        seconds, flops = costs[task.block.name]
        rows.append(
            {
                "block": task.block.name,
                "kind": task.block.kind,
                "parameters": task.block.numel,
                "products": number,
                "gradients": number * seconds / gradient,
                "flops": number * count * flops,
                "seconds": number * count * seconds,
                "basis": task.waiting_bytes,
            }
        )
    return pd.DataFrame(rows).set_index("block")


def fit(schedule: Schedule, operator: Operator, limit: int) -> int:
    """Chooses the operator's micro-batch so that the estimate stays within ``limit`` bytes, and how
    many graphs are kept.

    Returns:
        What is left for the recurrences under way: all of them at once if that leaves room for one
        example at a time, else as many as fit.

    Raises:
        ValueError: Not even one recurrence fits beside one example; the message says what would.
    """
    operator = _calibrated(operator)
    blocks = [task.block for task in schedule.tasks]
    _growth(operator, blocks, 1)  # what is allocated once and kept, is in use from here on
    used = memory.used(operator.device)
    largest = operator.largest_batch()
    one = _growth(operator, blocks, 1)
    slope = _growth(operator, blocks, 2) - one if largest > 1 else 0
    at_once = sum(task.waiting_bytes for task in schedule.tasks)
    single = max(task.job_bytes() for task in schedule.tasks)
    room = limit - used - int(MARGIN * one)
    if room < single:
        needed = memory.readable(used + MARGIN * one + single)
        if operator.save_memory(
            f"the whole graph of one example takes {needed}, of {memory.readable(limit)}"
        ):
            return fit(schedule, operator, limit)
        raise ValueError(
            f"memory of {memory.readable(limit)} is too little: {memory.readable(used)} are in "
            "use, one example takes "
            f"{memory.readable(one)} and one recurrence on the largest block "
            f"{memory.readable(single)}; "
            f"{memory.readable(used + MARGIN * one + single)} would fit, or fewer steps, "
            "basis_dtype='bfloat16', "
            "basis_device='cpu', or reorthogonalize=False"
        )
    spare = max(room - at_once, 0)
    micro_batch = min(largest, 1 + int(spare / (MARGIN * slope)) if slope > 0 else largest)
    operator.micro_batch = None if micro_batch >= largest else micro_batch
    graph = MARGIN * (one + slope * (micro_batch - 1))
    operator.graphs = 1 + int(max(room + MARGIN * one - at_once - graph, 0) / max(graph, 1))
    return min(room, at_once)


def agree(schedule: Schedule, operator: Operator) -> None:
    """Every process has fitted its own memory; from here on all of them go by the narrowest."""
    operator, ranks = _calibrated(operator), operator.ranks
    whole = operator.largest_batch()
    found = ranks.all_of((schedule.budget, operator.graphs, operator.micro_batch or whole))
    schedule.budget, operator.graphs, micro = (min(v) for v in zip(*found, strict=True))
    operator.micro_batch = None if micro >= whole else micro


def _calibrated(operator: Operator) -> Calibrated:
    if not isinstance(operator, Calibrated):
        raise ValueError(
            f"the operator {operator.curvature!r} cannot be planned: what its products cost is not "
            "known; leave out memory="
        )
    return operator


def _growth(operator: Calibrated, blocks: Sequence[Block], size: int | None) -> int:
    """Peak memory of one shared pass and one product of the deepest block, on ``size`` examples."""
    with memory.watched(operator.device) as peak:
        operator.rehearse(blocks, size)
    return peak.growth
