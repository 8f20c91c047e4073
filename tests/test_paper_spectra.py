"""Reproductions of figures about spectra and about Adam against SGD: distances, patterns, gaps and
correlations.
"""

import json
import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch

from blockspec import partition
from blockspec.model.blocks import Block
from blockspec.spectra.collection import Spectra
from blockspec.spectra.spectrum import Spectrum
from language_models.models import ModelSettings as LanguageModel
from language_models.models import build as build_language
from paper import figure_1, figure_3, figure_4, figure_6, figure_7, table_1
from paper.distances import DEFINITIONS, RESOLVED, distances, heterogeneity, nearness, square, tidy
from paper.exhibit import Context
from paper.optimizers import ADAM, SGD, gaps, weight_matrices
from training.checkpoints import RECORD, list_checkpoints, read_record
from vision_models.models import ModelSettings as VisionModel
from vision_models.models import build as build_vision


def spectrum(name, nodes, *, residual=0.0, weights=None, probes=2, noise=0.0, seed=0):
    """A Lanczos result with given nodes; ``noise`` moves those of each probe."""
    rng = np.random.default_rng(seed)
    nodes = np.sort(
        np.asarray(nodes, float) * (1 + noise * rng.standard_normal((probes, len(nodes)))), axis=1
    )
    flat = (
        np.full(nodes.shape, 1 / nodes.shape[1])
        if weights is None
        else np.tile(weights, (probes, 1))
    )
    return Spectrum(
        block=Block(name=name, kind="mlp_in", layer=0, numel=1000),
        nodes=nodes,
        weights=flat,
        residuals=np.full(nodes.shape, residual),
        steps=np.full(probes, nodes.shape[1]),
        breakdown=np.zeros(probes, bool),
        orthogonality=np.zeros(probes),
        steps_error=np.zeros(probes),
        reorthogonalized=True,
        exact=False,
        curvature="hessian",
        dtype="float64",
        distribution="rademacher",
        seed=0,
    )


BULK = np.linspace(-1, 3, 12)


def test_equal_spectra_are_near_and_disjoint_ones_at_the_bound():
    found = Spectra([spectrum("a", BULK), spectrum("b", BULK), spectrum("c", BULK + 1000)])
    table = distances(found, RESOLVED)
    np.testing.assert_allclose(table, table.T)
    assert table.loc["a", "b"] == pytest.approx(0, abs=1e-12)
    assert table.loc["a", "c"] == pytest.approx(math.log(2), abs=1e-5)  # the tails of kernels meet


def test_places_of_nodes_that_lanczos_does_not_resolve_are_no_distance():
    nodes = 2.0 ** np.arange(12)
    fine = Spectra(
        [spectrum("a", nodes), spectrum("b", 2**0.5 * nodes)]
    )  # half a gap further, with the same moments but for that
    wide = np.full_like(fine["a"].nodes, np.inf)  # gaps between nodes that say nothing
    coarse = Spectra([replace(s, residuals=s.nodes, apart=wide) for s in fine.values()])
    assert (
        distances(coarse, RESOLVED).loc["a", "b"] < 0.05 * distances(fine, RESOLVED).loc["a", "b"]
    )
    one = Spectra(
        [fine["a"], coarse["b"]]
    )  # the pair is compared at the resolution of the coarser one
    assert distances(one, RESOLVED).loc["a", "b"] < 0.05 * distances(fine, RESOLVED).loc["a", "b"]


def test_resolved_distances_do_not_depend_on_the_scale_of_the_loss():
    parts = [
        spectrum("a", BULK, residual=0.1),
        spectrum("b", BULK**2, residual=0.1),
        spectrum("c", 3 * BULK, residual=0.2),
    ]
    small = [replace(s, nodes=s.nodes * 1e-8, residuals=s.residuals * 1e-8) for s in parts]
    np.testing.assert_allclose(
        distances(Spectra(small), RESOLVED),
        distances(Spectra(parts), RESOLVED),
        rtol=1e-6,
        atol=1e-9,
    )


def test_heterogeneity_has_the_error_of_its_probes():
    quiet, noisy = (
        Spectra([spectrum("a", BULK, noise=n), spectrum("b", 5 * BULK, noise=n, seed=1)])
        for n in (1e-6, 0.2)
    )
    for found, low, high in ((quiet, 0, 1e-4), (noisy, 1e-3, 1)):
        table = heterogeneity(found).set_index("definition")
        assert list(table.index) == list(DEFINITIONS)
        plain = distances(found, RESOLVED).loc["a", "b"]  # js0 is corrected for its bias
        assert abs(table.loc[RESOLVED, "js0"] - plain) <= 3 * table.loc[RESOLVED, "stderr"] + 1e-6
        assert low <= table.loc[RESOLVED, "stderr"] < high
    single = heterogeneity(
        Spectra([spectrum("a", BULK, probes=1), spectrum("b", 5 * BULK, probes=1)])
    )
    assert single["stderr"].isna().all()


