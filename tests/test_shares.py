"""Numbers of the toolbox with errors of the data, against jackknives over dense matrices without
each unit.
"""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from launching import together
from models import tiny_gpt2
from populations import SampledOperator, population
from problems import tokens
from torch.utils._python_dispatch import TorchDispatchMode

import blockspec
from blockspec.numerics.jackknife import jackknife_error
from blockspec.products.curvature import Products
from blockspec.products.shares import SIZE, Sketch
from blockspec.products.union import MANY_BLOCKS, Union
from blockspec.products.units import Unit
from blockspec.toolbox.traces import METHODS

TERMS = torch.arange(1.0, 11.0, dtype=torch.float64)


class Sampled(SampledOperator):
    """With columns by unit too."""

    def columns_by_unit(self, requests, targets, each, *, summed=True):
        found = self.columns(requests, targets)
        units = []
        for place, (terms, matrix) in enumerate(zip(self.terms, self.matrices, strict=True)):
            unit = SampledOperator(matrix[None])
            parts = [[terms * p for p in row] for row in unit.columns(requests, targets)]
            values = [each(number, row) for number, row in enumerate(parts)]
            units.append((place, Unit(float(terms), values)))
        return found, units


def sampled(size=300, heavy=0.5):
    return Sampled(population(10, size, heavy=heavy), TERMS)


def exact(operator, number):
    """The jackknife error of a number of the mean matrix."""
    left_out = np.array([number(operator.without(unit)) for unit in range(10)])
    return jackknife_error(number(operator.mean.numpy()), left_out)


def halves(operator):
    return [operator.block(0, 40), operator.block(40, 300)]


@pytest.mark.parametrize(
    ("method", "probes", "low", "high"),
    [("hutchinson", 200, 0.9, 1.2), ("hutch++", 180, 0.9, 1.1), ("xtrace", 280, 0.9, 1.3)],
)
def test_traces(method, probes, low, high):
    operator = sampled()
    found = blockspec.trace(
        None, halves(operator), method, num_probes=probes, curvature=operator, check=False
    )
    assert found.units == 10
    for (name, value), part in zip(found.items(), (slice(0, 40), slice(40, 300)), strict=True):
        right = exact(operator, lambda matrix, part=part: np.trace(matrix[part, part]))
        assert low <= value.data_stderr / right <= high, name
        if part.stop == 40 and method != "hutchinson":
            assert value.data_stderr == pytest.approx(right, rel=1e-9)  # done exactly
        assert value.total_stderr == np.hypot(value.stderr, value.data_stderr)


def test_means_of_the_diagonal_and_of_groups_of_blocks():
    operator = sampled()
    blocks = halves(operator)
    settings = {"num_probes": 100, "curvature": operator}
    found = blockspec.diagonal(None, blocks, **settings)
    traces = blockspec.trace(None, blocks, **settings)
    for block in blocks:
        expected = traces[block.name].data_stderr / block.numel
        assert found.means[block.name].data_stderr == pytest.approx(expected)
    ((_, grouped),) = found.grouped().iterrows()
    right = exact(operator, np.trace) / 300
    assert 0.9 <= grouped["data_stderr"] / right <= 1.25


@pytest.mark.parametrize("probes", [60, 400])
def test_squared_norms_know_what_few_data_add(probes):
    operator = sampled()
    found = blockspec.squared_norms(
        None, operator.block(), num_probes=probes, curvature=operator, check=False
    )["matrix"]
    right = exact(operator, lambda matrix: (matrix**2).sum())
    assert 0.75 <= found.data_stderr / right <= 1.35


def test_norms_of_spectra_have_the_errors_of_each_column():
    operator = sampled(40)
    spectra = blockspec.estimate_spectra(None, operator.block(), curvature=operator)
    row = blockspec.norms(spectra).loc["matrix"]
    values = {
        "norm": lambda v: np.abs(v).max(),
        "squared_norm": lambda v: (v**2).sum(),
        "nuclear_norm": lambda v: np.abs(v).sum(),
        "stable_rank": lambda v: (v**2).sum() / np.abs(v).max() ** 2,
        "effective_rank": lambda v: np.abs(v).sum() / np.abs(v).max(),
    }
    for name, function in values.items():
        right = exact(operator, lambda matrix, f=function: f(np.linalg.eigvalsh(matrix)))
        assert row[f"{name}_data_stderr"] == pytest.approx(right, rel=1e-4), name


