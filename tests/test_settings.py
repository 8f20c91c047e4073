"""Settings out of range are refused when they are made, and leave nothing behind."""

import factories_for_runs as factories
import pytest
import torch
from test_cli import invoke, run_arguments

from blockspec.engine.settings import EstimateSettings, Execution
from blockspec.numerics import memory
from blockspec.runs import launched
from blockspec.runs.settings import Resources, find_device

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "wrong",
    [
        {"tolerance": 1e-300},
        {"tolerance": -1.0},
        {"seed": 2**70},
        {"basis_device": "meta"},
        {"basis_device": "cuda:99"},
        {"num_probes": 0},
        {"basis_dtype": "float8"},
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_at_once(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong)))):
        EstimateSettings(**wrong)


@pytest.mark.parametrize(
    "wrong", [0, -1, "-3GiB", 1e26, "1e26", "200%", float("nan"), True, "much"]
)
def test_memory_that_cannot_be_is_refused_at_once(wrong):
    with pytest.raises(ValueError, match="memory"):
        Execution(memory=wrong)


def test_memory_means_what_it_says():
    total = memory.total(CPU)
    found = [memory.parse(given, CPU) for given in ("1 B", "1e9", "1e3 GiB", "2KiB", 10**9)]
    assert found == [1, 10**9, 1000 * 2**30, 2048, 10**9]
    for share in (0.5, "0.5", "50%"):
        assert memory.parse(share, CPU) == int(total / 2)
    assert memory.parse(1.0, CPU) == memory.parse("1.0", CPU) == total


def test_resources_that_are_not_there():
    for device in ("meta", "cuda:99", "tpu"):
        with pytest.raises(ValueError, match=device):
            Resources(device=device)
    with pytest.raises(ValueError, match="columns"):
        Execution(columns=0)
    with pytest.raises(ValueError, match="state_every"):
        Execution(state_every=-1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        ("--estimate.tolerance", "-1"),
        ("--memory", "0"),
        ("--device", "cuda:99"),
        ("--estimate.basis_device", "meta"),
        ("--dtype", "int8"),
        ("--estimate.seed", str(2**70)),
    ],
    ids=str,
)
def test_a_refused_command_leaves_nothing_and_the_corrected_one_works(tmp_path, wrong):
    factories.reset()
    out = tmp_path / "run"
    refused = invoke(*run_arguments(out), *wrong)
    assert refused.code != 0
    assert len(refused.err.strip().splitlines()) == 1
    assert not out.exists()
    assert factories.calls["loss"] == 0


@pytest.mark.slow
def test_what_only_the_model_can_tell_leaves_nothing_either(tmp_path):
    out = tmp_path / "run"
    assert invoke(*run_arguments(out), "--memory", "1MiB").code != 0
    assert not out.exists()
    assert invoke(*run_arguments(out)).code == 0


def test_several_processes_without_a_place_to_meet(monkeypatch):
    for name in launched.NEEDED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(
        ValueError, match="MASTER_ADDR, MASTER_PORT is not set: start with torchrun"
    ):
        launched.join()


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_processes_that_do_not_come_are_told_soon(monkeypatch, rank):
    values = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29587"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(ValueError, match=f"process {rank} has waited 1 s for all 2 processes"):
        launched.join(patience=1.0)


def test_the_group_of_processes_ends_before_the_interpreter(monkeypatch):
    values = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    at_exit = []
    monkeypatch.setattr(launched.atexit, "register", at_exit.append)
    assert launched.join(patience=30.0)
    assert torch.distributed.is_initialized()
    (leave,) = at_exit
    leave()
    leave()  # a program may have left by itself
    assert not torch.distributed.is_initialized()


def test_processes_that_share_a_gpu_are_told_or_compute_on_the_cpu(monkeypatch):
    """NCCL refuses a GPU for two: "Duplicate GPU detected"."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert find_device("auto") == "cuda:0"
    assert launched.backend_here() == "nccl"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert launched.backend_here() == "gloo"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_device("cpu") == "cpu"
    with pytest.raises(ValueError, match=r"process 1 .* there are 1: .* --device cpu"):
        find_device("auto")
