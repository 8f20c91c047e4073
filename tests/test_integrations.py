"""Spectra from other people's training: what they are, where they go, and that training goes on bit
by bit as without.
"""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import dense_truth
import factories_for_runs
import models
import numpy as np
import pandas as pd
import problems
import pytest
import torch
from launching import run_script
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from blockspec import Objective, estimate_spectra, load_run, load_spectra, losses, partition
from blockspec.engine.settings import EstimateSettings
from blockspec.integrations import SpectrumCallback, record, recording
from blockspec.integrations.measuring import due_steps
from blockspec.runs import cli, report
from blockspec.runs.run import BlockSettings

ROOT = Path(__file__).parent.parent
QUICK = {"num_probes": 2, "num_steps": 3}
SOME = BlockSettings(include=["*h.0.attn.c_attn.weight/*", "*wpe.weight"], full=False)


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def drawing_next_token(model, batch):
    """A loss that draws random numbers of every kind, and does not use them."""
    random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
    return losses.next_token(model, batch)


def state_of_everything(model, optimizer):
    """What training depends on, as one flat list of tensors and plain values."""
    own = [random.getstate(), *np.random.get_state(), torch.get_rng_state()]  # noqa: NPY002
    flags = [(module.training, getattr(module, "flash", None)) for module in model.modules()]
    tensors = [t.detach().clone() for p in model.parameters() for t in (p, p.grad) if t is not None]
    memory = [t.clone() for state in optimizer.state.values() for t in state.values()]
    return [
        *own,
        flags,
        [p.requires_grad for p in model.parameters()],
        *tensors,
        *model.buffers(),
        *memory,
    ]


def assert_identical(these, those):
    assert len(these) == len(those)
    for one, other in zip(these, those, strict=True):
        assert (
            np.array_equal(one, other)
            if isinstance(one, (torch.Tensor, np.ndarray))
            else one == other
        )


class Tracker(TrainerCallback):
    """Stands among the trackers: keeps what is logged, and the random numbers at the end."""

    def __init__(self):
        self.logged = []

    def on_log(self, args, state, control, logs=None, **others):
        self.logged.append({"step": state.global_step, **logs})

    def on_train_end(self, args, state, control, model=None, optimizer=None, **others):
        self.left = state_of_everything(model, optimizer)


