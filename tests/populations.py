"""Populations of units of data whose matrices are known, and operators on samples of them."""

import torch

from blockspec import FunctionOperator
from blockspec.products.units import Unit


class SampledOperator(FunctionOperator):
    """The mean of the units' matrices (U, P, P), weighted by their numbers of loss terms; tells
    units apart.
    """

    micro_batch = 1

    def __init__(self, matrices, terms=None):
        self.matrices = matrices
        self.terms = torch.ones(len(matrices)).to(matrices) if terms is None else terms
        mean = torch.einsum("u,uij->ij", self.terms, matrices) / self.terms.sum()
        super().__init__(lambda v: mean @ v, matrices.shape[1], dtype=matrices.dtype)
        self.mean = mean

    def without(self, group):
        """The matrix of all units but these."""
        kept = torch.ones(len(self.terms), dtype=torch.bool)
        kept[group] = False
        return SampledOperator(self.matrices[kept], self.terms[kept]).mean.numpy()

    def sweep_by_unit(self, requests, each):
        found = self.sweep(requests)
        units = []
        for number, (terms, matrix) in enumerate(zip(self.terms, self.matrices, strict=True)):
            values = []
            for place, (block, vector) in enumerate(requests):
                piece = block.pieces[0].index if block.pieces[0].index else slice(None)
                rows = matrix[piece, piece]
                values.append(each(place, [terms * (rows @ vector)]))
            units.append((number, Unit(float(terms), values)))
        return found, units


def population(count, size, *, seed=0, spread=1.0, heavy=1.0):
    """(count, size, size) matrices of single units: a few positive directions each, of sizes that
    are log-normal, over noise of both signs; their mean has outliers and a bulk.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scale = torch.arange(1, size + 1, dtype=torch.float64) ** -0.7
    mean = torch.diag(scale**2)
    outer = draw(count, 3, size) * scale
    noise = draw(count, 2, size) * scale / 2
    sizes = (heavy * draw(count, 1, 1)).exp()
    own = sizes * outer.mT @ outer / 3 - noise.mT @ noise / 2
    return mean + spread * (own - mean)