def test_a_table_of_distances_comes_back_from_its_rows():
    table = distances(
        Spectra([spectrum(name, k * BULK) for k, name in enumerate("cab", start=1)]), RESOLVED
    )
    pd.testing.assert_frame_equal(square(tidy(table)), table, check_names=False)


def test_nearness_counts_the_pairs_that_are_farther():
    values = np.array([[0, 1, 4, 4], [1, 0, 4, 8], [4, 4, 0, 2], [4, 8, 2, 0]], float)
    table = pd.DataFrame(values, index=list("abcd"), columns=list("abcd"))
    assert nearness(table, [("b", "a")]) == (1 / 4, 1.0)
    assert nearness(table, [("b", "d")]) == (2.0, 0.0)
    assert nearness(table, [("a", "b"), ("a", "c")]) == (
        2.5 / 4,
        pytest.approx((4 + 0.5 * 2 + 1) / 8),
    )


PATHS = {kind: f"attn.c_attn.weight/{kind}" for kind in ("query", "key", "value")}
PATHS |= {
    "attn_out": "attn.c_proj.weight",
    "mlp_in": "mlp.c_fc.weight",
    "mlp_out": "mlp.c_proj.weight",
}
GPT2 = {
    f"h{l}.{kind}": f"transformer.h.{l}.{path}"
    for l in (0, 3, 7, 11)
    for kind, path in PATHS.items()
}
GPT2 = {"wte": "transformer.wte.weight", **GPT2}
GPT2_NAMES = list(GPT2)


def test_patterns_are_the_pairs_that_they_say():
    far = figure_4.first_and_rest(GPT2_NAMES)
    assert len(far) == 5 * 20
    assert ("wte", "h0.query") in far
    assert ("wte", "h0.value") not in far
    assert len(figure_4.query_and_key(GPT2_NAMES)) == 4
    late = figure_4.within_late_layers(GPT2_NAMES)
    assert len(late) == 2 * 15
    assert ("h7.query", "h7.mlp_out") in late
    nano = [f"h{l}.{kind}" for l in range(6) for kind in ("qkv", "ln_2", "mlp_out")]
    assert len(figure_4.second_norms(nano)) == 15
    assert figure_4.last_projections(["patch_embed", "blocks.0.qkv", "blocks.3.fc2", "head"]) == [
        ("blocks.3.proj", "blocks.3.fc2")
    ]


@pytest.mark.parametrize("models", [figure_4.SMALL, figure_4.PAPER_MODELS], ids=["small", "paper"])
def test_blocks_are_those_of_the_paper(models):
    found = {}
    for name, model in models.items():
        arguments, blocks = model.run.model_args, model.run.blocks
        with torch.device("meta"):
            if name in figure_4.GROUPS["language"]:
                network = build_language(
                    LanguageModel(**arguments["settings"]), vocabulary=512, window=64, end_token=0
                )
            else:
                network = build_vision(VisionModel(arguments["model"]))
        found[name] = len(partition(network, blocks.by, blocks.include, blocks.exclude))
    assert {name: found[name] for name in ("ViT", "GPT2-nano", "GPT2")} == {
        "ViT": 14,
        "GPT2-nano": 19,
        "GPT2": 25,
    }
    assert found["BERT"] == 15  # 16 with the head of the next sentence, which ours does not predict


def heat_maps(near, *, seeds=2):
    """Tables of figure 4 for one GPT2 in which the pairs ``near`` are near."""
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(seeds):
        values = pd.DataFrame(rng.uniform(0.3, 0.6, (25, 25)), index=GPT2_NAMES, columns=GPT2_NAMES)
        for i, j in combinations(GPT2_NAMES, 2):
            values.loc[i, j] = values.loc[j, i] = (
                0.01 if (i, j) in near or (j, i) in near else values.loc[i, j]
            )
        for definition in DEFINITIONS:
            rows.append(
                tidy(values.rename(index=GPT2, columns=GPT2)).assign(
                    model="GPT2", seed=seed, definition=definition
                )
            )
    js0 = pd.DataFrame(
        [
            {"model": "GPT2", "seed": s, "definition": d, "js0": 0.4, "width": 1.0}
            for s in range(seeds)
            for d in DEFINITIONS
        ]
    )
    return {"distances": pd.concat(rows), "js0": js0}


