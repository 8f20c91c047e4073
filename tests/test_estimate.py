"""Estimates through the public names: quadrature identities, scales, seeds, breakdown, float32 on a
trained model.
"""

import copy
from collections import Counter
from functools import cache

import dense_truth
import models
import numpy as np
import pytest
import torch
from problems import Problem, gpt2, problem, tokens
from quadratics import decaying, matrix_of, objective_of, spectra_of

from blockspec import Objective, draw_probe, estimate_spectra, losses, partition
from blockspec.engine.estimate import plan_spectra

NAME = "weights.a"


def moments_of(matrix, start, count):
    """v' A^k v and v' |A|^k v for k < count, with v normalised."""
    values, vectors = np.linalg.eigh(matrix.numpy())
    shares = (vectors.T @ start.double().numpy()) ** 2 / float(start.double().square().sum())
    powers = np.arange(count)[:, None]
    return (shares * values**powers).sum(1), (shares * np.abs(values) ** powers).sum(1)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("num_steps", [1, 3, 8, 12])
@pytest.mark.parametrize("seed", range(3))
def test_moments_are_right_up_to_twice_the_steps_and_no_further(seed, num_steps, distribution):
    matrix = matrix_of(
        torch.rand(100, generator=torch.Generator().manual_seed(seed)) * 2 - 1, seed=seed
    )
    spectra = spectra_of(
        {"a": matrix}, num_probes=3, num_steps=num_steps, seed=seed, distribution=distribution
    )
    spectrum = spectra[NAME]
    beyond = []
    for k in range(3):
        start = draw_probe(NAME, 100, seed=seed, probe=k, distribution=distribution)
        truth, size = moments_of(matrix, start, 2 * num_steps + 1)
        powers = np.arange(2 * num_steps + 1)[:, None]
        errors = np.abs((spectrum.weights[k] * spectrum.nodes[k] ** powers).sum(1) - truth) / size
        assert errors[:-1].max() <= 1e-9
        beyond.append(errors[-1])
    assert min(beyond) > 1e-7


def test_moments_and_trace_are_means_over_probes_with_their_standard_error():
    matrix = matrix_of(decaying(60))
    spectrum = spectra_of({"a": matrix}, num_probes=5, num_steps=4)[NAME]
    for k in (0, 1, 2, 7):
        samples = [
            moments_of(matrix, draw_probe(NAME, 60, probe=i), k + 1)[0][-1] for i in range(5)
        ]
        assert spectrum.moment(k).value == pytest.approx(np.mean(samples), rel=1e-9)
        assert spectrum.moment(k).stderr == pytest.approx(
            np.std(samples, ddof=1) / np.sqrt(5), rel=1e-6, abs=1e-13
        )
    assert spectrum.trace.value == pytest.approx(60 * spectrum.moment(1).value, rel=1e-12)
    assert spectrum.trace.stderr == pytest.approx(60 * spectrum.moment(1).stderr, rel=1e-12)


def test_the_error_of_one_probe_is_unknown_and_not_zero():
    spectrum = spectra_of({"a": matrix_of(decaying(60))}, num_probes=1, num_steps=4)[NAME]
    assert spectrum.trace.stderr is None
    assert spectrum.moment(2).stderr is None


@pytest.mark.slow
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_standard_errors_are_as_large_as_the_errors(distribution):
    """Over many seeds: no bias, and the spread that the standard error says."""
    values = decaying(40)
    matrix = matrix_of(values)
    traces = [
        spectra_of({"a": matrix}, num_probes=4, num_steps=2, seed=seed, distribution=distribution)[
            NAME
        ].trace
        for seed in range(150)
    ]
    errors = np.array([trace.value for trace in traces]) - float(values.sum())
    stated = np.sqrt(np.mean([trace.stderr**2 for trace in traces]))
    assert np.std(errors) == pytest.approx(stated, rel=0.2)
    assert abs(np.mean(errors)) < 3.5 * stated / np.sqrt(150)


def test_a_rademacher_probe_has_the_trace_of_a_diagonal_matrix_exactly():
    values = decaying(50)
    spectrum = spectra_of(
        {"a": torch.diag(values)}, num_probes=3, num_steps=2, distribution="rademacher"
    )[NAME]
    assert spectrum.trace.value == pytest.approx(float(values.sum()), rel=1e-12)
    assert spectrum.trace.stderr == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-8, 1e6])
