"""Vision models: published parameter counts and names, forward passes against other
implementations, switches.
"""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

import blockspec
from vision_models.hf import pretrained
from vision_models.mixer import Mixer
from vision_models.mlp import ScaledMLP
from vision_models.models import ModelSettings, build
from vision_models.resnet import ResNet, cifar_resnet
from vision_models.vgg import VGG


def make(name, **settings):
    return build(ModelSettings(name, settings))


@pytest.mark.parametrize(
    ("name", "settings", "count"),
    [
        ("vit", {}, 86_567_656),  # timm vit_base_patch16_224
        ("mixer", {}, 59_880_472),  # timm mixer_b16_224
        ("hf_resnet", {}, 25_557_032),  # torchvision resnet50
        ("resnet18", {}, 11_689_512),  # torchvision, as the following
        ("vgg11", {}, 132_863_336),
        ("vgg11", {"batch_norm": True}, 132_868_840),
        ("vgg16", {}, 138_357_544),
        ("vgg16", {"batch_norm": True}, 138_365_992),
        ("cifar_resnet", {"depth": 20}, 272_474),  # PyHessian's models/resnet.py
        ("cifar_resnet", {"depth": 20, "batch_norm": False}, 270_906),
        (
            "cifar_resnet",
            {"depth": 20, "residual": False},
            269_722,
        ),  # and He et al.'s, whose shortcuts have no parameters
        ("cifar_resnet", {"depth": 56}, 855_770),
        ("mlp", {"sizes": (64, 8, 2), "bias": False}, 528),
    ],
)
def test_parameter_counts(name, settings, count):
    with torch.device("meta"):
        model = make(name, **settings)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize(
    ("name", "settings", "names"),
    [
        ("resnet18", {}, {"conv1.weight", "bn1.running_var", "layer1.0.conv1.weight", "layer4.1.bn2.bias", "fc.bias",
                          "layer2.0.downsample.0.weight", "layer2.0.downsample.1.num_batches_tracked"}),
        ("vgg16", {}, {"features.0.weight", "features.28.bias", "classifier.0.weight", "classifier.6.bias"}),
        ("vgg16", {"batch_norm": True}, {"features.1.running_mean", "features.40.weight", "classifier.6.weight"}),
        ("mixer", {}, {"stem.proj.weight", "blocks.0.mlp_tokens.fc1.weight", "blocks.11.mlp_channels.fc2.bias",
                       "blocks.3.norm2.weight", "norm.weight", "head.weight"}),
    ],
)  # fmt: skip
def test_names_are_torchvisions_and_timms(name, settings, names):
    with torch.device("meta"):
        assert names <= set(make(name, **settings).state_dict())


def hf_name(name):
    """The name that HF's ResNet gives a tensor of ours."""
    rules = {
        r"^conv1\.": "resnet.embedder.embedder.convolution.",
        r"^bn1\.": "resnet.embedder.embedder.normalization.",
        r"^fc\.": "classifier.1.",
        r"^layer(\d+)\.(\d+)\.downsample\.0\.": r"resnet.encoder.stages.\1.layers.\2.shortcut.convolution.",
        r"^layer(\d+)\.(\d+)\.downsample\.1\.": r"resnet.encoder.stages.\1.layers.\2.shortcut.normalization.",
        r"^layer(\d+)\.(\d+)\.conv(\d)\.": r"resnet.encoder.stages.\1.layers.\2.layer.\3.convolution.",
        r"^layer(\d+)\.(\d+)\.bn(\d)\.": r"resnet.encoder.stages.\1.layers.\2.layer.\3.normalization.",
    }
    pattern, replacement = next(rule for rule in rules.items() if re.match(rule[0], name))
    named = re.sub(pattern, replacement, name)
    return re.sub(r"(stages|layer)\.(\d+)", lambda match: f"{match[1]}.{int(match[2]) - 1}", named)


@pytest.mark.parametrize("training", [False, True])
def test_resnet_is_hfs(training):
    ours = ResNet((1, 2), classes=5, width=4, stem="imagenet").double().train(training)
    config = ResNetConfig(
        num_labels=5,
        depths=[1, 2],
        hidden_sizes=[4, 8],
        embedding_size=4,
        layer_type="basic",
        hidden_act="relu",
    )
    theirs = ResNetForImageClassification(config).double().train(training)
    theirs.load_state_dict({hf_name(name): tensor for name, tensor in ours.state_dict().items()})
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x).logits)


def norms(module):
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


def test_batch_norm_of_one_stage_is_switched_off():
    model = cifar_resnet(depth=8, batch_norm=[True, False, True])
    assert [len(norms(model.get_submodule(f"layer{i}"))) for i in (1, 2, 3)] == [2, 0, 3]
    assert len(norms(model)) == 6  # the stem keeps its own
    assert not norms(cifar_resnet(depth=8, batch_norm=False))


