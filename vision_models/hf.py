"""Vision models of HF transformers: any configuration of ViT and ResNet, fresh or pretrained."""

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import cached_file

from training.hub import hub_or_cache

VIT_BASE = "google/vit-base-patch16-224"


def vit(*, classes: int = 1000, **config: Any) -> ViTForImageClassification:
    """A fresh ViT: by default ViT-base/16 at 224 pixels, 86,567,656 parameters.

    Args:
        classes: Number of classes.
        **config: Fields of HF's ViTConfig (image_size, patch_size, num_channels, hidden_size,
        num_hidden_layers, …).
    """
    return ViTForImageClassification(_config(ViTConfig, classes, config))


def resnet(*, classes: int = 1000, **config: Any) -> ResNetForImageClassification:
    """A fresh HF ResNet: by default ResNet50.

    Args:
        classes: Number of classes.
        **config: Fields of HF's ResNetConfig (depths, hidden_sizes, embedding_size, layer_type,
        num_channels, …).
    """
    return ResNetForImageClassification(_config(ResNetConfig, classes, config))


def pretrained(name: str = VIT_BASE, *, classes: int | None = None) -> PreTrainedModel:
    """A pretrained image classifier by HF name, or from a folder that ``save_pretrained`` wrote.

    Args:
        name: HF name or folder.
        classes: Number of classes of a fresh head. None: the head it has.
    """
    head = {} if classes is None else {"num_labels": classes, "ignore_mismatched_sizes": True}
    try:
        with _access(name):
            return AutoModelForImageClassification.from_pretrained(
                name, use_safetensors=True, trust_remote_code=False, **head
            )
    except OSError as error:
        raise ValueError(
            f"no image classifier with safetensors weights under {name!r}: {error}"
        ) from error


def normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """(mean, standard deviation) per channel of the images a pretrained model expects, or None if
    it does not say.
    """
    try:
        with _access(name):
            path = cached_file(name, "preprocessor_config.json")
    except OSError:
        return None
    assert path is not None
    settings = json.loads(Path(path).read_text(encoding="utf-8"))
    return tuple(settings["image_mean"]), tuple(settings["image_std"])


def _access(name: str) -> AbstractContextManager[None]:
    return nullcontext() if Path(name).is_dir() else hub_or_cache()


def _config(kind: type, classes: int, fields: dict[str, Any]) -> Any:
    unknown = sorted(set(fields) - set(vars(kind())))
    if unknown:
        raise ValueError(
            f"{kind.__name__} has no setting {unknown}: see its page in the documentation of "
            "transformers"
        )
    return kind(num_labels=classes, **fields)