def test_heat_maps_are_judged_by_their_patterns():
    tables = heat_maps(figure_4.query_and_key(GPT2_NAMES))
    tables["patterns"] = figure_4.patterns(tables)
    findings = figure_4.judge(tables)
    verdicts = {}
    for finding in findings[:-1]:
        verdicts.setdefault(finding.claim, []).append(finding.verdict)
    assert verdicts == {
        "GPT2: wte and layer 0 except query and key are far from everything else": ["disagrees"]
        * 2,
        "GPT2: query and key of one layer are nearly alike": ["agrees"] * 2,
        "GPT2: within layers 7 and 11 all blocks are near": ["disagrees"] * 2,
    }
    (alike, _) = (finding.measured for finding in findings if "nearly alike" in finding.claim)
    assert "median distance 0.02" in alike
    assert "nearer than 100 %" in alike
    assert "GPT2 0.4 (0.4 at width 1)" in findings[-1].measured
    assert set(figure_4.draw(tables)) == {
        "figure_4_language_resolved",
        "figure_4_language_as_published",
    }


def stages(transformer_blocks, noise):
    """Tables of figure 1: two models at two stages with full spectra that are equal but for
    noise.
    """
    tables, losses = [], []
    for model, blocks in (("cnn", [1, 1]), ("transformer", transformer_blocks)):
        for step, fraction in ((0, 0.0), (10, 1.0)):
            parts = [
                spectrum(f"b{i}", scale * BULK, residual=0.01, noise=0.01, seed=i)
                for i, scale in enumerate(blocks)
            ]
            parts.append(spectrum("model", BULK + 3, residual=0.01, noise=noise, seed=len(model)))
            tables.append(Spectra(parts).to_frame(step=step).assign(model=model))
            losses.append(
                {"model": model, "step": step, "fraction": fraction, "held_out_loss": 1.0}
            )
    table, losses = pd.concat(tables, ignore_index=True), pd.DataFrame(losses)
    return {"spectra": table, "losses": losses, "stages": figure_1._stages(table, losses)}


@pytest.mark.parametrize(
    ("scale", "noise", "verdict"), [(100, 0.001, "agrees"), (1, 0.3, "disagrees")]
)
def test_full_spectra_are_alike_if_blocks_differ_more(tmp_path, scale, noise, verdict):
    tables = stages([1, scale], noise)
    (finding,) = figure_1.judge(tables)
    assert finding.verdict == verdict
    assert "0 %:" in finding.measured
    assert set(figure_1.draw(tables)) == {"figure_1"}
    settings = figure_3.Settings(cnn=("b0", "b1"), transformer=("b0", "b1"))
    blockwise = figure_3.measure(settings, Context(0, tmp_path, needed={"figure_1": tables}))
    verdicts = [finding.verdict for finding in figure_3.judge(blockwise)]
    assert len(verdicts) == len(DEFINITIONS) + 1
    assert set(verdicts) == {verdict}
    assert set(figure_3.draw(blockwise)) == {"figure_3"}


def test_stages_of_two_models_belong_together_though_their_steps_round_differently(
    tmp_path, monkeypatch
):
    def trained(config, out, *, stages, device):
        num_steps = 300 if "vgg" in config else 1500
        for stage in stages:
            checkpoint = out / f"step_{round(stage * num_steps):06d}"
            checkpoint.mkdir(parents=True)
            record = {
                "step": round(stage * num_steps),
                "fraction": round(stage * num_steps) / num_steps,
                "held_out_loss": 1.0,
            }
            (checkpoint / RECORD).write_text(json.dumps(record))
        return out

    def measured(config, checkpoints, out, *, device):
        found = Spectra(
            spectrum(name, BULK + 3, residual=0.01, noise=0.01) for name in ("a", "b", "model")
        )
        return pd.concat(
            [
                found.to_frame(step=read_record(path)["step"])
                for path in list_checkpoints(checkpoints)
            ]
        )

    monkeypatch.setattr(figure_1, "trained", trained)
    monkeypatch.setattr(figure_1, "measured", measured)
    tables = figure_1.measure(figure_1.Settings(stages=(0.0, 0.025, 1.0)), Context(0, tmp_path))
    assert list(tables["stages"]["fraction"]) == [0.0, 0.025, 1.0]
    assert list(tables["losses"]["step"]) == [0, 8, 300, 0, 38, 1500]


def runs(adam, sgd, *, first=2.0):
    """Runs of two seeds with these final losses."""
    return pd.DataFrame(
        [
            {
                "optimizer": name,
                "lr": 0.1,
                "at_edge_of_grid": False,
                "seed": seed,
                "first": first,
                "held_out": v,
                "training": v / 2,
            }
            for name, values in ((ADAM, adam), (SGD, sgd))
            for seed, v in enumerate(values, start=1)
        ]
    )