def test_the_scale_of_the_loss_scales_the_eigenvalues_and_nothing_else(scale, dtype):
    it = gpt2()
    it.model.to(dtype)
    scaled = losses.Loss(
        it.loss.outputs, lambda outputs, batch: scale * it.loss.terms(outputs, batch)
    )
    blocks = [
        *partition(it.model, "matrix", ["*c_attn.weight*", "*wte*"]),
        *partition(it.model, "model"),
    ]
    for curvature in ("hessian", "ggn"):
        one = estimate_spectra(it.objective(), blocks, 1, 10, curvature=curvature)
        other = estimate_spectra(
            Objective(it.model, it.batches, scaled), blocks, 1, 10, curvature=curvature
        )
        for name in one:
            tolerance = 1e-6 if dtype == torch.float64 else 1e-4
            difference = np.abs(other[name].nodes / scale - one[name].nodes).max()
            assert difference <= tolerance * one[name].norm, (name, curvature)
            np.testing.assert_array_equal(other[name].steps, one[name].steps)
            np.testing.assert_array_equal(other[name].breakdown, one[name].breakdown)


# A trained model in float32, as users have it.


@cache
def trained():
    """A GPT-2 of 2 layers after 100 steps on sequences with a rule, in float32 with its default
    attention.
    """
    settings = {"n_embd": 16, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = models.tiny_gpt2(dtype=torch.float32, layers=2, **settings)
    generator = torch.Generator().manual_seed(0)

    def sequences(count):
        start, step = torch.randint(32, (2, count, 1), generator=generator)
        noise = torch.randint(3, (count, 12), generator=generator)
        return (start + (step % 5) * torch.arange(12) + noise) % 32

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        ids = sequences(16)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.zero_grad()
    ids = sequences(6)
    return Problem(
        model,
        [{"input_ids": ids[:4]}, {"input_ids": ids[4:]}],
        losses.next_token,
        lambda call, batch: call(**batch).logits[:, :-1].flatten(0, 1),
        lambda batch: batch["input_ids"][:, 1:].flatten(),
    )


ACCURACIES = {
    "model": 1e-5,
    "transformer.h.0.attn.c_attn.weight/query": 1e-4,
    "transformer.h.1.attn.c_attn.weight/query": 1e-4,
    "transformer.h.0.attn.c_attn.weight/value": 1e-4,
    "transformer.h.1.mlp.c_fc.weight": 1e-4,
    "transformer.h.0.attn.c_proj.weight": 1e-4,
    "transformer.wte.weight": 1e-4,
}


@cache
def trained_spectra():
    it = trained()
    blocks = [
        *partition(it.model, "matrix", [name for name in ACCURACIES if name != "model"]),
        *partition(it.model, "model"),
    ]
    return blocks, estimate_spectra(it.objective(), blocks, num_probes=2, num_steps=30)


@pytest.mark.slow
@pytest.mark.parametrize("name", ACCURACIES)
def test_largest_eigenvalues_of_a_trained_float32_model(name):
    it = trained()
    blocks, spectra = trained_spectra()
    assert spectra[name].dtype == "float32"
    (block,) = [block for block in blocks if block.name == name]
    exact = copy.deepcopy(it.model).double()
    index = dense_truth.positions(exact, block)
    truth = dense_truth.largest_eigenvalue(exact, it.batches, it.terms, index)
    assert dense_truth.relative_error(spectra[name].largest.value, truth) < ACCURACIES[name]
    assert abs(spectra[name].largest.value - truth) <= spectra[name].largest.residual


def test_the_value_part_hides_the_query_part_of_a_fused_matrix():
    it = trained()
    (fused,) = partition(it.model, "tensor", include="*h.0.attn.c_attn.weight")
    whole = estimate_spectra(it.objective(), fused, num_probes=1, num_steps=20)[
        fused.name
    ].largest.value
    _, spectra = trained_spectra()
    query, value = (spectra[f"{fused.name}/{part}"].largest.value for part in ("query", "value"))
    assert query < 0.5 * whole
    assert 0.5 * whole < value <= whole * (1 + 1e-5)


def test_a_float32_model_is_symmetric_to_its_precision_and_says_so():
    _, spectra = trained_spectra()
    for spectrum in spectra.values():
        assert spectrum.orthogonality.max() < 1e-4
        assert spectrum.nodes.dtype == spectrum.weights.dtype == np.float64
        assert spectrum.largest.residual < 1e-3 * spectrum.norm


# Seeds and company.


def test_the_same_seed_gives_the_same_bits():
    it = problem("gpt2")
    blocks = partition(it.model, include="*h.0.attn*weight*")
    one, two = (estimate_spectra(it.objective(), blocks, 2, 4, seed=3) for _ in range(2))
    for name in one:
        np.testing.assert_array_equal(one[name].nodes, two[name].nodes)
        np.testing.assert_array_equal(one[name].weights, two[name].weights)
        assert one[name].seed == 3


def test_other_seeds_and_names_and_numbers_give_other_probes():
    probes = {
        (name, seed, k): draw_probe(name, 64, seed=seed, probe=k).numpy().tobytes()
        for name in ("a", "b", "a1")
        for seed in (0, 1, 11)
        for k in (0, 1, 10)
    }
    assert len(set(probes.values())) == len(probes)
    assert probes["a", 1, 10] == draw_probe("a", 64, seed=1, probe=10).numpy().tobytes()


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_probes_have_the_distribution_that_was_asked_for(distribution):
    probe = draw_probe("a", 40_000, distribution=distribution).double()
    assert probe.device.type == "cpu"
    assert abs(probe.mean()) < 0.03
    assert probe.square().mean() == pytest.approx(1, abs=0.03)
    assert probe.pow(4).mean() == pytest.approx(1 if distribution == "rademacher" else 3, abs=0.2)


def test_a_probe_does_not_depend_on_how_many_or_what_is_beside_it():
    it = problem("gpt2")
    blocks = partition(it.model, include="*h.0*weight*")
    together = estimate_spectra(it.objective(), blocks, num_probes=3, num_steps=4)
    assert list(together) == [block.name for block in blocks]
    for block in (blocks[0], blocks[-1]):
        alone = estimate_spectra(it.objective(), block, num_probes=1, num_steps=4)[block.name]
        tolerance = 1e-12 * together[block.name].norm
        np.testing.assert_allclose(
            together[block.name].nodes[0], alone.nodes[0], rtol=0, atol=tolerance
        )
        np.testing.assert_allclose(
            together[block.name].weights[0], alone.weights[0], rtol=0, atol=1e-9
        )
    reverse = estimate_spectra(it.objective(), blocks[::-1], num_probes=3, num_steps=4)
    assert list(reverse) == [block.name for block in blocks[::-1]]


def test_global_random_numbers_do_not_matter():
    it = problem("nanogpt")
    (block,) = partition(it.model, include="*c_fc.weight")
    nodes = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        nodes.append(estimate_spectra(it.objective(), block, 1, 4)[block.name].nodes)
    np.testing.assert_array_equal(*nodes)


def test_blocks_may_overlap():
    it = problem("nanogpt")
    blocks = [b for by in ("tensor", "head", "layer", "model") for b in partition(it.model, by)]
    blocks = list({block.name: block for block in blocks}.values())
    assert set(estimate_spectra(it.objective(), blocks, 1, 2)) == {block.name for block in blocks}


# Ends before the last step.


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_distinct_eigenvalues_end_every_probe(dtype, scale):
    values = torch.tensor([-1.0] * 10 + [0.5] * 20 + [3.0] * 30)
    spectra = spectra_of(
        {"a": matrix_of(values)}, num_probes=3, num_steps=12, dtype=dtype, scale=scale
    )
    spectrum = spectra[NAME]
    assert spectrum.breakdown.all()
    assert spectrum.steps.tolist() == [3, 3, 3]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    np.testing.assert_allclose(
        spectrum.nodes[:, :3] / scale, [[-1, 0.5, 3]] * 3, rtol=0, atol=tolerance
    )
    assert spectrum.nodes.shape == spectrum.weights.shape == (3, 12)
    assert not spectrum.weights[:, 3:].any()
    np.testing.assert_allclose(spectrum.weights.sum(1), 1, atol=1e-12)


def test_a_probe_in_an_invariant_subspace_ends_alone():
    start = draw_probe(NAME, 60, probe=1).double()
    v = start / start.norm()
    rest = torch.eye(60, dtype=torch.float64) - torch.outer(v, v)
    matrix = rest @ matrix_of(decaying(60)) @ rest + 0.7 * torch.outer(v, v)
    spectrum = spectra_of({"a": matrix}, num_probes=3, num_steps=10)[NAME]
    assert spectrum.breakdown.tolist() == [False, True, False]
    assert spectrum.steps.tolist() == [10, 1, 10]
    assert spectrum.nodes[1, 0] == pytest.approx(0.7, rel=1e-12)
    assert spectrum.weights[1].tolist() == [pytest.approx(1)] + [0] * 9


def test_low_rank_ends_without_ghost_nodes():
    """Rank 4 in 100 dimensions: 5 distinct eigenvalues, one of them zero."""
    values = torch.tensor([0.0] * 96 + [-2, 1e-3, 1.0, 30.0])
    spectrum = spectra_of({"a": matrix_of(values)}, num_probes=4, num_steps=30)[NAME]
    assert spectrum.steps.max() <= 6
    for nodes, weights in zip(spectrum.nodes, spectrum.weights, strict=True):
        distance = np.abs(nodes[weights > 0][:, None] - np.unique(values)).min(1)
        assert distance.max() < 1e-10


@pytest.mark.parametrize("size", [1, 2, 7, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_steps_than_parameters_are_done_exactly(size, dtype):
    values = decaying(200)[:: 199 // size][:size].sort().values
    spectra = spectra_of(
        {"a": matrix_of(values), "b": matrix_of(decaying(40))},
        num_probes=2,
        num_steps=10,
        dtype=dtype,
    )
    spectrum = spectra[NAME]
    assert spectrum.exact
    assert not spectra["weights.b"].exact
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    for k in range(spectrum.num_probes):
        kept = spectrum.weights[k] > 0
        np.testing.assert_allclose(spectrum.nodes[k][kept], values, rtol=0, atol=tolerance)
        np.testing.assert_allclose(spectrum.weights[k][kept], 1 / size)
    assert spectrum.trace[:2] == (pytest.approx(float(values.sum()), abs=size * tolerance), 0)


def test_as_many_steps_as_parameters_less_one_find_every_eigenvalue():
    values = torch.linspace(-1, 2, 12, dtype=torch.float64)
    spectrum = spectra_of({"a": matrix_of(values)}, num_probes=1, num_steps=11)[NAME]
    assert not spectrum.exact
    assert spectrum.largest.value == pytest.approx(2, rel=1e-6)


# Orthogonality.


def outlier():
    values = torch.linspace(-0.1, 0.1, 300, dtype=torch.float64)
    values[-1] = 5.0
    return values


def test_every_converged_eigenvalue_appears_once():
    spectrum = spectra_of({"a": matrix_of(outlier())}, num_probes=2, num_steps=100)[NAME]
    assert spectrum.reorthogonalized
    assert ((np.abs(spectrum.nodes - 5) < 1e-6) & (spectrum.weights > 0)).sum(1).tolist() == [1, 1]
    assert spectrum.orthogonality.max() < 1e-12


def test_without_reorthogonalisation_copies_appear_the_density_holds_and_the_result_says_so():
    matrix = matrix_of(outlier())
    kept, lost = (
        spectra_of({"a": matrix}, num_probes=2, num_steps=100, reorthogonalize=flag)[NAME]
        for flag in (True, False)
    )
    assert not lost.reorthogonalized
    assert (np.abs(lost.nodes - 5) < 1e-6).sum(1).min() > 1
    assert lost.largest.value == pytest.approx(5, rel=1e-9)
    grid = np.linspace(-0.3, 5.3, 4000)
    difference = np.abs(lost.density(grid, 0.05) - kept.density(grid, 0.05))
    assert difference.max() < 1e-3 * kept.density(grid, 0.05).max()
    assert np.isnan(lost.orthogonality).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_eigenvalue_lies_within_the_residual_of_each_node(dtype):
    values = decaying(150)
    matrix = matrix_of(values)
    spectrum = spectra_of({"a": matrix}, num_probes=3, num_steps=12, dtype=dtype)[NAME]
    distance = np.abs(spectrum.nodes[..., None] - values.numpy()).min(-1)
    assert np.all(distance <= spectrum.residuals)
    for extreme in (spectrum.largest, spectrum.smallest):
        assert np.abs(values.numpy() - extreme.value).min() <= extreme.residual


# Cost and progress.


def test_progress_is_told_after_each_sweep_and_ends_complete():
    told = []
    low = torch.tensor([-1.0] * 10 + [0.5] * 10 + [3.0] * 10)
    matrices = {"a": matrix_of(decaying(50)), "b": matrix_of(decaying(6)), "c": matrix_of(low)}
    spectra_of(
        matrices,
        num_probes=2,
        num_steps=10,
        progress=lambda done, total: told.append((done, total)),
    )
    dones, totals = zip(*told, strict=True)
    assert dones[-1] == totals[-1] == 20 + 6 + 6  # c breaks down after three steps
    assert list(dones) == sorted(set(dones))
    assert all(done <= total for done, total in told)
    assert max(totals) == 20 + 6 + 20


def test_all_blocks_share_one_pass_over_the_batches():
    it = gpt2()
    calls = []
    it.model.register_forward_hook(lambda *_: calls.append(1))
    blocks = partition(it.model, include="*h.0*weight*")
    spectra = estimate_spectra(it.objective(), blocks, num_probes=3, num_steps=4)
    assert len(blocks) > 5
    assert spectra.cost.gradients == 4 * 2
    assert spectra.cost.products == 4 * 2 * 3 * len(blocks)
    # one whose memory is foreseen, twice for determinism, three gradients of a copy
    assert len(calls) <= 4 * 2 + 6


def test_an_estimate_checks_once_and_walks_over_the_modules_once_a_preparation(monkeypatch):
    """One preparation for the check, one to foresee memory, one a sweep; a plan makes the same
    check, and measures in two. The guard walks by itself: for its copy, and for its memory.
    """
    it = gpt2()
    calls = Counter()

    def counted(owner, name, whose):
        original = getattr(owner, name)

        def call(self, *given, **named):
            calls[name] += self is whose
            return original(self, *given, **named)

        monkeypatch.setattr(owner, name, call)

    objective = it.objective()
    counted(Objective, "prepared", objective)
    counted(Objective, "check", objective)
    counted(torch.nn.Module, "modules", it.model)
    blocks = partition(it.model, "layer")
    calls.clear()
    estimate_spectra(objective, blocks, num_probes=2, num_steps=3)
    assert calls == {"check": 1, "prepared": 2 + 3, "modules": 2 + 3 + 2}
    calls.clear()
    plan_spectra(objective, blocks, num_probes=2, num_steps=3)
    assert calls == {"check": 1, "prepared": 1 + 2, "modules": 1 + 2 + 1}


def test_parameters_outside_the_blocks_cost_no_gradient():
    """Only the blocks' own parameters are differentiated by, but for the checks before the first
    sweep.
    """
    it = gpt2()
    seen = []
    it.model.transformer.wpe.weight.register_hook(lambda gradient: seen.append(gradient))
    blocks = partition(it.model, include="*ln_f*")
    counts = []
    for num_steps in (2, 7):
        seen.clear()
        estimate_spectra(it.objective(), blocks, num_probes=1, num_steps=num_steps)
        counts.append(len(seen))
    assert counts[0] == counts[1] <= 2


def test_a_block_can_be_given_alone_and_a_loss_can_be_a_mean_of_one_batch():
    objective = objective_of({"a": matrix_of(decaying(30))})
    (block,) = partition(objective.model)
    assert list(estimate_spectra(objective, block, 1, 2)) == [NAME]


def test_small_types_are_measured_in_float32():
    it = Problem(
        models.tiny_gpt2(dtype=torch.bfloat16, layers=1),
        [{"input_ids": tokens(2, 6)}],
        losses.next_token,
        None,
        None,
    )
    (block,) = partition(it.model, include="*h.0*c_fc.weight")
    with pytest.warns(UserWarning, match="computed with in bfloat16"):
        spectrum = estimate_spectra(it.objective(), block, 1, 3)[block.name]
    assert spectrum.dtype == "float32"
    exact = Objective(copy.deepcopy(it.model).double(), it.batches, it.loss)
    truth = estimate_spectra(exact, block, 1, 3)[block.name]
    assert spectrum.moment(2).value == pytest.approx(truth.moment(2).value, rel=0.2)
