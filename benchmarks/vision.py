"""What spectra of all blocks of ResNet20 cost, in gradients of the same objective: ``python -m
benchmarks.vision``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import pandas as pd
import torch
from jsonargparse import CLI

import blockspec
from benchmarks.record import write
from vision_models.resnet import cifar_resnet


def objective_of(images: int, batch_size: int, depth: int) -> blockspec.Objective:
    """A residual network on random images of CIFAR's size; costs do not depend on the weights nor
    on the images.
    """
    torch.manual_seed(0)
    x, y = torch.randn(images, 3, 32, 32), torch.randint(10, (images,))
    batches = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    return blockspec.Objective(cifar_resnet(depth=depth), batches, blockspec.losses.classification)


def gradient(objective: blockspec.Objective) -> None:
    """One gradient of the objective, of the model as it comes, in eval mode."""
    objective.model.eval()
    for batch in objective.batches():
        torch.autograd.grad(objective.loss_sum(batch)[0], list(objective.parameters().values()))


def main(
    images: int = 512,
    batch_size: int = 128,
    depth: int = 20,
    steps: int = 30,
    rounds: int = 3,
    threads: int = 1,
) -> None:
    """Measures and writes the table.

    Args:
        images: Images of 32x32 pixels.
        batch_size: Images in a batch; changes no number. Activations of 128 are small enough to be
            kept by the allocator.
        depth: Of the network.
        steps: Lanczos steps of one probe.
        rounds: Gradients that are timed, before and after each estimate.
        threads: Of torch.
    """
    torch.set_num_threads(threads)
    objective = objective_of(images, batch_size, depth)
    matrices = ["*conv*", "*downsample.0*", "fc.weight"]
    parts = {
        "weight matrices": blockspec.partition(objective.model, "tensor", matrices),
        "norms and biases": blockspec.partition(objective.model, "tensor", exclude=matrices),
    }
    rows, gradients = {}, [*seconds_of(lambda: gradient(objective), rounds)]
    for title, blocks in parts.items():
        start = time.perf_counter(), time.process_time()
        spectra = blockspec.estimate_spectra(objective, blocks, num_probes=1, num_steps=steps)
        assert spectra.cost is not None
        products = spectra.cost.products // len(list(objective.batches()))
        rows[f"{title} ({len(blocks)})"] = (
            products,
            time.perf_counter() - start[0],
            time.process_time() - start[1],
        )
        gradients += seconds_of(lambda: gradient(objective), rounds)
    table = pd.DataFrame(rows, index=["products", "time (s)", "CPU time (s)"]).T.rename_axis(
        "blocks"
    )
    table.loc[f"all ({sum(map(len, parts.values()))})"] = table.sum()
    cost = statistics.median(gradients)
    table["a product (gradients)"] = table["CPU time (s)"] / table["products"] / cost
    table["products"] = table["products"].astype(int)
    title = f"ResNet{depth}, {images} images of 32x32, {steps} steps, 1 probe"
    notes = (
        f"A gradient takes {cost:.3g} s of CPU time (median of {len(gradients)}). A product: all "
        "of the CPU time of the spectra, "
        "over products; at most 0.8 gradients. Blocks of fewer parameters than steps are done "
        "exactly, with a product for each."
    )
    write("vision", {title: table}, notes=notes)


def seconds_of(function: Callable[[], None], rounds: int) -> Iterator[float]:
    """CPU seconds of each call, which another process on the machine changes less than the time on
    the clock.
    """
    for _ in range(rounds):
        start = time.process_time()
        function()
        yield time.process_time() - start


if __name__ == "__main__":
    CLI(main)
