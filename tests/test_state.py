"""Estimates that are killed go on bit by bit the same; states of something else are refused."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from launching import forks
from models import tiny_gpt2
from safetensors import safe_open
from safetensors.torch import save_file

import blockspec
from blockspec.engine import state
from blockspec.engine.state import Keeper
from blockspec.engine.unfinished import SweepKeeper
from blockspec.numerics.columns import Columns
from blockspec.numerics.lanczos import Lanczos
from blockspec.numerics.ranks import Ranks
from blockspec.products.curvature import Products
from blockspec.products.unfinished import Unfinished

SCRIPT = """
import sys, torch, blockspec
sys.path.insert(0, sys.argv[2])
from models import tiny_gpt2
model = tiny_gpt2(seed=0)
tokens = torch.randint(model.config.vocab_size, (2, 8), generator=torch.Generator().manual_seed(1))
objective = blockspec.Objective(model, [{"input_ids": tokens}], blockspec.losses.next_token)
blocks = blockspec.partition(model, include=["*c_fc.weight", "*ln_1.*"]) + blockspec.partition(model, "model")
print("begun", flush=True)
spectra = blockspec.estimate_spectra(objective, blocks, 2, 30, state=sys.argv[1] + "/state", state_every=0.0)
spectra.save(sys.argv[1] + "/spectra.parquet")
"""


class Stop(Exception):
    pass


def make(*, seed=0, shift=0.0, tokens_seed=1):
    model = tiny_gpt2(seed=seed)
    with torch.no_grad():
        next(model.parameters()).add_(shift)
    tokens = torch.randint(
        model.config.vocab_size, (2, 8), generator=torch.Generator().manual_seed(tokens_seed)
    )
    batches = [{"input_ids": row[None]} for row in tokens]
    objective = blockspec.Objective(model, batches, blockspec.losses.next_token)
    return objective, blockspec.partition(model, include=["*c_fc.weight", "*ln_1.weight"])


def many():
    """Nine batches."""
    objective, blocks = make()
    ids = torch.randint(32, (9, 8), generator=torch.Generator().manual_seed(3))
    rows = [{"input_ids": row[None]} for row in ids]
    return blockspec.Objective(objective.model, rows, objective.loss), blocks


def interrupted(state, *, after, **settings):
    calls = 0

    def progress(done, total):
        nonlocal calls
        calls += 1
        if calls == after:
            raise Stop

    settings = {"num_probes": 2, "num_steps": 8} | settings
    with pytest.raises(Stop):
        blockspec.estimate_spectra(
            *make(), state=state, state_every=0.0, progress=progress, **settings
        )


@pytest.mark.parametrize(
    "settings", [{}, {"reorthogonalize": False}, {"basis_dtype": "bfloat16"}, {"curvature": "ggn"}]
)
def test_a_stopped_estimate_goes_on_bit_by_bit_and_repeats_no_sweep(tmp_path, settings):
    unbroken = blockspec.estimate_spectra(*make(), 2, 8, **settings)
    interrupted(tmp_path, after=5, **settings)
    resumed = blockspec.estimate_spectra(*make(), 2, 8, state=tmp_path, **settings)
    assert resumed.cost.gradients == unbroken.cost.gradients - 2 * 5  # of two batches
    for name, spectrum in unbroken.items():
        np.testing.assert_array_equal(resumed[name].nodes, spectrum.nodes)
        np.testing.assert_array_equal(resumed[name].weights, spectrum.weights)
    assert list(Path(tmp_path).iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("errors", [True, False])
@pytest.mark.parametrize(("sweep", "batches"), [(0, 3), (2, 8)])
def test_a_sweep_that_was_stopped_on_the_way_goes_on_bit_by_bit(
    tmp_path, monkeypatch, errors, sweep, batches
):
    settings = {"num_probes": 2, "num_steps": 4, "data_errors": errors, "check": False}
    unbroken = blockspec.estimate_spectra(*many(), **settings)
    linearise, calls = Products.linearise, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) > 9 * sweep + batches:
            raise Stop
        return linearise(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Products, "linearise", stopping)
        with pytest.raises(Stop):
            blockspec.estimate_spectra(*many(), **settings, state=tmp_path, state_every=0.0)
    assert len(list(tmp_path.glob(f"*{sweep:08d}-unfinished.safetensors"))) == 1
    resumed = blockspec.estimate_spectra(*many(), **settings, state=tmp_path)
    assert resumed.cost.gradients == unbroken.cost.gradients - 9 * sweep - batches
    for name, spectrum in unbroken.items():
        np.testing.assert_array_equal(resumed[name].nodes, spectrum.nodes)
        np.testing.assert_array_equal(resumed[name].weights, spectrum.weights)
        assert resumed[name].trace == spectrum.trace
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_sweep_of_another_estimate_or_damaged_begins_anew(tmp_path, caplog):
    keeper = Keeper(tmp_path, 0.0, {"seed": 1}, Ranks())
    SweepKeeper(keeper).after_batch(lambda: Unfinished(1, None, 2.0, [[torch.ones(3)]], []))
    assert SweepKeeper(keeper).taken().done == 1
    other = Keeper(tmp_path, 0.0, {"seed": 2}, Ranks())
    assert SweepKeeper(other).taken() is None
    assert "is of another estimate; the sweep begins anew" in caplog.text
    keeper.unfinished.write_bytes(b"cut")
    assert SweepKeeper(keeper).taken() is None
    assert "damaged" in caplog.text
    keeper.clear()
    assert list(tmp_path.iterdir()) == []


DEFLATED = {"num_probes": "auto", "num_steps": "auto", "tolerance": 0.008}


@pytest.fixture(scope="module")
def unbroken():
    return blockspec.estimate_spectra(*make(), **DEFLATED)


def test_what_was_deflated_is_kept_in_files_and_mixtures(tmp_path, unbroken):
    unbroken.save(tmp_path / "spectra.parquet")
    loaded = blockspec.load_spectra(tmp_path / "spectra.parquet")
    for name, spectrum in unbroken.items():
        np.testing.assert_array_equal(loaded[name].known, spectrum.known)
        assert loaded[name].error == spectrum.error
    mixture = blockspec.block_diagonal(unbroken)
    assert mixture.known.sum() > 0
    noisy = replace(mixture, known=None)
    assert 0 < mixture.error < noisy.error
    older = pd.read_parquet(tmp_path / "spectra.parquet").drop(columns="known")
    older.to_parquet(tmp_path / "older.parquet")
    for s in blockspec.load_spectra(tmp_path / "older.parquet").values():
        assert not s.known.any()
    both = pd.concat(
        [older.assign(step=0), pd.read_parquet(tmp_path / "spectra.parquet").assign(step=1)]
    )
    both.to_parquet(tmp_path / "both.parquet")
    for step in (0, 1):
        assert (
            blockspec.load_spectra(tmp_path / "both.parquet", step=step).summary()["error"] >= 0
        ).all()


@pytest.mark.slow
@pytest.mark.parametrize("after", [40, 120])
def test_a_deflated_estimate_goes_on_bit_by_bit(tmp_path, unbroken, after):
    """Stopped in the probe that finds the eigenvalues, and in those beyond it."""
    assert any(s.known.any() and not s.exact for s in unbroken.values())
    interrupted(tmp_path, after=after, **DEFLATED)
    for path in tmp_path.glob("*.safetensors"):
        shifted(path, 8)
    resumed = blockspec.estimate_spectra(*make(), state=tmp_path, **DEFLATED)
    assert resumed.cost.gradients == unbroken.cost.gradients - 2 * after
    for name, spectrum in unbroken.items():
        for kept in ("nodes", "weights", "known"):
            np.testing.assert_array_equal(getattr(resumed[name], kept), getattr(spectrum, kept))


@pytest.mark.parametrize(
    ("what", "settings", "match"),
    [
        ({}, {"num_steps": 9}, "num_steps is 8 there, 9 here"),
        ({}, {"seed": 3}, "seed is 0 there, 3 here"),
        ({"shift": 1e-3}, {}, "weights is"),
        ({"tokens_seed": 2}, {}, "data is"),
    ],
)
def test_a_state_of_something_else_is_refused_with_the_difference(tmp_path, what, settings, match):
    interrupted(tmp_path, after=2)
    arguments = {"num_probes": 2, "num_steps": 8} | settings
    with pytest.raises(ValueError, match=match):
        blockspec.estimate_spectra(*make(**what), **arguments, state=tmp_path)


def spoiled(path, rng):
    """The file with one bit flipped, or cut short."""
    content = bytearray(path.read_bytes())
    if rng.random() < 0.2:
        return bytes(content[: rng.randrange(len(content))])
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def test_damaged_states_are_never_taken(tmp_path, caplog):
    """Any flipped bit is found; the sound older state beside it is taken by itself."""
    interrupted(tmp_path, after=3)
    unbroken = blockspec.estimate_spectra(*make(), 2, 8)
    older, newer = sorted(tmp_path.glob("*.safetensors"))
    kept = {path: path.read_bytes() for path in (older, newer)}
    rng = random.Random(0)
    for number in range(40):
        for path, content in kept.items():
            path.write_bytes(content)
        newer.write_bytes(spoiled(newer, rng))
        if number:
            with pytest.raises(ValueError, match="damaged"):
                state.read(newer)
            continue
        resumed = blockspec.estimate_spectra(*make(), 2, 8, state=tmp_path)
        assert resumed.cost.gradients == unbroken.cost.gradients - 2 * 2
        assert "going on from an older one" in caplog.text
        for name, spectrum in unbroken.items():
            np.testing.assert_array_equal(resumed[name].nodes, spectrum.nodes)
    for path, content in kept.items():
        path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        blockspec.estimate_spectra(*make(), 2, 8, state=tmp_path)


def begins(path):
    """Where each tensor of a state begins in its file, to 64 bytes: there, new tensors begin in
    memory.
    """
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    return {n: (8 + length + e["data_offsets"][0]) % 64 for n, e in entries.items() if n[0] != "_"}


def shifted(path, by):
    """Rewrites a state so that its tensors begin ``by`` bytes after a multiple of 64."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    for spaces in range(64):
        save_file(tensors, path, metadata=metadata | {"padding": " " * spaces})
        if min(begins(path).values()) == by or by in begins(path).values():
            return


