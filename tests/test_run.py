"""A run's folder: what is in it, and that a second call does only what is not done yet."""

import json
import os

import factories_for_runs as factories
import numpy as np
import pandas as pd
import pytest
from test_cli import invoke, run_arguments

from blockspec import Objective, estimate_spectra, load_spectra, partition


@pytest.fixture(autouse=True)
def _counters():
    factories.reset()


def run(out, *arguments):
    return invoke(*run_arguments(out), *arguments)


def checkpoints(tmp_path, steps):
    return json.dumps(
        [str(path) for path in factories.write_checkpoints(tmp_path / "checkpoints", steps)]
    )


def contents(folder):
    return sorted(
        os.path.relpath(os.path.join(root, name), folder)
        for root, _, names in os.walk(folder)
        for name in names
    )


def table_of(out):
    return pd.read_parquet(out / "spectra.parquet")


def test_a_run_leaves_its_folder_and_nothing_else(tmp_path):
    out = tmp_path / "run"
    assert run(out).code == 0
    assert contents(out) == ["heterogeneity.parquet", "run.json", "spectra.parquet"]


def test_a_run_deletes_nothing_that_it_did_not_make(tmp_path):
    out = tmp_path / "run"
    theirs = [
        "step_00000008/model.safetensors",
        "step_0/notes.txt",
        "mine.txt",
        "step_0/state-of-play.safetensors",
    ]
    for name in theirs:
        (out / "state" / name).parent.mkdir(parents=True, exist_ok=True)
        (out / "state" / name).write_text("kept")
    (out / "state/step_0/state-0of1-0of2-00000003.safetensors").write_text(
        "of a killed run on two processes"
    )
    assert run(out).code == 0
    assert contents(out / "state") == sorted(theirs)


def test_run_json_says_what_was_run(tmp_path):
    out = tmp_path / "run"
    run(out, "--model_args.shift", "0.01", "--estimate.seed", "7")
    record = json.loads((out / "run.json").read_text())
    settings = record["settings"]
    assert settings["model"] == "factories_for_runs:tiny"
    assert settings["model_args"] == {"shift": 0.01}
    assert (settings["estimate"]["num_probes"], settings["estimate"]["num_steps"]) == (2, 3)
    assert record["seed"] == 7
    assert {"blockspec", "torch", "transformers", "numpy", "python"} <= set(record["versions"])
    assert isinstance(record["git_commit"], str | None)
    assert record["command"][1:] or record["command"]
    assert record["started"] <= record["finished"]
    (stage,) = record["stages"]
    assert stage["step"] == 0
    assert stage["model"] == {"class": "GPT", "parameters": 1032, "dtype": "torch.float64"}
    assert len(stage["data"]) == 2
    assert stage["seconds"] > 0
    model, batches, loss = factories.tiny(shift=0.01)
    assert stage["loss"] == pytest.approx(Objective(model, batches, loss).value(), rel=1e-12)


def test_the_numbers_are_those_of_the_python_interface(tmp_path):
    out = tmp_path / "run"
    run(out)
    model, batches, loss = factories.tiny()
    blocks = [
        *partition(model, include=["*c_attn*weight*", "*ln_f.weight"]),
        *partition(model, "model"),
    ]
    expected = estimate_spectra(
        Objective(model, batches, loss), blocks, num_probes=2, num_steps=3, seed=0
    )
    found = load_spectra(out / "spectra.parquet")
    assert list(found) == list(expected)
    for name in expected:
        np.testing.assert_array_equal(found[name].nodes, expected[name].nodes)
        np.testing.assert_array_equal(found[name].weights, expected[name].weights)


