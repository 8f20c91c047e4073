"""Images in one folder for each class, as ImageNet comes: ``train/n01440764/n01440764_18.JPEG``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vision_models.preprocess import NORMALISATION, Preprocess

SUFFIXES = {".jpeg", ".jpg", ".png", ".bmp", ".webp", ".ppm"}
MEAN, STD = NORMALISATION["imagenet"]
IMAGENET = Preprocess(mean=MEAN, std=STD, resize=256, crop=224)


@dataclass(frozen=True)
class ImageFolder:
    """The image files of a folder with a label each."""

    files: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    preprocess: Preprocess

    def __len__(self) -> int:
        return len(self.files)

    def read(self, i: int) -> tuple[bytes, int]:
        return self.files[i].read_bytes(), self.labels[i]

    def name(self, i: int) -> str:
        return str(self.files[i])


def image_folder(
    root: str | Path,
    *,
    classes: int | Sequence[str] | None = None,
    per_class: int | None = None,
    preprocess: Preprocess = IMAGENET,
) -> ImageFolder:
    """The images below ``root``: the first of each class, then the second of each, and so on, all
    by sorted names.

    So any first n images are spread over the classes, whatever the order on disk. A label is the
    place of its class among all sorted class folders, also where only some are used: for ImageNet
    the usual numbers 0 to 999.

    Args:
        root: The folder with one folder for each class.
        classes: How many of the sorted classes, or the names of the classes, to use. None: all.
        per_class: How many images of each class to use at most. None: all.
        preprocess: What is done to the images.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"no folder {root}: it should contain one folder of images for each class")
    names = tuple(sorted(folder.name for folder in root.iterdir() if folder.is_dir()))
    chosen = _chosen(names, classes, root)
    files = [(name, _files(root / name)[:per_class]) for name in chosen]
    if not any(found for _, found in files):
        raise ValueError(
            f"no images in the folders of {root}: looked for {', '.join(sorted(SUFFIXES))}"
        )
    index = {name: i for i, name in enumerate(names)}
    order = sorted((rank, name, file) for name, found in files for rank, file in enumerate(found))
    return ImageFolder(
        files=tuple(file for _, _, file in order),
        labels=tuple(index[name] for _, name, _ in order),
        classes=names,
        preprocess=preprocess,
    )


def _chosen(
    names: tuple[str, ...], classes: int | Sequence[str] | None, root: Path
) -> Sequence[str]:
    if classes is None:
        return names
    if isinstance(classes, int):
        if not 1 <= classes <= len(names):
            raise ValueError(
                f"classes = {classes}: {root} has {len(names)}, give 1 to {len(names)}"
            )
        return names[:classes]
    missing = sorted(set(classes) - set(names))
    if missing:
        raise ValueError(
            f"no class {missing} in {root}, which has {', '.join(names[:5])}, … ({len(names)} in "
            "all)"
        )
    return classes


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