@pytest.mark.parametrize("by", [8, 40])
@pytest.mark.parametrize("settings", [{}, {"reorthogonalize": False}])
def test_what_is_restored_lies_in_memory_of_its_own(tmp_path, monkeypatch, settings, by):
    """Sums over the same numbers differ in the last bit by where the numbers begin in memory."""
    expected = blockspec.estimate_spectra(*make(), 2, 8, **settings)
    interrupted(tmp_path, after=5, **settings)
    for path in tmp_path.glob("*.safetensors"):
        shifted(path, by)
        assert by in begins(path).values()
    seen = []
    sweep = Products.sweep

    def watched(self, requests):
        seen.extend(vector.data_ptr() % 64 for _, vector in requests)
        return sweep(self, requests)

    monkeypatch.setattr(Products, "sweep", watched)
    found = blockspec.estimate_spectra(*make(), 2, 8, state=tmp_path, **settings)
    assert set(seen) == {0}
    for name, spectrum in expected.items():
        np.testing.assert_array_equal(found[name].nodes, spectrum.nodes)
        np.testing.assert_array_equal(found[name].weights, spectrum.weights)


@pytest.mark.parametrize("kind", ["lanczos", "without a basis", "columns"])
def test_recurrences_copy_what_they_restore(kind):
    make_one = {
        "lanczos": lambda: Lanczos(torch.ones(61).double(), 5),
        "without a basis": lambda: Lanczos(torch.ones(61).double(), 5, reorthogonalize=False),
        "columns": lambda: Columns(61, dtype=torch.float64, device="cpu"),
    }[kind]
    process, matrix = make_one(), torch.diag(torch.arange(61.0)).double()
    for _ in range(3):
        Ranks().together([process.step(matrix @ process.vector)])
    tensors, numbers = process.state()
    odd = {name: misaligned(tensor) for name, tensor in tensors.items()}
    again = make_one()
    again.restore(odd, numbers)
    for _ in range(2):
        assert again.vector.data_ptr() % 64 == 0
        Ranks().together([again.step(matrix @ again.vector)])
    shared = {tensor.untyped_storage().data_ptr() for tensor in odd.values()}
    kept = again.state()[0].values()
    assert not shared & {tensor.untyped_storage().data_ptr() for tensor in kept}


