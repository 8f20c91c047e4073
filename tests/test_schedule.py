"""What is asked for, counted: products, passes, which blocks are done exactly, memory."""

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import torch
from models import tiny_gpt2

import blockspec
from blockspec.engine import plan as planning
from blockspec.engine.estimate import plan_spectra
from blockspec.numerics.columns import Columns
from blockspec.numerics.memory import parse, readable
from blockspec.products.curvature import Products


@pytest.fixture(scope="module")
def objective():
    model = tiny_gpt2(seed=0)
    tokens = torch.randint(
        model.config.vocab_size, (4, 8), generator=torch.Generator().manual_seed(1)
    )
    return blockspec.Objective(
        model, [{"input_ids": tokens[:1]}, {"input_ids": tokens[1:]}], blockspec.losses.next_token
    )


@pytest.fixture(scope="module")
def blocks(objective):
    return blockspec.partition(
        objective.model, include=["*c_fc.weight", "*ln_1.weight", "*c_attn.weight/query"]
    )


def test_fixed_numbers_cost_what_they_say(objective, blocks):
    spectra = blockspec.estimate_spectra(objective, blocks, num_probes=2, num_steps=20)
    small = [b for b in blocks if b.numel <= 20]
    products = sum(b.numel for b in small) + 2 * 20 * (len(blocks) - len(small))
    assert small
    assert spectra.cost.products == 2 * products  # two batches
    assert spectra.cost.gradients == 2 * 20


def test_a_tolerance_takes_more_products_when_it_is_tighter_and_drops_blocks_that_are_done(
    objective, blocks
):
    loose = blockspec.estimate_spectra(objective, blocks, "auto", "auto", tolerance=0.1)
    tight = blockspec.estimate_spectra(objective, blocks, "auto", "auto", tolerance=0.04)
    assert loose.cost.products < tight.cost.products
    for spectra, tolerance in ((loose, 0.1), (tight, 0.04)):
        assert all(s.exact or s.error <= 1.3 * tolerance * s.norm for s in spectra.values())
    taken = [s.block.numel if s.exact else int(s.steps.sum()) for s in loose.values()]
    assert loose.cost.products == 2 * sum(taken) < 2 * len(blocks) * max(taken)  # two batches


def test_small_blocks_are_exact_and_marked_so(objective, blocks):
    spectra = blockspec.estimate_spectra(objective, blocks, "auto", "auto", tolerance=0.04)
    norm = next(s for name, s in spectra.items() if "ln_1" in name)
    assert norm.exact
    assert norm.error == 0
    assert norm.trace.stderr == 0
    assert norm.nodes.shape == (1, norm.block.numel)
    np.testing.assert_allclose(norm.weights, 1 / norm.block.numel)


@pytest.mark.slow
def test_a_memory_bound_changes_no_number(objective, blocks):
    whole = blockspec.estimate_spectra(objective, blocks, num_probes=2, num_steps=6)
    used = parse("100%", torch.device("cpu"))
    bound = blockspec.estimate_spectra(objective, blocks, num_probes=2, num_steps=6, memory=used)
    for name, spectrum in whole.items():
        np.testing.assert_allclose(
            bound[name].nodes, spectrum.nodes, rtol=1e-9, atol=1e-12 * spectrum.norm
        )


def test_processes_wait_for_their_turn_when_memory_is_short(objective, blocks):
    from blockspec.engine.accuracy import Accuracy
    from blockspec.engine.schedule import Schedule
    from blockspec.engine.task import Probing, Task

    tasks = [
        Task(
            b,
            torch.float64,
            torch.device("cpu"),
            Accuracy(6, 2, 0.1),
            Probing(0, "rademacher", True),
        )
        for b in blocks
    ]
    sizes = {task.block.name: task.job_bytes() for task in tasks}
    budget = max(sizes.values())
    taken = []
    schedule = Schedule(tasks, budget=budget)
    schedule.run(
        Products(objective),
        after_sweep=lambda s: taken.append(sum(sizes[job.block.name] for job in s.active)),
    )
    assert 0 < max(taken) <= budget < sum(sizes.values())
    assert all(len(task.tridiagonals) == 2 for task in tasks if not task.exact)


@pytest.mark.slow
def test_too_little_memory_is_said_with_what_would_fit(objective, blocks):
    with pytest.raises(ValueError, match=r"memory of 1 MiB is too little.*would fit"):
        blockspec.estimate_spectra(objective, blocks, memory="1MiB")


@pytest.mark.parametrize(
    ("text", "size"), [("20GiB", 20 * 2**30), ("500 MB", 500 * 2**20), (1000, 1000), ("7k", 7168)]
)
def test_sizes_are_read(text, size):
    assert parse(text, torch.device("cpu")) == size


def test_shares_are_of_the_device():
    whole = parse(1.0, torch.device("cpu"))
    assert abs(parse("50%", torch.device("cpu")) - whole / 2) <= 1
    assert readable(3 * 2**30) == "3 GiB"
    with pytest.raises(ValueError, match="a share of the device"):
        parse("plenty", torch.device("cpu"))


