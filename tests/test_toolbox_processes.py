"""The toolbox on two processes: both of them get the numbers of one."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from launching import together
from problems import PROBLEMS, problem, tokens

import blockspec
from blockspec import losses
from blockspec.toolbox.sharpness import critical_steps
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


def followed():
    """Eigenvalues of both matrices along three updates; the batches are dealt."""
    it = PROBLEMS["gpt2"]()
    blocks = blockspec.partition(it.model, "model") + blockspec.partition(it.model)[2:4]
    torch.manual_seed(0)  # of dropout
    # a larger epsilon: gradients that are 0 but for rounding would be steps of random signs
    optimizer = torch.optim.AdamW(it.model.parameters(), lr=1e-2, eps=1e-3)
    tracker = blockspec.track(it.objective(), blocks, k=2, optimizer=optimizer)
    for step in range(3):
        tracker(step)
        it.update(optimizer)
    table = tracker.table
    return table[["value", "residual", "error", "products"]].to_numpy(float)


def along_a_direction(batches, **settings):
    """Numbers of moves, and their errors over the data: the first process has twelve units of the
    twenty, and one batch more.
    """
    it = problem("gpt2")
    objective = blockspec.Objective(it.model, batches, losses.next_token, micro_batch=1, **settings)
    blocks = blockspec.partition(it.model, "layer")
    move = {name: 0.01 * p.detach().sign() for name, p in it.model.named_parameters()}
    found = blockspec.directional(objective, blocks, move)
    least = blockspec.directional(objective, blocks, move, couplings=False, curvature="ggn")
    numbers = [found.predicted, found.measured, found.slope, found.bend, least.bend]
    critical = critical_steps(objective, blocks[:2], move)["measured"]
    table = found.to_frame().select_dtypes("number").to_numpy(float)
    parts = [table, found.curvature, [[n.value, n.data_stderr] for n in numbers], critical]
    return np.concatenate([np.ravel(part) for part in parts])


def sequences():
    """Five batches of unequal numbers of sequences."""
    return [{"input_ids": tokens(rows, 6, seed=rows)} for rows in (3, 4, 5, 2, 6)]


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    np.save(f"{folder}/{rank}.npy", numbers())
    np.save(f"{folder}/followed{rank}.npy", followed())
    np.save(f"{folder}/dealt{rank}.npy", along_a_direction(sequences()))
    own = sequences()[rank::2]
    np.save(f"{folder}/sharded{rank}.npy", along_a_direction(own, sharded=True))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path):
    together(process, str(tmp_path))
    expected = numbers()
    for rank in range(2):
        np.testing.assert_allclose(
            np.load(tmp_path / f"{rank}.npy"), expected, rtol=1e-8, atol=1e-11
        )
    tracked = followed()
    for rank in range(2):
        found = np.load(tmp_path / f"followed{rank}.npy")
        np.testing.assert_allclose(found, tracked, rtol=1e-6, atol=1e-9)
    along = along_a_direction(sequences())
    assert np.isfinite(along).sum() > 40
    for name in ("dealt0", "dealt1", "sharded0", "sharded1"):
        found = np.load(tmp_path / f"{name}.npy")
        np.testing.assert_allclose(found, along, rtol=1e-8, atol=1e-12, err_msg=name)
