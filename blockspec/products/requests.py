"""What is asked of an operator: blocks of its own parameters, and vectors in the dtype that they
have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from blockspec.model.blocks import Block


def block_dtype(parameters: Mapping[str, Tensor], block: Block) -> torch.dtype:
    """The dtype that the block's vectors have: the widest of its parameters', at least float32."""
    dtype = torch.float32
    for name in block.parameters:
        dtype = torch.promote_types(dtype, parameters[name].dtype)
    return dtype


def checked_blocks(
    parameters: Mapping[str, Tensor], blocks: Iterable[Block] | Block
) -> tuple[Block, ...]:
    """The blocks as a tuple.

    Raises:
        ValueError: There are none, two have one name, or one is not cut from these parameters.
    """
    blocks = (blocks,) if isinstance(blocks, Block) else tuple(blocks)
    if not blocks:
        raise ValueError("no blocks: the partition is empty; see blockspec.partition")
    names = [block.name for block in blocks]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"blocks with the same name: {twice[:3]}; names must differ")
    for block in blocks:
        if unknown := [name for name in block.parameters if name not in parameters]:
            raise ValueError(
                f"block {block.name!r} holds {unknown[0]!r}, which is no parameter of the model "
                "that requires gradients; "
                "make the partition from the same model, after freezing"
            )
        if not block.pieces:
            raise ValueError(
                f"block {block.name!r} has no parameters (from a file?): make it with "
                "blockspec.partition"
            )
    return blocks
