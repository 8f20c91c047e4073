"""How far one may step: critical sharpness by forward passes, and the sharpest direction within a
ball of a norm.

The step at which the loss stops falling is what learning rates run into. Along a direction d the
quadratic says that the loss is back at its value for the multiple ``-2 g'd / d'Hd``; the loss
itself says it by forward passes alone, on any scale.

Optimizers move within balls of other norms than the Euclidean one: SignGD and Adam within that of
the largest entry, Muon within that of the spectral norm. ``max d'Hd`` over such a ball is no
eigenvalue and hard to find exactly; conditional gradients from several starts give lower bounds,
each with the gap that is left (Frank, Wolfe 1956; Jaggi 2013).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from blockspec.model.objective import Objective
from blockspec.model.pieces import Block
from blockspec.numerics.probes import draw_probe
from blockspec.products.requests import block_dtype
from blockspec.products.selection import OperatorSettings, open_operator
from blockspec.products.settings import takes
from blockspec.toolbox.by_unit import losses_by_unit
from blockspec.toolbox.directional import Direction, directional, restricted
from blockspec.toolbox.moves import joined, shifted

LARGEST_STEP = 2.0**20


def critical_steps(
    objective: Objective,
    blocks: Sequence[Block],
    direction: Direction,
    *,
    precision: float = 0.05,
) -> pd.DataFrame:
    """The smallest multiple of a direction at which the loss is higher than at the start, by block
    and for all of them.

    Args:
        objective: The loss.
        blocks: Disjoint, from :func:`blockspec.partition`.
        direction: Parameter name -> tensor: an optimizer's step, see
            :mod:`blockspec.toolbox.directions`.
        precision: Relative, of the multiple.

    Returns:
        A row a block, and the row ``all``: ``measured``, the multiple by forward passes (infinite
        where the loss is still lower at 2^20 times the step; 0 where it rises at once);
        ``quadratic``, ``-2 g'd / d'Hd``; ``critical_sharpness``, 2 over ``measured``, as arXiv
        2601.16979 has it for a step of its own length; ``forward_passes``.
    """
    picture = directional(objective, blocks, direction, couplings=True, measure=False)
    assert picture.curvature is not None
    within = np.diag(picture.curvature.to_numpy())
    rows = {}
    for block, slope, bend in zip(picture.blocks, picture.gradient, within, strict=True):
        rows[block.name] = _critical(objective, [block], direction, slope, bend, precision)
    slope, bend = picture.slope.value, picture.bend.value
    rows["all"] = _critical(objective, picture.blocks, direction, slope, bend, precision)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("block")


def _critical(
    objective: Objective,
    blocks: Sequence[Block],
    direction: Direction,
    slope: float,
    bend: float,
    precision: float,
) -> dict[str, float]:
    parameters = objective.parameters()
    shapes = {name: objective.weights.shape_of(p) for name, p in parameters.items()}
    changes = joined(restricted(direction, shapes, blocks), shapes)
    passes = 0

    def loss(step: float) -> float:
        nonlocal passes
        passes += 1
        with shifted(parameters, changes, step):
            sums, terms = losses_by_unit(objective)
        return float(sums.sum() / terms.sum())

    start = loss(0.0)
    quadratic = -2 * slope / bend if bend > 0 and slope < 0 else (math.inf if slope < 0 else 0.0)
    first = quadratic if 0 < quadratic < math.inf else 1.0
    step = _first_rise(lambda s: loss(s) > start, first, precision) if slope < 0 else 0.0
    sharpness = 2 / step if step > 0 else math.inf
    return {
        "measured": step,
        "quadratic": quadratic,
        "critical_sharpness": sharpness,
        "forward_passes": passes,
    }


def _first_rise(rises: Callable[[float], bool], guess: float, precision: float) -> float:
    """The smallest step that rises, bracketed from the guess by factors of two and then halved on
    the logarithmic scale.
    """
    high = guess
    while rises(high / 2):  # also down to where it still falls
        high /= 2
        if high < guess / LARGEST_STEP:
            return 0.0
    low = high / 2
    while not rises(high):
        low, high = high, 2 * high
        if high > guess * LARGEST_STEP:
            return math.inf
    while high / low > 1 + precision:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if rises(middle) else (middle, high)
    return high


@dataclass(frozen=True, eq=False)
class BallSharpness:
    """``max d'Hd`` over a unit ball, from below.

    Attributes:
        value: The largest ``d'Hd`` that was found; a lower bound of the maximum.
        gap: How much a linear model of ``d'Hd`` at the end still promised: 0 at a point that no
            single move improves.
        direction: (P,) where it was found, on the ball's surface.
        products: How many it took.
    """

    value: float
    gap: float
    direction: Tensor
    products: int


@takes(settings=OperatorSettings)
def ball_sharpness(
    objective: Objective | None,
    block: Block,
    norm: str = "max",
    *,
    restarts: int = 4,
    max_steps: int = 50,
    seed: int = 0,
    settings: OperatorSettings,
) -> BallSharpness:
    """The sharpest direction within the unit ball of a norm, as a lower bound.

    Args:
        objective: The loss.
        block: Of which block of the matrix.
        norm: ``"max"``: the largest entry in magnitude (SignGD, Adam), or ``"spectral"``: the
            largest singular value of each matrix, the largest entry of other tensors (Muon). The
            block must then hold whole tensors.
        restarts: Random starts; the best end counts.
        max_steps: Products of each start at most; it ends early where nothing improves.
        seed: Of the starts.
        [settings]
    """
    if norm not in BALLS:
        raise ValueError(f"norm is one of {tuple(BALLS)}, got {norm!r}")
    operator, _ = open_operator(objective, block, settings)
    if norm == "spectral" and any(piece.axis is not None for piece in block.pieces):
        raise ValueError(f"block {block.name!r} cuts a matrix; the spectral norm needs whole ones")
    shapes = [operator.parameters[name].shape for name in block.parameters]
    furthest, dtype = BALLS[norm], block_dtype(operator.parameters, block)
    best: BallSharpness | None = None
    products = 0
    for start in range(restarts):
        probe = draw_probe(block.name, block.numel, seed=seed, probe=start, distribution="gaussian")
        d = furthest(probe.to(operator.device, dtype), shapes)
        value, gap, d, taken = _climb(
            lambda v: operator.sweep([(block, v)])[0], d, furthest, shapes, max_steps
        )
        products += taken
        if best is None or value > best.value:
            best = BallSharpness(value, gap, d, products)
    assert best is not None
    return BallSharpness(best.value, best.gap, best.direction, products)


def _climb(
    product: Callable[[Tensor], Tensor],
    d: Tensor,
    furthest: Callable[[Tensor, Sequence[torch.Size]], Tensor],
    shapes: Sequence[torch.Size],
    max_steps: int,
) -> tuple[float, float, Tensor, int]:
    """Conditional gradient ascent: go all the way, or as far as the quadratic between two points
    rises.
    """
    image = product(d)
    value = float(d @ image)
    for step in range(1, max_steps):
        corner = furthest(image, shapes)
        gap = 2 * float((corner - d) @ image)
        if gap <= 1e-6 * abs(value):
            return value, max(gap, 0.0), d, step
        move = corner - d
        bent = product(move)
        bend = float(move @ bent)
        length = 1.0 if bend >= 0 else min(1.0, -gap / (2 * bend))
        d, image = d + length * move, image + length * bent
        value = float(d @ image)
    gap = 2 * float((furthest(image, shapes) - d) @ image)
    return value, max(gap, 0.0), d, max_steps


def _max_corner(slope: Tensor, shapes: Sequence[torch.Size]) -> Tensor:
    return torch.where(slope >= 0, 1.0, -1.0).to(slope)


def _spectral_corner(slope: Tensor, shapes: Sequence[torch.Size]) -> Tensor:
    """Of every matrix U V' from its singular vectors; the signs of other tensors."""
    parts = slope.split([shape.numel() for shape in shapes])
    corners = []
    for part, shape in zip(parts, shapes, strict=True):
        if len(shape) < 2:
            corners.append(_max_corner(part, shapes))
            continue
        u, _, v = torch.linalg.svd(part.view(shape[0], -1), full_matrices=False)
        corners.append((u @ v).reshape(-1))
    return torch.cat(corners)


BALLS: Mapping[str, Callable[[Tensor, Sequence[torch.Size]], Tensor]] = {
    "max": _max_corner,
    "spectral": _spectral_corner,
}
"""Norm -> the point of its unit ball that is furthest along a slope."""