def test_shortcuts_of_one_stage_are_switched_off():
    model = cifar_resnet(depth=14, residual=[True, False, True], batch_norm=False)
    x = torch.randn(2, 16, 8, 8)
    for i, width in ((1, 16), (2, 32), (3, 64)):
        stage = model.get_submodule(f"layer{i}")
        inputs = x if i == 1 else torch.randn(2, width // 2, 8, 8)
        for name, parameter in stage.named_parameters():
            if "downsample" not in name:
                nn.init.zeros_(parameter)
        assert bool(stage(inputs).any()) == (i != 2)  # only a shortcut lets anything through
        assert any("downsample" in name for name, _ in stage.named_parameters()) == (i == 3)


def test_vgg_without_residuals_is_a_chain_of_convolutions():
    model = VGG(((2, 3), (4,)), classes=5, channels=1, hidden=(6,), pool=2).double().eval()
    tensors = model.state_dict()
    x = y = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    for i, pooled in ((0, False), (2, True), (5, True)):
        y = F.conv2d(
            y, tensors[f"features.{i}.weight"], tensors[f"features.{i}.bias"], padding=1
        ).clamp(min=0)
        y = y.unfold(2, 2, 2).unfold(3, 2, 2).amax((-2, -1)) if pooled else y
    y = (y.flatten(1) @ tensors["classifier.0.weight"].T + tensors["classifier.0.bias"]).clamp(
        min=0
    )
    torch.testing.assert_close(
        model(x), y @ tensors["classifier.3.weight"].T + tensors["classifier.3.bias"]
    )


def test_mixer_mixes_tokens_then_channels():
    model = Mixer(
        image_size=6,
        patch_size=2,
        channels=2,
        classes=3,
        width=4,
        depth=1,
        token_hidden=5,
        channel_hidden=7,
    )
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    t = model.state_dict()

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return (
            x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * t[f"{name}.weight"]
            + t[f"{name}.bias"]
        )

    def mlp(x, name, formula):
        first, second = formula
        x = torch.einsum(first, x, t[f"{name}.fc1.weight"])
        x = x + (t[f"{name}.fc1.bias"] if x.shape[-1] == 7 else t[f"{name}.fc1.bias"][:, None])
        x = torch.einsum(second, x * (1 + torch.erf(x / math.sqrt(2))) / 2, t[f"{name}.fc2.weight"])
        return x + (t[f"{name}.fc2.bias"] if "channels" in name else t[f"{name}.fc2.bias"][:, None])

    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    patches = x.reshape(2, 2, 3, 2, 3, 2)  # (B, C, row, y, column, x)
    y = (
        torch.einsum("bcrysx,dcyx->brsd", patches, t["stem.proj.weight"]).reshape(2, 9, 4)
        + t["stem.proj.bias"]
    )
    y = y + mlp(norm(y, "blocks.0.norm1"), "blocks.0.mlp_tokens", ("btd,ht->bhd", "bhd,th->btd"))
    y = y + mlp(norm(y, "blocks.0.norm2"), "blocks.0.mlp_channels", ("btd,hd->bth", "bth,dh->btd"))
    expected = norm(y, "norm").mean(1) @ t["head.weight"].T + t["head.bias"]
    torch.testing.assert_close(model(x), expected)


def test_scaled_layers_scale_blocks_of_the_hessian_and_keep_the_function():
    scales = (10.0, 1.0, 0.1)
    plain = make("mlp", sizes=(5, 4, 3, 2)).double()
    scaled = make("mlp", sizes=(5, 4, 3, 2), scales=scales).double()  # the same seed
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1, 0])
    torch.testing.assert_close(
        scaled(x), plain(x), rtol=1e-6, atol=1e-7
    )  # the weights were divided in float32

    def hessian(model):
        def loss(parameters):
            return F.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y)

        return torch.func.hessian(loss)({name: p.detach() for name, p in model.named_parameters()})

    one, other = hessian(plain), hessian(scaled)
    for l in range(3):
        for m in range(3):
            a, b = f"layers.{l}.weight", f"layers.{m}.weight"
            torch.testing.assert_close(
                other[a][b], scales[l] * scales[m] * one[a][b], rtol=1e-5, atol=1e-7
            )


@pytest.mark.parametrize(
    "name", ["digits_vit", "digits_resnet", "digits_vgg", "digits_mixer", "digits_mlp"]
)
def test_models_for_digits_run_and_depend_on_the_seed_alone(name):
    x = torch.randn(2, 1, 8, 8)
    state = torch.get_rng_state()
    models = [build(ModelSettings(name), seed=seed).eval() for seed in (3, 3, 4)]
    assert torch.equal(state, torch.get_rng_state())
    outputs = [model(x) for model in models]
    first, again, other = (
        output if isinstance(output, torch.Tensor) else output.logits for output in outputs
    )
    assert first.shape == (2, 10)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        (
            "digits_vit",
            "embedding position query key value attention_output mlp_in mlp_out norm head bias",
        ),
        ("digits_resnet", "conv norm head bias"),
        ("digits_vgg", "conv head bias"),
        ("digits_mixer", "embedding mlp_in mlp_out norm head bias"),
    ],
)
def test_the_partition_knows_every_part(name, kinds):
    model = make(name)
    blocks = blockspec.partition(model, by="matrix")
    assert {block.kind for block in blocks} == set(kinds.split())
    assert sum(block.numel for block in blocks) == sum(
        parameter.numel() for parameter in model.parameters()
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make("resnet-18"), "no model 'resnet-18': there are vit, .*cifar_resnet"),
        (lambda: make("mixer", layers=3), "'mixer' does not take .*layers"),
        (lambda: make("vit", hidden=3), r"ViTConfig has no setting \['hidden'\]"),
        (lambda: cifar_resnet(depth=18), "depth 18 .* 6 n . 2"),
        (lambda: cifar_resnet(depth=8, residual=[True, False]), "2 switches .* 3 stages"),
        (lambda: ResNet(stem="cifar100"), "no stem 'cifar100': there are cifar, imagenet"),
        (lambda: Mixer(image_size=10, patch_size=4), "patch_size 4 does not divide image_size 10"),
        (lambda: ScaledMLP((4, 3, 2), scales=(1.0,)), "1 scales .* 2 layers"),
        (lambda: ScaledMLP((4, 3, 2), scales=(1.0, 0.0)), "contain 0"),
        (lambda: pretrained("/no/such/folder"), "no image classifier .*/no/such/folder"),
    ],
)
def test_wrong_settings_say_what_is_right(call, message):
    with pytest.raises(ValueError, match=message):
        call()
