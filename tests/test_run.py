"""A run's folder: what is in it, and that a second call does only what is not done yet."""

import io
import json
import os
import shutil
import subprocess

import factories_for_runs as factories
import numpy as np
import pandas as pd
import pytest
import torch
from test_cli import invoke, run_arguments

import blockspec
from blockspec import (
    Objective,
    estimate_spectra,
    js0,
    js_distances,
    load_spectra,
    losses,
    partition,
)
from blockspec.engine.settings import EstimateSettings
from blockspec.model import identity
from blockspec.numerics.files import only_writer
from blockspec.products.curvature import Products
from blockspec.runs import record as records
from blockspec.runs import run as runs
from blockspec.runs.record import git_commit
from blockspec.runs.run import BlockSettings, RunSettings, measure
from blockspec.spectra.heterogeneity import DEFINITIONS

LOOKED_AT = (
    6  # losses to know a model by: of two batches, one example with slopes; three to cut it off
)


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
    plt.close("all")
    distances = pd.read_parquet(out / "heterogeneity.parquet")
    assert set(distances.columns) == {
        *("block", "other", "distance", "step", "definition", "js0", "js0_stderr"),
        *("distance_data_stderr", "js0_data_stderr", "label"),
    }
    assert set(distances["definition"]) == set(DEFINITIONS)
    assert "model" not in set(distances["block"])
    rows = distances[
        (distances["definition"] == "wasserstein") & (distances["block"] < distances["other"])
    ]
    plain = rows["distance"].mean()  # js0 is corrected for its bias
    assert abs(rows["js0"].iloc[0] - plain) <= 3 * rows["js0_stderr"].iloc[0]


def test_numbers_of_a_loaded_run_are_those_that_the_run_says(tmp_path):
    """The full matrix is a kind of its own in the table, and no block beside the others."""
    out = tmp_path / "run"
    run(out)
    table, loaded = table_of(out), load_spectra(out / "spectra.parquet")
    assert set(table.loc[table["block"] == "model", "kind"]) == {"full"}
    assert "full" not in set(table.loc[table["block"] != "model", "kind"])
    means = pd.read_parquet(out / "heterogeneity.parquet").groupby("definition")["js0"].first()
    for definition in DEFINITIONS:
        assert js0(loaded, definition).value == pytest.approx(means[definition], rel=1e-12)
    assert list(js_distances(loaded)) == list(loaded.parts) == list(loaded)[:-1]
    assert list(js_distances({"one": loaded["model"], "two": loaded["model"]})) == ["one", "two"]


@pytest.mark.slow
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
    assert factories.calls["loss"] <= 2 * LOOKED_AT


def test_a_second_call_measures_nothing_again(tmp_path):
    out, given = tmp_path / "run", checkpoints(tmp_path, [10, 20])
    run(out, "--checkpoints", given)
    before = {name: (out / name).read_bytes() for name in contents(out)}
    factories.reset()
    assert run(out, "--checkpoints", given).code == 0
    assert factories.calls["factory"] == 2  # their content is compared, whatever it is called
    assert factories.calls["loss"] <= 2 * LOOKED_AT
    assert {name: (out / name).read_bytes() for name in contents(out)} == before


@pytest.mark.slow
def test_a_run_goes_on_with_new_checkpoints(tmp_path):
    out = tmp_path / "run"
    run(out, "--checkpoints", checkpoints(tmp_path, [10, 30]))
    first = table_of(out)
    factories.reset()
    assert run(out, "--checkpoints", checkpoints(tmp_path, [10, 20, 30])).code == 0
    assert factories.calls["factory"] == 3  # two to compare
    both = table_of(out)
    assert set(both["step"]) == {10, 20, 30}
    pd.testing.assert_frame_equal(both[both["step"] != 20].reset_index(drop=True), first)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("state_every", ["0", "1000"])
