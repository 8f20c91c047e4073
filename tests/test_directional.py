"""Curvature along a direction: against dense truth, finite differences, and steps that optimizers
really take.
"""

import math
import types

import numpy as np
import pytest
import torch
from dense_truth import positions
from models import tiny_gpt2
from problems import problem, truth

import blockspec
from blockspec.products.curvature import Products
from blockspec.toolbox import directions
from blockspec.toolbox.moves import shifted
from blockspec.toolbox.sharpness import ball_sharpness, critical_steps


def drawn(model, *, seed=0, size=1e-2):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: size * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in model.named_parameters()
    }


def dense_couplings(it, blocks, direction, matrix):
    flat = torch.cat([direction[name].flatten() for name, _ in it.model.named_parameters()])
    places = [positions(it.model, block) for block in blocks]
    return np.array([[float(flat[b] @ matrix[b][:, c] @ flat[c]) for c in places] for b in places])


@pytest.mark.parametrize("name", ["gpt2", "llama", "resnet"])
@pytest.mark.parametrize(
    ("by", "products"), [("matrix", "whole"), ("layer", "whole"), ("matrix", "layerwise")]
)
def test_entries_are_those_of_the_dense_matrix(name, by, products):
    it = problem(name)
    blocks = blockspec.partition(it.model, by)
    direction = drawn(it.model)
    found = blockspec.directional(it.objective(), blocks, direction, products=products)
    expected = dense_couplings(it, blocks, direction, truth(name))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found.curvature.to_numpy(), expected, atol=1e-10 * scale, rtol=0)
    np.testing.assert_allclose(found.rows.to_numpy(), expected.sum(1), atol=1e-10 * scale, rtol=0)
    assert found.bend.value == pytest.approx(expected.sum(), rel=1e-9)


@pytest.mark.parametrize("name", ["gpt2", "nanogpt"])
def test_the_sum_is_the_second_difference_of_the_loss(name):
    """Tied weights of gpt2 count once."""
    it = problem(name)
    objective = it.objective()
    direction = drawn(it.model, size=1.0)
    found = blockspec.directional(objective, blockspec.partition(it.model), direction)
    step = 1e-4
    losses = {}
    for multiple in (-step, 0.0, step):
        with shifted(objective.parameters(), direction, multiple):
            losses[multiple] = objective.value()
    second = (losses[step] + losses[-step] - 2 * losses[0.0]) / step**2
    assert found.bend.value == pytest.approx(second, rel=1e-5)
    assert found.slope.value == pytest.approx((losses[step] - losses[-step]) / (2 * step), rel=1e-6)
    assert float(found.gradient.sum()) == pytest.approx(found.slope.value, rel=1e-12)


@pytest.mark.parametrize("curvature", ["ggn", "fisher"])
def test_other_matrices(curvature):
    it = problem("gpt2")
    blocks = blockspec.partition(it.model, "layer")
    direction = drawn(it.model)
    found = blockspec.directional(it.objective(), blocks, direction, curvature=curvature)
    expected = dense_couplings(it, blocks, direction, truth("gpt2", curvature))
    np.testing.assert_allclose(
        found.curvature.to_numpy(), expected, atol=1e-10 * np.abs(expected).max(), rtol=0
    )


def test_predicted_and_measured_agree_for_small_moves():
    it = problem("gpt2")
    found = blockspec.directional(
        it.objective(), blockspec.partition(it.model), drawn(it.model, size=1e-4)
    )
    assert found.measured.value == pytest.approx(found.predicted.value, rel=1e-4)


def counted_passes(model):
    """Forward passes of the model while this list grows."""
    passes = []
    return passes, model.register_forward_hook(lambda *_: passes.append(None))


