"""Which operator: from the settings that every estimator takes to the operator and the blocks that
it works with.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from blockspec.model.blocks import Block
from blockspec.model.identity import Identity, blocks_digest, identity_of, same_everywhere
from blockspec.model.objective import Objective
from blockspec.numerics.ranks import Ranks, arrange, everywhere
from blockspec.products.curvature import Products
from blockspec.products.operators import Operator
from blockspec.products.preconditioning.operator import Preconditioned
from blockspec.products.preconditioning.preconditioner import Preconditioner
from blockspec.products.requests import checked_blocks
from blockspec.products.ways import check_way


@dataclass(frozen=True)
class OperatorSettings:
    """Which matrix is measured.

    Args:
        curvature: Which matrix: hessian, ggn (generalised Gauss-Newton), fisher (empirical Fisher),
            or residual (the difference hessian - ggn). In Python it may also be an operator of your
            own, see blockspec.products.operators.
        check: Compare one product with central differences of the gradient first. This costs three
            gradients of one batch, and finds functions whose second derivative is silently wrong
            (blockspec.products.guard explains it). The result tells in cost.check what was found,
            or that nothing was compared.
        precondition: Measure P^(-1/2) H P^(-1/2), the curvature that an optimizer sees, instead of
            H. Give a file or a folder with the optimizer's state, such as optimizer.pt; in Python
            it may also be a blockspec.Preconditioner. If left out, H itself is measured.
        products: How products are made: whole keeps the graph of the whole model, which is fastest;
            layerwise builds the graph of one layer at a time, in memory that does not grow with the
            number of layers; auto takes whole where it fits into memory=, and layerwise where it
            does not. They give the same numbers, to rounding.
    """

    curvature: str | Operator = "hessian"
    check: bool = True
    precondition: str | Preconditioner | None = None
    products: Literal["auto", "whole", "layerwise"] = "auto"

    def __post_init__(self) -> None:
        """Raises ValueError for a way to products that there is not."""
        check_way(self.products)
        if self.products != "auto" and not isinstance(self.curvature, str):
            raise ValueError(
                f"products={self.products!r} goes with the name of a matrix, not with an operator, "
                "which makes its own products"
            )


def open_operator(
    objective: Objective | None,
    blocks: Iterable[Block] | Block,
    settings: OperatorSettings,
    *,
    ranks: Ranks | None = None,
    precision: str | None = None,
) -> tuple[Operator, tuple[Block, ...]]:
    """The operator that the settings name, and the blocks as a tuple; both are checked here, before
    the expensive part.

    Args:
        objective: What is differentiated; may be None where ``settings.curvature`` is an operator.
        blocks: One block or several.
        settings: Which matrix.
        ranks: Processes that share the work; None: all processes split the batches. An operator of
            the user's has its own.
        precision: Of the products, see :mod:`blockspec.products.precision`.

    Raises:
        ValueError: A block is not of this operator, or a guard of the operator does not hold.
        TypeError: There is neither an objective nor an operator.
    """
    operator = settings.curvature
    if isinstance(operator, str):
        if objective is None:
            raise TypeError(
                f"curvature {operator!r} needs an objective; only an operator of your own goes "
                "without"
            )
        operator = Products(
            objective,
            operator,
            ranks=ranks or arrange(1),
            precision=precision,
            guarded=settings.check,
            products=settings.products,
        )
    elif not isinstance(operator, Operator):
        raise TypeError(
            "curvature is the name of a matrix or an operator (blockspec.Operator says what one "
            "has), got a "
            f"{type(operator).__name__}"
        )
    elif precision is not None:
        raise ValueError(
            f"precision={precision!r} goes with the name of a matrix, not with an operator"
        )
    operator = _preconditioned(operator, settings)
    chosen = everywhere(lambda: checked_blocks(operator.parameters, blocks))
    if operator.ranks.rows * operator.ranks.columns > 1:
        same_everywhere(_identity(operator, chosen, settings))
    everywhere(lambda: operator.check(chosen))
    return operator, chosen


def _preconditioned(operator: Operator, settings: OperatorSettings) -> Operator:
    if settings.precondition is None:
        return operator
    return Preconditioned(operator, opened_preconditioner(settings, operator.objective))


def opened_preconditioner(
    settings: OperatorSettings, objective: Objective | None
) -> Preconditioner:
    """The preconditioner that the settings name; a file is read.

    Raises:
        ValueError: The file is none, or not of this model.
        TypeError: It is neither a path nor a preconditioner, or a path without a model.
    """
    given = settings.precondition
    if isinstance(given, Preconditioner):
        return given.renewed()
    if not isinstance(given, (str, os.PathLike)):
        raise TypeError(
            "precondition is a blockspec.Preconditioner or the path of an optimizer's state, got "
            f"a {type(given).__name__}; from an optimizer: "
            "Preconditioner.from_optimizer(optimizer, model)"
        )
    if objective is None:
        raise TypeError(
            f"precondition={str(given)!r} is read for a model, and an operator of your own has "
            "none: give a blockspec.Preconditioner"
        )
    model = objective.model
    return everywhere(lambda: Preconditioner.from_state(given, model))


def content_of(settings: OperatorSettings) -> dict[str, str]:
    """What the identity of a model has to name beside weights, data and blocks."""
    given = settings.precondition
    return {"precondition": str(given)} if isinstance(given, Preconditioner) else {}


def told(settings: OperatorSettings, operator: Operator) -> dict[str, Any]:
    """The settings as what numbers depend on: what stands for a matrix is named by its content."""
    named: dict[str, Any] = dict(vars(settings)) | {"curvature": operator.curvature}
    if isinstance(operator, Preconditioned):
        named["precondition"] = operator.preconditioner.digest
    return named


def _identity(operator: Operator, blocks: Sequence[Block], settings: OperatorSettings) -> Identity:
    """What all processes must agree on before the first of them waits for another."""
    named: Mapping[str, str] = {n: str(value) for n, value in told(settings, operator).items()}
    objective = operator.objective
    if objective is None:
        return {**named, "blocks": blocks_digest(blocks)}
    return everywhere(lambda: identity_of(objective, blocks, named))


def check_of(operator: Operator) -> str:
    """What is known of its products, in words."""
    found = getattr(operator, "checked", None)
    return "unchecked: an operator of one's own" if found is None else str(found)
