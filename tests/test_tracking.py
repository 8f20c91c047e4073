"""Eigenvalues followed through a training: against dense truth at every step, through crossings,
and without training noticing.
"""

import numpy as np
import pandas as pd
import problems
import pytest
import torch
from quadratics import objective_of
from test_integrations import SOME, assert_identical, held_out, state_of_everything, trainer

import blockspec
from blockspec import FunctionOperator, partition
from blockspec.figures.style import save
from blockspec.figures.tracking import tracked_eigenvalues
from blockspec.integrations import SpectrumCallback, TrackSettings, record
from blockspec.numerics.algorithms import run
from blockspec.numerics.tracking import errors, orthonormal, refine
from blockspec.runs.plotting import PlotSettings
from blockspec.runs.report import _tracking_figures, draw
from blockspec.toolbox.localisation import _of_entries, kinds_of, localised
from blockspec.toolbox.tracking import Tracking

CROSSING = np.linspace(0, 1, 40)


def crossing(t, *, size=50):
    """A symmetric matrix whose first eigenvalue falls from 5 to 3 while the second rises from 2 to
    6, in a frame that turns; and its eigenvalues, the largest first.
    """
    generator = np.random.default_rng(0)
    frame, turn = (generator.standard_normal((size, size)) for _ in range(2))
    q = np.linalg.qr(frame + 0.3 * t * turn)[0]
    values = generator.uniform(-1, 1, size)
    values[:2] = 5 - 2 * t, 2 + 4 * t
    return torch.from_numpy(q @ np.diag(values) @ q.T), np.sort(values)[::-1]


class Moving:
    """An operator whose matrix is whatever ``matrix`` is now."""

    def __init__(self, matrix):
        self.matrix = matrix
        self.operator = FunctionOperator(lambda v: self.matrix @ v, len(matrix))


@pytest.mark.parametrize(("k", "guards"), [(1, 1), (2, 1), (3, 2)])
def test_eigenvalues_are_followed_through_a_crossing(k, guards):
    moving = Moving(crossing(0)[0])
    tracker = blockspec.track(
        None, moving.operator.block(), k=k, guards=guards, look_again=0, curvature=moving.operator
    )
    for step, t in enumerate(CROSSING):
        moving.matrix, truth = crossing(t)
        tracker(step)
        rows = tracker.table.query("step == @step")
        np.testing.assert_allclose(rows["value"][: min(k, 2)], truth[: min(k, 2)], rtol=0.02)
    table = tracker.table.query("step > 0")
    assert table["products"].mean() <= 3 * k + guards + 1
    if k == 2:  # the crossing is seen: the first eigenvector was the second one before
        assert (table.query("rank == 1")["rank_before"] == 2).sum() == 1


def test_without_a_guard_the_crossing_would_be_missed():
    """What the guards are for."""
    moving = Moving(crossing(0)[0])
    block = moving.operator.block()
    tracker = blockspec.track(None, block, guards=0, look_again=0, curvature=moving.operator)
    for step, t in enumerate(CROSSING[:27]):
        moving.matrix, truth = crossing(t)
        tracker(step)
    assert truth[0] > 1.2 * tracker.table["value"].iloc[-1]


