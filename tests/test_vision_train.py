"""Training of vision models: that it learns, goes on where it was stopped, and leaves checkpoints
to measure.
"""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

import blockspec
from training.checkpoints import list_checkpoints, read_record
from training.command import run_command
from training.log import read_log
from training.optimizers import OptimizerSettings, ScheduleSettings
from training.trainer import TrainingSettings
from vision_models import factories, models
from vision_models.data import ShuffledBatches, fixed_batches
from vision_models.digits import digits
from vision_models.models import ModelSettings
from vision_models.sources import DataSettings
from vision_models.train import number_right, train

CONFIGS = Path(__file__).parents[1] / "vision_models" / "configs"
SGD = OptimizerSettings(name="sgd", lr=0.05, momentum=0.9, weight_decay=5e-4)
RESNET = ModelSettings("digits_resnet", {"depth": 8, "width": 8})
VGG_WITH_DROPOUT = ModelSettings(
    "digits_vgg", {"stages": [[4], [4]], "dropout": 0.5, "batch_norm": True}
)
VIT = ModelSettings(
    "digits_vit", {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
)


def settings(**changes):
    defaults = {
        "num_steps": 12,
        "checkpoints": (0.0, 1.0),
        "state_every": 4,
        "log_every": 3,
        "device": "cpu",
        "tracker": "none",
        "optimizer": SGD,
        "schedule": ScheduleSettings(shape="steps", milestones=(8,)),
    }
    return TrainingSettings(**{**defaults, **changes})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps", "least"),
    [
        ("digits_resnet", 60, 0.9),
        ("digits_vgg", 120, 0.8),
        ("digits_mixer", 50, 0.8),
        ("digits_mlp", 200, 0.9),
    ],
)
def test_the_configs_of_the_digits_learn(name, steps, least, tmp_path, capsys):
    """A shortened run; the numbers of whole runs stand in the configs. At chance: 0.1."""
    arguments = [
        "--config",
        f"{CONFIGS}/{name}.yaml",
        "--out",
        str(tmp_path / "run"),
        "--training.tracker",
        "none",
    ]
    last = run_command(
        train, [*arguments, f"--training.num_steps={steps}", "--training.checkpoints", "[1.0]"]
    )
    record = read_record(last)
    assert record["accuracy"] > least
    assert record["model"]["name"] == name
    model, held_out = models.load(last).eval(), fixed_batches(digits("test"))
    sums, counts = zip(*(number_right(model, batch) for batch in held_out), strict=True)
    assert sum(counts) == 355
    assert int(sum(sums)) == round(record["accuracy"] * 355)


@pytest.mark.slow
def test_a_vit_learns(tmp_path):
    training = settings(
        num_steps=80, optimizer=OptimizerSettings(lr=5e-3), schedule=ScheduleSettings(warmup=10)
    )
    model = ModelSettings(
        "digits_vit", {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    )
    record = read_record(train(out=tmp_path / "run", model=model, training=training))
    assert record["accuracy"] > 0.8


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_understood_and_its_model_exists(path, monkeypatch):
    """Without its data and without training: what ``run_command`` hands to ``train``."""
    called = run_command(described, ["--config", str(path)])
    assert called["out"] == f"runs/{path.stem}"
    assert sorted(called["data"].__dict__) == sorted(DataSettings().__dict__)
    with torch.device("meta"):
        built = models.MODELS[called["model"].name](**called["model"].settings)
    assert sum(p.numel() for p in built.parameters()) > 0
    assert (
        called["training"].optimizer.lr
        == yaml.safe_load(path.read_text())["training"]["optimizer"]["lr"]
    )


def described(
    *, out: str, model: ModelSettings, data: DataSettings, training: TrainingSettings
) -> dict:
    return {"out": out, "model": model, "data": data, "training": training}


class Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(("model", "workers"), [(RESNET, 2), (VGG_WITH_DROPOUT, 0), (VIT, 0)])
def test_a_stopped_training_goes_on_to_the_same_weights(model, workers, tmp_path, monkeypatch):
    data = DataSettings(augment="shift", batch_size=32, workers=workers)
    whole = train(out=tmp_path / "whole", model=model, data=data, training=settings())

    original = ShuffledBatches.__call__

    def stopping(self, index):
        if index == 10:
            raise Killed
        return original(self, index)

    monkeypatch.setattr(ShuffledBatches, "__call__", stopping)
    with pytest.raises(Killed):
        train(out=tmp_path / "cut", model=model, data=data, training=settings())
    monkeypatch.undo()
    torch.rand(3)  # another process has other random numbers
    resumed = train(out=tmp_path / "cut", model=model, data=data, training=settings())
    states = [load_file(folder / "model.safetensors") for folder in (whole, resumed)]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    logs = [
        read_log(tmp_path / run).drop(columns="time", errors="ignore") for run in ("whole", "cut")
    ]
    assert logs[0].equals(logs[1])


def test_micro_batches_see_every_image_once(tmp_path, monkeypatch):
    asked, strides = [], set()
    original = ShuffledBatches.__call__

    def noting(self, index):
        asked.append(index)
        strides.add(self.stride)
        return original(self, index)

    monkeypatch.setattr(ShuffledBatches, "__call__", noting)
    train(
        out=tmp_path, model=RESNET, training=settings(num_steps=2, micro_batches=3, checkpoints=())
    )
    assert asked == list(range(6))
    assert strides == {1}  # as asked: else nothing is decoded ahead


def test_the_checkpoint_is_rebuilt_and_measured(tmp_path):
    last = train(
        out=tmp_path, model=RESNET, data=DataSettings(augment="shift"), training=settings()
    )
    first = list_checkpoints(tmp_path)[0]
    fresh = models.build(RESNET, seed=0).state_dict()
    torch.testing.assert_close(models.load(first).state_dict(), fresh, rtol=0, atol=0)
    assert not torch.equal(
        models.load(last).state_dict()["bn1.running_mean"], fresh["bn1.running_mean"]
    )
    model, batches, loss = factories.checkpoint(checkpoint=str(last), split="test", count=None)
    value = blockspec.Objective(model, batches, loss).value()
    assert value == pytest.approx(read_record(last)["held_out_loss"], rel=1e-5)
    other, _, _ = factories.digits(checkpoint=str(last), model="digits_vgg", count=20)
    torch.testing.assert_close(other.state_dict(), models.load(last).state_dict(), rtol=0, atol=0)
    _, batches, _ = factories.checkpoint(checkpoint=str(last), count=20)
    torch.testing.assert_close(
        batches[0], fixed_batches(digits("train"), count=20)[0], rtol=0, atol=0
    )


def write_image_folder(root):
    for split, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(("ant", "bee", "cat")):
            (root / split / name).mkdir(parents=True)
            for rank in range(count):
                pixels = np.random.default_rng((label, rank)).integers(
                    0, 80 * label + 90, (240, 300, 3), dtype=np.uint8
                )
                Image.fromarray(pixels).save(root / split / name / f"{rank}.JPEG")
    return DataSettings(
        "image_folder",
        str(root),
        test_split="val",
        classes=2,
        augment="imagenet",
        batch_size=4,
        workers=1,
    )


def write_saved_set(root):
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])}
    )
    generator = np.random.default_rng(0)
    pixels = [
        Image.fromarray(generator.integers(0, 256, (260, 250, 3), dtype=np.uint8)) for _ in range(8)
    ]
    rows = datasets.Dataset.from_dict({"image": pixels, "label": [0, 1] * 4}, features=features)
    datasets.DatasetDict({"train": rows, "test": rows.take(3)}).save_to_disk(root / "saved")
    return DataSettings("hub", str(root / "saved"), augment="cifar", batch_size=4)


