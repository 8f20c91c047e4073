"""Processes that differ say so before the work; those that hold parts of the data, or less memory,
give one process's numbers.
"""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from factories_for_runs import tiny
from models import tiny_gpt2

import blockspec
from blockspec.engine import estimate, plan
from blockspec.engine.settings import EstimateSettings
from blockspec.numerics import ranks
from blockspec.products.curvature import Products
from blockspec.runs.run import BlockSettings, RunSettings, measure

pytestmark = pytest.mark.slow  # most of them launch processes

DIMS = {"layers": 1, "n_embd": 8, "n_head": 2, "vocab_size": 13}
QUICK = {"num_probes": 1, "num_steps": 3}
SIZES = (2, 3, 1, 4, 2)  # examples of the batches


def problem(*, seed=0, tokens_seed=1, batches=5, wrong_loss=False, sharded=False, rank=0, world=1):
    model = tiny_gpt2(**DIMS, seed=seed)
    generator = torch.Generator().manual_seed(tokens_seed)
    data = [
        {"input_ids": torch.randint(13, (size, 5), generator=generator)} for size in SIZES[:batches]
    ]
    loss = right = blockspec.losses.next_token
    if wrong_loss:
        loss = blockspec.losses.Loss(right.outputs, lambda o, b: 1.1 * right.terms(o, b))
    own = data[rank::world] if sharded else data
    blocks = blockspec.partition(model, include=["*c_fc.weight", "*ln_1.weight", "*wte*"])
    return blockspec.Objective(model, own, loss, sharded=sharded), blocks


def nodes(objective, blocks, **settings):
    found = blockspec.estimate_spectra(objective, blocks, **(QUICK | settings))
    return np.concatenate([s.nodes.ravel() for s in found.values()])


def said(function, *arguments, **named):
    """The error, in words; empty where there is none."""
    try:
        function(*arguments, **named)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def differing(rank):
    """What is said where one process differs, case by case."""
    first = rank == 0
    one = problem()
    reversed_blocks = one[1] if first else tuple(reversed(one[1]))
    cases = {
        "weights": lambda: nodes(*problem(seed=rank)),
        "data": lambda: nodes(*problem(tokens_seed=1 + rank)),
        "number of batches": lambda: nodes(*problem(batches=5 - rank)),
        "loss": lambda: nodes(*problem(wrong_loss=not first)),
        "seed": lambda: nodes(*one, seed=rank),
        "probes": lambda: nodes(*one, num_probes=1 + rank),
        "curvature": lambda: nodes(*one, curvature="hessian" if first else "ggn"),
        "order of blocks": lambda: nodes(one[0], reversed_blocks),
        "number of blocks": lambda: nodes(one[0], one[1][: 3 - rank]),
        "memory": lambda: nodes(*one, memory=None if first else "8GiB"),
        "toolbox": lambda: blockspec.trace(one[0], one[1], num_probes=2, seed=rank),
        "toolbox probes": lambda: blockspec.trace(one[0], one[1], num_probes=2 + rank),
        "wrong block on one": lambda: nodes(one[0], one[1] if first else one[1][:2] + one[1][:1]),
    }
    return {name: said(case) for name, case in cases.items()}


def out_of_memory_once(rank):
    """Numbers where one process alone runs out of memory in its second batch."""
    original, left = Products.linearise, [2 if rank == 1 else -1]

    def linearise(self, batch, parameters):
        left[0] -= 1
        if left[0] == 0:
            raise torch.OutOfMemoryError("out of memory")
        return original(self, batch, parameters)

    Products.linearise = linearise
    try:
        with pytest.warns(UserWarning, match="out of memory: going on with a micro-batch of 2"):
            return nodes(*problem())
    finally:
        Products.linearise = original


def of_unequal_memory(rank):
    """Numbers, and what was agreed on, where the processes have unequal room."""
    original = estimate.fit

    def fit(schedule, operator, limit):
        budget = original(schedule, operator, limit)
        operator.micro_batch, operator.graphs = 1 + rank, 3 - rank
        return budget // (1 + rank)

    estimate.fit = fit
    seen = []
    agree = plan.agree

    def noted(schedule, operator):
        agree(schedule, operator)
        seen.extend([schedule.budget, operator.graphs, operator.micro_batch])

    estimate.agree = noted
    try:
        found = nodes(*problem(), memory="8GiB", num_steps=4, columns=1)
    finally:
        estimate.fit, estimate.agree = original, agree
    return found, seen


