"""Spectra of vision models: batch norm, every family against dense truth, blocks of one's own,
PyHessian's algorithms.
"""

import copy
import json
import math
from pathlib import Path

import dense_truth
import models as stand_ins
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from problems import roughened
from torch import nn

from blockspec import Objective, draw_probe, estimate_spectra, load_spectra, losses, partition
from blockspec.engine.settings import EstimateSettings
from blockspec.model.blocks import GRANULARITIES
from blockspec.products.curvature import Products
from blockspec.runs import cli
from blockspec.runs.run import BlockSettings, Resources, RunSettings, measure
from vision_models import factories
from vision_models.mixer import Mixer
from vision_models.mlp import ScaledMLP
from vision_models.models import ModelSettings, build
from vision_models.resnet import ResNet
from vision_models.vgg import VGG

CONFIGS = Path(__file__).parents[1] / "vision_models" / "configs"
TINY_VIT = {
    "classes": 3, "image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 6, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 8,
}  # fmt: skip
TINY_HF_RESNET = {
    "classes": 3, "num_channels": 1, "embedding_size": 2, "hidden_sizes": [2, 3], "depths": [1, 1], "layer_type": "basic",
}  # fmt: skip
FAMILIES = {
    "vit": lambda: build(ModelSettings("vit", TINY_VIT)),
    "hf_resnet": lambda: build(ModelSettings("hf_resnet", TINY_HF_RESNET)),
    "resnet": lambda: ResNet((1, 1), classes=3, channels=1, width=2),
    "plain": lambda: ResNet(
        (1, 1), classes=3, channels=1, width=2, batch_norm=False, residual=[True, False]
    ),
    "vgg": lambda: VGG(((2,), (3,)), classes=3, channels=1, hidden=(4,), pool=2),
    "vgg_bn": lambda: VGG(
        ((2,), (3,)), classes=3, channels=1, hidden=(4,), pool=1, batch_norm=True
    ),
    "mixer": lambda: Mixer(
        image_size=8,
        patch_size=4,
        channels=1,
        classes=3,
        width=4,
        depth=1,
        token_hidden=3,
        channel_hidden=5,
    ),
    "mlp": lambda: ScaledMLP((64, 3, 3, 3), scales=(3.0, 1.0, 0.3)),
    "alexnet": stand_ins.alexnet,  # a user's own, as the following
    "squeezenet": stand_ins.squeezenet,
    "densenet": stand_ins.densenet,
}
WITH_BATCH_NORM = ("resnet", "vgg_bn", "densenet")


