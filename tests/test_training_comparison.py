"""Optimizers side by side: the rate is chosen on one seed, and compared on others."""

import json
import math
import pickle
from concurrent.futures import Executor, Future
from pathlib import Path

import pandas as pd
import pytest

from language_models.compare_optimizers import compare as compare_language
from language_models.models import ModelSettings
from language_models.train import DataSettings
from training import comparison
from training.comparison import ComparisonSettings, best_rates, compare
from training.trainer import TrainingSettings
from vision_models import models as vision
from vision_models import sources as vision_sources
from vision_models.compare_optimizers import compare as compare_vision

RATES = {"adam": (0.1, 0.2, 0.4), "sgd": (1.0, 2.0)}
SETTINGS = ComparisonSettings(rates=RATES, num_steps=20, measure_every=10, seeds=(1, 2, 3, 4))


class Here(Executor):
    """Runs what is submitted at once, in this process; ``pickled`` as if it had gone to another
    one.
    """

    def __init__(self, *, pickled: bool = False) -> None:
        self.pickled = pickled

    def submit(self, function, /, *arguments):
        if self.pickled:
            function, arguments = pickle.loads(pickle.dumps((function, arguments)))
        future = Future()
        future.set_result(function(*arguments))
        return future


def made_up_loss(settings: TrainingSettings) -> float:
    """Best at 0.2 for adam and at 2.0 for sgd; each seed has its own offset."""
    best = {"adam": 0.2, "sgd": 2.0}[settings.optimizer.name]
    offset = {"adam": 1.0, "sgd": 1.5}[settings.optimizer.name]
    return offset + abs(math.log(settings.optimizer.lr / best)) + 0.01 * settings.seed


@pytest.fixture
def trained(monkeypatch) -> list[TrainingSettings]:
    monkeypatch.setattr(comparison, "_pool", lambda settings: Here())
    monkeypatch.setattr(comparison, "draw", lambda *arguments: None)  # some seconds
    return []


def made_up(trained: list[TrainingSettings]):
    def train_one(settings: TrainingSettings, folder: Path) -> None:
        trained.append(settings)
        folder.mkdir(parents=True, exist_ok=True)
        if settings.optimizer.lr == 0.4:
            raise FloatingPointError("the loss became nan at step 3")
        lines = [{"step": 0, "loss": 9.0}, {"step": 0, "held_out_loss": 9.0}]
        lines += [{"step": 20, "held_out_loss": made_up_loss(settings)}]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    return train_one


def test_best_rates_are_compared_on_fresh_seeds(trained, tmp_path):
    table = compare(made_up(trained), SETTINGS, out=tmp_path).set_index("optimizer")
    assert table["lr"].to_dict() == {"adam": 0.2, "sgd": 2.0}
    assert table["mean"].to_dict() == {"adam": pytest.approx(1.025), "sgd": pytest.approx(1.525)}
    assert table["std"].tolist() == [pytest.approx(0.01 * (5 / 3) ** 0.5)] * 2
    assert table["at_edge_of_grid"].to_dict() == {"adam": False, "sgd": True}
    assert table["gap"].to_dict() == {"adam": 0.0, "sgd": pytest.approx(0.5)}
    asked = [
        (settings.optimizer.name, settings.optimizer.lr, settings.seed) for settings in trained
    ]
    tuning = [
        (name, lr, seed) for name, rates in RATES.items() for lr in rates for seed in (10, 11)
    ]
    assert asked == tuning + [
        (name, lr, seed) for name, lr in (("adam", 0.2), ("sgd", 2.0)) for seed in (1, 2, 3, 4)
    ]
    same = {(s.num_steps, s.schedule, s.optimizer.clip, s.optimizer.weight_decay) for s in trained}
    assert len(same) == 1


def test_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "_pool", lambda settings: Here())
    compare(made_up([]), SETTINGS, out=tmp_path)
    for name in ("trials", "optimizers", "curves"):
        pd.testing.assert_frame_equal(
            pd.read_parquet(tmp_path / f"{name}.parquet"), pd.read_csv(tmp_path / f"{name}.csv")
        )
    trials = pd.read_parquet(tmp_path / "trials.parquet")
    assert len(trials) == 10 + 8
    assert trials.query("lr == 0.4")["final_loss"].tolist() == [math.inf, math.inf]
    assert len(pd.read_parquet(tmp_path / "curves.parquet")) == 8 * 3
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [
        "optimizers.pdf",
        "optimizers.png",
    ]


def test_runs_that_diverged_are_not_repeated(trained, tmp_path):
    compare(made_up(trained), SETTINGS, out=tmp_path)
    again = []
    compare(made_up(again), SETTINGS, out=tmp_path)
    assert [s for s in again if s.optimizer.lr == 0.4] == []


def test_a_rate_that_one_seed_liked_by_luck_is_not_taken():
    losses = {(0.01, 10): 3.0, (0.01, 11): 3.6, (0.003, 10): 3.2, (0.003, 11): 3.2}
    trials = pd.DataFrame(
        [{"optimizer": "adam", "lr": lr, "final_loss": loss} for (lr, _), loss in losses.items()]
    )
    assert best_rates(trials) == {"adam": 0.003}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": (10, 1)}, r"none may be in both"),
        ({"seeds": ()}, r"both need one at least"),
        ({"tuning_seeds": ()}, r"both need one at least"),
        ({"rates": {}}, r"needs one learning rate at least"),
        ({"rates": {"adam": ()}}, r"needs one learning rate at least"),
    ],
)
def test_wrong_settings(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        compare(made_up([]), ComparisonSettings(**{**vars(SETTINGS), **changes}), out=tmp_path)


TINY = ComparisonSettings(
    rates={"adam": (0.01,), "sgd": (0.3,)},
    num_steps=12,
    measure_every=6,
    seeds=(1, 2),
    device="cpu",
    warmup=2,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compare_models", "model", "data", "chance"),
    [
        (
            compare_language,
            ModelSettings(num_layers=1, num_heads=2, width=8),
            DataSettings("embedded", 8, 4, 1),
            6.3,
        ),
        (
            compare_vision,
            vision.ModelSettings("digits_mlp", {"sizes": [64, 8, 10]}),
            vision_sources.DataSettings(held_out=8),
            2.5,
        ),
    ],
    ids=["language", "vision"],
)
def test_a_real_model(compare_models, model, data, chance, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparison, "_pool", lambda settings: Here(pickled=True))
    table = compare_models(out=str(tmp_path), model=model, data=data, comparison=TINY)
    assert table["count"].tolist() == [2, 2]
    assert (table["mean"] < chance).all()
    assert (tmp_path / "runs/sgd_lr0.3_seed2/step_000012/model.safetensors").is_file()
    assert "adam" in capsys.readouterr().out
