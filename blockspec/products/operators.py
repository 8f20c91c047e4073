"""The operator: a symmetric matrix that is known through its products with vectors.

Everything that estimates (the engine, the toolbox) takes an operator and asks nothing else. An
operator has named parameters, from which blocks are cut, and gives ``H_bb v`` for (block b, vector
v). The Hessian of a model, products made a layer at a time, sharded products, a preconditioned
operator around another one and a matrix of a user's own are all operators.

An operator of your own is a class with the members of :class:`Operator`; for a matrix or a plain
function, :class:`FunctionOperator` is one already::

    operator = FunctionOperator(lambda v: matrix @ v, len(matrix))
    estimate_spectra(None, operator.block(), curvature=operator)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from blockspec.model.blocks import Block, Piece, gather, scatter
from blockspec.model.objective import Objective
from blockspec.numerics.ranks import Ranks


@runtime_checkable
class Operator(Protocol):
    """What estimators ask of a matrix.

    Attributes:
        curvature: The matrix's name, which results carry: ``"hessian"``, ``"ggn"``, ...
        objective: The function that the matrix belongs to; None for a matrix without a model.
        parameters: Name -> tensor of all that blocks may be cut from. Shapes, dtypes and order
            count.
        device: Where vectors live.
        ranks: The processes that share the work of one product.
        gradients: Shared forward-and-backward passes over one batch that were made so far.
        products: Products of one vector with one batch that were made so far.
    """

    @property
    def curvature(self) -> str: ...

    @property
    def objective(self) -> Objective | None: ...

    @property
    def parameters(self) -> Mapping[str, Tensor]: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def ranks(self) -> Ranks: ...

    @property
    def gradients(self) -> int: ...

    @property
    def products(self) -> int: ...

    def check(self, blocks: Sequence[Block]) -> None:
        """Guards, before the expensive part.

        Raises:
            ValueError: The products with these blocks would be wrong: the objective is not
                deterministic, not finite, or cannot be differentiated twice.
        """
        ...

    def sweep(self, requests: Sequence[tuple[Block, Tensor]]) -> list[Tensor]:
        """For each (block b, v (P_b,)): H_bb v (P_b,); all of them from one pass over the data."""
        ...

    def columns(
        self, requests: Sequence[tuple[Block, Tensor]], targets: Sequence[Block]
    ) -> list[list[Tensor]]:
        """For each (block b, v (P_b,)): H_cb v (P_c,) of every block c in ``targets``; one pass
        over the data.
        """
        ...


def forget(operator: Operator) -> None:
    """Tells an operator that the parameters have new values: what it keeps from one call to the
    next must not depend on the old ones. An operator that keeps such things has a method
    ``forget()``; the protocol does not ask for it.
    """
    if callable(own := getattr(operator, "forget", None)):
        own()


def opened(operator: Operator) -> AbstractContextManager[None]:
    """Tells an operator that many sweeps follow while this is open, at the same values of the
    parameters. One that can prepare for all of them at once has a method ``opened()``; the protocol
    does not ask for it.
    """
    own = getattr(operator, "opened", None)
    return own() if callable(own) else nullcontext()


class FunctionOperator:
    """A symmetric matrix of one's own, given as the function v (P,) -> A v (P,).

    Args:
        function: The product; it is called with one vector at a time.
        numel: P, the size of the matrix.
        dtype: Of the vectors.
        device: Of the vectors.
        name: Of the only parameter, a vector (P,), of which blocks are pieces.
        curvature: What results call the matrix.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        numel: int,
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        name: str = "matrix",
        curvature: str = "matrix",
    ) -> None:
        if numel < 1:
            raise ValueError(f"numel is the size of the matrix, at least 1, got {numel}")
        self.curvature = curvature
        self.objective: Objective | None = None
        self.ranks = Ranks()
        self.gradients = 0
        self.products = 0
        self.device = torch.device(device)
        self.parameters: dict[str, Tensor] = {
            name: torch.zeros(1, dtype=dtype, device=device).expand(numel)  # takes no memory
        }
        self._function = function

    def block(self, start: int = 0, stop: int | None = None, *, name: str | None = None) -> Block:
        """The diagonal block of rows ``start`` to ``stop``; the whole matrix where both are left
        out.
        """
        ((parameter, tensor),) = self.parameters.items()
        stop = len(tensor) if stop is None else stop
        if not 0 <= start < stop <= len(tensor):
            raise ValueError(
                f"rows {start} to {stop} are no piece of a matrix of size {len(tensor)}"
            )
        if (start, stop) == (0, len(tensor)):
            return Block(name or parameter, "other", None, stop, (Piece(parameter),))
        piece = Piece(parameter, 0, slice(start, stop))
        return Block(
            name or f"{parameter}/rows_{start}_{stop}", "other", None, stop - start, (piece,)
        )

    def check(self, blocks: Sequence[Block]) -> None:
        """One product with the first block, compared with itself and with the shape that it must
        have.
        """
        block = blocks[0]
        vector = torch.ones(block.numel, device=self.device).to(
            next(iter(self.parameters.values()))
        )
        first, again = self.sweep([(block, vector), (block, vector)])
        if not torch.equal(first, again):
            raise ValueError(
                f"the operator {self.curvature!r} is not deterministic: the same vector gave two "
                "products"
            )

    def sweep(self, requests: Sequence[tuple[Block, Tensor]]) -> list[Tensor]:
        """For each (block b, v (P_b,)): A_bb v (P_b,)."""
        return [self._product(block, vector, [block])[0] for block, vector in requests]

    def columns(
        self, requests: Sequence[tuple[Block, Tensor]], targets: Sequence[Block]
    ) -> list[list[Tensor]]:
        """For each (block b, v (P_b,)): A_cb v (P_c,) of every block c in ``targets``."""
        return [self._product(block, vector, targets) for block, vector in requests]

    def _product(self, block: Block, vector: Tensor, targets: Sequence[Block]) -> list[Tensor]:
        ((name, tensor),) = self.parameters.items()
        whole = scatter(block, vector, self.parameters)[name]
        product = self._function(whole)
        self.products += 1
        if not isinstance(product, Tensor) or product.shape != tensor.shape:
            raise ValueError(
                f"the operator's function must give a tensor of shape {tuple(tensor.shape)}, the "
                "shape of its "
                "argument; it gave "
                f"{tuple(product.shape) if isinstance(product, Tensor) else product!r}"
            )
        return [gather(target, {name: product}) for target in targets]
