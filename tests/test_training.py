"""The trainer: against a bare loop of PyTorch, and against itself after being stopped."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from blockspec.integrations import TrackSettings
from blockspec.optim import AdaHessian
from training.checkpoints import due_steps, list_checkpoints, read_record, write_checkpoint
from training.following import follower
from training.log import read_log
from training.optimizers import (
    OptimizerSettings,
    ScheduleSettings,
    make_optimizer,
    parameter_groups,
    share_of_peak,
)
from training.state import latest_state, save_state
from training.trainer import TrainingSettings, mean_loss, train

SETTINGS = TrainingSettings(
    num_steps=12,
    checkpoints=(0.0, 0.5, 1.0),
    state_every=4,
    log_every=3,
    device="cpu",
    tracker="none",
    optimizer=OptimizerSettings(lr=0.01),
    schedule=ScheduleSettings(warmup=3),
)


def make_model(*, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)).double()


def batch_at(index: int, *, size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Batches of unequal sizes: a mean over batch means is not the mean over examples."""
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(size or 2 + index % 3, 5, dtype=torch.float64, generator=generator)
    return x, torch.randint(3, (len(x),), generator=generator)


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, int]:
    terms = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return terms.sum(), len(terms)


def losses(out) -> pd.Series:
    log = read_log(out)
    return log.dropna(subset="loss").set_index("step")["loss"]


def bare_losses(
    optimizer: torch.optim.Optimizer, model: nn.Module, *, clip: float, rates: list[float]
) -> list[float]:
    found = []
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        x, y = batch_at(step)
        value = nn.functional.cross_entropy(model(x), y)
        getattr(optimizer, "backward", torch.Tensor.backward)(value)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        found.append(value.item())
    return found


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adahessian"])
def test_losses_are_those_of_a_bare_loop(name, tmp_path):
    chosen = OptimizerSettings(
        name=name, lr=0.1, weight_decay=0.2, clip=0.3, spatial_averaging="rows"
    )
    settings = dataclasses.replace(
        SETTINGS, optimizer=chosen, schedule=ScheduleSettings(shape="constant")
    )
    train(make_model(), batch_at, loss, settings=settings, out=tmp_path)
    model = make_model()
    matrices, vectors = [model[0].weight, model[3].weight], [model[0].bias, model[3].bias]
    groups = [{"params": matrices, "weight_decay": 0.2}, {"params": vectors, "weight_decay": 0.0}]
    made = {
        "adamw": lambda: torch.optim.AdamW(groups, betas=(0.9, 0.95)),
        "adam": lambda: torch.optim.Adam(groups, betas=(0.9, 0.95)),
        "sgd": lambda: torch.optim.SGD(groups, momentum=0.9),
        "adahessian": lambda: AdaHessian(groups, betas=(0.9, 0.95), spatial_averaging="rows"),
    }[name]()
    expected = bare_losses(made, model, clip=0.3, rates=[0.1] * 12)
    torch.testing.assert_close(losses(tmp_path).tolist(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["adamw", "adahessian"])
def test_micro_batches_give_the_mean_over_all_terms(name, tmp_path):
    optimizer = OptimizerSettings(name=name, lr=0.05, update_each=2)
    settings = dataclasses.replace(SETTINGS, optimizer=optimizer)
    train(
        make_model(),
        batch_at,
        loss,
        settings=dataclasses.replace(settings, micro_batches=3),
        out=tmp_path / "cut",
    )

    def whole(step: int) -> tuple[torch.Tensor, ...]:
        parts = [batch_at(3 * step + micro) for micro in range(3)]
        return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))

    train(make_model(), whole, loss, settings=settings, out=tmp_path / "whole")
    torch.testing.assert_close(
        losses(tmp_path / "cut").tolist(), losses(tmp_path / "whole").tolist(), rtol=1e-12, atol=0
    )


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", ["adamw", "sgd", "adahessian"])
@pytest.mark.parametrize("stop", [3, 7, 8, 11])
def test_a_stopped_run_goes_on_with_the_same_losses(name, stop, tmp_path):
    settings = dataclasses.replace(SETTINGS, optimizer=OptimizerSettings(name=name, lr=0.05))
    measure = lambda model: {"held_out": mean_loss(model, [batch_at(99)], loss)}  # noqa: E731
    train(
        make_model(dropout=0.3),
        batch_at,
        loss,
        settings=settings,
        out=tmp_path / "whole",
        measure=measure,
    )

    def breaking(index: int):
        if index == stop:
            raise Killed
        return batch_at(index)

    with pytest.raises(Killed):
        train(
            make_model(dropout=0.3),
            breaking,
            loss,
            settings=settings,
            out=tmp_path / "cut",
            measure=measure,
        )
    torch.rand(17)  # another process has other random numbers
    asked = []
    recorded = lambda index: asked.append(index) or batch_at(index)  # noqa: E731
    train(
        make_model(dropout=0.3),
        recorded,
        loss,
        settings=settings,
        out=tmp_path / "cut",
        measure=measure,
    )
    assert asked[0] == stop // 4 * 4  # the latest state, not the start
    pd.testing.assert_frame_equal(read_log(tmp_path / "cut"), read_log(tmp_path / "whole"))
    for checkpoint in ("step_000006", "step_000012"):
        weights = [
            (tmp_path / run / checkpoint / "model.safetensors").read_bytes()
            for run in ("cut", "whole")
        ]
        assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_followed_training_is_the_same_and_goes_on_after_a_stop(tmp_path):
    def run(out, batches=batch_at, *, followed=True):
        track = TrackSettings(every=2, k=2, examples=None, preconditioned=True)
        follow = follower(track if followed else None, [batch_at(99, size=40)], loss)
        model = make_model(dropout=0.3)
        return train(model, batches, loss, settings=SETTINGS, out=tmp_path / out, follow=follow)

    def breaking(index: int):
        if index == 7:
            raise Killed
        return batch_at(index)

    run("plain", followed=False)
    run("whole")
    with pytest.raises(Killed):
        run("cut", breaking)
    run("cut")
    weights = {
        name: (tmp_path / name / "step_000012/model.safetensors").read_bytes()
        for name in ("plain", "whole", "cut")
    }
    assert weights["plain"] == weights["whole"] == weights["cut"]
    tables = [pd.read_parquet(tmp_path / name / "tracking.parquet") for name in ("whole", "cut")]
    rows = [table.set_index(["step", "matrix", "rank"])["value"] for table in tables]
    seen = "preconditioned hessian (AdamW)"
    assert set(rows[0].index) == {
        (step, matrix, rank)
        for step in range(0, 13, 2)
        for matrix in ("hessian", seen)
        for rank in (1, 2)
        if step or matrix == "hessian"
    }
    np.testing.assert_allclose(rows[1][rows[0].index], rows[0], rtol=0.03)
    log = read_log(tmp_path / "whole").set_index("step")
    logged = log[f"track/{seen}/model/1"].dropna()
    assert logged.to_dict() == rows[0].xs((seen, 1), level=("matrix", "rank")).to_dict()
    assert (tmp_path / "cut/figures/tracking.png").stat().st_size > 10_000


