"""Populations of units of data whose matrices are known: of small trained models, the dense Hessian
of every single sequence or image.

A data set is drawn with replacement, so that its units are independent, and the population's own
matrix is the mean over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from blockspec import FunctionOperator
from blockspec.model.blocks import Block
from blockspec.numerics.jackknife import MOST_GROUPS
from blockspec.products.units import Unit
from language_models.embedded import topics
from vision_models.digits import digits

UNITS = 256  # of a population
STEPS = 200  # of training


@dataclass(frozen=True)
class Population:
    """Of one model.

    Args:
        matrices: (N, P, P) the units' Hessians.
        pieces: Names of blocks -> their rows.
    """

    matrices: Tensor
    pieces: dict[str, slice]

    def drawn(self, chosen: np.ndarray) -> Drawn:
        """The operator of a data set of these units."""
        groups = min(len(chosen), MOST_GROUPS)
        group = np.arange(len(chosen)) * groups // len(chosen)
        size = self.matrices.shape[1]
        sums = torch.zeros(groups, size, size, dtype=torch.float64)
        for number, unit in zip(group, chosen, strict=True):
            sums[number] += self.matrices[unit]
        return Drawn(sums, np.bincount(group).astype(float), len(chosen))

    def blocks(self, operator: FunctionOperator) -> list[Block]:
        """The pieces as blocks of an operator."""
        return [operator.block(s.start, s.stop, name=name) for name, s in self.pieces.items()]


class Drawn(FunctionOperator):
    """The mean matrix of a data set, which tells groups of its units apart, as an estimate does
    where there are many.

    Args:
        sums: (n, P, P) over the units of each group.
        terms: (n,) how many units each has.
        units: In all.
    """

    micro_batch = 1

    def __init__(self, sums: Tensor, terms: np.ndarray, units: int) -> None:
        self.sums, self.terms, self.units = sums, terms, units
        self.mean = sums.sum(0) / terms.sum()
        self._cut: dict[str, Tensor] = {}
        super().__init__(lambda v: self.mean @ v, len(self.mean))

    def check(self, blocks: Sequence[Block]) -> None:
        """A matrix is deterministic: no product is taken to see that."""

    def sweep(self, requests: Sequence[tuple[Block, Tensor]]) -> list[Tensor]:
        """Products with pieces of the mean."""
        self.products += len(requests)
        return [self.mean[_rows(b), _rows(b)] @ v for b, v in requests]

    def sweep_by_unit(
        self, requests: Sequence[tuple[Block, Tensor]], each: Callable[[int, list[Tensor]], Any]
    ) -> tuple[list[Tensor], list[tuple[int, Unit]]]:
        """See :class:`blockspec.products.units.ByUnit`."""
        parts = self._parts(requests)
        units = [
            (g, Unit(terms, [each(number, [part[g]]) for number, part in enumerate(parts)]))
            for g, terms in enumerate(self.terms)
        ]
        return self.sweep(requests), units

    def _parts(self, requests: Sequence[tuple[Block, Tensor]]) -> list[Tensor]:
        """(n, P) products of the groups' sums with each request; all requests of a block at once,
        since the matrices are large.
        """
        together: dict[str, list[int]] = {}
        for number, (block, _) in enumerate(requests):
            together.setdefault(block.name, []).append(number)
        found: dict[int, Tensor] = {}
        for numbers in together.values():
            block = requests[numbers[0]][0]
            vectors = torch.stack([requests[number][1] for number in numbers], 1)
            if block.name not in self._cut:
                rows = _rows(block)
                self._cut[block.name] = self.sums[:, rows, rows].contiguous()
            products = self._cut[block.name] @ vectors  # (n, P, requests)
            found |= dict(zip(numbers, products.permute(2, 0, 1).contiguous(), strict=True))
        return [found[number] for number in range(len(requests))]


def _rows(block: Block) -> slice:
    index = block.pieces[0].index
    return index if isinstance(index, slice) else slice(None)


def gpt2(width: int = 4, length: int = 32, symbols: int = 16) -> Population:
    """A whole GPT-2 of one layer, trained on embedded text."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=symbols,
            n_positions=length,
            n_embd=width,
            n_layer=1,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="eager",
        )
    ).eval()
    symbol = torch.tensor(list("".join(topics()).encode())) % symbols
    starts = torch.randint(len(symbol) - length, (UNITS,))
    data = torch.stack([symbol[start : start + length] for start in starts])

    def loss(units: Tensor) -> Tensor:
        ids = data[units]
        logits = model(input_ids=ids).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    return _measured(model, loss)


class SmallResNet(nn.Module):
    """A residual block of two convolutions between a stem and a head."""

    def __init__(self, width: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, H, W) -> (B, C)"""
        x = F.gelu(self.stem(images))
        x = F.gelu(x + self.second(F.gelu(self.first(x))))
        return self.head(x.mean((2, 3)))


def resnet() -> Population:
    """A small residual network, trained on the digits of scikit-learn."""
    torch.manual_seed(0)
    model = SmallResNet()
    data = digits("train")
    images = torch.from_numpy(data.arrays[:UNITS, None, :, :, 0] / 8.0 - 1)
    labels = torch.from_numpy(data.labels[:UNITS]).long()

    def loss(units: Tensor) -> Tensor:
        own = images[units].to(next(model.parameters()))
        return F.cross_entropy(model(own), labels[units])

    return _measured(model, loss)


def _measured(model: nn.Module, loss: Callable[[Tensor], Tensor]) -> Population:
    """Trains the model, and takes each unit's Hessian by automatic differentiation alone."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(torch.randint(UNITS, (32,))).backward()
        optimizer.step()
    model.double()
    parameters = dict(model.named_parameters())
    matrices = [
        _hessian(loss(torch.tensor([unit])), list(parameters.values())).float()
        for unit in range(UNITS)
    ]
    pieces, start = {}, 0
    for name, p in parameters.items():
        if p.dim() > 1:
            pieces[name] = slice(start, start + p.numel())
        start += p.numel()
    return Population(torch.stack(matrices), pieces)


def _hessian(value: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """(P, P)"""
    gradient = torch.cat(
        [g.flatten() for g in torch.autograd.grad(value, parameters, create_graph=True)]
    )
    rows = torch.autograd.grad(
        gradient, parameters, torch.eye(len(gradient)).to(gradient), is_grads_batched=True
    )
    matrix = torch.cat([part.flatten(1) for part in rows], dim=1)
    return (matrix + matrix.T) / 2


def heavy(units: int = 1024, size: int = 120, sigma: float = 1.0) -> Population:
    """No model: positive matrices of sizes that are log-normal, so that one unit of 16 is most
    often as large as four others.
    """
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, size + 1) ** -0.7
    rows = torch.randn(units, size, size, generator=generator) * scale
    sizes = (sigma * torch.randn(units, 1, 1, generator=generator)).exp()
    third = size // 3
    pieces = {f"piece_{k}": slice(k * third, (k + 1) * third) for k in range(3)}
    return Population(sizes * rows.mT @ rows / size, pieces)


POPULATIONS = {"gpt2": gpt2, "resnet": resnet, "heavy": heavy}