def misaligned(tensor):
    holder = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    holder[1:].copy_(tensor.flatten())
    return holder[1:].view(tensor.shape)


def wait_for_a_state(folder, process):
    """Until there is a state that was not there at first: a busy machine takes its time, and a kill
    before it meets none.
    """
    before = set(folder.glob("state-*.safetensors"))
    while process.poll() is None and not set(folder.glob("state-*.safetensors")) - before:
        time.sleep(0.01)


@pytest.mark.slow
def test_kill_9_at_random_moments(tmp_path):
    """CI kills a few times; KILLS=20 runs the long version."""
    met = set()
    command = [sys.executable, "-c", SCRIPT]
    tests = str(Path(__file__).parent)
    (tmp_path / "unbroken").mkdir()
    subprocess.run([*command, str(tmp_path / "unbroken"), tests], check=True, capture_output=True)
    (tmp_path / "killed").mkdir()
    kills, random_moments = 0, random.Random(0)
    while not (tmp_path / "killed/spectra.parquet").exists():
        process = subprocess.Popen(
            [*command, str(tmp_path / "killed"), tests], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "begun\n"
        if kills < int(os.environ.get("KILLS", "3")):
            wait_for_a_state(tmp_path / "killed/state", process)
            time.sleep(random_moments.uniform(0.0, 0.3))
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
            for state in (tmp_path / "killed/state").glob("state-*.safetensors"):
                met |= set(begins(state).values())
        else:
            assert process.wait() == 0
        process.stdout.close()
    assert kills >= 1
    assert met - {0}, "no state was met whose tensors begin elsewhere than new ones"
    unbroken, killed = (
        blockspec.load_spectra(tmp_path / name / "spectra.parquet")
        for name in ("unbroken", "killed")
    )
    for name, spectrum in unbroken.items():
        np.testing.assert_array_equal(killed[name].nodes, spectrum.nodes)


def killed_within_a_sweep(folder, moment, settings):
    """Batches that the sweep has behind it which a forked estimate was in when it was killed by
    signal 9, ``moment`` seconds after it had saved one; None where it had come to its end before.
    """
    held = {path: path.stat().st_mtime_ns for path in folder.glob("*-unfinished*")}
    child = os.fork()
    if not child:
        blockspec.estimate_spectra(*many(), **settings, state=folder, state_every=0.0)
        os._exit(0)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and os.waitpid(child, os.WNOHANG) == (0, 0):
        if any(p.stat().st_mtime_ns != held.get(p) for p in folder.glob("*-unfinished*")):
            break
        time.sleep(0.001)
    else:
        return None
    time.sleep(moment)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left = [state.read(path)[1] for path in folder.glob("*-unfinished.safetensors")]
    return max((record["done"] for record in left), default=0)


@forks
@pytest.mark.slow
@pytest.mark.parametrize("products", ["whole", "layerwise"])
def test_kill_9_in_the_middle_of_a_sweep(tmp_path, products):
    """KILLS=20 is the long version."""
    settings = {"num_probes": 2, "num_steps": 4, "check": False, "products": products}
    unbroken = blockspec.estimate_spectra(*many(), **settings)
    moments = random.Random(products)
    met = [
        killed_within_a_sweep(tmp_path, moments.uniform(0.0, 0.05), settings)
        for _ in range(int(os.environ.get("KILLS", "3")))
    ]
    assert any(met), "no kill met a sweep with batches behind it"
    resumed = blockspec.estimate_spectra(*many(), **settings, state=tmp_path)
    assert resumed.cost.gradients < unbroken.cost.gradients
    for name, spectrum in unbroken.items():
        np.testing.assert_array_equal(resumed[name].nodes, spectrum.nodes)
        np.testing.assert_array_equal(resumed[name].weights, spectrum.weights)
        assert resumed[name].trace == spectrum.trace
    assert list(tmp_path.iterdir()) == []