def test_tables_are_tidy(tmp_path):
    """One line of seaborn is enough for a figure of one's own."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    import seaborn

    out = tmp_path / "run"
    run(out)
    axes = seaborn.histplot(
        table_of(out), x="node", weights="weight", hue="kind", stat="density", bins=30
    )
    assert axes.has_data()
    plt.close(axes.figure)
    distances = pd.read_parquet(out / "heterogeneity.parquet")
    assert {"block", "other", "distance", "step", "definition", "js0", "js0_stderr"} == set(
        distances.columns
    )
    assert set(distances["definition"]) == {"jensen-shannon", "symmetrised-kl", "wasserstein"}
    assert "model" not in set(distances["block"])
    rows = distances[
        (distances["definition"] == "wasserstein") & (distances["block"] < distances["other"])
    ]
    assert rows["js0"].iloc[0] == pytest.approx(rows["distance"].mean(), rel=1e-9)


def test_stages_are_in_the_order_of_their_steps(tmp_path):
    out = tmp_path / "run"
    assert run(out, "--checkpoints", checkpoints(tmp_path, [100, 9, 20])).code == 0
    record = json.loads((out / "run.json").read_text())
    assert [stage["step"] for stage in record["stages"]] == [9, 20, 100]
    assert record["stages"][0]["checkpoint"].endswith("step_000009.pt")
    assert set(table_of(out)["step"]) == {9, 20, 100}
    assert len({stage["loss"] for stage in record["stages"]}) == 3


def test_globs_of_checkpoints(tmp_path):
    checkpoints(tmp_path, [10, 20])
    assert (
        run(
            tmp_path / "run", "--checkpoints", json.dumps([str(tmp_path / "checkpoints" / "*.pt")])
        ).code
        == 0
    )
    assert set(table_of(tmp_path / "run")["step"]) == {10, 20}


def test_a_single_pattern_needs_no_list(tmp_path):
    checkpoints(tmp_path, [10, 20])
    out, pattern = tmp_path / "run", str(tmp_path / "checkpoints" / "*.pt")
    assert run(out, "--checkpoints", pattern, "--blocks.exclude", "*ln_f*").code == 0
    found = table_of(out)
    assert set(found["step"]) == {10, 20}
    assert not found["block"].str.contains("ln_f").any()
    factories.reset()
    assert (
        run(out, "--checkpoints", json.dumps([pattern]), "--blocks.exclude", '["*ln_f*"]').code == 0
    )  # the same settings
    assert factories.calls["loss"] == 0


def test_a_second_call_does_nothing_again(tmp_path):
    out, given = tmp_path / "run", checkpoints(tmp_path, [10, 20])
    run(out, "--checkpoints", given)
    before = {name: (out / name).read_bytes() for name in contents(out)}
    factories.reset()
    assert run(out, "--checkpoints", given).code == 0
    assert (factories.calls["factory"], factories.calls["loss"]) == (0, 0)
    assert {name: (out / name).read_bytes() for name in contents(out)} == before


def test_a_run_goes_on_with_new_checkpoints(tmp_path):
    out = tmp_path / "run"
    run(out, "--checkpoints", checkpoints(tmp_path, [10, 30]))
    first = table_of(out)
    factories.reset()
    assert run(out, "--checkpoints", checkpoints(tmp_path, [10, 20, 30])).code == 0
    assert factories.calls["factory"] == 1
    both = table_of(out)
    assert set(both["step"]) == {10, 20, 30}
    pd.testing.assert_frame_equal(both[both["step"] != 20].reset_index(drop=True), first)


def test_checkpoints_without_numbers_keep_their_steps_or_are_refused(tmp_path):
    """A new one that sorts between two that are done would take the step of the second."""
    paths = factories.write_checkpoints(tmp_path, [1, 2, 3])
    named = [
        path.rename(tmp_path / f"{name}.pt")
        for path, name in zip(paths, ("early", "late", "middle"), strict=True)
    ]
    out = tmp_path / "run"
    assert run(out, "--checkpoints", json.dumps([str(named[0]), str(named[1])])).code == 0
    before = table_of(out)
    again = run(out, "--checkpoints", json.dumps([str(named[0]), str(named[2]), str(named[1])]))
    assert again.code != 0
    assert "step 1" in again.err
    assert "late.pt" in again.err
    pd.testing.assert_frame_equal(table_of(out), before)


@pytest.mark.parametrize("state_every", ["0", "1000"])
@pytest.mark.parametrize("share", [0.6, 0.8, 1.0])
def test_a_killed_run_goes_on_and_gives_the_same_numbers(tmp_path, share, state_every):
    """Killed within the second stage of two; with a state kept after every sweep it goes on within it."""
    given = checkpoints(tmp_path, [10, 20])
    run(tmp_path / "whole", "--checkpoints", given)
    whole = factories.calls["loss"]
    factories.reset()
    factories.calls["fail_at_loss"] = int(share * whole)
    arguments = ("--checkpoints", given, "--state_every", state_every)
    killed = run(tmp_path / "killed", *arguments)
    assert killed.code != 0
    assert "killed on the way" in killed.err
    assert set(table_of(tmp_path / "killed")["step"]) == {10}
    factories.reset()
    assert run(tmp_path / "killed", *arguments).code == 0
    pd.testing.assert_frame_equal(table_of(tmp_path / "killed"), table_of(tmp_path / "whole"))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert factories.calls["factory"] == 1
    if share == 1:  # two of three sweeps over two batches were done
        assert whole // 2 - factories.calls["loss"] == (4 if state_every == "0" else 0)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (("--estimate.num_probes", "3"), r"estimate.num_probes is 2 there, 3 here"),
        (("--model_args.shift", "0.5"), r"model_args.shift is None there, 0.5 here"),
        (("--blocks.by", "tensor"), r"blocks.by is 'matrix' there, 'tensor' here"),
        (("--dtype", "float32"), r"dtype is None there, 'float32' here"),
    ],
)
def test_a_folder_of_other_settings_is_refused(tmp_path, changed, named):
    out = tmp_path / "run"
    run(out)
    before = {name: (out / name).read_bytes() for name in contents(out)}
    refused = run(out, *changed)
    assert refused.code != 0
    assert named in refused.err
    assert "choose another --out" in refused.err
    assert {name: (out / name).read_bytes() for name in contents(out)} == before


def test_a_damaged_record_is_an_error(tmp_path):
    out = tmp_path / "run"
    run(out)
    (out / "run.json").write_text((out / "run.json").read_text()[:50])
    refused = run(out)
    assert refused.code != 0
    assert "run.json is damaged" in refused.err


def test_a_checkpoint_that_is_not_there_is_an_error(tmp_path):
    refused = run(tmp_path / "run", "--checkpoints", '["nowhere/step_*.pt"]')
    assert refused.code != 0
    assert "no checkpoint at 'nowhere/step_*.pt': give files, folders or globs" in refused.err


def test_the_model_is_converted_where_asked(tmp_path):
    run(tmp_path / "run", "--dtype", "float32")
    assert set(table_of(tmp_path / "run")["dtype"]) == {"float32"}


def test_the_full_matrix_can_be_left_out(tmp_path):
    run(tmp_path / "run", "--blocks.full", "false")
    assert "model" not in set(table_of(tmp_path / "run")["block"])


def test_one_block_alone_has_no_heterogeneity(tmp_path):
    assert run(tmp_path / "run", "--blocks.include", '["*ln_f.weight"]').code == 0
    assert contents(tmp_path / "run") == ["run.json", "spectra.parquet"]
    assert invoke("show", str(tmp_path / "run")).code == 0
