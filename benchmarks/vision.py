"""What spectra of all blocks of ResNet20 cost, in gradients of the same objective: ``python -m benchmarks.vision``."""

from __future__ import annotations

import time

import pandas as pd
import torch
from jsonargparse import CLI

import blockspec
from benchmarks.record import in_turns, write
from blockspec.curvature import Products
from vision_models.resnet import cifar_resnet


def objective_of(images: int, batch_size: int, depth: int) -> blockspec.Objective:
    """A residual network on random images of CIFAR's size; costs do not depend on the weights nor on the images."""
    torch.manual_seed(0)
    x, y = torch.randn(images, 3, 32, 32), torch.randint(10, (images,))
    batches = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    return blockspec.Objective(cifar_resnet(depth=depth), batches, blockspec.losses.classification)


def gradient(objective: blockspec.Objective) -> None:
    """One gradient of the objective, of the model as it comes, in eval mode."""
    objective.model.eval()
    for batch in objective.batches():
        torch.autograd.grad(objective.loss_sum(batch)[0], list(objective.parameters().values()))


def sweep(objective: blockspec.Objective, blocks: tuple[blockspec.Block, ...]) -> None:
    """One product with every block."""
    Products(objective).sweep([(block, torch.randn(block.numel)) for block in blocks])


def main(images: int = 512, batch_size: int = 512, depth: int = 20, steps: int = 30, rounds: int = 3, threads: int = 1) -> None:
    """Measures and writes the table.

    Args:
        images: Images of 32x32 pixels.
        batch_size: Images in a batch.
        depth: Of the network.
        steps: Lanczos steps of one probe.
        rounds: Turns of a gradient and a sweep that are timed.
        threads: Of torch.
    """
    torch.set_num_threads(threads)
    objective = objective_of(images, batch_size, depth)
    rows = []
    for title, by, include in (
        ("every tensor", "tensor", None),
        ("weight matrices", "tensor", ["*conv*", "*downsample.0*", "fc.weight"]),
    ):
        blocks = blockspec.partition(objective.model, by, include)
        seconds = in_turns(
            {"gradient": lambda: gradient(objective), "sweep": lambda b=blocks: sweep(objective, b)}, rounds=rounds
        )
        start = time.perf_counter()
        spectra = blockspec.estimate_spectra(objective, blocks, num_probes=1, num_steps=steps)
        whole = time.perf_counter() - start
        assert spectra.cost is not None
        products = spectra.cost.products / len(list(objective.batches()))
        rows.append(
            {
                "blocks": f"{title} ({len(blocks)})",
                "gradient (s)": seconds["gradient"],
                "spectra (s)": whole,
                "products": int(products),
                "a product (gradients)": whole / products / seconds["gradient"],
                "a product in one pass (gradients)": seconds["sweep"] / len(blocks) / seconds["gradient"],
            }
        )
    table = pd.DataFrame(rows).set_index("blocks")
    title = f"ResNet{depth}, {images} images of 32x32, {steps} steps, 1 probe"
    notes = "A product (gradients): all of the time of the spectra, over products, over the time of one gradient; at most 0.8."
    write("vision", {title: table}, notes=notes)


if __name__ == "__main__":
    CLI(main)