@pytest.mark.parametrize("which", ["largest", "magnitude", "smallest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_refined_pairs_are_as_good_as_their_residuals(which, dtype):
    matrix = crossing(0.3)[0].to(dtype)
    order = {"largest": np.positive, "magnitude": np.abs, "smallest": np.negative}[which]
    start = torch.randn(4, len(matrix), generator=torch.Generator().manual_seed(1), dtype=dtype)
    exact = np.linalg.eigvalsh(matrix.double())
    best = exact[np.argsort(-order(exact))]
    for rounds in (1, 3, 40):
        found = run(
            refine(start, 2, order, kept=3, tolerance=1e-4, max_rounds=rounds), lambda v: v @ matrix
        )
        assert found.vectors.shape == (3, len(matrix))
        assert found.rounds <= rounds
        identity = torch.eye(3, dtype=dtype)
        torch.testing.assert_close(found.vectors @ found.vectors.T, identity, atol=1e-5, rtol=0)
        distances = np.abs(exact[:, None] - found.values).min(0)
        assert (distances <= found.residuals).all()
    np.testing.assert_allclose(found.values[:2], best[:2], rtol=1e-5)
    assert found.products < len(matrix)


def test_refining_ends_in_an_invariant_space_and_with_a_matrix_of_zeros():
    matrix = torch.diag(torch.arange(6, dtype=torch.float64))
    found = run(
        refine(torch.eye(6).double()[4:], 1, np.positive, kept=2, tolerance=1e-9, max_rounds=9),
        lambda v: v @ matrix,
    )
    assert found.values.tolist() == [5, 4]
    assert found.products == 2
    zeros = run(
        refine(torch.eye(6).double()[4:], 1, np.positive, kept=2, tolerance=1e-9, max_rounds=9),
        lambda v: 0 * v,
    )
    assert zeros.values.tolist() == [0, 0]
    assert zeros.residuals.tolist() == [0, 0]


def test_orthonormal_leaves_out_what_adds_nothing():
    basis = torch.eye(5).double()[:2]
    rows = torch.tensor([[1, 2, 0, 0, 0], [1, 2, 3, 0, 0], [0, 0, 5, 0, 0], [0, 0, 0, 0, 0]])
    found = orthonormal(rows.double(), basis)
    torch.testing.assert_close(found, torch.eye(5).double()[2:3])


def test_what_is_missed_is_said(caplog):
    moving = Moving(crossing(0)[0])
    tracker = blockspec.track(
        None, moving.operator.block(), max_rounds=1, curvature=moving.operator
    )
    tracker(0)
    moving.matrix = moving.matrix.roll((7, 7), (0, 1))  # all eigenvectors at once
    tracker(1), tracker(2)
    table = tracker.table
    assert table["converged"].tolist() == [True, False, False]
    assert (table["error"] > 0.03 * table["value"].abs())[1:].all()
    assert (table["error"] <= table["residual"]).all()
    assert len(caplog.records) == 1
    assert "step 1, block 'matrix'" in caplog.text
    assert "after 1 rounds of products" in caplog.text
    assert "max_rounds" in caplog.text


def test_what_the_first_search_misses_is_said_apart(caplog):
    """It is bounded in products, and what follows may miss something too."""
    values = torch.linspace(0, 1, 3000, dtype=torch.float64)
    crowded = FunctionOperator(lambda v: values * v, len(values))
    tracker = blockspec.track(
        None, crowded.block(), tolerance=1e-7, max_rounds=2, curvature=crowded
    )
    tracker(0), tracker(1), tracker(2)
    first, later = (record.message for record in caplog.records)
    products = tracker.table["products"].iloc[0]
    assert "step 0, block 'matrix'" in first
    assert f"after {products} products of the first search" in first
    assert "rounds" not in first
    assert "step 1, block 'matrix'" in later
    assert "after 2 rounds of products" in later


def test_a_random_vector_finds_what_the_residual_cannot_see():
    """A direction that is exactly orthogonal to all that is followed."""
    values = torch.linspace(-1, 1, 200, dtype=torch.float64)
    values[:2] = torch.tensor([5.0, 4.0])
    found = {}
    for look_again in (0, 2):
        moving = Moving(torch.diag(values))
        tracker = blockspec.track(
            None, moving.operator.block(), look_again=look_again, curvature=moving.operator
        )
        for step in range(6):
            moving.matrix[150, 150] = 1.0 + 3 * step
            tracker(step)
        found[look_again] = tracker.table["value"].iloc[-1]
    assert found[0] == pytest.approx(5)
    assert found[2] == pytest.approx(16, rel=1e-3)


def train(it, steps, *, lr, each):
    """Trains a problem's model by SGD with momentum on its own batches."""
    optimizer = torch.optim.SGD(it.model.parameters(), lr=lr, momentum=0.9)
    for step in range(steps):
        each(step)
        total, terms = it.loss(it.model, it.batches[step % len(it.batches)])
        optimizer.zero_grad()
        (total / terms).backward()
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "lr", "every"), [("gpt2", 0.05, 1), ("resnet", 0.02, 1), ("gpt2", 0.05, 10)]
)
def test_within_two_percent_of_converged_lanczos_along_a_training(name, lr, every):
    it = problems.PROBLEMS[name]()
    objective = blockspec.Objective(it.model, it.batches[:1], it.loss)
    tracker = blockspec.track(objective, k=2, guards=2, every=every)
    whole = partition(it.model, "model")[0]
    exact = {}

    def each(step):
        tracker(step)
        if step % max(3, every):
            return
        found = blockspec.top_eigenpairs(
            objective, whole, 2, "largest", tolerance=1e-3, check=False, seed=7
        )
        exact[step] = found.values

    train(it, 31 if every == 1 else 71, lr=lr, each=each)
    table = tracker.table.pivot(index="step", columns="rank", values="value")
    truth = np.array(list(exact.values()))
    errors = np.abs(table.loc[list(exact)].to_numpy() - truth) / np.abs(truth)
    assert np.ptp(truth, axis=0).max() > 0.2 * truth.max()  # there is something to follow
    assert (errors <= 0.02).mean() >= 0.95
    assert tracker.table.query("step > 0")["products"].mean() < (10 if every == 1 else 14)


