"""The toolbox on two processes: both of them get the numbers of one."""

import numpy as np
import torch
import torch.distributed as dist
from launching import together
from problems import problem

import blockspec
from blockspec.toolbox.traces import METHODS


def numbers():
    """Of everything that takes products."""
    it = problem("gpt2")
    objective, blocks = it.objective(), blockspec.partition(it.model)[:6]
    block, other = blocks[2:4]
    estimates = [blockspec.trace(objective, blocks, method, num_probes=8) for method in METHODS]
    estimates.append(blockspec.squared_norms(objective, blocks, num_probes=4))
    parts = [
        *([value.value for value in found.values()] for found in estimates),
        *blockspec.diagonal(objective, blocks, num_probes=3).values.values(),
        blockspec.coupling(objective, blocks, 2).samples,
        blockspec.top_eigenpairs(objective, block, 2).values,
        blockspec.dense(objective, block),
        blockspec.dense(objective, block, other),
        blockspec.landscape(objective, block, dimensions=1, points=3).losses,
    ]
    return np.concatenate([np.ravel(part) for part in parts])


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    np.save(f"{folder}/{rank}.npy", numbers())
    dist.destroy_process_group()


def test_two_processes_give_the_numbers_of_one(tmp_path):
    together(process, str(tmp_path))
    expected = numbers()
    for rank in range(2):
        np.testing.assert_allclose(
            np.load(tmp_path / f"{rank}.npy"), expected, rtol=1e-8, atol=1e-11
        )
