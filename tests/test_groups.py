"""Many blocks: tables column by column, and distances between groups of blocks."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import blockspec
from blockspec import FunctionOperator, js0, js_distances, load_spectra
from blockspec.figures import plots
from blockspec.runs.tables import heterogeneity_of
from blockspec.spectra import heterogeneity, pairs
from blockspec.spectra.groups import MOST_COMPARED, MOST_MIXED, compared


def spectra_of_many(number, *, size=4, kinds=("query", "mlp_in"), layers=2):
    """Exact spectra of blocks of a diagonal matrix; their kinds and layers take turns."""
    values = torch.randn(number * size, generator=torch.Generator().manual_seed(0)).double()
    operator = FunctionOperator(lambda v: values * v, len(values))
    blocks = [
        replace(
            operator.block(i * size, (i + 1) * size),
            kind=kinds[i % len(kinds)],
            layer=i // len(kinds) % layers,
        )
        for i in range(number)
    ]
    return blockspec.estimate_spectra(None, blocks, 1, size, curvature=operator)


@pytest.fixture(scope="module")
def many():
    return spectra_of_many(MOST_COMPARED + 40)


def test_of_many_blocks_groups_are_compared_and_say_so(many):
    found = compared(many)
    each = len(many) // 4
    looked_at = len(range(0, each, -(-each // MOST_MIXED)))
    assert looked_at <= MOST_MIXED
    expected = [
        f"layer_{layer}.{kind} ({looked_at} of {each} blocks)"
        for layer in (0, 1)
        for kind in ("query", "mlp_in")
    ]
    assert list(found) == expected
    assert sum(s.block.numel for s in found.values()) == sum(s.block.numel for s in many.values())
    table = heterogeneity_of(many, step=0)
    assert table.groupby("definition").size().tolist() == [16] * 4
    assert set(table["block"]) == set(expected)


def test_few_blocks_are_compared_as_they_are(many):
    few = blockspec.Spectra(list(many.values())[:MOST_COMPARED])
    assert list(compared(few)) == list(few)


def test_where_kinds_and_layers_are_too_many_kinds_are_compared():
    spectra = spectra_of_many(MOST_COMPARED + 1, kinds=("query",), layers=MOST_COMPARED + 1)
    assert len(compared(spectra)) == 1
    assert next(iter(compared(spectra))).startswith("query (")


def test_a_group_is_the_mixture_of_its_blocks():
    spectra = spectra_of_many(MOST_COMPARED + 1, kinds=tuple(f"kind_{i}" for i in range(30)))
    for name, mixture in compared(spectra).items():
        kind, layer = mixture.block.kind, mixture.block.layer
        own = [s for s in spectra.values() if (s.block.kind, s.block.layer) == (kind, layer)]
        nodes = np.sort(np.concatenate([s.nodes[0] for s in own]))
        np.testing.assert_allclose(mixture.nodes[0], nodes)
        assert name.endswith(f"({len(own)} blocks)")


def test_tables_are_made_column_by_column(many, tmp_path, monkeypatch):
    """The number of tables that are made does not grow with the number of blocks."""
    made = []
    original = pd.DataFrame.__init__
    monkeypatch.setattr(
        pd.DataFrame, "__init__", lambda self, *a, **k: (made.append(1), original(self, *a, **k))[1]
    )
    counts = []
    for part in (list(many.values())[:10], list(many.values())):
        made.clear()
        table = blockspec.Spectra(part).to_frame()
        blockspec.spectra.collection.spectra_of(table)
        counts.append(len(made))
    assert counts[0] == counts[1]
    many.save(tmp_path / "many.parquet")
    assert (tmp_path / "many.parquet").stat().st_size < 400 * len(many) + 20_000
    again = load_spectra(tmp_path / "many.parquet")
    assert list(again) == list(many)
    pd.testing.assert_frame_equal(again.to_frame(), many.to_frame())


@pytest.mark.slow
def test_a_large_map_does_not_grow_with_its_cells(many, tmp_path):
    sizes = []
    for number in (60, 120):
        part = blockspec.Spectra(list(many.values())[:number])
        plots.save(plots.distance_heatmap(js_distances(part)), tmp_path, "map")
        sizes.append((tmp_path / "map.pdf").stat().st_size)
    assert max(sizes) < 300_000


@pytest.mark.slow
def test_the_mean_distance_of_many_blocks_is_that_of_a_sample_and_says_so(many):
    """The number of pairs that are looked at does not grow with the number of blocks; the stated
    error holds what the sample leaves out.
    """
    with pytest.warns(UserWarning, match=r"a random sample of 60 of the 240 blocks"):
        found = js0(many, max_blocks=60)
    truth = js0(many, max_blocks=None)
    assert truth.value == pytest.approx(mean_distance(many), rel=1e-9)
    assert truth.stderr == 0 < found.stderr
    assert abs(found.value - truth.value) < 3 * found.stderr
    errors = []
    for seed in range(30):
        chosen = np.random.default_rng(100 + seed).choice(len(many), 60, replace=False)
        part = blockspec.Spectra(list(many.values())[place] for place in chosen)
        errors.append(js0(part).value - truth.value)
    assert np.std(errors) == pytest.approx(found.stderr, rel=0.4)
    with pytest.raises(ValueError, match="max_blocks=2 is too few: at least 3"):
        js0(many, max_blocks=2)


def mean_distance(spectra):
    return js_distances(spectra).to_numpy()[np.triu_indices(len(spectra), 1)].mean()


def test_tables_of_very_many_pairs_are_announced_or_refused_before_the_work(many, monkeypatch):
    monkeypatch.setattr(heterogeneity, "_distances", lambda parts, *_: np.zeros((len(parts),) * 2))
    monkeypatch.setattr(pairs, "MOST_UNSAID", 100)
    for call in (js_distances, lambda spectra: js0(spectra, max_blocks=None)):
        with pytest.warns(UserWarning, match="of 240 blocks is 28,680 pairs.*groups.compared"):
            call(many)
    monkeypatch.setattr(pairs, "MOST_ENTRIES", 50_000)
    for call in (js_distances, lambda spectra: js0(spectra, max_blocks=None)):
        with pytest.raises(ValueError, match="57,600 numbers held at once, and at most 50,000"):
            call(many)
    few = blockspec.Spectra(list(many.values())[:40])
    js_distances(few)
    js0(few)