def trainer(tmp_path, **arguments):
    """A real one, on a tiny GPT-2 with dropout, shuffled data and gradient accumulation."""
    rows = [{"input_ids": row, "labels": row} for row in problems.tokens(24, 8)]
    settings = {
        "output_dir": str(tmp_path / "trainer"),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    model = models.tiny_gpt2(dtype=torch.float32, layers=1)
    tracker = Tracker()
    it = Trainer(
        model, TrainingArguments(**(settings | arguments)), train_dataset=rows, callbacks=[tracker]
    )
    it.tracker = tracker
    return it


def held_out():
    """A loader draws a number from torch's global generator each time it is read."""
    rows = problems.tokens(4, 8, seed=9)
    return DataLoader([{"input_ids": row} for row in rows], batch_size=2)


def with_spectra(it, out, **settings):
    given = {
        "blocks": SOME,
        "estimate": EstimateSettings(**QUICK),
        "loss": drawing_next_token,
    } | settings
    it.add_callback(SpectrumCallback(it, out, held_out(), **given))
    return it


def training_logs(it):
    return [
        {k: v for k, v in entry.items() if "time" not in k}
        for entry in it.tracker.logged
        if "loss" in entry
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer that was watched, and its run folder."""
    folder = tmp_path_factory.mktemp("trained")
    it = with_spectra(trainer(folder), folder / "run", steps=(2,), fractions=(0, 1.0))
    it.train()
    return it, folder / "run"


def test_a_trainer_trains_bit_by_bit_as_without(trained, tmp_path):
    without = trainer(tmp_path)
    without.train()
    assert len(training_logs(without)) == 4
    assert training_logs(trained[0]) == training_logs(without)
    assert_identical(trained[0].tracker.left, without.tracker.left)


def test_scalars_reach_the_trackers_and_the_history(trained):
    it, out = trained
    for entries in (it.tracker.logged, it.state.log_history):
        found = [entry for entry in entries if "spectrum/js0" in entry]
        assert [entry["step"] for entry in found] == [0, 2, 4]
    table = pd.read_parquet(out / "heterogeneity.parquet").query(
        "definition == 'jensen-shannon' and step == 4"
    )
    last = load_spectra(out / "spectra.parquet", step=4)
    assert found[-1]["spectrum/js0"] == table["js0"].iloc[0] > 0
    queries = [s for s in last.values() if s.block.kind == "query"]
    assert found[-1]["spectrum/trace/query"] == pytest.approx(sum(s.trace.value for s in queries))
    assert found[-1]["spectrum/largest/query"] == max(s.largest.value for s in queries)
    assert found[-1]["spectrum/js0_stderr"] == table["js0_stderr"].iloc[0] > 0
    errors = [s.trace.stderr for s in queries]
    assert found[-1]["spectrum/trace_stderr/query"] == pytest.approx(np.linalg.norm(errors))
    assert found[-1]["spectrum/largest_residual/query"] >= 0


def test_the_folder_is_a_run_s(trained, capsys):
    it, out = trained
    assert sorted(path.name for path in out.iterdir()) == [
        "heterogeneity.parquet",
        "run.json",
        "spectra.parquet",
    ]
    stages = json.loads((out / "run.json").read_text())["stages"]
    assert [stage["step"] for stage in stages] == [0, 2, 4]
    model = it.model.eval()
    expected = estimate_spectra(
        Objective(model, held_out(), losses.next_token),
        partition(model, include=SOME.include),
        **QUICK,
    )
    pd.testing.assert_frame_equal(
        load_spectra(out / "spectra.parquet", step=4).to_frame(step=4), expected.to_frame(step=4)
    )
    report.show(out)
    assert "step 4" in capsys.readouterr().out


def test_a_resumed_training_does_not_measure_again(trained, tmp_path, monkeypatch):
    it, out = trained
    monkeypatch.setattr(
        "blockspec.runs.run.estimate_spectra", lambda *a, **k: pytest.fail("measured again")
    )
    before = (out / "spectra.parquet").read_bytes()
    again = with_spectra(trainer(tmp_path), out, steps=(2,), fractions=(0, 1.0))
    again.train()
    assert (out / "spectra.parquet").read_bytes() == before
    logs = [
        [entry for entry in one.tracker.logged if "spectrum/js0" in entry] for one in (it, again)
    ]
    assert logs[0] == logs[1]


@pytest.mark.slow
def test_tensorboard_gets_them(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    it = with_spectra(
        trainer(tmp_path, report_to="tensorboard", max_steps=1), tmp_path / "run", fractions=(0, 1)
    )
    it.train()
    events = accumulator.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/spectrum/js0")] == [0, 1]
    assert [event.step for event in events.Scalars("train/spectrum/js0_stderr")] == [0, 1]
    images = events.Images("spectrum/blocks")
    assert [image.step for image in images] == [0, 1]
    assert images[0].encoded_image_string.startswith(b"\x89PNG")


@pytest.mark.parametrize("others", [[1], []])
def test_processes_that_do_not_call_record_are_told(monkeypatch, others):
    """``if rank == 0: record(...)`` waited for the other process without an end."""
    store = torch.distributed.HashStore()
    for name, value in {"is_initialized": True, "get_world_size": 2, "get_rank": 0}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(recording, "_met", Counter())
    for other in others:
        store.set(f"blockspec/record/1/{other}", "here")
    if others:
        recording.wait_for_all("record", patience=0.3)
    else:
        with pytest.raises(ValueError, match=r"the processes \[1\] of 2, .*if rank == 0"):
            recording.wait_for_all("record", patience=0.3)


@pytest.mark.filterwarnings("ignore::UserWarning")  # few workers, few batches
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_lightning_trainer_measures_and_trains_as_without(tmp_path, accumulated):
    lightning = pytest.importorskip("pytorch_lightning")
    from blockspec.integrations import LightningSpectrumCallback

    class Regression(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Sequential(
                torch.nn.Linear(3, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1)
            )
            self.seen = []

        def training_step(self, batch, _):
            loss = torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])
            self.seen.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Logged(lightning.loggers.CSVLogger):
        def __init__(self):
            super().__init__(tmp_path)
            self.given, self.shown = {}, []

        def log_metrics(self, metrics, step=None):
            self.given[step] = metrics

        def log_image(self, key, images, step=None):
            self.shown.append((key, step))

    def fit(*callbacks):
        module, logger = Regression(), Logged()
        batches = [(torch.ones(2, 3) * i, torch.ones(2, 1)) for i in range(4)]
        settings = {"logger": logger, "enable_checkpointing": False, "enable_progress_bar": False}
        settings |= {
            "max_epochs": 2,
            "accelerator": "cpu",
            "enable_model_summary": False,
            "log_every_n_steps": 1,
        }
        torch.manual_seed(1)
        lightning.Trainer(
            callbacks=list(callbacks), accumulate_grad_batches=accumulated, **settings
        ).fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
        return module, logger

    callback = LightningSpectrumCallback(
        tmp_path / "run",
        [(torch.ones(2, 3), torch.ones(2, 1))],
        losses.regression,
        model=lambda module: module.net,
        steps=(1,),
        estimate=EstimateSettings(**QUICK),
    )
    watched, logger = fit(callback)
    assert watched.seen == fit()[0].seen
    steps = [0, 1, 8 // accumulated]
    found = {step: m for step, m in logger.given.items() if "spectrum/js0" in m}
    assert list(found) == steps
    assert "spectrum/js0_stderr" in found[1]
    assert logger.shown == [("spectrum/blocks", step) for step in steps]
    assert set(pd.read_parquet(tmp_path / "run/spectra.parquet")["step"]) == set(steps)


def test_mixed_precision_is_off_in_a_measurement(tmp_path):
    it = with_spectra(trainer(tmp_path, bf16=True, max_steps=1), tmp_path / "run", fractions=(0,))
    it.train()
    plain = models.tiny_gpt2(dtype=torch.float32, layers=1)
    expected = estimate_spectra(
        Objective(plain, held_out(), losses.next_token),
        partition(plain, include=SOME.include),
        **QUICK,
    )
    np.testing.assert_allclose(
        load_spectra(tmp_path / "run/spectra.parquet")["transformer.wpe.weight"].nodes,
        expected["transformer.wpe.weight"].nodes,
        rtol=1e-5,
        atol=1e-7,
    )
    assert (
        it.model(problems.tokens(1, 8)).logits.dtype == torch.float32
    )  # accelerate's wrapper is back: it converts
    assert "forward" in vars(it.model)


def test_what_would_fail_on_the_way_fails_before_training(trained, tmp_path):
    for settings, message in (
        ({"blocks": BlockSettings(include=["*no_such*"])}, "no_such"),
        (
            {"loss": lambda model, batch: (model(**batch).logits.sum() * torch.rand(()), 1)},
            "random numbers",
        ),
    ):
        it = with_spectra(trainer(tmp_path), tmp_path / "run", fractions=(1.0,), **settings)
        with pytest.raises(ValueError, match=message):
            it.train()
        assert it.state.global_step == 0
    other = with_spectra(
        trainer(tmp_path), trained[1], estimate=EstimateSettings(num_probes=1, num_steps=3)
    )
    with pytest.raises(ValueError, match=r"estimate\.num_probes is 2 there, 1 here"):
        other.train()


def folder_as_it_is(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize(
    ("other", "told"),
    [({"seed": 4}, "seed is '3' there, '4' here"), ({"learning_rate": 1e-3}, "learning_rate is")],
    ids=str,
)
def test_another_training_is_refused_where_a_folder_holds_one(trained, tmp_path, other, told):
    """Else the first training's numbers would go to the second one's tracker."""
    before = folder_as_it_is(trained[1])
    it = with_spectra(trainer(tmp_path, **other), trained[1])
    with pytest.raises(ValueError, match=rf"{told}.*give each training a folder of its own"):
        it.train()
    assert it.state.global_step == 0
    assert not [entry for entry in it.tracker.logged if "spectrum/loss" in entry]
    assert folder_as_it_is(trained[1]) == before


def test_the_same_arguments_with_other_weights_are_refused(trained, tmp_path):
    """What the arguments do not say, the weights do."""
    before = folder_as_it_is(trained[1])
    it = with_spectra(trainer(tmp_path), trained[1])
    with torch.no_grad():
        next(it.model.parameters()).add_(0.01)
    with pytest.raises(
        ValueError, match=r"step 0 of .* was measured of other content .*weights is"
    ):
        it.train()
    assert folder_as_it_is(trained[1]) == before


def test_record_refuses_another_training_and_measures_anew_where_told(tmp_path, caplog):
    it, other = problems.nanogpt(), problems.nanogpt()
    blocks = partition(it.model, include="*ln_f*")
    found = record(tmp_path, 5, it.objective(), blocks, **QUICK)
    assert record(tmp_path, 5, it.objective(), blocks, **QUICK) == found
    with torch.no_grad():
        next(other.model.parameters()).mul_(1.5)
    before = folder_as_it_is(tmp_path)
    with pytest.raises(ValueError, match=r"step 5 of .*weights is"):
        record(tmp_path, 5, other.objective(), blocks, **QUICK)
    for refused in (
        {"objective": Objective(it.model, it.batches[:1], it.loss)},
        {"blocks": partition(it.model, include="*ln_1*")},
        {"seed": 1},
    ):
        given = {"objective": it.objective(), "blocks": blocks, **QUICK} | refused
        with pytest.raises(ValueError, match=r"other data|other settings"):
            record(tmp_path, 6, **given)
    assert folder_as_it_is(tmp_path) == before
    anew = record(tmp_path, 5, other.objective(), blocks, replace=True, **QUICK)
    assert anew["spectrum/loss"] != found["spectrum/loss"]
    assert "measured anew" in caplog.text


REFUSED = {
    "a negative step": ({"step": -1}, "step is the number of updates so far, at least 0, got -1"),
    "no step": ({"step": True}, "at least 0, got True"),
    "half a step": ({"step": 1.5}, r"step is the number of updates so far, got 1\.5"),
    "text": ({"step": "5"}, "number of updates so far, got '5'"),
    "no probes": ({"num_probes": 0}, "num_probes is a whole number >= 1 or 'auto', got 0"),
    "a tolerance": ({"tolerance": -1}, "tolerance is relative .* got -1"),
    "a seed": ({"seed": 2**70}, "seed is a whole number from 0 to"),
    "memory": ({"memory": 0}, "memory must be positive, got 0"),
    "a matrix": ({"curvature": "kfac"}, "curvature is one of .* got 'kfac'"),
    "an unknown setting": ({"num_prob": 2}, "unexpected keyword argument 'num_prob'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_record_refuses_leaves_nothing(tmp_path, case):
    given, message = REFUSED[case]
    it, step = problems.nanogpt(), given.get("step", 0)
    settings = QUICK | {name: value for name, value in given.items() if name != "step"}
    out = tmp_path / "run"
    with pytest.raises((ValueError, TypeError), match=message):
        record(out, step, it.objective(), partition(it.model, include="*ln_f*"), **settings)
    assert not out.exists()


def test_a_step_may_be_a_number_of_numpy_or_torch(tmp_path):
    it = problems.nanogpt()
    blocks = partition(it.model, include="*ln_f*")
    for step in (np.int64(3), torch.tensor(4)):
        record(tmp_path, step, it.objective(), blocks, **QUICK)
    assert load_run(tmp_path).steps == [3, 4]


def test_steps_that_are_due():
    assert due_steps((5,), (0, 0.001, 0.25, 1.0), total=10) == {0, 1, 2, 5, 10}
    with pytest.raises(ValueError, match=r"got 5: give numbers of updates as steps"):
        due_steps((), (5,), total=10)
    with pytest.raises(ValueError, match="got -1"):
        due_steps((-1,), (), total=10)
    with pytest.raises(TypeError, match="got a GPT"):
        SpectrumCallback(problems.nanogpt().model, "run", [])


def nanogpt_loop(it, *, each_update=lambda iter_num: None):
    """nanoGPT's train.py, shortened; dropout makes it draw."""
    model, ctx = it.model, nullcontext()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    losses_seen = []
    for iter_num in range(3):
        each_update(iter_num, optimizer)
        for X, Y in it.batches:
            with ctx:
                _, loss = model(X, Y)
            scaler.scale(loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses_seen.append(loss.item())
        optimizer.zero_grad(set_to_none=True)
        model(X, Y)[1].backward()  # gradients that a measurement must leave alone
    return losses_seen


@pytest.mark.slow
def test_a_nanogpt_loop_goes_on_bit_by_bit(tmp_path):
    """State compared right before and after each measurement, gradients and generators among it."""
    it = problems.nanogpt(dropout=0.2)
    it.model.train()
    batches = DataLoader(
        problems.tokens(2, 6, seed=8),
        batch_size=2,
        collate_fn=lambda rows: 2 * (torch.stack(rows),),
    )
    objective, blocks = Objective(it.model, batches, drawing_next_token), partition(it.model)

    def measure(iter_num, optimizer):
        before = state_of_everything(it.model, optimizer)
        record(tmp_path, iter_num, objective, blocks, **QUICK)
        assert_identical(state_of_everything(it.model, optimizer), before)

    torch.manual_seed(5)
    found = nanogpt_loop(it, each_update=measure)
    fresh = problems.nanogpt(dropout=0.2)
    fresh.model.train()
    torch.manual_seed(5)
    assert found == nanogpt_loop(fresh, each_update=lambda *_: None)
    assert set(pd.read_parquet(tmp_path / "spectra.parquet")["step"]) == {0, 1, 2}


def test_a_measurement_that_fails_disturbs_nothing(tmp_path):
    it = problems.nanogpt(dropout=0.2)
    it.model.train()
    optimizer = torch.optim.SGD(it.model.parameters(), lr=0.1)
    calls = []

    def failing(model, batch):
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
        calls.append(batch)
        if len(calls) == 8:
            raise RuntimeError("on the way")
        return losses.next_token(model, batch)

    before = state_of_everything(it.model, optimizer)
    with pytest.raises(RuntimeError, match="on the way"):
        record(tmp_path, 0, Objective(it.model, it.batches, failing), partition(it.model), **QUICK)
    assert_identical(state_of_everything(it.model, optimizer), before)
    assert not (tmp_path / "spectra.parquet").exists()


@pytest.mark.slow
@pytest.mark.parametrize("flash", [True, False])
def test_a_nanogpt_model_has_the_right_blocks_and_products(tmp_path, flash):
    it = problems.nanogpt(flash=flash)
    names = [block.name for block in partition(it.model)]
    weights = [f"transformer.h.0.attn.c_attn.weight/{part}" for part in ("query", "key", "value")]
    assert [name for name in names if "c_attn.weight" in name] == weights
    blocks = partition(it.model, include=weights)
    record(
        tmp_path, 0, it.objective(), blocks, num_probes=1, num_steps=64
    )  # 8 x 8: all eigenvalues
    found = load_spectra(tmp_path / "spectra.parquet")
    for block in blocks:
        index = dense_truth.positions(it.model, block)
        exact = dense_truth.largest_eigenvalue(it.model, it.batches, it.terms, index)
        assert found[block.name].largest.value == pytest.approx(exact, rel=1e-6)
    assert it.model.transformer.h[0].attn.flash is flash


def test_a_wrapped_model_is_refused_with_the_remedy(tmp_path):
    model = problems.nanogpt().model
    wrapped = DistributedDataParallel.__new__(
        DistributedDataParallel
    )  # a real one needs a process group
    torch.nn.Module.__init__(wrapped)
    wrapped.module = model
    with pytest.raises(ValueError, match=r"DistributedDataParallel: pass its \.module"):
        record(
            tmp_path,
            0,
            Objective(wrapped, [problems.tokens(1, 4)], losses.next_token),
            partition(model),
        )
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match=r"the model is compiled .*model\._orig_mod"):
        record(
            tmp_path,
            0,
            Objective(compiled, [problems.tokens(1, 4)], losses.next_token),
            partition(model),
        )


@pytest.mark.slow
def test_the_nanogpt_example(tmp_path):
    main = example("nanogpt_loop").main
    short = {"max_iters": 3, "batch_size": 2}
    assert main(tmp_path, measured=(0, 3), num_steps=2, **short) == main(None, **short)
    assert set(pd.read_parquet(tmp_path / "spectra.parquet")["step"]) == {0, 3}


def on_two_processes(tmp_path, program):
    """Runs it on CPU with gloo, as accelerate starts it, its folder as the argument."""
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(program))
    run_script(script, str(tmp_path))


def assert_same_spectra(one, two):
    assert list(one) == list(two)
    for name in one:
        np.testing.assert_allclose(
            two[name].nodes, one[name].nodes, rtol=1e-3, atol=1e-6 * one[name].norm
        )


@pytest.mark.slow
def test_accelerate_on_two_processes(tmp_path):
    """The example: losses as without, spectra as on one process."""
    program = """
        import sys
        from accelerate import PartialState
        from accelerate_loop import main
        with_spectra, without = main(sys.argv[1] + "/two", num_steps=3, measured=(0, 2)), main(None)
        assert with_spectra == without and len(without) == 8, (with_spectra, without)
        assert PartialState().num_processes == 2
    """
    on_two_processes(tmp_path, program)
    example("accelerate_loop").main(tmp_path / "one", num_steps=3, measured=(0,))
    assert_same_spectra(
        *(load_spectra(tmp_path / run / "spectra.parquet", step=0) for run in ("one", "two"))
    )
    assert set(pd.read_parquet(tmp_path / "two/spectra.parquet")["step"]) == {0, 2}


@pytest.mark.slow
def test_a_trainer_on_two_processes(tmp_path):
    """Losses and everything that training depends on as without, spectra as on one process."""
    program = """
        import sys
        from pathlib import Path
        from accelerate import PartialState
        from test_integrations import assert_identical, trainer, training_logs, with_spectra
        out = Path(sys.argv[1])
        watched = with_spectra(trainer(out), out / "two", fractions=(0, 1))
        watched.train()
        plain = trainer(out)
        plain.train()
        assert training_logs(watched) == training_logs(plain) and len(training_logs(plain)) == 4
        assert_identical(watched.tracker.left, plain.tracker.left)
        assert PartialState().num_processes == 2
    """
    on_two_processes(tmp_path, program)
    model = models.tiny_gpt2(dtype=torch.float32, layers=1)
    objective = Objective(model, held_out(), losses.next_token)
    one = estimate_spectra(objective, partition(model, include=SOME.include), **QUICK)
    assert_same_spectra(one, load_spectra(tmp_path / "two/spectra.parquet", step=0))
    assert set(pd.read_parquet(tmp_path / "two/spectra.parquet")["step"]) == {0, 4}


@pytest.mark.slow
def test_a_run_that_was_killed_with_kill_9_goes_on(tmp_path):
    """In the middle of the second of two checkpoints; ends with the table of an unbroken run."""
    paths = json.dumps(
        [
            str(path)
            for path in factories_for_runs.write_checkpoints(tmp_path / "checkpoints", [10, 20])
        ]
    )
    settings = [
        "--model",
        "factories_for_runs:tiny",
        "--checkpoints",
        paths,
        "--estimate.num_steps",
        "6",
        "--plots",
        "false",
    ]
    command = [
        "run",
        *settings,
        "--estimate.num_probes",
        "2",
        "--device",
        "cpu",
        "--state_every",
        "0",
    ]
    program = f"""
        import os, signal
        from blockspec.runs import cli
        from blockspec.engine import state
        save = state.Keeper.save
        def killing(keeper, schedule):
            save(keeper, schedule)
            if keeper.folder.name == "step_20" and keeper._sweep == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        state.Keeper.save = killing
        cli.main({[*command, "--out", str(tmp_path / "cut")]!r})
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    line = [sys.executable, "-c", textwrap.dedent(program)]
    killed = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list((tmp_path / "cut/state/step_20").glob("*.safetensors"))) == 2
    calls = []
    for run in ("cut", "whole"):
        factories_for_runs.reset()
        cli.main([*command, "--out", str(tmp_path / run)])
        calls.append(factories_for_runs.calls["loss"])
    tables = [pd.read_parquet(tmp_path / run / "spectra.parquet") for run in ("cut", "whole")]
    pd.testing.assert_frame_equal(*tables)
    assert set(tables[0]["step"]) == {10, 20}
    assert calls[0] < 0.6 * calls[1]  # the first checkpoint and three sweeps were not done again
    assert not (tmp_path / "cut/state").exists()
