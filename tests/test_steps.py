"""The training step of a checkpoint: read where it is known, from clear names, else not at all."""

import json
from types import SimpleNamespace

import pytest
import torch

from blockspec.runs.settings import RunSettings
from blockspec.runs.stages import stages
from blockspec.runs.steps import step_of

NAMES = {
    "step_000100": 100,
    "step-7.pt": 7,
    "step143000": 143000,
    "step1000-unsharded": 1000,
    "checkpoint-500": 500,
    "checkpoint_500.safetensors": 500,
    "ckpt_25.pt": 25,
    "iter-002000-ckpt.pth": 2000,
    "global_step80": 80,
    "epoch=3-step=1500.ckpt": 1500,
    "epoch=3-step=1500-val_loss=0.31.ckpt": 1500,
    "update_12.tar.gz": 12,
    "000100.pt": 100,
    "250": 250,
    # numbers that are no steps
    "epoch=02-val_loss=0.32.ckpt": None,
    "epoch=10-val_loss=0.07.ckpt": None,
    "gpt2-final": None,
    "gpt2": None,
    "llama-3.2-1b": None,
    "model_v2.pt": None,
    "step_10k": None,
    "step_0.5": None,
    "lockstep5x": None,
    "final": None,
    "run2_best.pt": None,
}


@pytest.mark.parametrize(("name", "step"), NAMES.items(), ids=NAMES)
def test_steps_of_names(name, step, tmp_path):
    (tmp_path / name).mkdir()
    assert step_of(str(tmp_path / name)) == step


@pytest.mark.parametrize(
    ("file", "field"), [("trainer_state.json", "global_step"), ("checkpoint.json", "step")]
)
def test_a_folder_says_its_step_itself(tmp_path, file, field):
    folder = tmp_path / "checkpoint-500"
    folder.mkdir()
    (folder / file).write_text(json.dumps({field: 42}))
    assert step_of(str(folder)) == 42
    (folder / file).write_text("damaged")
    assert step_of(str(folder)) == 500


@pytest.mark.parametrize("field", ["global_step", "iter_num", "step"])
def test_a_file_says_its_step_itself(tmp_path, field):
    path = tmp_path / "epoch=02-val_loss=0.32.ckpt"
    torch.save({field: 1234, "state_dict": {"weight": torch.zeros(3)}}, path)
    assert step_of(str(path)) == 1234


def test_classes_in_a_file_are_not_made(tmp_path):
    """A pickle may run anything: it is left alone, and the name decides."""
    torch.save({"step": 3, "hyper_parameters": SimpleNamespace()}, tmp_path / "step_9.pt")
    assert step_of(str(tmp_path / "step_9.pt")) == 9


def order(folder, *names):
    for name in names:
        (folder / name).mkdir(exist_ok=True)
    given = [str(folder / name) for name in names]
    found = stages(RunSettings("a:b", checkpoints=given))
    return [(stage.step, stage.checkpoint.split("/")[-1], stage.label) for stage in found]


def test_known_steps_give_the_order(tmp_path):
    found = order(tmp_path, "step_10", "checkpoint-9", "000100")
    assert found == [(9, "checkpoint-9", None), (10, "step_10", None), (100, "000100", None)]


def test_where_one_is_not_known_the_order_is_the_given_one_with_labels(tmp_path):
    found = order(tmp_path, "step_10", "final", "best2")
    assert found == [(0, "step_10", "step_10"), (1, "final", "final"), (2, "best2", "best2")]


def test_equal_steps_are_told_apart_by_their_paths(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "step_5").mkdir(parents=True)
    given = [str(tmp_path / name / "step_5") for name in ("a", "b")]
    assert [s.label for s in stages(RunSettings("m:f", checkpoints=given))] == given


def test_globs_count_numbers_by_value(tmp_path):
    for name in ("epoch=10-loss=0.1", "epoch=2-loss=0.2", "epoch=1-loss=0.3"):
        (tmp_path / name).mkdir()
    found = stages(RunSettings("m:f", checkpoints=[str(tmp_path / "epoch*")]))
    assert [s.label for s in found] == ["epoch=1-loss=0.3", "epoch=2-loss=0.2", "epoch=10-loss=0.1"]


def test_a_path_that_is_not_there_names_those_like_it(tmp_path):
    (tmp_path / "step_10").mkdir()
    with pytest.raises(ValueError, match=r"no checkpoint at .*stp_10.*step_10"):
        stages(RunSettings("m:f", checkpoints=[str(tmp_path / "stp_10")]))
