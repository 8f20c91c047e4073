"""What the command line measures: functions that give ``(model, batches, loss)``.

``blockspec run`` takes them as ``vision_models.factories:digits`` and so on.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from blockspec.model.losses import Loss, classification
from training.checkpoints import read_record
from vision_models import hub as hub_images
from vision_models import image_folder as folders
from vision_models import models, sources
from vision_models.data import Batch, Batches, OnBroken, fixed_batches
from vision_models.digits import digits as open_digits
from vision_models.models import ModelSettings

Measurable = tuple[nn.Module, list[Batch] | Batches, Loss]


def digits(
    *,
    model: str = "digits_vit",
    settings: dict[str, Any] | None = None,
    checkpoint: str | None = None,
    split: str = "train",
    count: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
) -> Measurable:
    """A fresh model and scikit-learn's 8x8 digits.

    Args:
        model: Name of the model: digits_vit, digits_resnet, digits_vgg, digits_mixer, digits_mlp or
            any of ``MODELS``.
        settings: What the model's function takes.
        checkpoint: Folder of a checkpoint of ``vision_models.train``, in place of ``model`` and
            ``settings``.
        split: train (1,442 images), test (355) or all.
        count: The first so many images. None: all of the split.
        batch_size: Images in a batch.
        seed: Of the model's weights.
    """
    _, network = _chosen(model, settings, checkpoint, seed)
    return (
        network,
        fixed_batches(open_digits(split), count=count, batch_size=batch_size),
        classification,
    )


def image_folder(
    *,
    root: str,
    model: str = "vit",
    settings: dict[str, Any] | None = None,
    checkpoint: str | None = None,
    classes: int | Sequence[str] | None = None,
    per_class: int | None = None,
    count: int | None = 256,
    batch_size: int = 64,
    workers: int = 2,
    on_broken: OnBroken = "error",
    memory_gib: float = 4.0,
    seed: int = 0,
) -> Measurable:
    """A model and the images of a folder with one folder for each class, such as ImageNet's train
    or val.

    Args:
        root: The folder.
        model: Name of the model: vit, resnet18, vgg16, pretrained, … (see ``MODELS``).
        settings: What the model's function takes.
        checkpoint: Folder of a checkpoint of ``vision_models.train``, in place of ``model`` and
            ``settings``.
        classes: Only the first so many classes in sorted order, or those named. None: all.
        per_class: Only so many images of each class. None: all.
        count: The first so many images, which are spread over the classes. None: all.
        batch_size: Images in a batch.
        workers: Processes that decode.
        on_broken: error, or skip: images that cannot be decoded are left out, with a warning.
        memory_gib: What decoded batches may take. Beyond, they are decoded again in every pass.
        seed: Of the model's weights.
    """
    # a wrong root is found before the model is made
    images: Any = folders.image_folder(root, classes=classes, per_class=per_class)
    chosen, network = _chosen(model, settings, checkpoint, seed)
    images = sources.as_expected(images, chosen)
    batches = fixed_batches(
        images,
        count=count,
        batch_size=batch_size,
        workers=workers,
        on_broken=on_broken,
        memory_gib=memory_gib,
    )
    return network, batches, classification


def hub(
    *,
    name: str = "cifar10",
    split: str = "train",
    label: str | None = None,
    model: str = "cifar_resnet",
    settings: dict[str, Any] | None = None,
    checkpoint: str | None = None,
    count: int | None = 512,
    batch_size: int = 256,
    workers: int = 0,
    on_broken: OnBroken = "error",
    memory_gib: float = 4.0,
    seed: int = 0,
) -> Measurable:
    """A model and images of an HF data set.

    Args:
        name: cifar10, cifar100, mnist, imagenet, any name on the HF hub, or a folder that
            ``save_to_disk`` wrote.
        split: The split's name.
        label: The label's column. None: the first column of class labels.
        model: Name of the model: cifar_resnet, vit, vgg, pretrained, … (see ``MODELS``).
        settings: What the model's function takes.
        checkpoint: Folder of a checkpoint of ``vision_models.train``, in place of ``model`` and
            ``settings``.
        count: The first so many images; the others are not downloaded. None: all.
        batch_size: Images in a batch.
        workers: Processes that decode.
        on_broken: error, or skip: images that cannot be decoded are left out, with a warning.
        memory_gib: What decoded batches may take. Beyond, they are decoded again in every pass.
        seed: Of the model's weights.
    """
    chosen, network = _chosen(model, settings, checkpoint, seed)
    images = sources.as_expected(
        hub_images.hub(name, split=split, label=label, count=count), chosen
    )
    batches = fixed_batches(
        images,
        count=count,
        batch_size=batch_size,
        workers=workers,
        on_broken=on_broken,
        memory_gib=memory_gib,
    )
    return network, batches, classification


def checkpoint(
    checkpoint: str,
    *,
    split: str | None = None,
    count: int | None = 512,
    batch_size: int = 256,
    workers: int = 0,
    memory_gib: float = 4.0,
) -> Measurable:
    """A checkpoint of ``vision_models.train`` and the data that it was trained on, without
    augmentation.

    Args:
        checkpoint: Folder of the checkpoint, such as runs/digits_vit/step_000300.
        split: The split's name. None: the one that it was trained on.
        count: The first so many images. None: all.
        batch_size: Images in a batch.
        workers: Processes that decode.
        memory_gib: What decoded batches may take. Beyond, they are decoded again in every pass.
    """
    data = sources.DataSettings(**read_record(Path(checkpoint))["data"])
    images = sources.open_images(data, split or data.train_split, models.settings_of(checkpoint))
    batches = fixed_batches(
        images,
        count=count,
        batch_size=batch_size,
        workers=workers,
        on_broken=data.on_broken,
        memory_gib=memory_gib,
    )
    return models.load(checkpoint), batches, classification


def _chosen(
    model: str, settings: dict[str, Any] | None, checkpoint: str | None, seed: int
) -> tuple[ModelSettings, nn.Module]:
    if checkpoint is not None:
        return models.settings_of(checkpoint), models.load(checkpoint)
    chosen = ModelSettings(model, settings or {})
    return chosen, models.build(chosen, seed=seed)
