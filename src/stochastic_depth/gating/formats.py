"""The memory formats in which blocks are given tensors: for each, torch makes a graph of its own.

A dropped block hands its input on in the format that it has, and not in that which it would have
made. So what the next block is given depends on the draw: graphs are built for the formats as well
that other tensors of the same shape were seen in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from stochastic_depth.torch_private import tree_flatten, tree_leaves, tree_unflatten

Kind = tuple[torch.Size, torch.dtype, torch.device]
Strides = tuple[int, ...]


class Formats:
    """What was seen so far: of each kind of tensor, the strides."""

    def __init__(self) -> None:
        self._seen: dict[Kind, dict[Strides, None]] = {}

    def note(self, values: Any) -> None:
        """Remember the formats of all tensors in it."""
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor):
                self._seen.setdefault(_kind(leaf), {})[leaf.stride()] = None

    def others(self, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
        """Arguments with one tensor after the other in another format, and with all that are alike.

        Nobody knows which of them will ever be given; in some a block may not be able to run.
        """
        self.note((args, kwargs))
        leaves, spec = tree_flatten((args, kwargs))
        looks = [
            (_kind(leaf), leaf.stride()) if isinstance(leaf, Tensor) else None for leaf in leaves
        ]
        for look in dict.fromkeys(look for look in looks if look is not None):
            alike = [number for number, other in enumerate(looks) if other == look]
            changes = [[number] for number in alike] + ([alike] if len(alike) > 1 else [])
            for strides in [*self._seen[look[0]]]:
                for change in changes if strides != look[1] else []:
                    changed = [
                        _with(leaf, strides) if number in change else leaf
                        for number, leaf in enumerate(leaves)
                    ]
                    yield tree_unflatten(changed, spec)


def _kind(leaf: Tensor) -> Kind:
    return leaf.shape, leaf.dtype, leaf.device


def _with(leaf: Tensor, strides: Strides) -> Tensor:
    """The same in another format: its values, but where places in memory stand for several."""
    length = 1 + sum((n - 1) * stride for n, stride in zip(leaf.shape, strides, strict=True))
    other = leaf.detach().new_zeros(max(length, 0)).as_strided(leaf.shape, strides)
    if length >= leaf.numel():
        other.copy_(leaf.detach())
    return other.requires_grad_(leaf.requires_grad)