def test_a_layer_at_a_time_gives_the_same_for_both_matrices():
    """And shares each pass between them: a layer is built again once for all vectors."""
    tables = []
    for products in ("whole", "layerwise"):
        it = problems.nanogpt()
        optimizer = torch.optim.AdamW(it.model.parameters(), lr=1e-2)
        objective = blockspec.Objective(it.model, it.batches[:1], it.loss)
        tracker = blockspec.track(objective, k=2, optimizer=optimizer, products=products)
        for step in range(3):
            tracker(step)
            it.update(optimizer)
        tables.append(tracker.table.drop(columns=["overlap", "rank_before"]))
    pd.testing.assert_frame_equal(*tables, rtol=1e-5, atol=1e-8)


def test_training_does_not_notice():
    left = {}
    for tracked in (False, True):
        torch.manual_seed(1)
        it = problems.nanogpt(dropout=0.2)
        it.model.train()
        optimizer = torch.optim.AdamW(it.model.parameters(), lr=1e-2)
        tracker = blockspec.track(it.objective(), every=2) if tracked else lambda step: None
        for step in range(5):
            tracker(step)
            total, terms = it.loss(it.model, it.batches[0])
            (total / terms).backward()
            tracker(step)  # in the middle of an update too: gradients are left alone
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        left[tracked] = state_of_everything(it.model, optimizer)
    assert_identical(left[False], left[True])
    assert tracker.table["step"].tolist() == [0, 0, 2, 2, 4, 4]


@pytest.mark.slow
def test_several_blocks_share_the_passes_over_the_data(tmp_path):
    it = problems.problem("gpt2")
    blocks = partition(it.model, include=["*c_attn.weight/*", "*wpe.weight"])
    tracker = blockspec.track(it.objective(), blocks, k=2, curvature="ggn")
    scalars = tracker(0)
    before = tracker._operator.gradients
    tracker(1)
    rounds = tracker.table.query("step == 1")["rounds"].max()
    assert tracker._operator.gradients - before == len(it.batches) * rounds
    table = tracker.table
    for block in blocks:
        rows = table[(table["block"] == block.name) & (table["step"] == 1)]
        exact = blockspec.top_eigenpairs(it.objective(), block, 2, "largest", curvature="ggn")
        np.testing.assert_allclose(rows["value"], exact.values, rtol=0.02)
        assert scalars[f"track/ggn/{block.name}/1"] == pytest.approx(rows["value"].iloc[0])
    tracker.save(tmp_path)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "tracking.parquet"), table)
    assert len(pd.read_parquet(tmp_path / "localisation.parquet")) == 2 * 2 * len(blocks)