def test_a_compiled_model_is_not_followed(tmp_path):
    settings = dataclasses.replace(SETTINGS, compile=True)
    follow = follower(TrackSettings(), [batch_at(0)], loss)
    with pytest.raises(ValueError, match="switch compile off to follow eigenvalues"):
        train(make_model(), batch_at, loss, settings=settings, out=tmp_path, follow=follow)


def test_dropout_is_drawn_in_training(tmp_path):
    """Otherwise the test above would not see whether random numbers are restored."""
    for dropout in (0.0, 0.3):
        train(
            make_model(dropout=dropout),
            batch_at,
            loss,
            settings=SETTINGS,
            out=tmp_path / str(dropout),
        )
    assert losses(tmp_path / "0.0").tolist() != losses(tmp_path / "0.3").tolist()


def test_a_complete_run_is_not_trained_again_and_keeps_no_state(tmp_path):
    last = train(make_model(), batch_at, loss, settings=SETTINGS, out=tmp_path)
    assert not (tmp_path / "training_state").exists()

    def never(index: int):
        raise AssertionError("a complete run asked for a batch")

    assert (
        train(make_model(), never, loss, settings=SETTINGS, out=tmp_path)
        == last
        == tmp_path / "step_000012"
    )


def test_checkpoints_say_what_they_are(tmp_path):
    record = {"data": {"source": "made up"}}
    train(
        make_model(),
        batch_at,
        loss,
        settings=SETTINGS,
        out=tmp_path,
        record=record,
        measure=lambda m: {"accuracy": 0.5},
    )
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step_000000",
        "step_000006",
        "step_000012",
    ]
    found = read_record(tmp_path / "step_000006")
    assert (found["step"], found["fraction"], found["accuracy"], found["data"]) == (
        6,
        0.5,
        0.5,
        record["data"],
    )
    assert found["loss"] == losses(tmp_path)[5]
    assert found["training"]["optimizer"]["lr"] == 0.01
    assert read_record(tmp_path / "step_000000")["loss"] is None


