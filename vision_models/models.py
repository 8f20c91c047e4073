"""The models by name, so that a checkpoint can say with a name and plain settings which model it
holds.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch import nn
from transformers import PreTrainedModel

from training.checkpoints import read_record, save_weights
from vision_models.hf import pretrained, resnet, vit
from vision_models.mixer import Mixer
from vision_models.mlp import ScaledMLP
from vision_models.resnet import ResNet, cifar_resnet, resnet18
from vision_models.vgg import VGG, vgg11, vgg16

MODELS: dict[str, Callable[..., nn.Module]] = {
    "vit": vit,
    "hf_resnet": resnet,
    "pretrained": pretrained,
    "resnet": ResNet,
    "cifar_resnet": cifar_resnet,
    "resnet18": resnet18,
    "vgg": VGG,
    "vgg11": vgg11,
    "vgg16": vgg16,
    "mixer": Mixer,
    "mlp": ScaledMLP,
    # For images of 8x8 pixels in one channel.
    "digits_vit": partial(
        vit,
        classes=10,
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        # about 1 / sqrt(hidden_size); with the default 0.02, for 768, training hardly starts
        initializer_range=0.1,
    ),
    "digits_resnet": partial(cifar_resnet, depth=14, channels=1),
    "digits_vgg": partial(
        VGG, stages=((32, 32), (64, 64)), classes=10, channels=1, hidden=(64,), pool=2, dropout=0.0
    ),
    "digits_mixer": partial(
        Mixer,
        image_size=8,
        patch_size=2,
        channels=1,
        classes=10,
        width=64,
        depth=4,
        token_hidden=32,
        channel_hidden=256,
    ),
    "digits_mlp": partial(ScaledMLP, sizes=(64, 64, 64, 64, 10)),
}


@dataclass(frozen=True)
class ModelSettings:
    """Which model.

    Args:
        name: vit, hf_resnet, pretrained, resnet, cifar_resnet, resnet18, vgg, vgg11, vgg16, mixer,
            mlp, digits_vit, digits_resnet, digits_vgg, digits_mixer or digits_mlp.
        settings: What the model's function takes, such as {depth: 56, batch_norm: false} for
            cifar_resnet.
    """

    name: str = "digits_vit"
    settings: dict[str, Any] = field(default_factory=dict)


def build(model: ModelSettings, *, seed: int = 0) -> nn.Module:
    """The model with fresh weights (but for ``pretrained``).

    Args:
        model: Name and settings.
        seed: Of the weights; torch's global generator is left as it was.

    Raises:
        ValueError: Unknown name, or settings that the model does not take.
    """
    if model.name not in MODELS:
        raise ValueError(f"no model {model.name!r}: there are {', '.join(MODELS)}")
    builder = MODELS[model.name]
    try:
        inspect.signature(builder).bind(**model.settings)
    except TypeError as error:
        raise ValueError(
            f"model {model.name!r} does not take the settings {model.settings}: {error}"
        ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return builder(**model.settings)


def save(model: nn.Module, folder: Path) -> None:
    """Weights as safetensors; a model of transformers so that its ``from_pretrained`` loads it."""
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(folder)
    else:
        save_weights(model, folder)


def settings_of(checkpoint: str | Path) -> ModelSettings:
    """Which model a checkpoint holds."""
    return ModelSettings(**read_record(Path(checkpoint))["model"])


def load(checkpoint: str | Path) -> nn.Module:
    """The model of a checkpoint, built from the settings in its record; nothing of it is executed.

    Raises:
        ValueError: The weights do not fit the model of the record.
        FileNotFoundError: The folder is no checkpoint.
    """
    folder = Path(checkpoint)
    settings = settings_of(folder)
    if (folder / "config.json").is_file():
        return pretrained(str(folder))
    model = build(settings)
    try:
        load_model(model, str(folder / "model.safetensors"))
    except RuntimeError as error:
        raise ValueError(
            f"the weights of {folder} do not fit its model {settings}: {error}"
        ) from error
    return model
