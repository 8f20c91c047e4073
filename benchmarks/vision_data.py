"""Does decoding keep up? JPEG files against one forward and backward pass of ViT-base/16 at 224 pixels.

    python -m benchmarks.vision_data --images 256 --batch 256 --micro-batch 16 --workers 0 1 2

Writes synthetic photographs (smooth random fields with noise, 500 x 375 pixels, about 110 kB, as ImageNet's) into a
temporary folder, and measures how fast batches come from them and how long a gradient of as many images takes. A
Hessian product takes longer than a gradient, and batches that fit into memory are decoded once for all products: the
share that is printed is an upper bound of what a measurement waits.
"""

import argparse
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image

from blockspec.losses import classification
from vision_models.data import fixed_batches
from vision_models.image_folder import image_folder
from vision_models.models import ModelSettings, build


def write_photographs(folder: Path, count: int) -> None:
    """Images whose size as JPEG and cost of decoding are like those of photographs."""
    generator = np.random.default_rng(0)
    for i in range(count):
        coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        field = np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC), dtype=np.float32)
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
    """Seconds of one forward and backward pass of ViT-base for each image, from one micro-batch after another one."""
    model = build(ModelSettings("vit")).to(device).eval()
    x, y = fixed_batches(image_folder(folder), count=micro_batch, batch_size=micro_batch)[0]
    batch = x.to(device), y.to(device)
    for _ in range(2):
        start = time.perf_counter()
        classification(model, batch)[0].backward()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return seconds / micro_batch


def table(arguments: argparse.Namespace, folder: Path) -> list[str]:
    write_photographs(folder, arguments.images)
    size = statistics.mean(path.stat().st_size for path in folder.glob("*/*.JPEG"))
    gradient = seconds_of_gradient(folder, micro_batch=arguments.micro_batch, device=arguments.device) * arguments.batch
    lines = [
        f"{arguments.images} JPEG files of {size / 1e3:.0f} kB on average; ViT-base/16, batch {arguments.batch} on "
        f"{arguments.device}: forward and backward {gradient:.1f} s ({torch.get_num_threads()} threads)",
        "",
        "| workers | images / s | spread | s per batch | of forward and backward |",
        "|---|---|---|---|---|",
    ]
    for workers in arguments.workers:
        passes = seconds_of_decoding(folder, batch=min(arguments.batch, 32), workers=workers, passes=arguments.passes)
        rates = [arguments.images / seconds for seconds in passes]
        one = arguments.batch / statistics.median(rates)
        lines.append(
            f"| {workers} | {statistics.median(rates):.0f} | {min(rates):.0f} to {max(rates):.0f} | {one:.2f} "
            f"| {100 * one / gradient:.1f} % |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=256, help="JPEG files")
    parser.add_argument("--batch", type=int, default=256, help="images in a batch of the model")
    parser.add_argument("--micro-batch", type=int, default=16, help="images whose gradient is timed, then scaled")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of decoding processes")
    parser.add_argument("--passes", type=int, default=3, help="timed passes over the files")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, …")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the dated result")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = table(arguments, Path(folder))
    header = [
        f"# Image decoding, {date.today()}",
        "",
        f"{platform.machine()}, {platform.system()}; torch {torch.__version__}, Pillow {PIL.__version__}, "
        f"numpy {np.__version__}, Python {platform.python_version()}",
        "",
        " ".join(["python -m benchmarks.vision_data", *sys.argv[1:]]),
    ]
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"vision_data_{date.today()}.md"
    path.write_text("\n".join([*header, "", *lines, ""]), encoding="utf-8")
    print("\n".join(lines), f"\nwritten to {path}", sep="\n")


if __name__ == "__main__":
    main()
