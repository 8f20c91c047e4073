"""What an estimate will cost, before it is made: a short calibration on one micro-batch, and
arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from blockspec.engine.schedule import Schedule
from blockspec.model.blocks import Block
from blockspec.numerics import memory
from blockspec.products.calibration import Calibrated
from blockspec.products.operators import Operator

# on measured growth: allocators round up, and between graphs that come and go memory is left over:
# sweeps over many blocks were seen to take 1.2 times what was measured
MARGIN = 1.25
RESERVE = 4 * 2**20  # bytes: what Python itself takes on the way


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
    """Calibrates on the first micro-batch and adds up.

    Raises:
        ValueError: The estimate would take more than ``limit`` bytes; the message says what would
            do.
    """
    operator = _calibrated(operator)
    blocks = [task.block for task in schedule.tasks]
    if limit is None:
        memory.trim()
        fitted = Fitted(
            None, memory.used(operator.device) + RESERVE, _growth(operator, blocks, None)
        )
    else:
        fitted = fitted_to(schedule, operator, limit)
        schedule.budget = fitted.budget
    count, costs = operator.num_batches(), operator.calibrate(blocks)
    table = _table(schedule, costs.blocks, costs.gradient, count)
    at_once = int(table["basis"].sum())
    passes = 1 if schedule.budget is None else -(-at_once // max(schedule.budget, 1))
    sweeps = passes * max(table["products"] / [max(task.to_start, 1) for task in schedule.tasks])
    vectors = at_once if schedule.budget is None else min(at_once, schedule.budget)
    kept = count <= operator.graphs  # one linearisation serves every sweep
    graphs = (count if kept else 1) * int(MARGIN * fitted.growth)
    peak = fitted.used + graphs + vectors
    _check_peak(peak, limit)
    total = float(table["seconds"].sum() + (1 if kept else sweeps) * count * costs.shared)
    gradient = costs.gradient * count
    return Plan(
        table, gradient, total, operator.micro_batch, peak, limit, int(passes), operator.told
    )


def _check_peak(peak: int, limit: int | None) -> None:
    if limit is not None and peak > limit:
        raise ValueError(
            f"the estimate would take {memory.readable(peak)}, and memory= allows "
            f"{memory.readable(limit)}: allow as much as it takes, or pass smaller batches, fewer "
            "probes or fewer steps"
        )


def check_possible(schedule: Schedule, device: torch.device, *, bounded: bool) -> None:
    """Refuses, before anything is measured, what no machine of this size can do.

    Args:
        schedule: Of this process.
        device: Where vectors live.
        bounded: Whether a bound of memory is kept, so that not all recurrences are under way at
            once.

    Raises:
        ValueError: The results alone, or the vectors of all recurrences at once, are more than the
            machine's memory.
    """
    host = torch.device("cpu")
    results = sum(task.result_bytes for task in schedule.tasks)
    probes = max(task.to_start for task in schedule.tasks)
    asked = f"{len(schedule.tasks):,} block(s) with up to {probes:,} probes"
    if results > (there := memory.total(host)):
        raise ValueError(
            f"the spectra of {asked} would take {memory.readable(results)}, and this machine has "
            f"{memory.readable(there)}: ask for fewer probes, steps or blocks"
        )
    at_once = sum(task.waiting_bytes for task in schedule.tasks)
    if not bounded and at_once > (there := max(memory.total(host), memory.total(device))):
        raise ValueError(
            f"{asked} would take {memory.readable(at_once)} of vectors at once, and this machine "
            f"has {memory.readable(there)}: give memory='80%', so that they take turns, or ask for "
            "fewer probes, steps or blocks"
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


@dataclass(frozen=True)
class Fitted:
    """What was found to keep within a bound.

    Args:
        budget: Bytes for the recurrences under way; None: no bound.
        used: Bytes in use before, with a reserve.
        growth: Bytes that a shared pass and a product on one micro-batch add, as measured.
    """

    budget: int | None
    used: int
    growth: int


def fit(schedule: Schedule, operator: Operator, limit: int) -> int:
    """Chooses the operator's micro-batch so that the estimate stays within ``limit`` bytes, and how
    many graphs are kept.

    Returns:
        What is left for the recurrences under way: all of them at once if that leaves room for one
        example at a time, else as many as fit.

    Raises:
        ValueError: Not even one recurrence fits beside one example; the message says what would.
    """
    budget = fitted_to(schedule, operator, limit).budget
    assert budget is not None
    return budget


def fitted_to(schedule: Schedule, operator: Operator, limit: int) -> Fitted:
    """:func:`fit`, with what was measured."""
    operator = _calibrated(operator)
    blocks = [task.block for task in schedule.tasks]
    _choose_way(operator, blocks, limit)
    _growth(operator, blocks, 1)  # what is allocated once and kept, is in use from here on
    memory.trim()
    used = _agreed(operator, memory.used(operator.device) + RESERVE)
    limit = -_agreed(operator, -limit)
    one = _growth(operator, blocks, 1)
    at_once = sum(task.waiting_bytes for task in schedule.tasks)
    single = max(task.job_bytes() for task in schedule.tasks)
    room = limit - used - int(MARGIN * one)
    if room < single:
        needed = memory.readable(used + MARGIN * one + single)
        if operator.save_memory(
            f"the whole graph of one example takes {needed}, of {memory.readable(limit)}"
        ):
            return fitted_to(schedule, operator, limit)
        raise ValueError(
            f"memory of {memory.readable(limit)} is too little: {memory.readable(used)} are in "
            "use, one example takes "
            f"{memory.readable(one)} and one recurrence on the largest block "
            f"{memory.readable(single)}; "
            f"{memory.readable(used + MARGIN * one + single)} would fit, or fewer steps, "
            "basis_dtype='bfloat16', "
            "basis_device='cpu', or reorthogonalize=False"
        )
    allowed = one + max(room - at_once, 0) / MARGIN
    micro_batch, growth = _largest_that_fits(operator, blocks, one, allowed)
    operator.micro_batch = None if micro_batch >= operator.largest_batch() else micro_batch
    graph = MARGIN * growth
    operator.graphs = 1 + int(max(room + MARGIN * one - at_once - graph, 0) / max(graph, 1))
    memory.trim()  # what the measurements left must not lie beside the first sweep
    return Fitted(min(room, at_once), used, growth)


def _choose_way(operator: Calibrated, blocks: Sequence[Block], limit: int) -> None:
    """Goes a layer at a time where a whole graph cannot fit, before one is made to measure it: on a
    CPU the system ends a process that takes more than there is.
    """
    needed = memory.used(operator.device) + operator.least_memory(blocks)
    if needed > limit:
        operator.save_memory(
            f"the whole graph of one example takes {memory.readable(needed)} at least, of "
            f"{memory.readable(limit)}"
        )


def _largest_that_fits(
    operator: Calibrated, blocks: Sequence[Block], one: int, allowed: float
) -> tuple[int, int]:
    """The most examples whose pass takes at most ``allowed`` bytes, and what it takes.

    What is chosen was measured: memory doesn't grow evenly with examples. From one size to the next
    there are at most twice as many, and no more than the growth so far has room for, so that the
    measurement itself keeps within the bound.
    """
    largest = operator.largest_batch()
    size, taken = 1, one
    slope = one / 2  # as if half of it were shared by all examples
    while size < largest:
        more = min(largest, 2 * size, size + int((allowed - taken) / max(slope, 1.0)))
        if more == size:
            break
        found = _growth(operator, blocks, more)
        if found > allowed:
            break
        slope = max((found - taken) / (more - size), (found - one) / (more - 1))
        size, taken = more, max(found, taken)
    return size, taken


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
    return _agreed(operator, peak.growth)


def _agreed(operator: Operator, number: int) -> int:
    """The largest number of all processes that a model is spread over: they make the same passes,
    so that all of them have to decide alike.
    """
    objective = operator.objective
    return number if objective is None else objective.weights.largest([number])[0]
