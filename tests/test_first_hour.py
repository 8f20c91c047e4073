"""The first hour of four new users, with an installed wheel and in an empty folder: what they type,
and what they get.
"""

import os
import re
import shlex
import subprocess
import sys
import textwrap
import zipfile

import pytest
from test_readme import README, blocks_of
from test_wheel import build_wheel

pytestmark = pytest.mark.slow
CALL = "from blockspec.runs.cli import main; main()"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(build_wheel()).extractall(folder)
    return folder


@pytest.fixture
def python(installed, tmp_path):
    """Runs Python in an empty folder, where only the wheel is known; gives what it printed."""

    def call(*arguments, fails=False):
        environment = {**os.environ, "PYTHONPATH": str(installed), "COLUMNS": "80"}
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert (done.returncode != 0) == fails, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr if fails else done.stdout

    return call


@pytest.fixture
def blockspec(python):
    return lambda line, **settings: python("-c", CALL, *shlex.split(line), **settings)


LAUNCHER = """
    import os, socket, subprocess, sys

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    started = [
        subprocess.Popen([sys.executable, "several.py"], env={**os.environ, **names, "RANK": rank})
        for rank in "01"
    ]
    sys.exit(max(process.wait(200) for process in started))
"""


def script(folder, name, text):
    (folder / name).write_text(textwrap.dedent(text))
    return name


def test_a_student_with_a_small_model_of_their_own(python, blockspec, tmp_path):
    """README from its first line to the folder of a run."""
    factory, example = blocks_of(README)
    script(tmp_path, "first.py", factory)
    printed = python(script(tmp_path, "example.py", example))
    assert "heterogeneity 0.33 ± 0.01 nats" in printed
    (line,) = re.findall(r"^blockspec (.*first:tiny.*)$", README.read_text("utf-8"), re.MULTILINE)
    assert "did you mean --blocks.include?" in blockspec(
        line.replace("--incl", "--incul"), fails=True
    )
    shown = blockspec(line)
    assert "blocks 8 by matrix" in shown
    assert list((tmp_path / "runs/first/figures").glob("*.pdf"))
    same = """
        import numpy as np
        from blockspec import js0, load_run, load_spectra
        run, alone = load_run("runs/first"), load_spectra("spectra.parquet")
        assert all((run.last[name].nodes == alone[name].nodes).all() for name in alone)
        assert js0(run.last) == js0(alone)
        print(run.last[0].plot()._repr_png_()[1:4])
    """
    assert "PNG" in python(script(tmp_path, "same.py", same))


def test_somebody_who_fine_tunes_with_a_trainer(python, blockspec, tmp_path):
    """A callback in their script; then its checkpoints, whose model has 16 positions."""
    training = """
        import torch, transformers
        from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
        from tokenizers import Tokenizer, models, pre_tokenizers
        from blockspec.engine.settings import EstimateSettings
        from blockspec.integrations import SpectrumCallback
        from blockspec.runs.settings import BlockSettings

        words = Tokenizer(models.WordLevel({w: i for i, w in enumerate("uabcdefgh")}, unk_token="u"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, unk_token="u", pad_token="u"
        )
        sizes = {"vocab_size": 9, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
        model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
        rows = [{"input_ids": row, "labels": row} for row in torch.randint(9, (8, 16))]
        arguments = TrainingArguments(
            "output", max_steps=2, save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True
        )
        trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
        batches = [{"input_ids": torch.stack([row["input_ids"] for row in rows])}]
        blocks = BlockSettings(include="*c_attn.weight*")
        quick = EstimateSettings(num_probes=1, num_steps=2)
        callback = SpectrumCallback(trainer, "spectra", batches, blocks=blocks, estimate=quick)
        trainer.add_callback(callback)
        trainer.train()
        print(sorted(trainer.state.log_history[-1]))
    """
    python(script(tmp_path, "training.py", training))
    assert "blocks 3 of a list of one's own, and the full matrix" in blockspec("show spectra")
    (tmp_path / "text.txt").write_text("a b c d e f g h " * 50)
    given = "--model output/checkpoint-2 --checkpoints output/checkpoint-1 output/checkpoint-2"
    given += " --model_args.text text.txt --include *attn*weight* --num_probes 1 --num_steps 2"
    printed = blockspec(f"run {given} --out run --plots false")
    assert "step 1: loss" in printed
    assert "step 2: loss" in printed
    near = blockspec("plan --model ./output/chekpoint-2", fails=True)
    assert "folders like it: output/checkpoint-2" in near


def test_a_user_of_several_processes(python, tmp_path):
    """``if rank == 0`` around a call that all processes have to make."""
    program = """
        import torch
        import torch.distributed as dist
        import blockspec
        from blockspec.integrations import record, recording

        recording.PATIENCE = recording.wait_for_all.__defaults__ = (5.0,)
        dist.init_process_group("gloo")
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        batches = [(torch.eye(3), torch.ones(3, 2)), (2 * torch.eye(3), torch.ones(3, 2))]
        objective = blockspec.Objective(model, batches, blockspec.losses.regression)
        blocks = blockspec.partition(model)
        record("run", 0, objective, blocks, num_probes=1, num_steps=2)
        if dist.get_rank() == 0:
            try:
                record("run", 1, objective, blocks, num_probes=1, num_steps=2)
            except ValueError as error:
                print("told:", error, flush=True)
        dist.barrier()
    """
    script(tmp_path, "several.py", program)
    script(tmp_path, "launch.py", LAUNCHER)
    printed = python("launch.py")
    assert "told: record of step 1: process 0 has waited 5 s for the processes [1] of 2" in printed
    assert (tmp_path / "run/spectra.parquet").exists()


def test_somebody_who_compares_and_reads_the_results_of_others(python, blockspec, tmp_path):
    factories = """
        import torch, blockspec

        def model(*, width: int = 4, scale: float = 1.0):
            torch.manual_seed(0)
            net = torch.nn.Sequential(
                torch.nn.Linear(3, width), torch.nn.Tanh(), torch.nn.Linear(width, 1)
            )
            with torch.no_grad():
                net[0].weight.mul_(scale)
            return net, [(torch.eye(3), torch.ones(3, 1))], blockspec.losses.regression
    """
    script(tmp_path, "mine.py", factories)
    rest = "--num_steps 3 --num_probes 2 --plots false --model mine:model"
    blockspec(f"run {rest} --out adam")
    blockspec(f"run {rest} --out sgd --model_args.scale 2")
    blockspec(f"run {rest} --out ggn --curvature ggn")
    compared = blockspec("compare adam sgd --out both")
    assert "matrix hessian" in compared
    assert (tmp_path / "both/figures/comparison.png").exists()
    assert "not of the same matrix" in blockspec("compare adam ggn --out wrong", fails=True)
    read = """
        import pandas as pd
        from blockspec import js0, load_spectra
        table = pd.read_parquet("adam/spectra.parquet")
        assert list(table[table.block == "model"].kind.unique()) == ["full"]
        saved = pd.read_parquet("adam/heterogeneity.parquet")
        said = saved[saved.definition == "jensen-shannon"].js0.iloc[0]
        assert abs(js0(load_spectra("adam")).value - said) < 1e-12
    """
    python(script(tmp_path, "read.py", read))
