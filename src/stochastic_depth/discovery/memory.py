"""Which memory a tensor lies in, and what of a tensor an operation in place has changed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stochastic_depth.torch_private.tracing import without_modes


class Layout(NamedTuple):
    """Where the elements of a tensor lie in their memory."""

    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    bytes: int  # of an element

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        """The layout of a tensor that is not sparse."""
        offset = int(tensor.storage_offset())
        return cls(offset, tensor.shape, tensor.stride(), tensor.element_size())

    def shares(self, other: Layout) -> tuple[bool, bool]:
        """Whether any of its elements is one of the other's, and whether all are."""
        if self == other:
            return True, True
        if self.bytes != other.bytes or not self.shape.numel() or not other.shape.numel():
            return self.bytes != other.bytes, False
        if self._end <= other.offset or other._end <= self.offset:
            return False, False
        with without_modes():
            marks = torch.zeros(max(self._end, other._end), dtype=torch.bool, device="cpu")
            marks.as_strided(other.shape, other.stride, other.offset).fill_(1)
            found = marks.as_strided(self.shape, self.stride, self.offset)
            return bool(found.any()), bool(found.all())

    @property
    def _end(self) -> int:
        pairs = zip(self.shape, self.stride, strict=True)
        return self.offset + sum((size - 1) * step for size, step in pairs) + 1


class Writes:
    """The values that operations in place have written, memory by memory."""

    def __init__(self) -> None:
        self._written: dict[int, list[tuple[int, Layout]]] = {}

    def note(self, tensor: Tensor, value: int) -> None:
        """A tensor was written: this value stands there now."""
        memory = memory_of(tensor)
        if memory >= 0 and not tensor.is_nested:
            self._written.setdefault(memory, []).append((value, Layout.of(tensor)))

    def since(self, tensor: Tensor, known: int) -> tuple[int, list[int]]:
        """What a tensor holds now that had the value `known` before.

        Returns:
            The last value that all of it comes from, and those that were written to parts of it
            since.
        """
        parts: list[int] = []
        written = self._written and self._written.get(memory_of(tensor))
        if not written or written[-1][0] <= known:
            return known, parts
        layout = Layout.of(tensor)
        for value, other in reversed(written):
            if value <= known:
                break
            some, whole = layout.shares(other)
            if whole:
                return value, parts
            if some:
                parts.insert(0, value)
        return known, parts


def memory_of(tensor: Tensor) -> int:
    """The memory that a tensor lies in; others that lie there, too, have the same."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return -id(tensor)  # sparse tensors and their like share no storage


def uses_of(tensor: Tensor) -> int:
    """How many tensors, and arrays of numpy, lie in its memory."""
    memory = memory_of(tensor)
    return int(torch._C._storage_Use_Count(memory)) if memory >= 0 else 0