def made(name):
    """A tiny model whose running statistics are those of no batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = roughened(FAMILIES[name]().double())
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.3)
    return model


def images(counts=(4, 2)):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(n, 1, 8, 8, generator=generator, dtype=torch.float64), torch.arange(n) % 3)
        for n in counts
    ]


def terms(call, batch):
    out = call(batch[0])
    return F.cross_entropy(getattr(out, "logits", out), batch[1], reduction="none")


def check_products(objective, matrix, blocks):
    """One product with each block, all in one pass, is that of the dense matrix's diagonal
    block.
    """
    generator = torch.Generator().manual_seed(1)
    vectors = [
        torch.randn(block.numel, generator=generator, dtype=torch.float64) for block in blocks
    ]
    found = Products(objective).sweep(list(zip(blocks, vectors, strict=True)))
    for block, vector, product in zip(blocks, vectors, found, strict=True):
        index = dense_truth.positions(objective.model, block)
        expected = matrix[index][:, index] @ vector
        noise = 1e-13 * float(matrix.abs().max())
        torch.testing.assert_close(
            product, expected, rtol=0, atol=1e-10 * float(expected.abs().max()) + noise
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_products_and_partitions_of_every_family(name):
    model, batches = made(name), images()
    matrix = dense_truth.dense_hessian(model, batches, terms)
    assert float(matrix.abs().max()) > 1e-3
    objective = Objective(model, batches, losses.classification)
    for by in GRANULARITIES:
        blocks = partition(model, by)
        positions = torch.cat([dense_truth.positions(model, block) for block in blocks])
        assert sorted(positions.tolist()) == list(range(len(matrix))), by
        check_products(objective, matrix, blocks)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("alexnet", "conv head bias"),
        ("squeezenet", "conv head bias"),  # its last convolution makes the classes
        ("densenet", "conv norm head bias"),
    ],
)
def test_the_partition_knows_torchvisions_networks(name, kinds):
    assert {block.kind for block in partition(made(name))} == set(kinds.split())


@pytest.mark.parametrize("name", ["vit", "resnet", "vgg", "mixer"])
def test_all_eigenvalues_of_the_smaller_blocks(name):
    model, batches = made(name), images()
    matrix = dense_truth.dense_hessian(model, batches, terms)
    blocks = [block for block in partition(model) if block.numel <= 24]
    spectra = estimate_spectra(
        Objective(model, batches, losses.classification), blocks, num_probes=1, num_steps=24
    )
    for block in blocks:
        values = dense_truth.eigenvalues(matrix, dense_truth.positions(model, block)).numpy()
        atol = 1e-9 * np.abs(values).max() + 1e-14 * float(matrix.abs().max())
        np.testing.assert_allclose(
            spectra[block.name].nodes[0, : block.numel], values, rtol=0, atol=atol
        )


@pytest.mark.parametrize("name", WITH_BATCH_NORM)
def test_batch_norm_is_that_of_eval_mode_or_that_of_train_mode(name):
    model, batches = made(name), images((5,))
    of_batch = copy.deepcopy(model)
    for module in of_batch.modules():
        if isinstance(
            module, nn.BatchNorm2d
        ):  # then even eval mode uses the statistics of the batch
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    truths = {
        "eval": dense_truth.dense_hessian(model, batches, terms),
        "train": dense_truth.dense_hessian(of_batch, batches, terms),
    }
    assert float((truths["eval"] - truths["train"]).norm() / truths["eval"].norm()) > 0.1
    before = copy.deepcopy(model.state_dict())
    for mode, matrix in truths.items():
        for training in (True, False):
            model.train(training)
            check_products(
                Objective(model, batches, losses.classification, batch_norm=mode),
                matrix,
                partition(model),
            )
            assert all(module.training == training for module in model.modules())
    check_products(
        Objective(model, batches, losses.classification), truths["eval"], partition(model, "model")
    )  # the default
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_run_in_float64_takes_images_in_float32(tmp_path):
    arguments = {"model": "digits_mlp", "settings": {"sizes": [64, 3, 10]}, "count": 20}
    settings = RunSettings(
        "vision_models.factories:digits",
        arguments,
        blocks=BlockSettings(include=["layers.1.weight"], full=False),
        estimate=EstimateSettings(num_probes=1, num_steps=2),
        dtype="float64",
    )
    measure(settings, factories.digits, tmp_path, resources=Resources(device="cpu"))
    assert load_spectra(tmp_path / "spectra.parquet")["layers.1.weight"].dtype == "float64"


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_mode_of_batch_norm_is_written_into_the_run(mode, tmp_path):
    arguments = {
        "model": "resnet",
        "settings": {"blocks": [1], "channels": 1, "width": 2},
        "count": 6,
    }
    settings = RunSettings(
        "vision_models.factories:digits",
        arguments,
        blocks=BlockSettings(include=["conv1.weight"], full=False),
        estimate=EstimateSettings(num_probes=1, num_steps=2),
        batch_norm=mode,
    )
    measure(settings, factories.digits, tmp_path, resources=Resources(device="cpu"))
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["batch_norm"] == mode


VIT_BASE = [
    "patch_embed",
    *(f"blocks.{i}.{part}" for i in (0, 6, 11) for part in ("qkv", "proj", "fc1", "fc2")),
    "head",
]


def test_the_papers_14_blocks_of_a_timm_vit_by_one_list():
    model = stand_ins.timm_vit(layers=12)
    include = [
        "patch_embed.proj.weight",
        "blocks.[06].[am]*.weight",
        "blocks.11.[am]*.weight",
        "head.weight",
    ]
    blocks = partition(model, "tensor", include)
    endings = (".weight", ".attn", ".mlp")
    names = [block.name for block in blocks]
    for ending in endings:
        names = [name.replace(ending, "") for name in names]
    assert [name.replace("patch_embed.proj", "patch_embed") for name in names] == VIT_BASE


def test_the_config_of_vit_base_has_the_papers_14_blocks():
    settings = yaml.safe_load((CONFIGS / "spectra" / "imagenet_vit_base.yaml").read_text())[
        "blocks"
    ]
    with torch.device("meta"):
        model = build(ModelSettings("vit"))
    blocks = partition(model, settings["by"], exclude=settings["exclude"])
    assert [block.name for block in blocks] == VIT_BASE
    width, hidden = 768, 3072
    sizes = [3 * width**2, width**2, width * hidden, width * hidden]
    assert [block.numel for block in blocks] == [width * 3 * 16**2, *sizes * 3, width * 1000]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("spectra/*.yaml")), ids=lambda path: path.stem)
def test_every_config_has_the_weight_matrices_of_its_model(path):
    given = ["run", "--config", str(path)]
    settings = cli._parser("run")[0].parse_args(given)["run"]
    name = settings.model_args.get("model") or path.stem
    with torch.device("meta"):
        model = build(ModelSettings(name))
    blocks = partition(model, settings.blocks.by, settings.blocks.include, settings.blocks.exclude)
    matrices = [
        n
        for n, p in model.named_parameters()
        if p.ndim >= 2 and not n.endswith(("cls_token", "position_embeddings"))
    ]
    found = [piece.parameter for block in blocks for piece in block.pieces]
    assert set(found) == set(matrices) if name != "vit" else set(found) < set(matrices)


@pytest.mark.slow
def test_other_batch_sizes_give_the_same_spectra():
    nodes = []
    for batch_size in (40, 16, 1):
        settings = {"depth": 8, "width": 4}
        model, *data = factories.digits(
            model="digits_resnet", settings=settings, count=40, batch_size=batch_size
        )
        objective = Objective(model.double(), *data)
        blocks = partition(objective.model, "layer", ["layer1.0", "fc.weight"])
        spectra = estimate_spectra(objective, blocks, num_probes=1, num_steps=6)
        nodes.append(np.concatenate([spectrum.nodes[0] for spectrum in spectra.values()]))
    np.testing.assert_allclose(nodes[1], nodes[0], rtol=1e-9, atol=1e-10 * nodes[0].max())
    np.testing.assert_allclose(nodes[2], nodes[0], rtol=1e-9, atol=1e-10 * nodes[0].max())


STAGES = {"stem": ["conv1.*", "bn1.*"], "first": "layer1.*", "second": "layer2.*", "head": "fc.*"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"second": ["layer2.*", "layer1.0.conv2.weight"]},
            r"'first' and 'second' overlap: both hold layer1\.0\.conv2\.weight",
        ),
        ({"head": "fc.weight"}, r"no block holds fc\.bias"),
        (
            {"second": "layer3.*"},
            r"block 'second': 'layer3\.\*' matches no block; the nearest are .*layer",
        ),
    ],
)
def test_stages_that_overlap_or_leave_gaps_are_refused_by_name(changes, message):
    model = made("resnet")
    assert [block.name for block in partition(model, STAGES)] == list(STAGES)
    with pytest.raises(ValueError, match=message):
        partition(model, STAGES | changes)


def test_attention_against_mlp_in_a_vit():
    model, batches = made("vit"), images()
    own = {
        "attention": "*attention*",
        "mlp": "*mlp*",
        "rest": ["*embeddings*", "*layernorm*", "classifier*"],
    }
    blocks = partition(model, own)
    check_products(
        Objective(model, batches, losses.classification),
        dense_truth.dense_hessian(model, batches, terms),
        blocks,
    )


# PyHessian's algorithms (github.com/amirgholami/PyHessian, pyhessian/hessian.py), written anew on
# flat vectors.


@pytest.fixture(scope="module")
def resnet20():
    """ResNet20 on ten real digits, its running statistics those of the digits: a product function,
    objective, spectrum.
    """
    model, batches, loss = factories.digits(model="digits_resnet", settings={"depth": 20}, count=10)
    model, (x, y) = model.double(), batches[0]
    with torch.no_grad():
        model.train()
        for _ in range(40):
            model(x.double())
    model.eval()
    parameters = list(model.parameters())
    value = F.cross_entropy(model(x.double()), y)
    gradient = torch.cat(
        [g.reshape(-1) for g in torch.autograd.grad(value, parameters, create_graph=True)]
    )

    def product(vector):
        parts = torch.autograd.grad(gradient, parameters, vector, retain_graph=True)
        return torch.cat([part.reshape(-1) for part in parts])

    objective = Objective(model, batches, loss)
    spectrum = estimate_spectra(
        objective, partition(model, "model"), num_probes=4, num_steps=16, seed=0
    )["model"]
    return product, objective, spectrum


@pytest.mark.slow
def test_the_top_eigenvalue_is_that_of_pyhessians_power_iteration(resnet20):
    product, _, spectrum = resnet20
    vector = torch.randn(
        spectrum.block.numel, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    vector, value = vector / vector.norm(), None
    for _ in range(200):
        image = product(vector)
        last, value = value, float(image @ vector)
        vector = image / image.norm()
        if last is not None and abs(value - last) / (abs(last) + 1e-6) < 1e-5:
            break
    assert spectrum.largest.value == pytest.approx(value, rel=1e-3)
    assert abs(spectrum.smallest.value) < spectrum.largest.value


@pytest.mark.slow
def test_the_trace_is_that_of_pyhessians_hutchinson(resnet20):
    product, objective, spectrum = resnet20
    (block,) = partition(objective.model, "model")
    trace = estimate_spectra(objective, block, num_probes=24, num_steps=1)[
        "model"
    ].trace  # one step knows v'Hv
    generator = torch.Generator().manual_seed(1)
    samples = []
    for _ in range(24):
        vector = torch.randint(0, 2, (block.numel,), generator=generator).double() * 2 - 1
        samples.append(float(vector @ product(vector)))
    error = np.hypot(np.std(samples, ddof=1) / np.sqrt(len(samples)), trace.stderr)
    assert error < 0.3 * trace.value
    assert abs(trace.value - np.mean(samples)) < 3 * error
    how = spectrum.distribution
    vector = draw_probe("model", block.numel, probe=1, distribution=how).double()
    vector *= math.sqrt(block.numel) / vector.norm()
    of_probe = block.numel * (spectrum.nodes[1] * spectrum.weights[1]).sum()
    assert of_probe == pytest.approx(
        float(vector @ product(vector)), rel=1e-9
    )  # the same vector, the same number


@pytest.mark.slow
def test_the_density_is_that_of_pyhessians_lanczos(resnet20):
    product, _, spectrum = resnet20
    vector = draw_probe("model", spectrum.block.numel, probe=2).double()
    basis = [vector / vector.norm()]
    for _ in range(int(spectrum.steps[2])):
        image = product(basis[-1])
        for other in basis * 2:
            image = image - (image @ other) * other
        basis.append(image / image.norm())
    rows = torch.stack(basis[:-1])
    values, vectors = torch.linalg.eigh(rows @ torch.stack([product(row) for row in rows]).T)
    np.testing.assert_allclose(spectrum.nodes[2], values.numpy(), rtol=0, atol=1e-8 * spectrum.norm)
    np.testing.assert_allclose(spectrum.weights[2], vectors[0].square().numpy(), rtol=0, atol=1e-8)