def test_costs_are_counted():
    """One product and one gradient a batch; the whole matrix takes as many passes over the data."""
    it = problem("gpt2")
    blocks = blockspec.partition(it.model)
    batches = len(it.batches)
    passes, hook = counted_passes(it.model)
    taken = {}
    for couplings in (False, True):
        passes.clear()
        found = blockspec.directional(
            it.objective(), blocks, drawn(it.model), couplings=couplings, check=False
        )
        taken[couplings] = len(passes), found
    hook.remove()
    (few, cheap), (many, whole) = taken[False], taken[True]
    assert len(blocks) > 16
    # the graph of the products, the gradient, the loss behind the move
    assert whole.cost.gradients == cheap.cost.gradients == 2 * batches
    assert many - few == 0
    assert cheap.cost.products == batches
    assert cheap.curvature is None
    assert whole.cost.products == batches * len(blocks)
    np.testing.assert_allclose(cheap.rows, whole.rows, rtol=1e-9, atol=1e-14)


def test_several_directions_are_those_one_by_one():
    it = problem("llama")
    blocks = blockspec.partition(it.model, "layer")
    given = {"a": drawn(it.model, seed=1), "b": drawn(it.model, seed=2)}
    found = blockspec.directionals(it.objective(), blocks, given)
    for name, direction in given.items():
        alone = blockspec.directional(it.objective(), blocks, direction)
        np.testing.assert_allclose(found[name].curvature, alone.curvature, rtol=1e-9, atol=1e-15)
        assert found[name].measured.value == pytest.approx(alone.measured.value, rel=1e-9)


def test_a_direction_outside_of_the_blocks_is_left_out_everywhere():
    it = problem("gpt2")
    blocks = blockspec.partition(it.model, include="*mlp*weight*")
    direction = drawn(it.model)
    inside = {n: d for n, d in direction.items() if any(n in b.parameters for b in blocks)}
    found, alone = (blockspec.directional(it.objective(), blocks, d) for d in (direction, inside))
    assert found.measured.value == alone.measured.value
    np.testing.assert_array_equal(found.curvature, alone.curvature)


@pytest.mark.parametrize(
    ("direction", "message"),
    [({"lm_head.weight": torch.zeros(3)}, "first name"), ({"transformer.wte.weight": torch.zeros(3)}, r"shape \(3,\)")],
)  # fmt: skip
def test_a_wrong_direction_is_refused(direction, message):
    model = tiny_gpt2()
    objective = blockspec.Objective(
        model, [{"input_ids": torch.zeros(1, 4, dtype=torch.long)}], blockspec.losses.next_token
    )
    with pytest.raises(ValueError, match=message):
        blockspec.directional(objective, blockspec.partition(model), direction)


def small_population(sequences=400, length=6):
    model = tiny_gpt2(seed=3)
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(model.config.vocab_size, (sequences, length), generator=generator)
    return model, rows


@pytest.mark.slow
def test_intervals_over_the_data_hold_the_populations_value():
    """50 samples of 24 sequences out of 400; the truth comes from all of them."""
    model, rows = small_population()
    blocks = blockspec.partition(model, "layer")
    direction = drawn(model, size=3e-2)

    def measured(chosen):
        objective = blockspec.Objective(
            model, [{"input_ids": chosen}], blockspec.losses.next_token, micro_batch=1
        )
        return blockspec.directional(objective, blocks, direction, couplings=False)

    whole = measured(rows)
    held = {"predicted": 0, "measured": 0, "bend": 0}
    for trial in range(50):
        places = torch.randperm(len(rows), generator=torch.Generator().manual_seed(trial))[:24]
        sample = samples_of(whole, places.numpy())
        for name in held:
            found, truth = sample[name], getattr(whole, name).value
            held[name] += abs(found.value - truth) <= 2.07 * found.data_stderr
    assert all(44 <= count <= 50 for count in held.values()), held


