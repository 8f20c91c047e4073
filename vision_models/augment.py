"""Random changes to training images, each drawn from a generator that seed, epoch and index alone
determine.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image

from vision_models.preprocess import Preprocess, as_array, decode, pixels

Source = np.ndarray | bytes
Augment = Callable[[Source, Preprocess, np.random.Generator], np.ndarray]


def shifted(
    image: Source, how: Preprocess, generator: np.random.Generator, *, padding: int = 1
) -> np.ndarray:
    """The image moved by up to ``padding`` pixels, empty at the border."""
    array = pixels(image, how)
    padded = np.pad(array, ((padding, padding), (padding, padding), (0, 0)))
    top, left = generator.integers(0, 2 * padding + 1, size=2)
    return padded[top : top + array.shape[0], left : left + array.shape[1]]


def cifar(image: Source, how: Preprocess, generator: np.random.Generator) -> np.ndarray:
    """Moved by up to 4 pixels, and mirrored half of the time (He et al. 2015, section 4.2)."""
    array = shifted(image, how, generator, padding=4)
    return array[:, ::-1] if generator.random() < 0.5 else array


def imagenet(image: Source, how: Preprocess, generator: np.random.Generator) -> np.ndarray:
    """A random rectangle of 8 to 100 % of the area, resized to a square, and mirrored half of the
    time (GoogLeNet).
    """
    assert not isinstance(image, np.ndarray)
    opened = decode(image, channels=len(how.mean))
    box = _rectangle(*opened.size, generator)
    assert how.crop is not None
    square = opened.resize((how.crop, how.crop), Image.Resampling.BILINEAR, box=box)
    array = as_array(square)
    return array[:, ::-1] if generator.random() < 0.5 else array


def _rectangle(
    width: int, height: int, generator: np.random.Generator
) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = width * height * generator.uniform(0.08, 1)
        ratio = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = generator.integers(0, width - w + 1), generator.integers(0, height - h + 1)
            return int(left), int(top), int(left + w), int(top + h)
    return 0, 0, width, height


AUGMENT: dict[str, Augment] = {"shift": shifted, "cifar": cifar, "imagenet": imagenet}
