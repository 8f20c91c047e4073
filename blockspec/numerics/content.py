"""Digests of what numbers depend on: equal for equal content, wherever it lies and whatever it is
called.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

SHOWN = 16  # hexadecimal digits: two of 2**32 digests are equal by chance never in practice


class Digest:
    """Content that is added piece by piece; each piece says what it is and how long, so that
    neighbours cannot merge.

    SHA-256, because it is the fastest of hashlib where the processor has instructions for it.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, value: Any) -> Digest:
        """Adds tensors, arrays, and nests of mappings and sequences of them; anything else by its
        ``repr`` or attributes.
        """
        if isinstance(value, Tensor):
            self._tensor(value.detach())
        elif isinstance(value, np.ndarray):
            self._array(value)
        elif isinstance(value, Mapping):
            self._mark("mapping", len(value))
            for name, item in value.items():
                self.add(str(name)).add(item)
        elif isinstance(value, (tuple, list)):
            self._mark("sequence", len(value))
            for item in value:
                self.add(item)
        elif hasattr(value, "__dict__"):  # its repr may be its address
            self.add({"": type(value).__qualname__} | vars(value))
        elif is_dataclass(value):  # with slots
            held = {field.name: getattr(value, field.name) for field in fields(value)}
            self.add({"": type(value).__qualname__} | held)
        else:
            self._bytes(repr(value).encode())
        return self

    def text(self) -> str:
        """The digest, in hexadecimal digits."""
        return self._hash.hexdigest()[:SHOWN]

    def _tensor(self, tensor: Tensor) -> None:
        self._mark(str(tensor.dtype), *tensor.shape)
        if hasattr(tensor, "full_tensor"):  # spread over processes: its content is that of all
            tensor = tensor.full_tensor()
        if tensor.layout is not torch.strided:
            tensor = tensor.to_dense()
        flat = tensor.cpu().resolve_conj().resolve_neg().contiguous().flatten()
        if size := flat.nbytes:
            # Not through numpy, after which torch refuses to resize the storage, as FSDP does
            self._hash.update((ctypes.c_char * size).from_address(flat.data_ptr()))

    def _array(self, array: np.ndarray) -> None:
        if array.dtype.hasobject or array.dtype.kind not in "biufc":
            self._mark(str(array.dtype), *array.shape)
            self.add(array.tolist())
        else:
            self._tensor(torch.from_numpy(np.ascontiguousarray(array).copy()).view(array.shape))

    def _bytes(self, content: bytes) -> None:
        self._mark("text", len(content))
        self._hash.update(content)

    def _mark(self, *marks: object) -> None:
        self._hash.update(f"<{','.join(map(str, marks))}>".encode())


def fingerprint(value: Any) -> str:
    """A digest of a batch, or of any nest of tensors: equal for equal content, whatever it is held
    in.
    """
    return Digest().add(value).text()


def fingerprint_of_all(parts: Iterable[Any]) -> str:
    """One digest of many parts in their order, each of which may be freed before the next comes."""
    digest = Digest()
    for part in parts:
        digest.add(part)
    return digest.text()
