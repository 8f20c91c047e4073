"""Where images come from, by settings: the digits, an image folder, or an HF data set."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vision_models import hf, hub
from vision_models.data import Images, OnBroken
from vision_models.digits import digits
from vision_models.image_folder import image_folder
from vision_models.models import ModelSettings


@dataclass(frozen=True)
class DataSettings:
    """The data of a training.

    Args:
        source: digits (embedded), image_folder, or hub (an HF data set).
        name: The image folder, which holds one folder for each split; or the data set's name or
            folder.
        train_split: Split to train on.
        test_split: Split to measure on.
        classes: Only the first so many classes; image folders only. None: all.
        per_class: Only so many images of each class; image folders only. None: all.
        batch_size: Images in a micro-batch of one process.
        augment: none, shift (by one pixel), cifar (crop and mirror) or imagenet (random rectangle
            and mirror).
        held_out: Images of test_split that are measured on. None: all.
        workers: Processes that decode. 0: the training process itself.
        on_broken: error, or skip: images that cannot be decoded are left out, with a warning.
    """

    source: Literal["digits", "image_folder", "hub"] = "digits"
    name: str = ""
    train_split: str = "train"
    test_split: str = "test"
    classes: int | None = None
    per_class: int | None = None
    batch_size: int = 64
    augment: Literal["none", "shift", "cifar", "imagenet"] = "none"
    held_out: int | None = None
    workers: int = 0
    on_broken: OnBroken = "error"


def _digits(data: DataSettings, split: str) -> Images:
    return digits(split)


def _image_folder(data: DataSettings, split: str) -> Images:
    return image_folder(Path(data.name) / split, classes=data.classes, per_class=data.per_class)


def _hub(data: DataSettings, split: str) -> Images:
    return hub.hub(data.name, split=split)


SOURCES: dict[str, Callable[[DataSettings, str], Images]] = {
    "digits": _digits,
    "image_folder": _image_folder,
    "hub": _hub,
}


def open_images(data: DataSettings, split: str, model: ModelSettings) -> Images:
    """The images of a split, normalised as the data set's are, or as a pretrained model expects
    them.
    """
    return as_expected(SOURCES[data.source](data, split), model)


def as_expected(images: Any, model: ModelSettings) -> Any:
    """The images, normalised as a pretrained model says that it expects them."""
    if model.name != "pretrained":
        return images
    expected = hf.normalisation(model.settings.get("name", hf.VIT_BASE))
    if expected is None:
        return images
    mean, std = expected
    return replace(images, preprocess=replace(images.preprocess, mean=mean, std=std))
