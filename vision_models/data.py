"""From images to batches (x, y): fixed ones to measure on, shuffled ones to train on.

Both decode in worker processes. The order, and with it every number, is independent of how many
there are.
"""

import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vision_models.augment import AUGMENT, Augment
from vision_models.preprocess import BROKEN, Preprocess, normalise, pixels

Batch = tuple[Tensor, Tensor]  # x (B, C, H, W) float32, y (B,) int64
OnBroken = Literal["error", "skip"]


class Images(Protocol):
    """Images with labels that are read one at a time: ``Arrays``, an ``ImageFolder``, or
    ``HubImages``.
    """

    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def preprocess(self) -> Preprocess: ...
    def __len__(self) -> int: ...
    def read(self, i: int) -> tuple[np.ndarray | bytes, int]: ...
    def name(self, i: int) -> str: ...


@dataclass(frozen=True)
class Arrays:
    """Images in memory."""

    arrays: np.ndarray  # (N, H, W, C) uint8
    labels: np.ndarray  # (N,)
    classes: tuple[str, ...]
    preprocess: Preprocess

    def __len__(self) -> int:
        return len(self.arrays)

    def read(self, i: int) -> tuple[np.ndarray, int]:
        return self.arrays[i], int(self.labels[i])

    def name(self, i: int) -> str:
        return f"image {i}"


@dataclass(frozen=True)
class Broken:
    """An image that could not be decoded."""

    name: str
    reason: str


Item = tuple[np.ndarray, int] | Broken
Collated = tuple[
    Batch | None, list[Broken]
]  # what a worker sends: it cannot raise or warn in the caller's words


@dataclass(frozen=True)
class Batches:
    """Batches that are decoded again in every pass."""

    loader: DataLoader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        return map(_whole, self.loader)


