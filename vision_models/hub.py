"""Image data sets by HF name, or saved on disk in that format: CIFAR-10, CIFAR-100, MNIST, ImageNet
and others.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import constants

from training.hub import hub_or_cache
from vision_models.preprocess import NORMALISATION, Preprocess

# Short names, and what is done to their images.
NAMES = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "mnist": "ylecun/mnist",
    "imagenet": "ILSVRC/imagenet-1k",
}
SIZES = {"imagenet": {"resize": 256, "crop": 224}}


@dataclass(frozen=True)
class HubImages:
    """The rows of a data set with an image column, still encoded, and a label column."""

    rows: Any  # a datasets.Dataset or a list: anything with rows[i] -> mapping
    image: str
    label: str
    classes: tuple[str, ...]
    preprocess: Preprocess

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, i: int) -> tuple[bytes, int]:
        row = self.rows[i]
        cell = row[self.image]
        return cell["bytes"] or Path(cell["path"]).read_bytes(), row[self.label]

    def name(self, i: int) -> str:
        return f"image {i} ({self.rows[i][self.image]['path']})"


def hub(
    name: str,
    *,
    split: str = "train",
    label: str | None = None,
    count: int | None = None,
    normalisation: str | None = None,
) -> HubImages:
    """A data set of images.

    Args:
        name: cifar10, cifar100, mnist, imagenet, any name on the HF hub, or a folder that
            ``save_to_disk`` wrote.
        split: The split's name.
        label: The label's column. None: the first column of class labels (for CIFAR-100 the 100
            fine ones).
        count: Only the first ``count`` images; from the hub they are streamed, and the rest is not
            downloaded.
        normalisation: One of digits, mnist, cifar10, cifar100, imagenet. None: by ``name``, else
            imagenet.

    Raises:
        ValueError: No such data set, split or column, or the hub cannot be reached.
    """
    rows = _load(name, split, count)
    image, label = _columns(rows.features or {}, name, label)
    rows = rows.cast_column(image, datasets.Image(decode=False))
    kind = normalisation or (name if name in NORMALISATION else "imagenet")
    mean, std = NORMALISATION[kind]
    return HubImages(
        rows=rows if count is None else list(rows.take(count)),
        image=image,
        label=label,
        classes=tuple(rows.features[label].names),
        preprocess=Preprocess(mean=mean, std=std, **SIZES.get(kind, {})),
    )


def _load(name: str, split: str, count: int | None) -> Any:
    if Path(name).is_dir():
        return _from_disk(Path(name), split)
    try:
        with hub_or_cache():
            streaming = (
                count is not None and not constants.HF_HUB_OFFLINE
            )  # a cached copy cannot be streamed
            return datasets.load_dataset(NAMES.get(name, name), split=split, streaming=streaming)
    except (OSError, ValueError) as error:  # offline, no such name, no such split, no permission
        raise ValueError(
            f"cannot load {NAMES.get(name, name)!r}, split {split!r} ({error}). Without a network, "
            "give a folder that "
            "datasets.Dataset.save_to_disk wrote, or use the embedded digits"
        ) from error


def _from_disk(folder: Path, split: str) -> Any:
    try:
        loaded = datasets.load_from_disk(str(folder))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} was not written by save_to_disk: {error}") from error
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if split not in loaded:
        raise ValueError(f"no split {split!r} in {folder}, which has {', '.join(loaded)}")
    return loaded[split]


def _columns(features: datasets.Features, name: str, label: str | None) -> tuple[str, str]:
    images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [
        column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)
    ]
    if not images or not labels or label not in (None, *labels):
        raise ValueError(
            f"{name!r} has image columns {images} and label columns {labels}: there must be one of "
            "each" + (f", and {label!r} is no label column" if label else "")
        )
    return images[0], label or labels[0]
