"""From an image to a normalised array with Pillow and numpy: the same input gives the same array,
to the bit.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

# (mean, standard deviation) per channel of the training images, scaled to [0, 1].
NORMALISATION = {
    "digits": ((0.3051,), (0.3762,)),
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
# What decoding a broken file has been seen to raise.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Preprocess:
    """What turns an image of a data set into the network's input.

    Args:
        mean: Per channel, on the scale where ``peak`` is 1. One channel makes images grey, three
            make them RGB.
        std: Per channel.
        peak: The value of full brightness.
        resize: The shorter side in pixels after resizing, or None.
        crop: Side in pixels of the square cut from the centre, or None.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    peak: float = 255.0
    resize: int | None = None
    crop: int | None = None


def pixels(image: np.ndarray | bytes | Path, how: Preprocess) -> np.ndarray:
    """Decodes an image, resizes and crops it (like torchvision's Resize and CenterCrop on a PIL
    image).

    Returns:
        uint8 array (H, W, C).
    """
    if isinstance(image, np.ndarray):
        return image
    decoded = decode(image, channels=len(how.mean))
    if how.resize is not None:
        decoded = resize_shorter(decoded, how.resize)
    if how.crop is not None:
        decoded = centre_crop(decoded, how.crop)
    return as_array(decoded)


def decode(image: bytes | Path, *, channels: int) -> Image.Image:
    """The image of a file or of its bytes, grey for one channel and RGB for three."""
    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
        return opened.convert("L" if channels == 1 else "RGB")


def resize_shorter(image: Image.Image, side: int) -> Image.Image:
    """The image with this shorter side, the longer in proportion, rounded down."""
    shorter = min(image.size)
    width, height = (
        side if length == shorter else side * length // shorter for length in image.size
    )
    return image.resize((width, height), Image.Resampling.BILINEAR)


def centre_crop(image: Image.Image, side: int) -> Image.Image:
    """The square of this side from the middle of the image."""
    left, top = (round((length - side) / 2) for length in image.size)
    return image.crop((left, top, left + side, top + side))


def as_array(image: Image.Image) -> np.ndarray:
    """uint8 array (H, W, C)."""
    array = np.asarray(image)
    return array if array.ndim == 3 else array[:, :, None]


def normalise(array: np.ndarray, how: Preprocess) -> np.ndarray:
    """uint8 (H, W, C) to float32 (C, H, W) with mean 0 and deviation 1 over the data set."""
    mean, std = np.asarray(how.mean, np.float32), np.asarray(how.std, np.float32)
    return ((array / np.float32(how.peak) - mean) / std).transpose(2, 0, 1).copy()
