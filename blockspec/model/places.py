"""What a block is among others of its kind: of the encoder or of the decoder, of self- or of
cross-attention (by where its inputs come from, or by its name), or an adapter of some matrix.

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
        sides: Whether the model has layers of a decoder, and others. A model that has the ones or
            the others alone has nothing to tell apart.
    """

    sides: bool

    @staticmethod
    def of(layers: Iterable[str | None]) -> Places:
        """For a model whose layers have these paths."""
        matches = [SIDE.search(path) for path in layers if path]
        found = {None if match is None else match[1] for match in matches}
        return Places("decoder" in found and len(found) > 1)

    def role(self, name: str, kind: str, matrix: str, crossed: bool | None = None) -> str:
        """``decoder_cross_query``, ``query_adapter``; the kind where there is nothing to tell
        apart.

        Args:
            name: Of the parameter, or of a layer.
            kind: Of the block.
            matrix: What an adapter adapts; for others the kind.
            crossed: Whether it was seen to be of cross-attention; None: the name tells.
        """
        adapts = kind == "adapter"
        side = SIDE.search(name) if self.sides else None
        crossed = bool(CROSS.search(name)) if crossed is None else crossed
        cross = (matrix if adapts else kind) in ATTENDING and crossed
        words = [side[1]] if side else []
        words += ["cross"] if cross else []
        words += [matrix] if adapts and matrix not in ("adapter", "other") else []
        return "_".join([*words, kind])
