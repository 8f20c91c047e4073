"""Does decoding keep up? JPEG files against one forward and backward pass of ViT-base/16 at 224
pixels.

    python -m benchmarks.vision_data

Writes synthetic photographs (smooth random fields with noise, 500 x 375 pixels, about 110 kB, as
ImageNet's) into a temporary folder, and measures how fast batches come from them and how long a
gradient of as many images takes. A measurement takes many products, and batches that fit into
memory are decoded once for all of them: the share that is printed is an upper bound of what a
measurement waits.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jsonargparse import CLI
from PIL import Image

from benchmarks.record import PACKAGES, write
from blockspec.model.losses import classification
from vision_models.data import fixed_batches
from vision_models.image_folder import image_folder
from vision_models.models import ModelSettings, build


def write_photographs(folder: Path, count: int) -> None:
    """Images whose size as JPEG and cost of decoding are like those of photographs."""
    generator = np.random.default_rng(0)
    for i in range(count):
        coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        field = np.asarray(
            Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC), dtype=np.float32
        )
        noisy = field + generator.normal(0, 20, field.shape)
        path = folder / f"class_{i % 8}" / f"{i}.JPEG"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def seconds_of_decoding(folder: Path, *, batch: int, workers: int, passes: int) -> list[float]:
    """Seconds of each pass over all images, decoded anew; the start of the workers is left out."""
    batches = fixed_batches(image_folder(folder), batch_size=batch, workers=workers, memory_gib=0)
    sum(1 for _ in batches)
    seconds = []
    for _ in range(passes):
        start = time.perf_counter()
        sum(1 for _ in batches)
        seconds.append(time.perf_counter() - start)
    return seconds


def seconds_of_gradient(folder: Path, *, micro_batch: int, device: str) -> float:
    """Seconds of one forward and backward pass of ViT-base for each image, from the second of two
    micro-batches.
    """
    model = build(ModelSettings("vit")).to(device).eval()
    x, y = next(
        iter(fixed_batches(image_folder(folder), count=micro_batch, batch_size=micro_batch))
    )
    batch = x.to(device), y.to(device)
    for _ in range(2):
        start = time.perf_counter()
        classification(model, batch)[0].backward()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return seconds / micro_batch


def main(
    images: int = 256,
    batch: int = 256,
    micro_batch: int = 16,
    workers: list[int] = [0, 1, 2],  # noqa: B006
    passes: int = 3,
    threads: int = 1,
    device: str = "cpu",
) -> None:
    """Measures and writes the table.

    Args:
        images: JPEG files.
        batch: Images in a batch of the model.
        micro_batch: Images whose gradient is timed, then scaled.
        workers: Numbers of decoding processes.
        passes: Timed passes over the files.
        threads: Of torch.
        device: cpu, cuda, …
    """
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), images)
        size = statistics.mean(path.stat().st_size for path in Path(folder).glob("*/*.JPEG"))
        gradient = seconds_of_gradient(Path(folder), micro_batch=micro_batch, device=device) * batch
        rows = {}
        for number in workers:
            rates = [
                images / seconds
                for seconds in seconds_of_decoding(
                    Path(folder), batch=min(batch, 32), workers=number, passes=passes
                )
            ]
            one = batch / statistics.median(rates)
            rows[number] = (
                statistics.median(rates),
                min(rates),
                max(rates),
                one,
                100 * one / gradient,
            )
    columns = ["images / s", "slowest", "fastest", "s a batch", "% of forward and backward"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("workers")
    title = (
        f"{images} JPEG files of {size / 1e3:.0f} kB on average; ViT-base/16 on {device}, "
        f"batch {batch}"
    )
    notes = f"Forward and backward: {gradient:.4g} s a batch. At most 10 % may be waited for."
    write("vision_data", {title: table}, notes=notes, packages=(*PACKAGES, "pillow", "numpy"))


if __name__ == "__main__":
    CLI(main)