@pytest.mark.parametrize("batches", [1, 2])
def test_the_model_is_prepared_once_where_no_forward_pass_follows(batches, monkeypatch):
    """A kept graph needs no more; every other pass begins with the buffers that the first had."""
    it = problems.PROBLEMS["gpt2"]()
    tracker = blockspec.track(blockspec.Objective(it.model, it.batches[:batches], it.loss), k=2)
    tracker(0)
    with torch.no_grad():
        for parameter in it.model.parameters():
            parameter.mul_(1.2)
    prepared = blockspec.Objective.prepared
    calls = []
    monkeypatch.setattr(
        blockspec.Objective, "prepared", lambda self: calls.append(1) or prepared(self)
    )
    tracker(1)
    rounds = tracker.table.query("step == 1")["rounds"].max()
    assert rounds > 1
    assert len(calls) == (1 if batches == 1 else rounds)
    tracker._operator.forget()
    tracker._operator.sweep([(tracker.blocks[0], torch.ones(tracker.blocks[0].numel).double())])
    assert len(calls) == (2 if batches == 1 else rounds + 1)  # outside, each pass does it itself


def test_participation_by_kind():
    it = problems.problem("gpt2")
    whole = partition(it.model, "model")[0]
    parameters = it.objective().parameters()
    kinds = kinds_of(whole, it.objective(), parameters)
    matrices = partition(it.model, "matrix")
    assert set(kinds.names) == {block.kind for block in matrices}
    tensors = {name: torch.zeros_like(p) for name, p in parameters.items()}
    query = next(block for block in matrices if block.kind == "query")
    query.pieces[0].fill(tensors[query.parameters[0]], torch.full((query.numel,), 3.0).double())
    tensors["transformer.wpe.weight"][0, 0] = 4 * query.numel**0.5
    vector = torch.cat([tensors[name].flatten() for name in parameters])[None]
    spread = localised(vector, kinds)
    shares, within = spread.shares[0], spread.parts[0]
    found = dict(zip(kinds.names, zip(shares, within, strict=True), strict=True))
    assert found["query"] == pytest.approx((9 / 25, 1 / query.numel))
    assert found["position"] == pytest.approx((16 / 25, 1.0))
    assert found["norm"][0] == 0
    assert np.isnan(found["norm"][1])
    expected = (16 / 25) ** 2 + (9 / 25) ** 2 / query.numel
    assert spread.whole[0] == pytest.approx(expected)


def test_participation_of_a_block_that_cuts_tensors():
    """Its entries are asked one by one; a block of whole tensors gives the same by views."""
    it = problems.problem("gpt2")
    parameters = it.objective().parameters()
    generator = torch.Generator().manual_seed(0)
    for block in partition(it.model, "layer") + partition(it.model, "head", "*c_attn.weight/*"):
        kinds = kinds_of(block, it.objective(), parameters)
        vectors = torch.randn(2, block.numel, generator=generator).double()
        spread = localised(vectors, kinds)
        numbers = _of_entries(block, partition(it.model, "matrix"), parameters)
        assert set(numbers.names) == set(kinds.names)
        other = localised(vectors, numbers)
        order = [numbers.names.index(name) for name in kinds.names]
        np.testing.assert_allclose(spread.shares, other.shares[:, order], rtol=1e-12)
        np.testing.assert_allclose(spread.parts, other.parts[:, order], rtol=1e-12)
        fourth = vectors.pow(4).sum(1) / vectors.square().sum(1).square()
        np.testing.assert_allclose(spread.whole, fourth, rtol=1e-12)