def samples_of(whole, places):
    """What the sequences at these places give: the same numbers as an objective of them alone,
    without the passes.
    """
    from blockspec.toolbox.by_unit import over_units

    terms = whole.terms[places]
    slopes = whole.samples["gradient"].sum(1)[places]
    bends = whole.samples["rows"].sum(1)[places]
    moved = whole.samples["measured"][places]
    return {
        "predicted": over_units(slopes + bends / 2, terms),
        "bend": over_units(bends, terms),
        "measured": over_units(moved, terms),
    }


def test_every_number_has_the_error_of_leaving_units_out():
    """Against the same call on the data without each unit."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    model.double()
    data = [(torch.randn(n, 3).double(), torch.randn(n, 2).double()) for n in range(1, 10)]
    blocks, move = blockspec.partition(model, "tensor"), drawn(model, size=0.1)

    def of(batches):
        objective = blockspec.Objective(model, batches, blockspec.losses.regression)
        return blockspec.directional(objective, blocks, move, check=False)

    whole = of(data)
    rest = [of(data[:unit] + data[unit + 1 :]) for unit in range(len(data))]
    table = whole.to_frame()
    for name, values in {
        "curvature": lambda found: found.curvature.to_numpy(),
        "gradient": lambda found: found.gradient.to_numpy(),
        "rows": lambda found: found.rows.to_numpy(),
        "within": lambda found: np.diag(found.curvature),
    }.items():
        left_out = np.stack([values(found) for found in rest])
        spread, bias = left_out.std(0), left_out.mean(0) - values(whole)
        expected = np.hypot(math.sqrt(8) * spread, 8 * bias)
        errors = (
            whole.curvature_data_stderr if name == "curvature" else table[f"{name}_data_stderr"]
        )
        np.testing.assert_allclose(errors, expected, rtol=1e-7)
    assert of(data[:7]).curvature_data_stderr.isna().all(axis=None)


def test_few_units_have_no_error_over_the_data():
    it = problem("gpt2")
    found = blockspec.directional(it.objective(), blockspec.partition(it.model), drawn(it.model))
    assert found.predicted.data_stderr is None
    assert found.predicted.stderr == 0.0
    assert found.predicted.total_stderr is None


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=1e-2),
        lambda p: torch.optim.Muon([q for q in p if q.dim() == 2], lr=1e-2),
    ],
    ids=["sgd", "adamw", "muon"],
)
def test_the_next_step_is_the_step_that_is_taken(make):
    it = problem("llama")
    objective = it.objective()
    parameters = objective.parameters()
    optimizer = make(list(parameters.values()))
    first = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        for _ in range(2):
            expected = directions.next_step(optimizer, objective)
            before = {name: p.detach().clone() for name, p in parameters.items()}
            assert all(p.grad is None for p in parameters.values())
            for name, gradient in objective.gradient().items():
                parameters[name].grad = gradient
            optimizer.step()
            it.model.zero_grad()
            for name, p in parameters.items():
                torch.testing.assert_close(p.detach() - before[name], expected[name])
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(first[name])


def test_difference_of_two_models_names_tied_weights_once():
    after, before = tiny_gpt2(seed=1), tiny_gpt2(seed=2)
    found = directions.difference(after, before)
    assert "lm_head.weight" not in found
    wte = after.transformer.wte.weight - before.transformer.wte.weight
    torch.testing.assert_close(found["transformer.wte.weight"], wte.detach())
    again = directions.difference(after.state_dict(), before)
    assert again.keys() == found.keys()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "how", [{}, {"per": "tensor"}, {"group": 4}, {"symmetric": False}], ids=str
)
def test_rounding_goes_to_the_nearest_of_the_levels(bits, how):
    torch.manual_seed(0)
    weight = torch.randn(6, 8, dtype=torch.float64)
    found = directions.rounded(weight, bits, **how)
    rows = (
        found.reshape(1, -1)
        if how.get("per") == "tensor"
        else found.reshape(-1, how.get("group", 8))
    )
    assert all(len(row.unique()) <= 2**bits for row in rows)
    error = (found - weight).abs().max()
    assert error <= weight.abs().max() / max(2 ** (bits - 1) - 1, 1)
    torch.testing.assert_close(directions.rounded(found, bits, **how), found)


def test_pruning_removes_the_smallest_weights():
    model = tiny_gpt2()
    found = directions.pruned(model, 0.25, include="*c_fc.weight")
    for name, change in found.items():
        weight = dict(model.named_parameters())[name].detach()
        gone = change != 0
        assert gone.sum() == round(0.25 * weight.numel())
        assert weight[gone].abs().max() <= weight[~gone].abs().min()


def test_critical_steps_of_a_quadratic_are_those_of_the_formula():
    model = torch.nn.Linear(4, 1, bias=False).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator, dtype=torch.float64)
    objective = blockspec.Objective(
        model, [(x, torch.randn(64, 1, dtype=torch.float64))], blockspec.losses.regression
    )
    step = {"weight": -objective.gradient()["weight"]}
    found = critical_steps(objective, blockspec.partition(model), step, precision=0.01)
    assert found.loc["all", "measured"] == pytest.approx(found.loc["all", "quadratic"], rel=0.012)
    up = {"weight": objective.gradient()["weight"]}
    assert critical_steps(objective, blockspec.partition(model), up).loc["all", "measured"] == 0


def test_sharpness_in_balls_against_all_corners_and_the_closed_form():
    torch.manual_seed(1)
    root = torch.randn(8, 8, dtype=torch.float64)
    matrix = root @ root.T  # convex: the best point is a corner
    operator = blockspec.FunctionOperator(lambda v: matrix @ v, 8)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 8)
    best = float(((corners @ matrix) * corners).sum(1).max())
    found = ball_sharpness(None, operator.block(), "max", restarts=12, curvature=operator)
    assert found.value <= best + 1e-9
    assert found.value >= 0.95 * best
    assert found.gap >= 0


def test_sharpness_in_the_spectral_ball_of_a_multiple_of_the_identity():
    """3 |d|^2 is 3 times the number of singular values where all of them are 1."""
    model = torch.nn.Linear(4, 3, bias=False).double()
    x = math.sqrt(3 * 4 * 3 / 2) * torch.eye(4, dtype=torch.float64)  # mean over 12 terms
    objective = blockspec.Objective(
        model, [(x, torch.zeros(4, 3, dtype=torch.float64))], blockspec.losses.regression
    )
    (block,) = blockspec.partition(model)
    matrix = blockspec.dense(objective, block)
    np.testing.assert_allclose(matrix, matrix[0, 0] * np.eye(12), atol=1e-12)
    found = ball_sharpness(objective, block, "spectral")
    assert found.value == pytest.approx(matrix[0, 0] * 3, rel=1e-9)
    values = torch.linalg.svdvals(found.direction.view(3, 4))
    torch.testing.assert_close(values, torch.ones(3, dtype=torch.float64))


def test_an_operator_of_ones_own_is_one_unit_of_data():
    """A matrix (the dense truth) that knows nothing of the data: the same numbers, no errors."""
    it = problem("resnet")
    objective, blocks = it.objective(), blockspec.partition(it.model, "layer")
    inner = Products(objective)
    own = types.SimpleNamespace(
        **{name: getattr(inner, name) for name in ("curvature", "objective", "parameters")},
        **{name: getattr(inner, name) for name in ("device", "ranks", "gradients", "products")},
        **{name: getattr(inner, name) for name in ("check", "sweep", "columns")},
    )
    direction = drawn(it.model)
    found = blockspec.directional(objective, blocks, direction, curvature=own)
    truth_ = blockspec.directional(objective, blocks, direction)
    np.testing.assert_allclose(found.gradient, truth_.gradient, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(found.curvature, truth_.curvature, rtol=1e-9, atol=1e-15)
    assert found.measured.value == pytest.approx(truth_.measured.value, rel=1e-9)
    assert found.units == 1
    assert found.predicted.data_stderr is None
