"""The 1,797 real 8x8 digits that come with scikit-learn (Alpaydin and Kaynak 1998), in a fixed
split.
"""

import numpy as np

from vision_models.data import Arrays
from vision_models.preprocess import NORMALISATION, Preprocess

EVERY = 5  # in each class every fifth image is for testing


def digits(split: str = "train") -> Arrays:
    """The digits.

    Args:
        split: "train" (1,442 images), "test" (355) or "all".
    """
    from sklearn.datasets import load_digits

    if split not in ("train", "test", "all"):
        raise ValueError(f"no split {split!r} of the digits: there are train, test and all")
    data = load_digits()
    chosen = {
        "train": ~_test(data.target),
        "test": _test(data.target),
        "all": np.full(len(data.target), True),
    }[split]
    mean, std = NORMALISATION["digits"]
    return Arrays(
        arrays=data.images[chosen, :, :, None].astype(np.uint8),
        labels=data.target[chosen],
        classes=tuple("0123456789"),
        preprocess=Preprocess(mean=mean, std=std, peak=16.0),
    )


def _test(labels: np.ndarray) -> np.ndarray:
    chosen = np.full(len(labels), False)
    for label in np.unique(labels):
        chosen[np.flatnonzero(labels == label)[EVERY - 1 :: EVERY]] = True
    return chosen
