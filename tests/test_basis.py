"""The Krylov vectors of a probe, and the memory that they take."""

import pytest
import torch

from blockspec.numerics import basis
from blockspec.numerics.basis import Basis, rows_taken


@pytest.mark.parametrize("numel", [7, basis.LARGE])
def test_memory_is_taken_for_little_more_vectors_than_there_are(numel):
    """A GPU gives memory at once that is not written to yet."""
    kept = Basis(numel, dtype=torch.float32, device="meta")
    for count in range(1, 41):
        kept.append(torch.empty(numel, device="meta"))
        taken = sum(chunk.numel() for chunk in kept._chunks)
        assert taken == rows_taken(count, numel) * numel
        assert count <= rows_taken(count, numel) <= max(4, 2 * count - 1, 0)
        if numel == basis.LARGE:
            assert rows_taken(count, numel) == count


def test_vectors_stay_in_their_order():
    vectors = torch.linalg.qr(torch.randn(50, 40, generator=torch.Generator().manual_seed(0)))[0].T
    kept = Basis(50, dtype=torch.float32, device="cpu")
    for vector in vectors:
        kept.append(vector)
    torch.testing.assert_close(kept.matrix(), vectors, rtol=0, atol=0)