def test_memory_that_runs_out_halves_the_micro_batch_and_goes_on(objective, blocks, monkeypatch):
    expected = blockspec.estimate_spectra(objective, blocks, num_probes=1, num_steps=4)
    model, given = objective.model, list(objective.whole_batches())
    loss = blockspec.losses.next_token

    def hungry(model, batch):
        if len(batch["input_ids"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory (a stand-in)")
        return loss(model, batch)

    small = blockspec.Objective(model, given, loss)
    monkeypatch.setattr(small, "check", lambda: None)
    small.loss = hungry
    with pytest.warns(
        UserWarning, match="out of memory: going on with a micro-batch of 1 instead of 3"
    ):
        spectra = blockspec.estimate_spectra(small, blocks, num_probes=1, num_steps=4)
    assert small.micro_batch is None  # the objective is the user's
    for name, spectrum in expected.items():
        np.testing.assert_allclose(
            spectra[name].nodes, spectrum.nodes, rtol=1e-8, atol=1e-11 * spectrum.norm
        )


@pytest.mark.slow
def test_a_plan_counts_what_the_estimate_then_takes(objective, blocks):
    cost = plan_spectra(objective, blocks, num_probes=2, num_steps=20)
    spectra = blockspec.estimate_spectra(objective, blocks, num_probes=2, num_steps=20)
    assert 2 * cost.table["products"].sum() == spectra.cost.products
    assert (cost.table["flops"] > 0).all()
    assert cost.seconds > 0
    assert cost.peak > 0


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_the_basis_can_be_stored_in_less(objective, blocks, storage):
    spectra = blockspec.estimate_spectra(objective, blocks, num_probes=1, num_steps=12)
    stored = blockspec.estimate_spectra(
        objective, blocks, num_probes=1, num_steps=12, basis_dtype=storage
    )
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[storage]
    for name, spectrum in spectra.items():
        assert abs(stored[name].largest.value - spectrum.largest.value) <= tolerance * spectrum.norm


class Weighed:
    """An operator of which only memory is asked for: ``needs(examples)`` bytes, seen by what
    ``watched`` measures.
    """

    def __init__(self, needs, largest):
        self.needs, self.largest, self.seen = needs, largest, []

    def largest_batch(self):
        return self.largest

    def rehearse(self, blocks, size):
        self.seen.append(size)


@pytest.mark.parametrize(
    ("needs", "allowed", "expected"),
    [
        (lambda n: 10 * n, 75, 7),
        (lambda n: 50 + 3 * n, 90, 13),
        (lambda n: 10 * n if n < 10 else 100 * n, 200, 8),  # it grows faster than it began
        (lambda n: 10, 10**6, 64),
        (lambda n: 100 * n, 150, 1),
    ],
)
def test_the_micro_batch_is_measured_and_never_beyond_the_bound(
    monkeypatch, needs, allowed, expected
):
    operator = Weighed(needs, 64)
    measured = []

    def growth(operator, blocks, size):
        measured.append(size)
        return needs(size)

    monkeypatch.setattr(planning, "_growth", growth)
    size, taken = planning._largest_that_fits(operator, [], needs(1), allowed)
    assert taken == needs(size) <= allowed
    assert size == expected
    assert all(b <= 2 * a for a, b in pairwise([1, *measured]))
    assert len([n for n in measured if needs(n) > allowed]) <= 1  # and then it is left


def test_a_plan_beyond_the_bound_is_refused(objective, blocks, monkeypatch):
    monkeypatch.setattr(planning, "_growth", lambda operator, blocks, size: 2**20)
    monkeypatch.setattr(
        planning, "fitted_to", lambda *_: planning.Fitted(2**20, 632 * 2**20, 2**20)
    )
    with pytest.raises(ValueError, match=r"would take 63\d MiB, and memory= allows 528 MiB"):
        plan_spectra(objective, blocks, memory="528MiB")


def test_what_no_machine_can_do_is_refused_before_the_start(objective, blocks):
    for function in (blockspec.estimate_spectra, plan_spectra):
        for memory in (None, "80%"):
            with pytest.raises(ValueError, match=r"with up to 1,000,000,000 probes.*TiB"):
                function(objective, blocks, num_probes=10**9, memory=memory)
    with pytest.raises(ValueError, match=r"of vectors at once.*memory='80%'"):
        blockspec.estimate_spectra(objective, blocks, num_probes=10**6, num_steps=10)


def test_columns_are_counted_and_given_up_for_their_eigenvalues():
    size = 600
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    matrix = matrix + matrix.T
    columns = Columns(size, dtype=torch.float32, device=torch.device("cpu"))
    for _ in range(size):
        for _ in columns.step(matrix @ columns.vector):
            pass
    counted = Columns.bytes_of(size, torch.float32)
    tracemalloc.start()  # numpy's arrays; the columns are torch's
    found = columns.eigenvalues()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak + matrix.nbytes <= 1.2 * counted
    np.testing.assert_allclose(found, np.linalg.eigvalsh(matrix.double().numpy()), atol=1e-9)
    kept, numbers = columns.state()
    assert sum(tensor.nbytes for tensor in kept.values()) == 8 * size
    again = Columns(size, dtype=torch.float32, device=torch.device("cpu"))
    again.restore(kept, numbers)
    assert again.done
    np.testing.assert_array_equal(again.eigenvalues(), found)