def groups_made(count):
    """Process groups made by that many estimates that split their blocks."""
    made, original = [], dist.new_group
    dist.new_group = lambda *a, **k: made.append(a) or original(*a, **k)
    try:
        for _ in range(count):
            nodes(*problem(batches=1), columns=dist.get_world_size())
    finally:
        dist.new_group = original
    return len(made)


def left_open(count):
    """Files and threads that so many further estimates leave behind, after those of the first."""
    held = []
    for _ in range(2):
        for _ in range(count // 2):
            nodes(*problem(batches=2), columns=dist.get_world_size(), num_steps=1, check=False)
        held.append([len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task")])
    return [after - before for before, after in zip(*held, strict=True)]


def threads_of_groups():
    """Names of the threads that process groups have left behind."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def stopped(folder):
    """An estimate on both processes that ends after its third sweep, and leaves its state."""

    def progress(done, total):
        left.pop()

    left = [0, 0]
    with pytest.raises(IndexError):
        nodes(*problem(), state=folder, state_every=0, progress=progress)


def told_to_stop(rank, folder, columns):
    """One process alone hears Ctrl-C after its second sweep, by SIGTERM and its echo; then the same
    call again. Sweeps before and after, what was raised, and the numbers.
    """
    sweeps, told = [], ""

    def progress(done, total):
        sweeps.append(done)
        if len(sweeps) == 2 and (rank == 1 or columns == 2):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)

    settings = {"state": folder, "columns": columns, "num_steps": 4}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as the command line does
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        nodes(*problem(), progress=progress, **settings)
    except KeyboardInterrupt as error:
        told = str(error)
    before = len(sweeps)
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    dist.barrier()
    found = nodes(*problem(), progress=lambda done, total: sweeps.append(done), **settings)
    return {"before": before, "after": len(sweeps) - before, "told": told, "nodes": found.tolist()}


def stages_of_first(rank, folder):
    """Two nodes without a common disk: the second one's folder is empty, or holds another run's
    record.
    """
    settings = RunSettings(
        "factories_for_runs:tiny",
        blocks=BlockSettings(include="*ln_f*", full=False),
        estimate=EstimateSettings(num_probes=1, num_steps=2),
    )
    out = Path(folder) / f"node{rank}"
    measure(settings, tiny, out)
    measure(settings, tiny, out)
    return sorted(path.name for path in out.iterdir()) if out.exists() else []


def process(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    found = {}
    if world == 2:
        found = {"differing": differing(rank), "files": stages_of_first(rank, folder)}
        found["groups"] = groups_made(3)
        found["left open"] = left_open(int(os.environ.get("ESTIMATES", "10")))
        stopped(f"{folder}/state")
        found["told to stop"] = [told_to_stop(rank, f"{folder}/{c}", c) for c in (1, 2)]
        np.save(f"{folder}/memory{rank}.npy", out_of_memory_once(rank))
        unequal, seen = of_unequal_memory(rank)
        np.save(f"{folder}/unequal{rank}.npy", unequal)
        found["agreed"] = seen
    sharded = problem(sharded=True, rank=rank, world=world)
    np.save(f"{folder}/sharded{rank}.npy", nodes(*sharded))
    found["value"] = sharded[0].value()
    found["gradient"] = {n: float(g.norm()) for n, g in sharded[0].gradient().items()}
    found["columns"] = said(nodes, *sharded, columns=world)
    dist.destroy_process_group()
    found["threads"] = threads_of_groups()
    Path(f"{folder}/{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def found(request, tmp_path_factory):
    folder, world = tmp_path_factory.mktemp("processes"), request.param
    torch.multiprocessing.spawn(process, (world, str(folder)), nprocs=world)
    told = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
    arrays = {path.stem: np.load(path) for path in folder.glob("*.npy")}
    return world, told, arrays, folder


def test_processes_that_hold_their_own_batches_give_the_numbers_of_all(found):
    world, told, arrays, _ = found
    objective, blocks = problem()
    expected = nodes(objective, blocks)
    norms = {name: float(g.norm()) for name, g in objective.gradient().items()}
    for rank in range(world):
        np.testing.assert_allclose(arrays[f"sharded{rank}"], expected, rtol=1e-8, atol=1e-10)
        assert told[rank]["value"] == pytest.approx(objective.value(), rel=1e-12)
        assert told[rank]["gradient"] == pytest.approx(norms, rel=1e-9)
        assert "leave out columns" in told[rank]["columns"]


def test_processes_that_differ_say_so_on_every_one(found):
    world, told, *_ = found
    if world == 3:
        return
    naming = {
        "weights": "weights is",
        "data": "sharded=True",
        "number of batches": "data is",
        "loss": "objective.loss is",
        "seed": "seed is '0' on process 0, '1' on process 1",
        "probes": "num_probes is",
        "curvature": "curvature is",
        "order of blocks": "blocks is",
        "number of blocks": "different numbers of (blocks, columns)",
        "memory": "memory is",
        "toolbox": "with the same seed",
        "toolbox probes": "same numbers of probes",
        "wrong block on one": "same name",
    }
    for process in told:
        assert set(process["differing"]) == set(naming)
        for case, word in naming.items():
            assert word in process["differing"][case], (case, process["differing"][case])


def test_a_process_that_is_short_of_memory_changes_nothing(found):
    world, told, arrays, _ = found
    if world == 3:
        return
    for rank in range(2):
        np.testing.assert_allclose(
            arrays[f"memory{rank}"], nodes(*problem()), rtol=1e-8, atol=1e-10
        )
        expected = nodes(*problem(), num_steps=4)
        np.testing.assert_allclose(arrays[f"unequal{rank}"], expected, rtol=1e-8, atol=1e-10)
    assert told[0]["agreed"] == told[1]["agreed"]
    assert told[0]["agreed"][1:] == [2, 1]


def test_the_first_process_decides_and_writes(found):
    world, told, *_ = found
    if world == 2:
        assert "spectra.parquet" in told[0]["files"]
        assert told[1]["files"] == []


def test_groups_are_made_once(found):
    world, told, *_ = found
    if world == 2:
        assert [process["groups"] for process in told] == [2, 2]


def test_estimates_leave_no_files_and_threads_open(found):
    """ESTIMATES=202 is the long version: a group for each would end at the 202nd."""
    world, told, *_ = found
    if world == 2:
        assert [process["left open"] for process in told] == [[0, 0], [0, 0]]


def test_no_thread_outlives_the_world_of_processes(found):
    """One that did could meet an interpreter that ends, and abort the program."""
    assert [process["threads"] for process in found[1]] == [[]] * found[0]


def test_all_processes_stop_after_the_sweep_in_which_one_was_told_to(found):
    """Split by batches only one hears it, and all agree; split by blocks each hears it."""
    world, told, *_ = found
    if world == 3:
        return
    expected = nodes(*problem(), num_steps=4)
    for process in told:
        for stop in process["told to stop"]:
            assert stop["told"] == "its sweeps are saved"
            assert (stop["before"], stop["after"]) == (3, 1)
            np.testing.assert_allclose(stop["nodes"], expected, rtol=1e-8, atol=1e-10)


def test_one_process_begins_anew_beside_the_state_of_two_and_says_so(found, caplog):
    """A state is of a number of processes: the numbers are the same, and the two can still go
    on.
    """
    world, _, _, folder = found
    if world == 3:
        return
    left = {path.name: path.read_bytes() for path in (folder / "state").iterdir()}
    assert len({name.rsplit("-", 1)[0] for name in left}) == 2
    alone = nodes(*problem(), state=folder / "state")
    np.testing.assert_array_equal(alone, nodes(*problem()))
    assert "is of 2 processes (1 x 2), and these are 1 x 1: the estimate begins anew" in caplog.text
    assert {path.name: path.read_bytes() for path in (folder / "state").iterdir()} == left


def test_one_process_alone_sends_nothing():
    started = time.perf_counter()
    assert ranks.from_first(lambda: 3) == 3
    assert ranks.everywhere(lambda: 4) == 4
    assert ranks.gathered(5) == [5]
    assert time.perf_counter() - started < 1
