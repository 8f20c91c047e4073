"""Several processes give the numbers of one, and end together when one of them dies."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from launching import WITHOUT_GPU, accelerate, together
from models import tiny_gpt2

import blockspec
from blockspec.numerics.ranks import Ranks

SETTINGS = {
    "fixed": {"num_probes": 2, "num_steps": 6},
    "auto": {"num_probes": "auto", "num_steps": 6, "tolerance": 0.2},
    "deflated": {"num_probes": "auto", "num_steps": "auto", "tolerance": 0.05},
    "no basis": {"num_probes": 2, "num_steps": 5, "reorthogonalize": False},
    "fisher": {"num_probes": 1, "num_steps": 4, "curvature": "fisher"},
}
NAMES = [
    "*mlp.c_fc.weight",
    "*attn.c_attn.weight/query",
    "*wte.weight",
    "*ln_f.weight",
    "*mlp.c_proj.bias",
]
DIMS = {
    "layers": 1,
    "n_embd": 10,
    "n_head": 2,
    "vocab_size": 17,
}  # 10 and 17: shares of unequal length


def numbers(columns=None):
    """Nodes and weights of every setting; four batches with different numbers of loss terms."""
    model = tiny_gpt2(**DIMS)
    generator = torch.Generator().manual_seed(1)
    batches = []
    for length in (6, 3, 2, 4):
        tokens = torch.randint(17, (2, length), generator=generator)
        batches.append(
            {
                "input_ids": tokens,
                "labels": tokens.masked_fill(
                    torch.rand(2, length, generator=generator) < 0.2, -100
                ),
            }
        )
    objective = blockspec.Objective(model, batches, blockspec.losses.next_token)
    blocks = blockspec.partition(model, include=NAMES)
    found = {}
    for name, settings in SETTINGS.items():
        spectra = blockspec.estimate_spectra(objective, blocks, columns=columns, **settings)
        for block, s in spectra.items():
            found |= {f"{name} {block} nodes": s.nodes, f"{name} {block} weights": s.weights}
    return found


def messages_in_a_step(num_blocks):
    """How often processes sum something in one Lanczos step of that many blocks."""
    model = tiny_gpt2(**DIMS)
    objective = blockspec.Objective(
        model, [{"input_ids": torch.arange(6)[None]}] * 2, blockspec.losses.next_token
    )
    blocks = blockspec.partition(model, include="*weight")[:num_blocks]
    counts, original, calls = [], dist.all_reduce, 0

    def counted(*arguments, **named):
        nonlocal calls
        calls += 1
        return original(*arguments, **named)

    dist.all_reduce = counted
    try:
        blockspec.estimate_spectra(
            objective, blocks, 1, 5, columns=1, progress=lambda done, total: counts.append(calls)
        )
    finally:
        dist.all_reduce = original
    return counts[2] - counts[1]


def process(rank, world, columns, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    np.savez(f"{folder}/{rank}.npz", **numbers(columns))
    if columns == 1:
        np.save(f"{folder}/messages{rank}.npy", [messages_in_a_step(1), messages_in_a_step(6)])
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def expected():
    return numbers()


@pytest.mark.slow
@pytest.mark.parametrize(("world", "columns"), [(2, 1), (3, 1), (3, 3), (4, 2)])
def test_numbers_are_those_of_one_process(tmp_path, expected, world, columns):
    together(process, world, columns, str(tmp_path), processes=world)
    for rank in range(world):
        found = np.load(tmp_path / f"{rank}.npz")
        assert set(found) == set(expected)
        for name, values in expected.items():
            np.testing.assert_allclose(
                found[name],
                values,
                rtol=1e-8,
                atol=1e-9 * np.abs(values).max() + 1e-12,
                err_msg=name,
            )
    if columns == 1:
        few, many = np.load(tmp_path / "messages0.npy")
        assert few == many == 4  # products, twice coefficients, vectors


def test_sums_keep_shapes_and_types():
    tensors = [torch.ones(2, 3), torch.ones(4, dtype=torch.float64)]
    assert Ranks().sums(tensors)[0] is tensors[0]


def launch(out, processes, *arguments):
    command = [sys.executable, *accelerate(processes), "-m", "blockspec", "run", "--model", "factories_for_runs:mortal",
               "--estimate.num_probes", "4", "--estimate.num_steps", "12", "--blocks.by", "matrix", "--blocks.full", "false",
               "--plots", "false", "--state_every", "0", "--out", str(out), *arguments]  # fmt: skip
    environment = (
        os.environ | WITHOUT_GPU | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.path.dirname(__file__)}
    )
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("columns", [1, 2], ids=["batches split", "blocks split"])
def test_a_process_that_dies_ends_all_and_leaves_the_state(tmp_path, columns):
    mark = tmp_path / "mark"
    dying = (
        "--model_args.dying_rank",
        "1",
        "--model_args.after",
        "42",
        "--model_args.mark",
        str(mark),
    )
    died = launch(tmp_path / "run", 2, "--columns", str(columns), *dying)
    ended = time.time()
    assert died.returncode != 0
    assert (
        ended - mark.stat().st_mtime < 60
    )  # a process that waits for another does so for half an hour
    assert "the same command goes on from the last saved state" in died.stderr
    states = (tmp_path / "run" / "state").rglob("*.safetensors")
    assert len({path.name[: len("state-0of2-0of2")] for path in states}) == 2  # of both processes
