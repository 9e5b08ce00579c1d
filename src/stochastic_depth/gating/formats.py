"""The memory formats in which blocks are given tensors: for each, torch makes a graph of its own.

A dropped block hands its input on in the format that it has, and not in that which it would have
made. So what the next block is given depends on the draw: its graphs are built for all the formats
that tensors of that shape were seen in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from stochastic_depth.torch_private import tree_flatten, tree_leaves, tree_unflatten


class Formats:
    """What was seen so far: for each shape, the strides."""

    def __init__(self) -> None:
        self._seen: dict[torch.Size, dict[tuple[int, ...], None]] = {}

    def note(self, values: Any) -> None:
        """Remember the formats of all tensors in it."""
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor):
                self._seen.setdefault(leaf.shape, {})[leaf.stride()] = None

    def variants(self, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
        """Arguments as they are, and then with one tensor after the other in another format."""
        self.note((args, kwargs))
        yield args, kwargs
        leaves, spec = tree_flatten((args, kwargs))
        for number, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                continue
            for strides in [*self._seen[leaf.shape]]:
                if strides != leaf.stride():
                    other = [*leaves[:number], _with(leaf, strides), *leaves[number + 1 :]]
                    yield tree_unflatten(other, spec)


def _with(leaf: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Zeros that look like it in another format; dimensions may overlap in it, as expanded ones."""
    length = 1 + sum((n - 1) * stride for n, stride in zip(leaf.shape, strides, strict=True))
    other = leaf.detach().new_zeros(max(length, 0)).as_strided(leaf.shape, strides)
    return other.requires_grad_(leaf.requires_grad)