def test_the_share_off_the_diagonal():
    operator = sampled()
    blocks = halves(operator)
    found = blockspec.coupling(None, blocks, 40, curvature=operator, check=False)

    def share(matrix):
        within = (matrix[:40, :40] ** 2).sum() + (matrix[40:, 40:] ** 2).sum()
        return 1 - within / (matrix**2).sum()

    assert found.units == 10
    assert 0.7 <= found.off_diagonal_share.data_stderr / exact(operator, share) <= 1.4
    assert found.grouped(lambda block: 0).off_diagonal_share.data_stderr == pytest.approx(0)


@pytest.mark.parametrize(("which", "place", "high"), [("largest", -1, 1.6), ("smallest", 0, 3)])
def test_eigenpairs(which, place, high):
    """The smallest ones are nearer to zero than the rest is wide: there it is on the safe side."""
    operator = sampled(100)
    found = blockspec.top_eigenpairs(None, operator.block(), 3, which, curvature=operator)
    for number, value in enumerate(found.ritz_values):
        at = place - number if place else number
        right = exact(operator, lambda matrix, at=at: np.linalg.eigvalsh(matrix)[at])
        assert 0.6 <= value.data_stderr / right <= high, number


def test_a_sketch_has_squared_norms_and_dot_products_in_expectation():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5000, generator=generator, dtype=torch.float64)
    b += a / 2
    sketches = [Sketch(f"{n}", 5000, a.device) for n in range(200)]
    dots = [np.array([s(a) @ s(a), s(a) @ s(b)]) for s in sketches]
    assert len(sketches[0](a)) == SIZE
    np.testing.assert_allclose(np.mean(dots, 0), [float(a @ a), float(a @ b)], rtol=0.03)
    assert np.std(dots, 0)[0] <= 1.2 * np.sqrt(2 / SIZE) * float(a @ a)
    short = torch.arange(7.0)
    np.testing.assert_array_equal(Sketch("a", 7, a.device)(short), short)


def objective(count=10, layers=1, batches=1, **settings):
    ids = tokens(count, 6).chunk(batches)
    given = [{"input_ids": part, "labels": part} for part in ids]
    model = tiny_gpt2(dtype=torch.float64, layers=layers)
    return blockspec.Objective(model, given, blockspec.losses.next_token, **settings)


def test_few_units_have_no_error_and_it_is_said_once():
    few = objective(micro_batch=2)
    blocks = blockspec.partition(few.model, include="*ln_1*")
    traces = blockspec.trace(few, blocks, num_probes=2)
    assert all(value.data_stderr is None for value in traces.values())
    assert repr(traces).count("in 5 units, and 8 are needed") == 1
    pairs = blockspec.top_eigenpairs(few, blocks[0])
    assert pairs.data_stderrs is None
    assert pairs.ritz_values[0].data_stderr is None
    assert "8 are needed" in repr(pairs)
    assert pairs.cost.products == 5 * pairs.products  # no product for an error that is not known
    coupled = blockspec.coupling(few, blocks, 1)
    assert coupled.off_diagonal_share.data_stderr is None
    assert "8 are needed" in coupled._repr_html_()


@pytest.mark.slow
def test_values_and_costs_are_the_same_with_and_without_errors_of_the_data():
    whole = objective(micro_batch=1)
    blocks = blockspec.partition(whole.model, include="*ln_1*")
    for method in METHODS:
        pair = [
            blockspec.trace(whole, blocks, method, num_probes=8, data_errors=wanted)
            for wanted in (True, False)
        ]
        assert pair[0].cost == pair[1].cost
        for name, value in pair[0].items():
            assert value[:2] == pair[1][name][:2]
            assert value.data_stderr > 0
            assert pair[1][name].data_stderr is None
    with_errors, without = (
        blockspec.coupling(whole, blocks, 2, data_errors=wanted) for wanted in (True, False)
    )
    assert with_errors.cost == without.cost
    np.testing.assert_array_equal(with_errors.samples, without.samples)


def test_preconditioned_numbers_have_errors_of_preconditioned_units():
    """A preconditioner of fours makes every number a quarter, errors and all."""
    whole = objective(8, micro_batch=1)
    blocks = blockspec.partition(whole.model, include="*ln_1*")
    fours = {b.name: torch.full((16,), 4.0, dtype=torch.float64) for b in blocks}
    given = {"precondition": blockspec.Preconditioner.diagonal(fours)}
    name = blocks[0].name
    plain, scaled = (
        blockspec.trace(whole, blocks, num_probes=2, **settings)[name] for settings in ({}, given)
    )
    np.testing.assert_allclose(scaled, np.array(plain) / 4)
    plain, scaled = (blockspec.coupling(whole, blocks, 1, **settings) for settings in ({}, given))
    np.testing.assert_allclose(scaled.left_out, plain.left_out / 16)