@pytest.mark.parametrize("left", [5, 3, 0])
def test_a_killed_run_goes_on_and_gives_the_same_numbers(tmp_path, left, state_every):
    """Killed in each of the three sweeps of the second stage of two; with a state kept after every
    sweep it goes on within it.
    """
    given = checkpoints(tmp_path, [10, 20])
    run(tmp_path / "whole", "--checkpoints", given)
    whole = factories.calls["loss"]
    factories.reset()
    factories.calls["fail_at_loss"] = whole - left
    arguments = ("--checkpoints", given, "--state_every", state_every)
    killed = run(tmp_path / "killed", *arguments)
    assert killed.code != 0
    assert "killed on the way" in killed.err
    assert set(table_of(tmp_path / "killed")["step"]) == {10}
    factories.reset()
    assert run(tmp_path / "killed", *arguments).code == 0
    pd.testing.assert_frame_equal(table_of(tmp_path / "killed"), table_of(tmp_path / "whole"))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert factories.calls["factory"] == 2  # one to compare
    if left == 0:  # of three sweeps over two batches, two and the first half of the third
        done = whole // 2 + LOOKED_AT - factories.calls["loss"]
        assert done == (5 if state_every == "0" else 0)


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
    out = tmp_path / "run"
    assert run(out, "--blocks.exclude", "*c_attn*").code == 0
    assert contents(out) == ["run.json", "spectra.parquet"]
    assert invoke("show", str(out)).code == 0


@pytest.mark.slow
def test_the_full_matrix_alone_is_drawn_shown_and_compared(tmp_path):
    arguments = list(run_arguments(tmp_path / "run"))
    at = arguments.index("--blocks.include")
    arguments[at : at + 2] = ["--blocks.by", "model"]
    found = invoke(*arguments, "--plots", "true")
    assert found.code == 0, found.err
    assert "the full matrix\n" in found.out
    figures = {path.stem for path in (tmp_path / "run/figures").glob("*.png")}
    assert figures >= {"esd_by_block", "edges_by_block", "esd_full"}
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    both = [str(tmp_path / name) for name in ("run", "other")]
    compared = invoke("compare", *both, "--out", str(tmp_path / "both"))
    assert compared.code == 0, compared.err
    assert (tmp_path / "both/figures/comparison.png").exists()


def checkpoint(path, step):
    """A state dict at that path, of the model that drifts with the step; the path as an
    argument.
    """
    (made,) = factories.write_checkpoints(path.parent / f"made_{step}", [step])
    path.parent.mkdir(parents=True, exist_ok=True)
    made.rename(path)
    return str(path)


def files(out):
    return {name: (out / name).read_bytes() for name in contents(out)}


def refused(out, *arguments, naming):
    """The command ends with one line that names these, and changes nothing in the folder."""
    before = files(out)
    result = run(out, *arguments)
    assert result.code != 0
    for word in naming:
        assert word in result.err, result.err
    assert files(out) == before
    return result


def test_other_content_under_the_same_name_never_gives_the_old_number(tmp_path):
    """nanoGPT always writes ckpt.pt; trainings go on under the same name; folders of runs hold the
    same names.
    """
    out, of_a = tmp_path / "run", checkpoint(tmp_path / "a/ckpt.pt", 1)
    of_b = checkpoint(tmp_path / "b/ckpt.pt", 2)
    assert run(out, "--checkpoints", of_a).code == 0
    told = ("weights is", "a/ckpt.pt", "choose another --out")
    refused(out, "--checkpoints", of_b, naming=(*told, "b/ckpt.pt"))
    os.replace(checkpoint(tmp_path / "more/ckpt.pt", 3), of_a)
    refused(out, "--checkpoints", of_a, naming=told)


def test_numbered_checkpoints_of_another_training_are_refused(tmp_path):
    out = tmp_path / "run"
    given = [checkpoint(tmp_path / name / "checkpoint-100.pt", i) for i, name in enumerate("ab")]
    assert run(out, "--checkpoints", given[0]).code == 0
    refused(out, "--checkpoints", given[1], naming=("step 100", "weights is"))


@pytest.mark.slow
def test_a_glob_that_grows_in_front_is_refused_before_any_work(tmp_path):
    out = tmp_path / "run"
    second = checkpoint(tmp_path / "sub2/ckpt.pt", 2)
    assert run(out, "--checkpoints", second).code == 0
    checkpoint(tmp_path / "sub1/ckpt.pt", 1)
    refused(out, "--checkpoints", str(tmp_path / "sub?/ckpt.pt"), naming=("step 0", "sub1", "sub2"))
    os.rename(tmp_path / "sub1", tmp_path / "sub3")
    assert run(out, "--checkpoints", str(tmp_path / "sub?/ckpt.pt")).code == 0
    stages = json.loads((out / "run.json").read_text())["stages"]
    assert [stage["step"] for stage in stages] == [0, 1]
    assert stages[1]["checkpoint"].endswith("sub3/ckpt.pt")


