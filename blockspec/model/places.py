"""What a block is among others of its kind: of the encoder or of the decoder, of self- or of
cross-attention, or an adapter of some matrix.

Kinds are coarse, because cuts and comparisons across models go by them: a query is a query. But the
mean over the queries of an encoder, of a decoder and of its cross-attention says little of each. So
a block has a role too, and figures and logs go by that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

SIDE = re.compile(r"(?:^|[._])(encoder|decoder)s?(?=[._]|$)")
CROSS = re.compile(
    r"(?i)(?:^|\.)\w*(?:cross_?att|cross_?mha|xatt|encoder_att|enc_?dec_?att|src_att|"
    r"multihead_attn)\w*(?=\.|$)"
)
"""What attention to another sequence is called; ``multihead_attn`` is PyTorch's own decoder's."""

ATTENDING = frozenset({"query", "key", "value", "qkv", "attention_output", "attention_gate"})


@dataclass(frozen=True)
class Places:
    """Tells roles by names.

    Args:
        sides: Whether the model has layers of an encoder and layers of a decoder. A model that has
            the ones alone has nothing to tell apart.
    """

    sides: bool

    @staticmethod
    def of(layers: Iterable[str | None]) -> Places:
        """For a model whose layers have these paths."""
        found = {match[1] for path in layers if path and (match := SIDE.search(path))}
        return Places(len(found) > 1)

    def role(self, name: str, kind: str, matrix: str) -> str:
        """``decoder_cross_query``, ``query_adapter``; the kind where there is nothing to tell
        apart.

        Args:
            name: Of the parameter, or of a layer.
            kind: Of the block.
            matrix: What an adapter adapts; for others the kind.
        """
        adapts = kind == "adapter"
        side = SIDE.search(name) if self.sides else None
        cross = (matrix if adapts else kind) in ATTENDING and CROSS.search(name)
        words = [side[1]] if side else []
        words += ["cross"] if cross else []
        words += [matrix] if adapts and matrix not in ("adapter", "other") else []
        return "_".join([*words, kind])
