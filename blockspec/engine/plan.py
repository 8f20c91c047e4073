"""What an estimate will cost, before it is made: a short calibration on one micro-batch, and arithmetic."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from blockspec.engine.schedule import Schedule
from blockspec.model.blocks import Block, scatter
from blockspec.model.objective import Objective, examples
from blockspec.numerics import memory
from blockspec.products.curvature import Products
from blockspec.products.precision import reduced_multiplication

MEASURED = 60  # products that are timed; the others take the time of the nearest one
MARGIN = 1.05  # on measured growth: allocators round up


@dataclass(frozen=True)
class Plan:
    """The cost of an estimate.

    table: a row a block: products (one vector through all batches), gradients (the same in units of one gradient of the whole
        objective), flops, seconds, basis (bytes of Krylov vectors).
    gradient_seconds: one gradient of the whole objective.
    seconds: in total, the shared passes included; adaptive numbers of steps and probes are counted at their typical values.
    micro_batch: examples at once; None: batches as they come.
    peak: bytes at most, what is in use already included; limit: what it may be, or None.
    passes: sweeps over the data, where the processes do not all fit at once.
    """

    table: pd.DataFrame
    gradient_seconds: float
    seconds: float
    micro_batch: int | None
    peak: int
    limit: int | None
    passes: int

    @property
    def products(self) -> int:
        """Of one vector with all batches, over all blocks."""
        return int(self.table["products"].sum())


def plan(schedule: Schedule, products: Products, *, limit: int | None = None) -> Plan:
    """Calibrates on the first micro-batch and adds up; leaves the objective's micro-batch as :func:`fit` chose it."""
    objective = products.objective
    if limit is not None:
        schedule.budget = fit(objective, schedule, products, limit)
    count = sum(1 for _ in objective.batches())
    blocks = [task.block for task in schedule.tasks]
    gradient, shared, costs = _calibrate(products, blocks)
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
                "basis": task.job_bytes() * (1 if task.exact else task.wanted),
            }
        )
    table = pd.DataFrame(rows).set_index("block")
    at_once = int(table["basis"].sum())
    passes = 1 if schedule.budget is None else -(-at_once // max(schedule.budget, 1))
    sweeps = passes * max(table["products"] / [max(task.wanted, 1) for task in schedule.tasks])
    vectors = at_once if schedule.budget is None else min(at_once, schedule.budget)
    kept = count <= products.graphs  # one linearisation serves every sweep
    graphs = count if kept else 1
    peak = (
        memory.used(objective.device)
        + graphs * int(MARGIN * _growth(products, blocks, None))
        + vectors
    )
    total = float(table["seconds"].sum() + (1 if kept else sweeps) * count * shared)
    return Plan(table, gradient * count, total, objective.micro_batch, peak, limit, int(passes))


def fit(objective: Objective, schedule: Schedule, products: Products, limit: int) -> int:
    """Chooses the objective's micro-batch so that the estimate stays within ``limit`` bytes, and how many graphs are kept;
    returns what is left for the processes under way: all of them at once if that leaves room for one example at a time, else as
    many as fit.

    Raises ValueError where not even one process fits beside one example, with what would.
    """
    blocks = [task.block for task in schedule.tasks]
    _growth(products, blocks, 1)  # what is allocated once and kept, is in use from here on
    used = memory.used(objective.device)
    largest = max((examples(batch) or 1 for batch in objective.whole_batches()), default=1)
    one = _growth(products, blocks, 1)
    slope = _growth(products, blocks, 2) - one if largest > 1 else 0
    at_once = sum(task.job_bytes() * (1 if task.exact else task.wanted) for task in schedule.tasks)
    single = max(task.job_bytes() for task in schedule.tasks)
    room = limit - used - int(MARGIN * one)
    if room < single:
        raise ValueError(
            f"memory of {memory.readable(limit)} is too little: {memory.readable(used)} are in use, one example takes "
            f"{memory.readable(one)} and one process on the largest block {memory.readable(single)}; "
            f"{memory.readable(used + MARGIN * one + single)} would fit, or fewer steps, basis_dtype='bfloat16', "
            "basis_device='cpu', or reorthogonalize=False"
        )
    spare = max(room - at_once, 0)
    micro_batch = min(largest, 1 + int(spare / (MARGIN * slope)) if slope > 0 else largest)
    objective.micro_batch = None if micro_batch >= largest else micro_batch
    graph = MARGIN * (one + slope * (micro_batch - 1))
    products.graphs = 1 + int(max(room + MARGIN * one - at_once - graph, 0) / max(graph, 1))
    return min(room, at_once)


def _growth(products: Products, blocks: Sequence[Block], size: int | None) -> int:
    """Peak memory of one shared pass and one product of the deepest block, on ``size`` examples."""
    objective = products.objective
    before, objective.micro_batch = objective.micro_batch, size or objective.micro_batch
    try:
        with memory.watched(objective.device) as peak:
            _one_product(products, blocks)
    finally:
        objective.micro_batch = before
    return peak.growth


def _one_product(products: Products, blocks: Sequence[Block]) -> None:
    objective = products.objective
    parameters = objective.parameters()
    deepest = max(blocks, key=lambda block: len(block.parameters))
    vector = torch.zeros(deepest.numel, device=objective.device)
    names = dict.fromkeys(name for block in blocks for name in block.parameters)
    with objective.prepared():
        for batch in islice(objective.batches(), 1):
            apply, _ = products.linearise(batch, {name: parameters[name] for name in names})
            apply(scatter(deepest, vector, parameters), deepest.parameters)


def _calibrate(
    products: Products, blocks: Sequence[Block]
) -> tuple[float, float, dict[str, tuple[float, float]]]:
    """Seconds of a gradient and of a shared pass, and of each block's product its seconds and floating-point operations; all of
    one micro-batch."""
    objective = products.objective
    parameters = objective.parameters()
    by_parameters = {block.parameters: block for block in blocks}
    stride = -(-len(by_parameters) // MEASURED)
    with objective.prepared(), reduced_multiplication(products.precision):
        batch = next(iter(objective.batches()))

        def gradient() -> None:
            torch.autograd.grad(
                objective.loss_sum(batch)[0], list(parameters.values()), allow_unused=True
            )

        gradient()
        gradient_seconds = min(_seconds(gradient, objective) for _ in range(3))
        names = dict.fromkeys(name for block in blocks for name in block.parameters)
        wanted = {name: parameters[name] for name in names}
        start = time.perf_counter()
        apply, _ = products.linearise(batch, wanted)
        shared_seconds = time.perf_counter() - start
        measured: dict[tuple[str, ...], tuple[float, float]] = {}
        nearest = (0.0, 0.0)
        for index, (key, block) in enumerate(by_parameters.items()):
            if index % stride == 0:
                direction = scatter(
                    block, torch.zeros(block.numel, device=objective.device), parameters
                )
                seconds = _seconds(
                    lambda direction=direction, key=key: apply(direction, key), objective
                )  # type: ignore[misc]
                with FlopCounterMode(display=False) as counter:
                    apply(direction, key)
                nearest = (seconds, float(counter.get_total_flops()))
            measured[key] = nearest
    return (
        gradient_seconds,
        shared_seconds,
        {block.name: measured[block.parameters] for block in blocks},
    )


def _seconds(function, objective: Objective) -> float:  # type: ignore[no-untyped-def]
    start = time.perf_counter()
    function()
    if objective.device.type == "cuda":
        torch.cuda.synchronize(objective.device)
    return time.perf_counter() - start
