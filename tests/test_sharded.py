"""A model that FSDP2 has spread over processes gives the numbers of one process."""

import gc
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from launching import together
from models import tiny_gpt2
from torch.distributed.fsdp import fully_shard

import blockspec
from blockspec.toolbox.sharpness import critical_steps

DIMS = {"layers": 2, "n_embd": 10, "n_head": 2, "vocab_size": 13}  # 10 and 13: ragged shards
SETTINGS = {"num_probes": 2, "num_steps": 4}


def data():
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(13, (2, 5), generator=generator)} for _ in range(6)]


def many():
    """Enough units of data for their errors."""
    generator = torch.Generator().manual_seed(2)
    return [{"input_ids": torch.randint(53, (1, 4), generator=generator)} for _ in range(12)]


def chosen(model):
    return blockspec.partition(model, include=["*c_fc.weight", "*h.1*/key", "*wte*", "*ln_f.bias"])


def nodes(model, batches, **settings):
    objective = blockspec.Objective(model, batches, blockspec.losses.next_token, **settings)
    found = blockspec.estimate_spectra(objective, chosen(model), **SETTINGS)
    return np.concatenate([s.nodes.ravel() for s in found.values()])


def enough(model):
    """Units, errors and norms of blocks with just enough data."""
    generator = torch.Generator().manual_seed(4)
    batches = [{"input_ids": torch.randint(13, (1, 5), generator=generator)} for _ in range(24)]
    objective = blockspec.Objective(model, batches, blockspec.losses.next_token)
    blocks = blockspec.partition(model, include=["*h.1*weight/key", "*ln_f.bias"])
    settings = {"num_probes": "auto", "num_steps": "auto", "tolerance": 0.2, "data": "auto"}
    found = blockspec.estimate_spectra(objective, blocks, check=False, **settings)
    return np.array([[s.units, s.error, s.data_error, s.norm] for s in found.values()])


def along_a_direction(objective):
    """Gradient, couplings and the real change of a move by known tensors, and a critical step."""
    blocks = blockspec.partition(objective.model, "layer")
    generator = torch.Generator().manual_seed(3)
    shapes = {name: p.shape for name, p in objective.model.named_parameters()}
    kind = {"generator": generator, "dtype": torch.float64}
    move = {name: 0.02 * torch.randn(shape, **kind) for name, shape in shapes.items()}
    before = objective.value()
    found = blockspec.directional(objective, blocks, move)
    steps = critical_steps(objective, blocks[-1:], move, precision=0.5)["measured"]
    assert objective.value() == before
    numbers = [found.measured.value, found.predicted.value]
    return np.concatenate([found.gradient, np.ravel(found.curvature), numbers, steps])


def alive():
    """Bytes of all tensors of this process, each storage once."""
    gc.collect()
    found = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    local = [t.to_local() if hasattr(t, "to_local") else t for t in found]
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in local}.values())


def bytes_held(make, batches, **settings):
    """Of the model, and at most of the Krylov vectors between sweeps of an estimate with errors of
    the data; those errors and the eigenvalues.
    """
    bare = alive()
    model = make(tiny_gpt2(layers=1, n_embd=48, n_head=2, vocab_size=53))
    weights = alive() - bare
    vectors = []
    objective = blockspec.Objective(model, batches, blockspec.losses.next_token, **settings)
    blocks = blockspec.partition(model, include=["*mlp*weight", "*wte*", "*ln_1.bias"])

    def seen(done, of):
        vectors.append(alive() - bare - weights)

    found = blockspec.estimate_spectra(objective, blocks, 2, 5, progress=seen).values()
    numbers = [[s.trace.data_stderr, s.largest.data_stderr, *s.nodes.ravel()] for s in found]
    return weights, max(vectors), np.array(numbers)


def spread(model):
    for layer in model.transformer.h:
        fully_shard(layer)
    fully_shard(model)
    return model


def process(rank, folder, world):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    model = spread(tiny_gpt2(**DIMS))
    hooks = {path: len(m._forward_pre_hooks) for path, m in model.named_modules()}
    own = data()[rank::world]
    np.save(f"{folder}/{rank}.npy", nodes(model, own, sharded=True))
    assert {path: len(m._forward_pre_hooks) for path, m in model.named_modules()} == hooks
    uneven = data()[:3] if rank == 0 else data()[3:4]
    objective = blockspec.Objective(model, uneven, blockspec.losses.next_token, sharded=True)
    np.save(f"{folder}/along{rank}.npy", along_a_direction(objective))
    np.save(f"{folder}/uneven{rank}.npy", nodes(model, uneven, sharded=True))
    np.save(f"{folder}/enough{rank}.npy", enough(model))
    *held, numbers = bytes_held(spread, many()[rank::world], sharded=True)
    np.save(f"{folder}/numbers{rank}.npy", numbers)
    Path(folder, f"{rank}.json").write_text(json.dumps(held))
    batch = own[0]  # the model still trains
    model(**batch).logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_model_under_fully_shard_gives_the_numbers_of_one_process(tmp_path, world):
    together(process, str(tmp_path), world, processes=world)
    model = tiny_gpt2(**DIMS)
    truth = nodes(model, data())
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    for rank in range(world):
        np.testing.assert_allclose(
            np.load(tmp_path / f"{rank}.npy"), truth, rtol=1e-8, atol=1e-10 * abs(truth).max()
        )
    batches = data()[:3] + data()[3:4] * (world - 1)
    objective = blockspec.Objective(model, batches, blockspec.losses.next_token)
    along = along_a_direction(objective)
    uneven = nodes(model, batches)
    units = enough(model)
    for rank in range(world):
        found = np.load(tmp_path / f"uneven{rank}.npy")
        np.testing.assert_allclose(found, uneven, rtol=1e-8, atol=1e-10 * abs(uneven).max())
        found = np.load(tmp_path / f"along{rank}.npy")
        np.testing.assert_allclose(found, along, rtol=1e-8, atol=1e-10 * abs(along[:-4]).max())
        found = np.load(tmp_path / f"enough{rank}.npy")
        np.testing.assert_allclose(found, units, rtol=1e-6)
    weights, vectors, numbers = bytes_held(lambda whole: whole, many())
    for rank in range(world):
        assert told[rank][0] <= (1 / world + 0.05) * weights, (told, weights)
        assert told[rank][1] <= (1 / world + 0.05) * vectors, (told, vectors)
        found = np.load(tmp_path / f"numbers{rank}.npy")
        np.testing.assert_allclose(found, numbers, rtol=1e-6, atol=1e-10 * abs(numbers).max())
