"""What is asked of an operator: blocks of its own parameters, and vectors in the dtype that they have."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from blockspec.model.blocks import Block
from blockspec.model.objective import Objective


def block_dtype(objective: Objective, block: Block) -> torch.dtype:
    """The dtype that the block's vectors have: the widest of its parameters', at least float32."""
    parameters = objective.parameters()
    dtype = torch.float32
    for name in block.parameters:
        dtype = torch.promote_types(dtype, parameters[name].dtype)
    return dtype


def checked_blocks(objective: Objective, blocks: Iterable[Block] | Block) -> tuple[Block, ...]:
    blocks = (blocks,) if isinstance(blocks, Block) else tuple(blocks)
    if not blocks:
        raise ValueError("no blocks: the partition is empty; see blockspec.partition")
    names = [block.name for block in blocks]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"blocks with the same name: {twice[:3]}; names must differ")
    parameters = objective.parameters()
    for block in blocks:
        if unknown := [name for name in block.parameters if name not in parameters]:
            raise ValueError(
                f"block {block.name!r} holds {unknown[0]!r}, which is no parameter of the model that requires gradients; "
                "make the partition from the same model, after freezing"
            )
        if not block.pieces:
            raise ValueError(
                f"block {block.name!r} has no parameters (from a file?): make it with blockspec.partition"
            )
    return blocks