def test_the_same_content_under_another_name_is_not_measured_again(tmp_path):
    out, given = tmp_path / "run", checkpoint(tmp_path / "a/step_7.pt", 1)
    assert run(out, "--checkpoints", given).code == 0
    os.rename(tmp_path / "a", tmp_path / "moved")
    factories.reset()
    assert run(out, "--checkpoints", str(tmp_path / "moved/step_7.pt")).code == 0
    assert factories.calls["loss"] <= LOOKED_AT


@pytest.mark.parametrize(
    ("changed", "naming"),
    [
        ({"weights": 1e-6}, "weights is"),
        ({"data": 1}, "data is"),
        ({"loss": 1.01}, "objective.loss is"),
        ({"heads": 1}, "objective."),
    ],
    ids=str,
)
def test_what_the_settings_do_not_say_is_compared_too(tmp_path, monkeypatch, changed, naming):
    """Weights, data, a mended loss and a model's code change behind the same command."""
    out, original = tmp_path / "run", factories.tiny
    assert run(out).code == 0

    def other(**arguments):
        model, batches, loss = original(**arguments)
        if "weights" in changed:
            with torch.no_grad():
                next(model.parameters())[0, 0] += changed["weights"]
        if "data" in changed:
            batches[1][0][0, 0] = (batches[1][0][0, 0] + 1) % 5
        if "loss" in changed:
            terms = loss.terms
            loss = losses.Loss(loss.outputs, lambda o, b: terms(o, b) * changed["loss"])
        if "heads" in changed:
            for module in model.modules():
                if hasattr(module, "n_head"):
                    module.n_head = changed["heads"]
        return model, batches, loss

    monkeypatch.setattr(factories, "tiny", other)
    refused(out, naming=(naming, "choose another --out"))


def test_further_checkpoints_on_other_data_are_refused(tmp_path, monkeypatch):
    out, original = tmp_path / "run", factories.tiny
    first, second = (checkpoint(tmp_path / f"step_{step}.pt", step) for step in (1, 2))
    assert run(out, "--checkpoints", first).code == 0

    def other(**arguments):
        model, batches, loss = original(**arguments)
        return model, batches[:1], loss

    monkeypatch.setattr(factories, "tiny", other)
    refused(out, "--checkpoints", second, naming=("other data", "needs a seed"))


@pytest.mark.slow
def test_a_table_that_was_deleted_is_made_again(tmp_path, caplog):
    out, given = tmp_path / "run", checkpoints(tmp_path, [10, 20])
    run(out, "--checkpoints", given)
    before = {name: pd.read_parquet(out / name) for name in contents(out) if "parquet" in name}
    (out / "heterogeneity.parquet").unlink()
    factories.reset()
    assert run(out, "--checkpoints", given).code == 0
    assert factories.calls["loss"] <= 2 * LOOKED_AT
    rows = table_of(out)
    rows[rows["step"] == 20].to_parquet(out / "spectra.parquet")
    assert run(out, "--checkpoints", given).code == 0
    assert "lacks the steps [10]" in caplog.text
    for name, table in before.items():
        found = pd.read_parquet(out / name)
        for step in (10, 20):
            pd.testing.assert_frame_equal(
                found[found["step"] == step].reset_index(drop=True),
                table[table["step"] == step].reset_index(drop=True),
            )


@pytest.mark.slow
def test_tables_of_another_run_are_not_merged(tmp_path):
    out, other = tmp_path / "run", tmp_path / "other"
    run(out)
    run(other, "--estimate.seed", "3")
    ours = (out / "spectra.parquet").read_bytes()
    foreign = (other / "spectra.parquet").read_bytes()
    (out / "spectra.parquet").write_bytes(foreign)
    refused(out, naming=("rows of step 0", "not those that run.json has recorded"))
    further = pd.read_parquet(other / "spectra.parquet").assign(step=7)
    pd.concat([pd.read_parquet(io.BytesIO(ours)), further]).to_parquet(out / "spectra.parquet")
    refused(out, naming=("[7]", "another run's table"))
    (out / "spectra.parquet").write_bytes(ours[:100])
    refused(out, naming=("spectra.parquet is damaged", "delete it"))
    (out / "spectra.parquet").write_bytes(foreign)
    (out / "run.json").unlink()
    refused(out, naming=("no run.json",))


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["announce_stage", "append_rows", "complete_stage"])
@pytest.mark.parametrize("after", [False, True])
def test_no_sweep_is_lost_between_the_estimate_and_the_record(tmp_path, monkeypatch, moment, after):
    """Ended just before or just after each thing that is written; all sweeps are safe, and the
    tables are the same.
    """
    run(tmp_path / "whole")
    out, original = tmp_path / "run", getattr(runs, moment)

    def ended(*arguments, **named):
        if after:
            original(*arguments, **named)
        raise RuntimeError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(runs, moment, ended)
        assert run(out).code != 0
    factories.reset()
    monkeypatch.setattr(Products, "_pass", lambda *_: pytest.fail("a sweep was made again"))
    monkeypatch.setattr(Products, "check", lambda *_: None)
    assert run(out).code == 0
    assert contents(out) == ["heterogeneity.parquet", "run.json", "spectra.parquet"]
    pd.testing.assert_frame_equal(table_of(out), table_of(tmp_path / "whole"))