def fixed_batches(
    images: Images,
    *,
    count: int | None = None,
    batch_size: int = 64,
    workers: int = 0,
    on_broken: OnBroken = "error",
    memory_gib: float = 4.0,
) -> list[Batch] | Batches:
    """The first ``count`` images as batches that never change.

    Args:
        images: The images.
        count: How many to use. None: all.
        batch_size: Images in a batch; the last may have fewer.
        workers: Processes that decode. 0: this process.
        on_broken: "error", or "skip": what cannot be decoded is left out, with a warning that
            counts and names it.
        memory_gib: What the batches may take. Beyond, they are decoded again in every pass.

    Returns:
        A list, or something that can be passed through any number of times.

    Raises:
        ValueError: An image that cannot be decoded, or no image that can; ``count`` out of range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}: give 1 or more")
    if on_broken not in CHECKS:
        raise ValueError(f"on_broken = {on_broken!r}: give 'error' or 'skip'")
    indices = list(range(_checked_count(images, count)))
    if on_broken == "skip":
        indices = _sound(images, indices, batch_size, workers)
    chunks = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    loader = _loader(_Read(images), chunks, workers, _collated)
    bytes_each = _Read(images).bytes_of(indices[0])
    batches = Batches(loader)
    return list(batches) if bytes_each * len(indices) <= memory_gib * 2**30 else batches


@dataclass
class ShuffledBatches:
    """Batches to train on, by number: ``batches(i)`` is always the same, so stopping and going on
    changes nothing.

    Each epoch has its own order and drops the last, smaller batch.

    Args:
        images: The images.
        batch_size: Images in a batch.
        seed: Of the order and of the augmentation.
        augment: Changes an image at random. None: images stay as they are.
        workers: Processes that decode ahead. 0: this process.
        stride: The step from one number asked for to the next (the number of training processes),
            for decoding ahead.
        on_broken: "error", or "skip": what cannot be decoded is left out of its batch, with a
            warning.
    """

    images: Images
    batch_size: int
    seed: int = 0
    augment: Augment | None = None
    workers: int = 0
    stride: int = 1
    on_broken: OnBroken = "error"
    _ahead: Iterator[Collated] = field(default_factory=lambda: iter(()), init=False, repr=False)
    _next: int = field(default=-1, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= len(self.images):
            raise ValueError(
                f"batch_size {self.batch_size} for {len(self.images)} images: give 1 to "
                f"{len(self.images)}"
            )
        if self.augment is AUGMENT["imagenet"] and self.images.preprocess.crop is None:
            raise ValueError(
                "augmentation 'imagenet' is for images that are cropped to one size: use 'cifar' "
                "or 'shift'"
            )

    def __call__(self, index: int) -> Batch:
        if index != self._next:
            keys = _keys_from(index, self.stride, len(self.images), self.batch_size, self.seed)
            read = _Read(self.images, self.augment, self.seed)
            self._ahead = iter(_loader(read, keys, self.workers, _collated))
        self._next = index + self.stride
        return CHECKS[self.on_broken](next(self._ahead))


def _keys_from(
    index: int, stride: int, images: int, batch_size: int, seed: int
) -> Iterator[list[tuple[int, int]]]:
    # No method: in a cycle of references with its loader the loader's end would wait 5 s for each
    # worker.
    for i in itertools.count(index, stride):
        yield shuffled_keys(i, images=images, batch_size=batch_size, seed=seed)


def shuffled_keys(index: int, *, images: int, batch_size: int, seed: int) -> list[tuple[int, int]]:
    """(epoch, image) for each image of batch number ``index``."""
    epoch, step = divmod(index, images // batch_size)
    order = _order(images, seed, epoch)
    return [(epoch, i) for i in order[step * batch_size : (step + 1) * batch_size].tolist()]


@functools.lru_cache(
    maxsize=2
)  # a new order for every batch of ImageNet would take as long as the batch
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


@dataclass(frozen=True)
class _Read:
    """The data set of a loader; a key is an index, or (epoch, index) for an image to train on."""

    images: Images
    augment: Augment | None = None
    seed: int = 0

    def __getitem__(self, key: int | tuple[int, int]) -> Item:
        epoch, i = key if isinstance(key, tuple) else (0, key)
        how = self.images.preprocess
        try:
            image, label = self.images.read(i)
            if self.augment is None:
                array = pixels(image, how)
            else:
                array = self.augment(image, how, np.random.default_rng((self.seed, epoch, i)))
        except BROKEN as error:
            return Broken(self.images.name(i), f"{type(error).__name__}: {error}")
        return normalise(array, how), label

    def bytes_of(self, i: int) -> int:
        item = self[i]
        return 0 if isinstance(item, Broken) else item[0].nbytes


@dataclass(frozen=True)
class _Check:
    """The data set of a loader that only tells which images are broken."""

    images: Images

    def __getitem__(self, i: int) -> Broken | None:
        item = _Read(self.images)[i]
        return item if isinstance(item, Broken) else None


def _collated(items: Sequence[Item]) -> Collated:
    sound = [item for item in items if not isinstance(item, Broken)]
    broken = [item for item in items if isinstance(item, Broken)]
    if not sound:
        return None, broken
    arrays, labels = zip(*sound, strict=True)
    return (torch.from_numpy(np.stack(arrays)), torch.tensor(labels)), broken


def _whole(collated: Collated) -> Batch:
    """The batch; a broken image is an error."""
    batch, broken = collated
    if batch is None or broken:
        first = broken[0]
        raise ValueError(
            f"cannot decode {first.name} ({first.reason}): repair or remove it, or use "
            "on_broken='skip'"
        )
    return batch


def _remaining(collated: Collated) -> Batch:
    """The batch without the broken images, with a warning for each."""
    batch, broken = collated
    for item in broken:
        warnings.warn(f"skipped {item.name} ({item.reason})", stacklevel=3)
    if batch is None:
        raise ValueError(
            f"no image of a batch can be decoded; {broken[0].name}: {broken[0].reason}"
        )
    return batch


CHECKS: dict[OnBroken, Callable[[Collated], Batch]] = {"error": _whole, "skip": _remaining}


def _sound(images: Images, indices: list[int], batch_size: int, workers: int) -> list[int]:
    """Indices of the images that can be decoded."""
    chunks = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    checked = list(itertools.chain.from_iterable(_loader(_Check(images), chunks, workers, list)))
    broken = [item for item in checked if item is not None]
    if len(broken) == len(indices):
        raise ValueError(
            f"none of {len(indices)} images can be decoded; {broken[0].name}: {broken[0].reason}"
        )
    if broken:
        names = ", ".join(item.name for item in broken[:5]) + (", …" if len(broken) > 5 else "")
        warnings.warn(
            f"{len(broken)} of {len(indices)} images cannot be decoded and are left out: {names}",
            stacklevel=3,
        )
    return [i for i, item in zip(indices, checked, strict=True) if item is None]


def _loader(
    dataset: Any, keys: Iterable, workers: int, collate: Callable[[Sequence], Any]
) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # else every pass would move the global generator on
    )


def _checked_count(images: Images, count: int | None) -> int:
    if count is None:
        return len(images)
    if not 1 <= count <= len(images):
        raise ValueError(
            f"count = {count}: there are {len(images)} images, give 1 to {len(images)}"
        )
    return count