@pytest.mark.parametrize(
    ("write", "held_out", "trained"), [(write_image_folder, 4, 12), (write_saved_set, 3, 8)]
)
def test_other_sources_are_trained_on_and_found_again(write, held_out, trained, tmp_path):
    mixer = {
        "width": 8,
        "depth": 1,
        "classes": 2,
        "token_hidden": 4,
        "channel_hidden": 4,
        "patch_size": 56,
    }
    data = write(tmp_path)
    last = train(
        out=tmp_path / "run",
        model=ModelSettings("mixer", mixer),
        data=data,
        training=settings(num_steps=3),
    )
    model, batches, loss = factories.checkpoint(
        checkpoint=str(last), split=data.test_split, count=None
    )
    assert sum(loss(model, batch)[1] for batch in batches) == held_out
    value = blockspec.Objective(model, batches, loss).value()
    assert value == pytest.approx(read_record(last)["held_out_loss"], rel=1e-5)
    _, batches, _ = factories.checkpoint(checkpoint=str(last), count=None)
    assert sum(len(y) for _, y in batches) == trained


def test_a_vit_is_saved_so_that_transformers_loads_it(tmp_path):
    last = train(out=tmp_path, model=VIT, training=settings())
    ours, theirs = models.load(last), AutoModelForImageClassification.from_pretrained(last)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    fresh = models.build(VIT, seed=0).state_dict()
    torch.testing.assert_close(
        models.load(list_checkpoints(tmp_path)[0]).state_dict(), fresh, rtol=0, atol=0
    )
    assert not torch.equal(ours.classifier.weight, fresh["classifier.weight"])


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    last = train(
        out=tmp_path / "run", model=RESNET, training=settings(num_steps=1, checkpoints=(1.0,))
    )
    other = shutil.copytree(last, tmp_path / "other")
    record = json.loads((other / "checkpoint.json").read_text())
    record["model"]["settings"]["depth"] = 14
    (other / "checkpoint.json").write_text(json.dumps(record))
    with pytest.raises(
        ValueError, match=r"weights of .*other do not fit its model .*digits_resnet.*'depth': 14"
    ):
        models.load(other)
    record["model"]["name"] = "os.system"
    (other / "checkpoint.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"no model 'os\.system'"):
        models.load(other)
    with pytest.raises(FileNotFoundError, match="no checkpoint of this trainer"):
        models.load(tmp_path)


def test_errors_are_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_command(train, ["--out", str(tmp_path), "--model.name", "alexnet"])
    assert exit_.value.code == 1
    assert capsys.readouterr().err.startswith("error: no model 'alexnet': there are vit,")
