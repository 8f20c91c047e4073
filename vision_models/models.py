"""The models by name, so that a checkpoint can say with a name and plain settings which model it holds."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

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
}


def build(name: str, **settings: Any) -> nn.Module:
    """The model of this name with these settings.

    Raises:
        ValueError: Unknown name, or settings that the model does not take.
    """
    if name not in MODELS:
        raise ValueError(f"no model {name!r}: there are {', '.join(MODELS)}")
    builder = MODELS[name]
    try:
        inspect.signature(builder).bind(**settings)
    except TypeError as error:
        raise ValueError(f"model {name!r} has no such settings {settings}: {error}") from error
    return builder(**settings)