def test_the_gap_is_the_share_that_sgd_misses():
    assert gaps(runs([1.0, 0.5], [1.5, 0.5])).tolist() == [0.5, 0.0]
    assert gaps(runs([1.0, 1.0], [0.5, np.inf])).tolist() == [-0.5, 1.0]


def test_a_rank_correlation_has_an_interval():
    names = [f"model {i}" for i in range(8)]
    rng = np.random.default_rng(0)
    x = {name: i + 0.1 * rng.standard_normal(3) for i, name in enumerate(names)}
    same = figure_7.rank_correlation(x, x, 200, np.random.default_rng(1))
    assert same["models"] == 8
    assert same["spearman"] == pytest.approx(1)
    assert same["low"] > 0.8
    other = {name: rng.standard_normal(3) for name in names}
    unrelated = figure_7.rank_correlation(x, other, 200, np.random.default_rng(1))
    assert unrelated["low"] < unrelated["spearman"] < unrelated["high"]
    assert unrelated["low"] < 0 < unrelated["high"]


def test_weight_matrices_are_no_vectors_and_no_positions():
    assert weight_matrices(build_vision(VisionModel("digits_mlp"))) == [
        f"layers.{i}.weight" for i in range(4)
    ]
    vit = weight_matrices(build_vision(VisionModel("digits_vit", {"num_hidden_layers": 1})))
    assert vit[0] == "vit.embeddings.patch_embeddings.projection.weight"
    assert len(vit) == 1 + 6 + 1
    assert len(weight_matrices(build_vision(VisionModel("digits_vgg", {"batch_norm": True})))) == 6


def fine_tuned():
    """Tables of figure 6, made up."""
    js0 = pd.DataFrame(
        [
            {"model": model, "seed": 1, "definition": definition, "js0": value, "stderr": 0.01}
            for model, value in ((figure_6.FRESH, 0.4), (figure_6.PRETRAINED, 0.2))
            for definition in DEFINITIONS
        ]
    )
    ends = {
        figure_6.FRESH: runs([1.0, 1.01], [1.5, 1.51]),
        figure_6.PRETRAINED: runs([1.0, 1.01], [1.1, 1.11]),
    }
    trained = pd.concat([table.assign(model=model) for model, table in ends.items()])
    steps = pd.concat(
        [
            trained.assign(step=step, loss=trained["first"], held_out_loss=trained["held_out"])
            for step in (0, 5)
        ]
    )
    trials = trained.assign(tuning=True, final_loss=trained["held_out"])
    pairs = tidy(
        distances(Spectra([spectrum(n, k * BULK) for k, n in enumerate("ab", start=1)]), RESOLVED)
    )
    maps = pd.concat([pairs.assign(model=model, seed=1) for model in ends])
    return {"js0": js0, "runs": trained, "trials": trials, "curves": steps, "distances": maps}


def test_fine_tuning_is_judged_by_distances_and_gaps():
    tables = fine_tuned()
    findings = figure_6.judge(tables)
    assert [finding.verdict for finding in findings] == ["agrees"] * (len(DEFINITIONS) + 1)
    assert "fine-tuned 0.1005" in findings[-1].measured
    assert set(figure_6.draw(tables)) == {"figure_6_distances", "figure_6_training"}


@pytest.mark.slow
def test_table_1_and_figure_7_from_training_to_verdict(tmp_path):
    settings = table_1.Settings(
        models={"MLP": table_1.SMALL["MLP, c = 10"]},
        adam=(3e-3,),
        sgd=(0.1,),
        num_steps=4,
        seeds=(1, 2),
        images=16,
    )
    context = Context(0, tmp_path, needed={"figure_6": fine_tuned()}, device="cpu")
    tables = table_1.measure(settings, context)
    table = tables["table_1"].set_index("model")
    assert set(table.index) == {"MLP", "GPT2", "GPT2, fine-tuned"}
    assert table.loc["GPT2", "gap (held_out)"] == pytest.approx(0.5, abs=0.01)
    assert (table[list(DEFINITIONS)] > 0).all(axis=None)
    assert table.loc["MLP", f"{RESOLVED}, seeds"] > 0
    assert set(tables["overview"]["lr adam"]) == {
        "0.1",
        "0.003*",
    }  # the made-up ones, and the only one of its grid
    assert set(table_1.draw(tables)) == {"table_1_training"}
    assert len(table_1.judge(tables)) == len(DEFINITIONS) + 2
    found = figure_7.measure(
        figure_7.Settings(samples=50), replace(context, needed={"table_1": tables})
    )
    assert found["correlations"]["models"].tolist() == [3] * 2 * len(DEFINITIONS)
    assert set(figure_7.draw(found)) == {"figure_7"}
    assert [finding.verdict for finding in figure_7.judge(found)].count("agrees") <= 2 * len(
        DEFINITIONS
    )