def test_two_commands_into_one_folder(tmp_path):
    """The second one is refused, whether it asks for the same or for something else."""
    out = tmp_path / "run"
    with only_writer(out):
        for other in ((), ("--estimate.seed", "3")):
            refused(out, *other, naming=("another program is writing", "choose another --out"))
    assert run(out).code == 0


def test_the_content_of_a_stage_is_looked_at_once(tmp_path, monkeypatch):
    """The run, its states and the comparison of processes hand it down; hashing GPT-2 takes 0.6 s
    each time.
    """
    hashed, digest = [], identity.weights_digest
    monkeypatch.setattr(
        identity, "weights_digest", lambda model: hashed.append(model) or digest(model)
    )
    given = checkpoints(tmp_path, [10, 20])
    assert run(tmp_path / "run", "--checkpoints", given, "--state_every", "0").code == 0
    assert len(hashed) == 2
    assert hashed[0] is not hashed[1]
    objective = Objective(*factories.tiny())
    before = identity.identity_of(objective, (), {})
    with torch.no_grad():
        next(objective.model.parameters()).add_(1.0)
    assert identity.identity_of(objective, (), {})["weights"] != before["weights"]


@pytest.mark.slow
def test_a_folder_that_is_deleted_on_the_way_is_told(tmp_path):
    """The record would have steps that no table has."""
    out, given = tmp_path / "run", checkpoints(tmp_path, [10, 20])

    def deleting(label, done, total):
        if label == "step 20" and done == 4:
            shutil.rmtree(out)

    settings = RunSettings(
        "factories_for_runs:tiny",
        checkpoints=json.loads(given),
        blocks=BlockSettings(include="*ln_f*", full=False),
        estimate=EstimateSettings(num_probes=1, num_steps=2),
    )
    with pytest.raises(ValueError, match=r"has lost the steps \[10\] while the run was under way"):
        measure(settings, factories.tiny, out, progress=deleting)
    measure(settings, factories.tiny, out)
    assert set(table_of(out)["step"]) == {10, 20}


def test_nothing_is_written_through_a_symbolic_link(tmp_path):
    out, theirs = tmp_path / "run", tmp_path / "theirs.txt"
    theirs.write_text("kept")
    out.mkdir()
    for name in (".run.json.partial", f".spectra.parquet.{os.getpid()}.partial"):
        (out / name).symlink_to(theirs)
    assert run(out).code == 0
    assert theirs.read_text() == "kept"


def test_git_runs_nothing_that_the_folder_names(tmp_path, monkeypatch):
    """A repository's own configuration can name programs for fsmonitor and filters."""
    repository, mark = tmp_path / "repository", tmp_path / "mark"
    hostile = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main")

    def git(*arguments):
        subprocess.run(
            ["git", *hostile, *arguments], cwd=repository, check=True, capture_output=True
        )

    repository.mkdir()
    git("init")
    (repository / "file.txt").write_text("first")
    git("add", "file.txt")
    git("commit", "-m", "first")
    (repository / ".gitattributes").write_text("*.txt filter=theirs\n")
    git("config", "filter.theirs.clean", f"touch {mark}; cat")
    git("config", "core.fsmonitor", f"touch {mark}; true")
    (repository / "file.txt").write_text("other")
    monkeypatch.chdir(repository)
    found = git_commit()
    assert found is not None
    assert len(found) == 12
    assert not mark.exists()


def test_a_checkout_that_is_not_installed_knows_its_version(monkeypatch):
    def version(name):
        assert name != "blockspec"  # it has no metadata
        return "1"

    monkeypatch.setattr(records, "version", version)
    assert records.versions()["blockspec"] == blockspec.__version__