def test_many_blocks_are_summed_in_one_pass():
    whole = objective(8, layers=2, micro_batch=1)
    neurons = blockspec.partition(whole.model, "neuron", include="*mlp*")
    assert len(neurons) > MANY_BLOCKS
    tensors = blockspec.partition(whole.model, "tensor", include="*mlp*")
    by_neuron, by_tensor = (
        blockspec.diagonal(whole, blocks, num_probes=1).grouped(
            lambda block: block.name.split("/")[0]
        )
        for blocks in (neurons, tensors)
    )
    columns = ["numel", "value", "data_stderr"]
    assert (by_neuron["data_stderr"] > 0).all()
    pd.testing.assert_frame_equal(by_neuron[columns], by_tensor[columns])


class Operations(TorchDispatchMode):
    """Counts operations on tensors."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function not in VIEWS
        return function(*args, **(kwargs or {}))


VIEWS = {torch.ops.aten.view.default, torch.ops.aten.slice.Tensor, torch.ops.aten.detach.default}


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({"by": "matrix"}, 6),
        ({"by": "neuron"}, 6),  # strips are short, and the blocks are many
        ({"by": "matrix", "include": "*attn*", "exclude": "*/key"}, 6),  # with gaps
        ({"by": "layer", "exclude": "*ln_f*"}, 6),
    ],
)
def test_what_a_unit_has_in_all_blocks_takes_few_operations(settings, most):
    model = tiny_gpt2(layers=2)
    blocks = blockspec.partition(model, **settings)
    products = Products(
        blockspec.Objective(model, [tokens(2, 6)], blockspec.losses.next_token), guarded=False
    )
    union = Union(products, blocks)
    a, b = torch.randn(2, union.block.numel, generator=torch.Generator().manual_seed(0))
    union.dots(a, b)
    with Operations() as operations:
        found = union.dots(a, b)
    assert operations.count <= most
    tensors = union.tensors(a.double() * b)
    for block, value in zip(blocks, found, strict=True):
        parts = [p.select(tensors[p.parameter]).sum() for p in block.pieces]
        assert value == pytest.approx(float(sum(parts)), abs=1e-4), block.name


def test_blocks_that_overlap_are_summed_one_by_one():
    model = tiny_gpt2(layers=1)
    blocks = blockspec.partition(model, "matrix") + blockspec.partition(model, "model")
    union = Union(
        Products(
            blockspec.Objective(model, [tokens(2, 6)], blockspec.losses.next_token), guarded=False
        ),
        blocks,
    )
    a, b = torch.randn(2, union.block.numel, generator=torch.Generator().manual_seed(0))
    *parts, whole = union.dots(a, b)
    assert whole == pytest.approx(sum(parts))


def errors():
    """Of everything that has errors of the data; there are more units than groups of them."""
    whole = objective(35, micro_batch=1, batches=5)
    blocks = blockspec.partition(whole.model, "matrix", include="*ln_1*")
    methods = ("hutchinson", "xtrace")
    traces = [blockspec.trace(whole, blocks, method, num_probes=8) for method in methods]
    traces += [blockspec.squared_norms(whole, blocks, num_probes=2)]
    parts = [[value.data_stderr for value in found.values()] for found in traces]
    parts.append([blockspec.coupling(whole, blocks, 1).off_diagonal_share.data_stderr])
    for given in (whole, objective(9, micro_batch=1)):  # of one batch, one process has nothing
        parts.append([blockspec.directional(given, blocks, direction()).bend.data_stderr])
        traces = blockspec.trace(given, blocks, num_probes=1)
        parts.append([value.data_stderr for value in traces.values()])
    for spectrum in blockspec.estimate_spectra(whole, blocks, num_probes=1, num_steps=4).values():
        parts.append([spectrum.trace.data_stderr, spectrum.data_error])
    return np.concatenate([np.ravel(part) for part in parts])


def direction():
    return {"transformer.h.0.ln_1.weight": torch.ones(16, dtype=torch.float64)}


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    np.save(f"{folder}/{rank}.npy", errors())
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_that_split_the_batches_have_the_errors_of_one(tmp_path):
    together(process, str(tmp_path))
    expected = errors()
    assert (expected > 0).all()
    for rank in range(2):
        np.testing.assert_allclose(np.load(tmp_path / f"{rank}.npy"), expected, rtol=1e-6)
