"""The command line: what it prints, and how it fails."""

import json
import os
import re
import struct
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from unittest import mock

import factories_for_runs as factories
import numpy as np
import pandas as pd
import pytest
import torch
import transformers

import blockspec
from blockspec import js_distances, load_spectra
from blockspec.figures import plots
from blockspec.runs import cli, report
from blockspec.runs import factories as run_factories
from blockspec.runs import run as run_module
from blockspec.runs.report import duration
from blockspec.spectra.collection import read_table, spectra_of

Result = namedtuple("Result", ["code", "out", "err"])
TINY = "factories_for_runs:tiny"


def run_arguments(out):
    """A run of a few seconds' work in a fraction of one."""
    blocks = '["*c_attn*weight*", "*ln_f.weight"]'
    numbers = ("--estimate.num_probes", "2", "--estimate.num_steps", "3")
    without = ("--plots", "false", "--plan", "false")
    return (
        "run",
        "--model",
        TINY,
        "--out",
        str(out),
        "--blocks.include",
        blocks,
        *numbers,
        *without,
    )


def invoke(*arguments):
    """The command in this process: exit code, stdout, stderr."""
    import contextlib
    import io

    from rich.console import Console

    out, err = io.StringIO(), io.StringIO()
    code = 0
    console = Console(file=err, width=200)
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(cli, "console", console),
    ):
        try:
            cli.main(list(arguments))
        except SystemExit as stopped:
            code = stopped.code or 0
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run of two stages that is complete."""
    folder = tmp_path_factory.mktemp("done")
    factories.reset()
    paths = factories.write_checkpoints(folder / "checkpoints", [10, 20])
    given = "[" + ", ".join(f'"{path}"' for path in paths) + "]"
    assert invoke(*run_arguments(folder / "first"), "--checkpoints", given).code == 0
    assert (
        invoke(
            *run_arguments(folder / "second"), "--checkpoints", given, "--model_args.shift", "0.05"
        ).code
        == 0
    )
    return folder


def test_help_explains_every_setting(capsys):
    result = invoke("run", "--help")
    assert result.code == 0
    for setting in (
        "--model",
        "--out",
        "--config",
        "--checkpoints",
        "--blocks.by",
        "--estimate.num_steps",
        "--dtype",
    ):
        assert setting in result.out
    for word in (
        "Number of Lanczos steps of each probe",
        "Number of random start vectors",
        "default: 40",
        "module:function",
        "hessian, ggn (generalised Gauss-Newton), fisher",
    ):
        assert word in " ".join(result.out.split())


@pytest.mark.parametrize("command", ["run", "blocks", "sensitivity"])
def test_help_is_plain_text_without_the_marks_of_docstrings(command):
    words = invoke(command, "--help").out
    assert not re.findall(r"``|:(?:mod|func|class|meth):", words)


def test_help_names_the_commands():
    result = invoke("--help")
    assert result.code == 0
    assert cli.COMMANDS.keys() >= {"run", "plan", "plot", "compare", "show"}
    for command in cli.COMMANDS:
        assert command in result.out


def test_show_prints_what_was_found_and_where_it_is(done):
    result = invoke("show", str(done / "first"))
    assert result.code == 0
    for word in (
        "step 10",
        "step 20",
        "query",
        "value",
        "norm",
        "full",
        "jensen-shannon",
        "largest",
        "stderr",
    ):
        assert word in result.out, word
    assert str(done / "first") in result.out.replace("\n", "")


def test_a_run_prints_what_it_found_and_shows_its_progress(tmp_path):
    result = invoke(*run_arguments(tmp_path / "run"))
    assert "jensen-shannon" in result.out
    assert "products" in result.err


@pytest.mark.slow
def test_plot_draws_from_the_tables_alone(done):
    with mock.patch.object(
        run_factories, "find_factory", side_effect=AssertionError("no model is needed")
    ):
        result = invoke("plot", str(done / "first"))
    assert result.code == 0
    printed = [Path(line) for line in result.out.splitlines()]
    assert len(printed) >= 4
    for path in printed:
        assert path.suffix == ".png"
        assert path.stat().st_size > 1000
        assert path.with_suffix(".pdf").stat().st_size > 1000


@pytest.mark.slow
def test_plot_draws_what_is_asked_for(done):
    run = str(done / "first")
    assert invoke("plot", run, "--columns", "1", "--include", "*c_attn*").code == 0
    width, _ = struct.unpack(">II", (done / "first/figures/edges_by_block.png").read_bytes()[16:24])
    assert width == 670  # 3.35 inches of 200 dots
    wrong = invoke("plot", run, "--include", "nothing")
    assert wrong.code == 1
    assert "no block matches include=" in wrong.err


@pytest.mark.slow
def test_compare_sets_runs_side_by_side(done):
    result = invoke(
        "compare", str(done / "first"), str(done / "second"), "--out", str(done / "both")
    )
    assert result.code == 0
    assert "first" in result.out
    assert "second" in result.out
    assert (done / "both" / "comparison.parquet").exists()
    assert {path.name for path in (done / "both" / "figures").glob("*.png")} == {
        "comparison.png",
        "distances.png",
    }


@pytest.mark.parametrize(
    ("setting", "value", "word"),
    [("--estimate.curvature", "ggn", "matrix"), ("--blocks.by", "tensor", "partition")],
)
def test_runs_that_say_nothing_about_each_other_are_not_compared(
    done, tmp_path, setting, value, word
):
    assert invoke(*run_arguments(tmp_path / "other"), setting, value).code == 0
    folders = (str(done / "first"), str(tmp_path / "other"))
    result = invoke("compare", *folders, "--out", str(tmp_path / "both"))
    assert result.code == 1
    assert f"not of the same {word} (first: " in result.err
    assert not (tmp_path / "both").exists()


def test_figures_say_which_stages_they_show(done):
    drawn = {}
    with mock.patch.object(
        plots, "save", lambda figure, folder, name: drawn.update({name: figure})
    ):
        report.draw(done / "first")
    titles = {name: " ".join(figure.get_suptitle().split()) for name, figure in drawn.items()}
    for name in ("tails_by_block", "esd_by_block", "edges_by_block", "full_and_block_diagonal"):
        assert titles[name].startswith("step 20, the last of 2 Hessian"), name
    assert "dashed: step 10" in titles["esd_full"]
    table = pd.read_parquet(done / "first/heterogeneity.parquet")
    four = pd.concat([table.assign(step=table["step"] + i) for i in (0, 1)])
    figures = report._heterogeneity_figures(four, every_block=True)
    assert figures["distances"].get_suptitle() == "3 of 4 stages"


def test_compare_draws_the_distances_of_each_runs_first_step(done, tmp_path):
    drawn = {}

    def keep(figure, folder, name):
        drawn[name] = figure
        return folder / name

    with mock.patch.object(plots, "save", keep):
        report.compare([done / "first", done / "second"], tmp_path)
    maps = [axes for axes in drawn["distances"].axes if axes.get_title()]
    assert [axes.get_title() for axes in maps] == ["first, step 10", "second, step 10"]
    for axes, run in zip(maps, ("first", "second"), strict=True):
        table = read_table(done / run / "spectra.parquet")
        spectra = spectra_of(table[(table["step"] == 10) & (table["block"] != "model")])
        expected = js_distances(spectra).to_numpy()
        below = np.tril_indices(len(spectra), -1)
        np.testing.assert_allclose(
            axes.collections[0].get_array()[below], expected[below], rtol=1e-9
        )


def test_plan_prints_what_a_run_would_cost(tmp_path):
    result = invoke("plan", *run_arguments(tmp_path / "run")[1:])
    assert result.code == 0
    for word in ("products", "gradients"):
        assert word in result.out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_says_what_it_planned_and_how_it_came_out(tmp_path):
    """Products exactly; time and memory as they were measured."""
    result = invoke(*run_arguments(tmp_path / "run"), "--plan", "true")
    assert result.code == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (stage,) = record["stages"]
    batches = len(stage["data"])
    assert stage["planned"]["products"] == stage["cost"]["products"]
    assert stage["planned"]["products"] * batches == stage["cost"]["batch_products"]
    assert f"planned: {stage['planned']['products']} products" in result.err
    assert stage["planned"]["seconds"] > 0
    assert 0 < stage["planned"]["peak"] < 2 * stage["peak"]
    assert f"(planned {duration(stage['planned']['seconds'])})" in " ".join(result.out.split())


@pytest.mark.slow
def test_a_settings_file_and_later_arguments(tmp_path):
    config = tmp_path / "settings.yaml"
    config.write_text(
        f"model: {TINY}\nout: {tmp_path / 'run'}\nplots: false\n"
        "model_args:\n  tokens: 4\nestimate:\n  num_probes: 1\n  num_steps: 2\nblocks:\n  include: "
        "['*ln_f*']\n"
    )
    assert invoke("run", "--config", str(config), "--estimate.num_steps", "3").code == 0
    spectrum = load_spectra(tmp_path / "run" / "spectra.parquet")["transformer.ln_f.weight"]
    assert spectrum.nodes.shape == (1, 3)


def test_blocks_of_ones_own_from_a_settings_file(tmp_path):
    config = tmp_path / "settings.yaml"
    config.write_text(
        "blocks:\n  by:\n    attention: '*attn*'\n    rest: ['*w?e*', '*ln*', '*mlp*']\n"
    )
    arguments = list(run_arguments(tmp_path / "run"))
    at = arguments.index("--blocks.include")
    del arguments[at : at + 2]
    assert invoke(arguments[0], "--config", str(config), *arguments[1:]).code == 0
    assert list(load_spectra(tmp_path / "run" / "spectra.parquet")) == [
        "attention",
        "rest",
        "model",
    ]


BASE = ("run", "--model", TINY, "--plots", "false")
MISTAKES = {
    "no such module": (
        ("run", "--model", "nowhere:tiny", "--out", "OUT"),
        "no module 'nowhere' for the factory",
    ),
    "no such factory": (
        ("run", "--model", "factories_for_runs:large", "--out", "OUT"),
        "has no factory 'large'; it has",
    ),
    "no such argument of it": ((*BASE, "--out", "OUT", "--model_args.width", "3"), "width"),
    "too few arguments of it": (
        ("run", "--model", "factories_for_runs:mortal", "--out", "OUT"),
        "needs the argument 'dying_rank': give it as --model_args.dying_rank",
    ),
    "no out": (BASE, "out"),
    "no such option": ((*BASE, "--out", "OUT", "--estimate.steps", "3"), "steps"),
    "no number": ((*BASE, "--out", "OUT", "--estimate.num_steps", "some"), "num_steps"),
    "no steps": (
        (*BASE, "--out", "OUT", "--estimate.num_steps", "0"),
        "num_steps is a whole number >= 1",
    ),
    "no such curvature": ((*BASE, "--out", "OUT", "--estimate.curvature", "kfac"), "curvature"),
    "no such partition": (
        (*BASE, "--out", "OUT", "--blocks.by", "rows"),
        "'rows' is not one of tensor, matrix",
    ),
    "no such block": (
        (*BASE, "--out", "OUT", "--blocks.include", '["transformer.h.0.atn.*"]'),
        "matches no block; the nearest are",
    ),
    "no such dtype": ((*BASE, "--out", "OUT", "--dtype", "float65"), "dtype is one of ('float"),
    "no such device": ((*BASE, "--out", "OUT", "--device", "tpu9"), "device 'tpu9' cannot be used"),
    "no such command": (("draw", "OUT"), "there is no command 'draw'. The commands are run, plan"),
    "nearly a command": (("runn", "OUT"), "did you mean run?"),
    "nearly an option": ((*BASE, "--out", "OUT", "--blocks.exclud", "a"), "mean --blocks.exclude?"),
    "the beginning of an option": (
        (*BASE, "--out", "OUT", "--estimate.num_step", "3"),
        "mean --estimate.num_steps?",
    ),
    "no run to show": (("show", "OUT"), "is no run's folder"),
    "no run to plot": (("plot", "OUT"), "no table of spectra at OUT/spectra.parquet: there is no"),
    "no run to compare": (
        ("compare", "OUT", "OUT", "--out", "OUT"),
        "OUT is no run's folder: it has no run.json",
    ),
    "one run to compare": (("compare", "OUT", "--out", "OUT"), "at least 2 runs, got 1"),
    "no such settings file": (("run", "--config", "OUT/settings.yaml"), "settings.yaml"),
    "no such hugging face model": (("run", "--model", "OUT/model", "--out", "OUT"), "OUT/model"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_clear_line_and_a_code(tmp_path, arguments, message):
    out = str(tmp_path / "nothing")
    result = invoke(*(argument.replace("OUT", out) for argument in arguments))
    assert result.code not in (0, None)
    lines = [line for line in result.err.splitlines() if line.strip()]
    lines = [line for line in lines if "products" not in line]  # the progress bar
    assert len(lines) == 1, result.err
    assert lines[0].startswith("blockspec: error: ")
    assert message.replace("OUT", out) in lines[0]
    assert "Traceback" not in result.err
    assert "--debug shows where" not in result.err  # that is for what nobody foresaw


def test_a_checkpoint_that_does_not_load_is_named(tmp_path):
    fine, damaged = tmp_path / "step_1.pt", tmp_path / "step_2.pt"
    torch.save(factories.tiny()[0].state_dict(), fine)
    damaged.write_bytes(fine.read_bytes()[:1000])
    result = invoke(*BASE, "--out", str(tmp_path / "out"), "--checkpoints", f'["{damaged}"]')
    (line,) = [line for line in result.err.splitlines() if line.startswith("blockspec: error")]
    assert f"from the factory {TINY!r} with {str(damaged)!r}" in line


def test_the_version_is_printed():
    result = invoke("--version")
    assert result.code == 0
    assert result.out.strip() == f"blockspec {blockspec.__version__}"


@pytest.mark.parametrize("width", [60, 80])
def test_numbers_are_whole_in_a_narrow_terminal(done, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    wide, narrow = [], []
    monkeypatch.setattr(report, "print_frame", lambda _, frame, title: wide.append((frame, title)))
    report.show(done / "first")
    monkeypatch.undo()
    monkeypatch.setenv("COLUMNS", str(width))
    narrow = invoke("show", str(done / "first")).out
    assert "…" not in narrow
    rows = [line for line in narrow.splitlines() if line.split()[:1] in (["query"], ["value"])]
    assert len(rows) >= 4
    assert max(map(len, rows)) <= width
    for frame, title in wide:
        assert title in narrow
        for cell in frame.to_numpy().ravel():
            assert cell in narrow.split()


def test_show_says_what_was_measured(done):
    printed = invoke("show", str(done / "first")).out
    for line in (
        f"model  {TINY} (GPT, ",
        "matrix hessian",
        "blocks 4 by matrix, and the full matrix",
        "probes 2 a block, 3 steps a probe, seed 0",
        "data   2 batch(es)",
    ):
        assert line in printed


def test_debug_gives_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="num_steps is a whole number >= 1"):
        cli.main([*run_arguments(tmp_path / "run"), "--estimate.num_steps", "0", "--debug"])


def test_stopping_it_says_how_to_go_on(tmp_path):
    with mock.patch.object(run_module, "measure", side_effect=KeyboardInterrupt):
        result = invoke(*run_arguments(tmp_path / "run"))
    assert result.code == 130
    assert "goes on" in result.err


def command(*arguments, folder):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    }
    line = [sys.executable, "-m", "blockspec", *arguments]
    return subprocess.run(
        line, capture_output=True, text=True, cwd=folder, env=environment, timeout=900
    )


@pytest.mark.slow
def test_the_command_itself(tmp_path):
    """As a user calls it: a factory in the working folder, exit codes, nothing but one line on
    stderr.
    """
    (tmp_path / "mine.py").write_text("from factories_for_runs import tiny\n")
    arguments = [argument.replace(TINY, "mine:tiny") for argument in run_arguments("out")]
    good = command(*arguments, folder=tmp_path)
    assert good.returncode == 0, good.stderr
    assert (tmp_path / "out" / "spectra.parquet").exists()
    bad = command(*arguments, "--estimate.seed", "1", folder=tmp_path)
    assert bad.returncode == 1
    assert "estimate.seed is 0 there, 1 here" in bad.stderr
    assert "Traceback" not in bad.stderr


def save_tokenizer(folder, special):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*special.values(), *"abcdefgh"]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=special["unk_token"])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(
        folder
    )


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_hugging_face_folder(tmp_path, kind):
    """Its weights, its tokenizer and a text of one's own; causal and masked models find their
    loss.
    """
    torch.manual_seed(0)
    special = {"unk_token": "<unk>", "mask_token": "<mask>", "pad_token": "<pad>"}
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=8
        )
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    else:
        sizes = {
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
        }
        config = transformers.BertConfig(vocab_size=11, max_position_embeddings=8, **sizes)
        transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model", special)
    (tmp_path / "text.txt").write_text("a b c d e f g h " * 10)
    given = (
        "--model_args.text",
        str(tmp_path / "text.txt"),
        "--model_args.tokens",
        "8",
        "--model_args.num_batches",
        "2",
    )
    arguments = [a.replace(TINY, str(tmp_path / "model")) for a in run_arguments(tmp_path / "run")]
    norms = '["*ln_*.weight"]' if kind == "gpt2" else '["*LayerNorm.weight"]'
    arguments[arguments.index("--blocks.include") + 1] = norms
    result = invoke(*arguments, *given)
    assert result.code == 0, result.err
    assert all(
        spectrum.norm > 0
        for spectrum in load_spectra(tmp_path / "run" / "spectra.parquet").values()
    )