def test_other_settings_are_refused_with_their_names(tmp_path):
    train(make_model(), batch_at, loss, settings=SETTINGS, out=tmp_path)
    changed = dataclasses.replace(SETTINGS, optimizer=OptimizerSettings(lr=0.02))
    with pytest.raises(ValueError, match=r"other settings \(training.optimizer.lr: 0.01 -> 0.02\)"):
        train(make_model(), batch_at, loss, settings=changed, out=tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    settings = dataclasses.replace(
        SETTINGS, optimizer=OptimizerSettings(name="sgd", lr=1e200, clip=0.0)
    )
    with pytest.raises(
        FloatingPointError,
        match=r"the loss became (nan|inf) at step [1-3]: lower the learning rate",
    ):
        train(make_model(), batch_at, loss, settings=settings, out=tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000000"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"micro_batches": 0}, "micro_batches is 0"),
        ({"checkpoints": (0.5, 1.5)}, "between 0 and 1"),
        ({"optimizer": OptimizerSettings(lr=0.0)}, "lr is 0.0; it must be above 0"),
        (
            {"optimizer": OptimizerSettings(name="adahessian"), "compile": True},
            "switch compile off",
        ),
    ],
)
def test_wrong_settings(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(
            make_model(),
            batch_at,
            loss,
            settings=dataclasses.replace(SETTINGS, **changes),
            out=tmp_path / "run",
        )


def test_nothing_to_train():
    with pytest.raises(ValueError, match="unfreeze"):
        make_optimizer(make_model().requires_grad_(False), OptimizerSettings())


def test_due_steps():
    assert due_steps((0.0, 0.001, 0.025, 0.5, 1.0), 100) == {
        0: 0.0,
        1: 0.001,
        2: 0.025,
        50: 0.5,
        100: 1.0,
    }


def test_shapes_of_the_learning_rate():
    cosine = ScheduleSettings(warmup=10, final=0.1)
    assert [share_of_peak(step, 110, cosine) for step in (0, 9)] == [1 / 11, 10 / 11]
    torch.testing.assert_close(
        [share_of_peak(s, 110, cosine) for s in (10, 60, 110)], [1.0, 0.55, 0.1]
    )
    linear = ScheduleSettings(shape="linear", warmup=10, final=0.0)
    torch.testing.assert_close(
        [share_of_peak(s, 110, linear) for s in (0, 10, 35, 110)], [1 / 11, 1.0, 0.75, 0.0]
    )
    steps = ScheduleSettings(shape="steps", milestones=(5, 8), factor=0.1)
    torch.testing.assert_close([share_of_peak(s, 10, steps) for s in (4, 5, 8)], [1.0, 0.1, 0.01])


def test_only_matrices_are_decayed():
    matrices, vectors = parameter_groups(make_model().parameters(), weight_decay=0.1)
    assert ({p.dim() for p in matrices["params"]}, matrices["weight_decay"]) == ({2}, 0.1)
    assert ({p.dim() for p in vectors["params"]}, vectors["weight_decay"]) == ({1}, 0.0)


def test_a_checkpoint_is_whole_or_absent(tmp_path):
    def breaking(model: nn.Module, folder) -> None:
        (folder / "half").write_text("half")
        raise Killed

    with pytest.raises(Killed):
        write_checkpoint(tmp_path, make_model(), step=1, record={}, save=breaking)
    assert list_checkpoints(tmp_path) == []
    with pytest.raises(FileNotFoundError, match=r"no checkpoint.json"):
        read_record(tmp_path / "step_000001")


def test_a_cut_line_of_the_log_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 0, "loss": 2.0}) + '\n{"step": 1, "lo')
    assert read_log(tmp_path).to_dict("records") == [{"step": 0, "loss": 2.0}]


def test_mean_loss_restores_the_mode():
    model = make_model(dropout=0.5).train()
    batches = [batch_at(0), batch_at(1)]
    x, y = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    found = mean_loss(model, batches, loss)
    assert model.training
    expected = nn.functional.cross_entropy(model.eval()(x), y)
    torch.testing.assert_close(found, expected.item(), rtol=1e-12, atol=0)


def test_tensorboard_has_the_losses(tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    train(
        make_model(),
        batch_at,
        loss,
        settings=dataclasses.replace(SETTINGS, tracker="tensorboard"),
        out=tmp_path,
    )
    found = (
        event_accumulator.EventAccumulator(str(tmp_path / tmp_path.name)).Reload().Scalars("loss")
    )
    torch.testing.assert_close(
        [event.value for event in found], losses(tmp_path).tolist(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("name", ["AdamW", "AdaHessian"])
def test_what_a_state_restores_begins_where_new_tensors_do(tmp_path, name):
    """Sums differ in the last bit by where their numbers begin in memory, and resumed training is
    bit-equal.
    """
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Sequential(torch.nn.Linear(3, 7), torch.nn.Linear(7, 61))
    make = torch.optim.AdamW if name == "AdamW" else AdaHessian
    model, wrapped = accelerator.prepare(model, make(model.parameters()))
    optimizer = wrapped.optimizer
    loss = model(torch.ones(2, 3)).square().sum()
    optimizer.backward(loss) if name == "AdaHessian" else loss.backward()
    wrapped.step()
    save_state(tmp_path, 1, accelerator)
    assert latest_state(tmp_path, accelerator) == 1
    kept = [value for state in optimizer.state.values() for value in state.values()]
    tensors = [value for value in [*model.parameters(), *kept] if isinstance(value, torch.Tensor)]
    assert {tensor.data_ptr() % 64 for tensor in tensors} == {0}
