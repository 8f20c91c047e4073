"""The training of language models as a command: what it leaves, killed and on two processes."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pandas as pd
import pytest
import torch
from jsonargparse import ArgumentParser
from launching import WITHOUT_GPU, accelerate
from transformers import AutoModelForCausalLM, AutoTokenizer

from language_models.data import prepare
from language_models.fresh import fresh
from language_models.loading import load_pretrained
from language_models.models import ModelSettings
from language_models.train import DataSettings, train
from training.checkpoints import list_checkpoints, read_record
from training.command import run_command
from training.log import read_log
from training.optimizers import OptimizerSettings
from training.trainer import TrainingSettings

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "language_models/configs").glob("*.yaml"))
SMALL = [
    "--model.num_layers=1",
    "--model.num_heads=2",
    "--model.width=16",
    "--data.num_tokens=16",
    "--data.batch_size=4",
]
QUICK = [*SMALL, "--data.held_out_batches=1", "--training.tracker=none", "--training.device=cpu"]


def command(*arguments: str, launcher: tuple[str, ...] = ("-m",)) -> subprocess.CompletedProcess:
    environment = {**os.environ, **WITHOUT_GPU, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    line = [sys.executable, *launcher, "language_models.train", *QUICK, *arguments]
    return subprocess.run(
        line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_a_run_from_a_file_with_overrides(tmp_path):
    config = str(ROOT / "language_models/configs/embedded_tiny.yaml")
    overrides = [
        "--out",
        str(tmp_path / "run"),
        "--training.num_steps=40",
        "--training.optimizer.lr=0.01",
    ]
    overrides += ["--training.checkpoints=[0,0.05,1]", "--track.every=20", "--track.examples=2"]
    last = run_command(train, ["--config", config, *QUICK, *overrides])
    assert last == tmp_path / "run/step_000040"
    record = read_record(last)
    assert record["training"]["optimizer"] == {
        **record["training"]["optimizer"],
        "name": "adamw",
        "lr": 0.01,
    }
    assert record["training"]["schedule"]["warmup"] == 50  # the file's
    assert (
        record["held_out_loss"] < read_record(tmp_path / "run/step_000000")["held_out_loss"] - 0.3
    )
    assert [read_record(path)["step"] for path in list_checkpoints(tmp_path / "run")] == [0, 2, 40]
    followed = pd.read_parquet(tmp_path / "run/tracking.parquet")
    assert followed["step"].tolist() == [0, 20, 40]
    assert read_log(tmp_path / "run")["track/hessian/model/1"].dropna().tolist() == pytest.approx(
        followed["value"].tolist()
    )
    model, report = AutoModelForCausalLM.from_pretrained(last, output_loading_info=True)
    assert not report["missing_keys"]
    assert model.lm_head.weight is model.transformer.wte.weight
    text = AutoTokenizer.from_pretrained(last)("The assert statement", return_tensors="pt")[
        "input_ids"
    ]
    assert model(text).logits.shape == (*text.shape, 512)
    assert model.generate(text, max_new_tokens=3, do_sample=False).shape[1] == text.shape[1] + 3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_understood(path):
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(train)
    settings = parser.instantiate_classes(parser.parse_args(["--config", str(path)]))
    assert settings.model.width % settings.model.num_heads == 0
    assert settings.out.startswith("runs/")


def test_the_124m_config_is_the_paper_s():
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(train)
    path = str(ROOT / "language_models/configs/gpt2_124m.yaml")
    found = parser.instantiate_classes(parser.parse_args(["--config", path]))
    training, optimizer, schedule = (
        found.training,
        found.training.optimizer,
        found.training.schedule,
    )
    assert found.data.num_tokens * found.data.batch_size * training.micro_batches == 491_520
    assert (optimizer.lr, optimizer.weight_decay, optimizer.betas, optimizer.clip) == (
        6e-4,
        0.1,
        (0.9, 0.95),
        1.0,
    )
    assert (schedule.warmup, schedule.final * optimizer.lr, training.num_steps) == (
        2000,
        pytest.approx(3e-5),
        100_000,
    )
    assert {0.001, 0.025, 0.05, 0.075, 0.1} <= set(training.checkpoints)


def test_help_explains_settings(capsys):
    with pytest.raises(SystemExit) as stopped:
        run_command(train, ["--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Windows in a micro-batch. (type: int, default: 16)" in shown
    assert "Share of activations dropped in training. (type: float, default: 0.0)" in shown


def test_an_error_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_command(
            train, ["--data.source", str(tmp_path / "absent"), "--out", str(tmp_path / "run")]
        )
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith(
        f"error: {tmp_path}/absent/train.bin does not exist: prepare it with"
    )
    assert not (tmp_path / "run").exists()
    with pytest.raises(FileNotFoundError):
        run_command(
            train,
            ["--debug", "--data.source", str(tmp_path / "absent"), "--out", str(tmp_path / "run")],
        )


def test_bert_learns_and_its_checkpoints_are_bert(tmp_path):
    settings = TrainingSettings(
        num_steps=40,
        checkpoints=(0.0, 1.0),
        device="cpu",
        tracker="none",
        optimizer=OptimizerSettings(lr=0.01),
    )
    model = ModelSettings(architecture="bert", num_layers=1, num_heads=2, width=16)
    last = train(
        out=str(tmp_path), model=model, data=DataSettings(num_tokens=16), training=settings
    )
    first = read_record(tmp_path / "step_000000")["held_out_loss"]
    assert read_record(last)["held_out_loss"] < first - 0.2
    assert json.loads((last / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]


def test_training_on_prepared_data_keeps_their_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text("a line of text to learn from\n" * 1000)
    source = prepare(
        str(tmp_path / "a.txt"), out=str(tmp_path / "data"), tokenizer="embedded", val_share=0.5
    )
    settings = TrainingSettings(num_steps=2, checkpoints=(1.0,), device="cpu", tracker="none")
    data = DataSettings(source=str(source), num_tokens=16, batch_size=4, held_out_batches=1)
    model = ModelSettings(num_layers=1, num_heads=2, width=16)
    last = train(out=str(tmp_path / "run"), model=model, data=data, training=settings)
    assert AutoTokenizer.from_pretrained(last).decode([17, 300]) == AutoTokenizer.from_pretrained(
        source / "tokenizer"
    ).decode([17, 300])


@pytest.mark.slow
def test_killed_training_goes_on_with_the_same_losses(tmp_path):
    """A real kill -9 in the middle of an update; dropout, so random numbers matter too."""
    arguments = [
        "--training.num_steps=14",
        "--training.state_every=4",
        "--training.log_every=2",
        "--model.dropout=0.2",
    ]
    program = f"""
        import os, signal, sys
        from language_models import train
        from language_models.batches import random_windows
        def killing(tokens, index, **rest):
            if index == 11:
                os.kill(os.getpid(), signal.SIGKILL)
            return random_windows(tokens, index, **rest)
        train.random_windows = killing
        train.run_command(train.train, {[*QUICK, *arguments, "--out", str(tmp_path / "cut")]!r})
    """
    line = [sys.executable, "-c", textwrap.dedent(program)]
    killed = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in (tmp_path / "cut/training_state").iterdir()] == ["step_00000008"]
    for run in ("cut", "whole"):
        run_command(train, [*QUICK, *arguments, "--out", str(tmp_path / run)])
    pd.testing.assert_frame_equal(read_log(tmp_path / "cut"), read_log(tmp_path / "whole"))
    weights = [
        (tmp_path / run / "step_000014/model.safetensors").read_bytes() for run in ("cut", "whole")
    ]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path):
    """Through accelerate launch, on CPU with gloo; masked tokens, whose number differs between the
    processes.
    """
    arguments = [
        "--model.architecture=bert",
        "--training.micro_batches=2",
        "--training.num_steps=4",
    ]
    done = command(*arguments, "--out", str(tmp_path / "two"), launcher=(*accelerate(2), "-m"))
    assert done.returncode == 0, done.stderr
    run_command(train, [*QUICK, *arguments, "--out", str(tmp_path / "one")])
    logs = [read_log(tmp_path / run) for run in ("one", "two")]
    torch.testing.assert_close(
        *(torch.tensor(log.fillna(0).to_numpy()) for log in logs), rtol=1e-5, atol=1e-6
    )
    for run, processes in (("one", 1), ("two", 2)):
        assert [read_record(path)["processes"] for path in list_checkpoints(tmp_path / run)] == [
            processes
        ] * 4


def test_fine_tuning_starts_from_the_weights_of_a_checkpoint(tmp_path):
    long = [
        "--out",
        str(tmp_path / "first"),
        "--training.num_steps=20",
        "--training.optimizer.lr=0.01",
    ]
    first = run_command(train, [*QUICK, *long])
    second = [
        "--out",
        str(tmp_path / "second"),
        "--start",
        str(first),
        "--training.num_steps=1",
        "--training.seed=5",
    ]
    run_command(train, [*QUICK, *second])
    fresh, start, end = (
        tmp_path / "first/step_000000",
        tmp_path / "second/step_000000",
        tmp_path / "second/step_000001",
    )
    losses = {path: read_record(path)["held_out_loss"] for path in (fresh, first, start, end)}
    assert losses[start] == losses[first] < losses[fresh]
    assert losses[end] != losses[start]
    with pytest.raises(
        ValueError, match=r"the weights of .* do not fit ModelSettings\(.*num_layers=2"
    ):
        train(
            out=str(tmp_path / "third"),
            model=ModelSettings(num_layers=2, num_heads=2, width=16),
            start=str(first),
        )


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_a_fresh_model_is_the_one_that_training_begins_with(tmp_path, architecture):
    shape = {"architecture": architecture, "num_layers": 1, "num_heads": 2, "width": 16}
    model, batches, loss = fresh(settings=shape, num_tokens=16, num_batches=2, batch_size=3, seed=4)
    training = TrainingSettings(
        num_steps=1, checkpoints=(0.0,), seed=4, tracker="none", device="cpu"
    )
    begun = train(
        out=str(tmp_path),
        model=ModelSettings(**shape),
        data=DataSettings(num_tokens=16),
        training=training,
    )
    weights = load_pretrained(
        str(begun), "masked" if architecture == "bert" else "causal"
    ).state_dict()
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    assert [batch["input_ids"].shape for batch in batches] == [(3, 16), (3, 16)]
    total, terms = loss(model, batches[0])
    assert abs(total.item() / terms - 6.24) < 0.3  # log 512