@pytest.mark.parametrize("which", ["largest", "magnitude", "smallest"])
def test_errors_hold_where_the_guard_is_the_next_eigenpair(which):
    """Temple's bound, three times: against exact eigenvalues, for start vectors of all angles."""
    order = {"largest": np.positive, "magnitude": np.abs, "smallest": np.negative}[which]
    generator = np.random.default_rng(0)
    vectors = np.linalg.qr(generator.standard_normal((50, 50)))[0]
    exact = np.concatenate([[-6.0, -4, 3, 5], np.linspace(-1, 1, 46)])
    matrix = torch.from_numpy(vectors * exact @ vectors.T)
    best = np.argsort(-order(exact))
    smaller = 0
    for angle in (0.3, 0.1, 0.03):
        turned = vectors[:, best[:3]].T + angle * generator.standard_normal((3, 50)) / 50**0.5
        start = torch.from_numpy(turned)
        found = run(
            refine(start, 2, order, kept=3, tolerance=0.5, max_rounds=1), lambda v: v @ matrix
        )
        missed = np.abs(found.values - exact[best[:3]])[:2]
        assert (missed <= found.errors[:2]).all()
        smaller += (found.errors[:2] < 0.5 * found.residuals[:2]).sum()
    assert smaller > 0
    assert errors(np.array([2.0, 1.9]), [0.1, 0.2], 1, np.positive).tolist() == [0.1]  # no gap seen
    assert errors(np.array([2.0, 1.0]), [0.1], 1, np.positive).tolist() == [0.1]  # no guard
    assert errors(np.array([2.0, 1.0]), [0.1, 0.2], 1, np.positive) == pytest.approx([0.0375])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k is a whole number >= 1, got 0"),
        ({"which": "top"}, "which is one of"),
        ({"tolerance": 2}, "between 0 and 1"),
        ({"guards": -1}, "guards is a whole number >= 0"),
        ({"every": 0}, "every is a whole number >= 1"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Tracking(**settings)


def test_more_eigenvalues_than_parameters_are_refused():
    objective = objective_of({"a": torch.eye(3)})
    with pytest.raises(ValueError, match=r"k is at most the 3 parameters of block 'model', got 4"):
        blockspec.track(objective, k=4)


def test_the_figure_shows_values_thresholds_and_what_is_rough(tmp_path):
    table = pd.DataFrame(
        {
            "step": np.tile(np.arange(4), 2),
            "matrix": "hessian",
            "block": "model",
            "rank": np.repeat([1, 2], 4),
            "value": [1.0, 2, 3, 4, 0.5, 1, 1, 1],
            "error": 0.1,
            "converged": [True, True, False, True, True, True, True, True],
            "overlap": 0.9,
            "ipr": 0.01,
        }
    )
    course = pd.Series([3.0, 2.0], index=[0, 3])
    figure = tracked_eigenvalues(table, {"2/lr": 3.5, "falling": course})
    axes = figure.axes[0]
    dashed = [line for line in axes.lines if line.get_color() == "0.35"]
    assert [line.get_ydata()[0] for line in dashed] == [3.5, 3.0]
    assert {text.get_text() for text in axes.texts} == {"2/lr", "falling"}
    circles = [line for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert [line.get_xdata().tolist() for line in circles] == [[2]]
    assert save(figure, tmp_path, "tracking").stat().st_size > 10_000
    nested = tracked_eigenvalues(table, {"ggn": {"other": 1.0}, "hessian": {"own": 2.0}})
    assert {text.get_text() for text in nested.axes[0].texts} == {"own"}
    with pytest.raises(ValueError, match="no measurements"):
        tracked_eigenvalues(table[:0])


@pytest.mark.slow
def test_the_curvature_that_the_optimizer_sees_is_followed_beside(tmp_path):
    it = problems.nanogpt()
    optimizer = torch.optim.AdamW(it.model.parameters(), lr=1e-2)
    tracker = blockspec.track(it.objective(), optimizer=optimizer)
    for step in range(4):
        tracker(step)
        it.update(optimizer)
    tracker(4)
    table = tracker.table
    plain, preconditioned = table["matrix"].unique()
    assert (plain, preconditioned) == ("hessian", "preconditioned hessian (AdamW)")
    assert table[table["matrix"] == preconditioned]["step"].tolist() == [1, 2, 3, 4]
    whole = partition(it.model, "model")[0]
    p = blockspec.Preconditioner.from_optimizer(optimizer, it.model)
    exact = blockspec.top_eigenpairs(
        it.objective(), whole, 1, "largest", precondition=p, check=False, tolerance=1e-4
    )
    found = table[(table["matrix"] == preconditioned) & (table["step"] == 4)]["value"].iloc[0]
    assert found == pytest.approx(exact.values[0], rel=0.02)
    tracker.save(tmp_path)
    again = blockspec.track(it.objective(), optimizer=optimizer)
    again.go_on_from(tmp_path, 3)
    again(3)
    assert again.table["step"].tolist() == [0, 1, 1, 2, 2, 3, 3]
    assert len(tracked_eigenvalues(table, {preconditioned: {"38/lr": 3800.0}}).axes) == 6


@pytest.mark.slow
def test_curves_are_drawn_beside_spectra_where_their_blocks_are_asked_for(tmp_path):
    it = problems.problem("gpt2")
    blocks = partition(it.model, include="*c_attn.weight/*")
    record(tmp_path, 0, it.objective(), blocks, num_probes=1, num_steps=2, check=False)
    tracker = blockspec.track(it.objective(), curvature="ggn", check=False)
    tracker(0)
    tracker.save(tmp_path)
    assert {"tracking", "tails_by_block"} <= {path.stem for path in draw(tmp_path)}
    assert _tracking_figures(tmp_path, PlotSettings(include="*/query")) == {}


@pytest.mark.slow
def test_the_callback_follows_logs_and_writes(tmp_path):
    left = {}
    for track in (None, TrackSettings(every=2, examples=1, preconditioned=True)):
        it = trainer(tmp_path / str(track is None))
        out = tmp_path / "out"
        if track is not None:
            callback = SpectrumCallback(it, out, held_out(), fractions=(), blocks=SOME, track=track)
            it.add_callback(callback)
        it.train()
        left[track is None] = it.tracker.left
    assert_identical(left[True], left[False])
    table = pd.read_parquet(out / "tracking.parquet")
    assert table["step"].tolist() == [0, 2, 2, 4, 4]
    logged = [x for x in it.tracker.logged if "track/hessian/model/1" in x]
    assert [x["step"] for x in logged] == [0, 2, 4]
    values = table[table["matrix"] == "hessian"]["value"]
    assert [x["track/hessian/model/1"] for x in logged] == pytest.approx(values.tolist())
    assert (out / "localisation.parquet").exists()
    (out / "figures" / "tracking.png").unlink()
    assert [path.name for path in draw(out)] == ["tracking.png"]  # no spectra were asked for
    assert (out / "figures" / "tracking.png").exists()
    with pytest.raises(ValueError, match=r"no block matches include=nothing\*"):
        draw(out, PlotSettings(include="nothing*"))
    assert {"loss"} <= {key for x in it.tracker.logged for key in x}


@pytest.mark.parametrize("batches", [1, 2])
def test_both_matrices_share_the_passes_over_the_data(batches):
    it = problems.nanogpt()
    objective = blockspec.Objective(it.model, it.batches[:batches], it.loss)
    optimizer = torch.optim.AdamW(it.model.parameters(), lr=1e-2)
    tracker = blockspec.track(objective, optimizer=optimizer, check=False)
    for step in range(3):
        before = tracker._operator.gradients
        tracker(step)
        it.update(optimizer)
    rows = tracker.table.query("step == 2")
    assert len(rows) == 2
    passes = 1 if batches == 1 else batches * rows["rounds"].max()
    assert tracker._operator.gradients - before == passes
