"""The kept rows of a batch: how many, taking them out of a tensor, putting what they became back.

A tensor may hold several rows for each example (an image cut into windows), example by example.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochastic_depth.torch_private.trees import tree_flatten, tree_unflatten


@dataclass(frozen=True, slots=True)
class Rows:
    """Which rows of a batch are kept: a window, which may wrap around the end.

    Attributes:
        batch: The number of rows.
        start: The first kept row; the others follow it, from the end on to the beginning.
        count: How many are kept: more than none, fewer than all.
    """

    batch: int
    start: int
    count: int

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of the kept rows, in rising order."""
        return tuple(sorted((self.start + i) % self.batch for i in range(self.count)))

    def cut(self, full: Tensor, dim: int) -> tuple[Any, Any]:
        """The kept rows, and what `join` needs to put them back."""
        # One split for both, so that the gradient is put together in one piece, too. A part without
        # rows would bring a gradient of its own, in another memory format than the others'.
        lengths = self._lengths(full, dim)
        pieces = iter(full.split([length for length in lengths if length], dim))
        parts = [next(pieces) if length else None for length in lengths]
        if self._wraps():
            return _joined([parts[0], parts[2]], dim, _order(full)), parts
        return parts[1], parts

    def join(self, kept: Tensor, dim: int, rest: Any) -> Tensor:
        """The tensor that was cut, with these rows in the places of the kept ones."""
        return _one_format(self._with_rest(kept, dim, *rest), _order(kept))

    def spread(self, kept: Tensor, dim: int) -> Tensor:
        """Zeros with the kept rows in their places."""
        shape = list(kept.shape)
        each = shape[dim] // self.count
        shape[dim] = each * (self.batch - self.count)
        gap, start = _zeros(kept, shape), each * self.start
        ends = (gap, gap) if self._wraps() else gap.split([start, shape[dim] - start], dim)
        return self._with_rest(kept, dim, ends[0], gap, ends[1])

    def _with_rest(
        self, kept: Tensor, dim: int, first: Tensor, middle: Tensor, last: Tensor
    ) -> Tensor:
        """The kept rows as the middle between two parts, or around the middle as both ends."""
        if not self._wraps():
            return _joined([first, kept, last], dim, _order(kept))
        each = kept.shape[dim] // self.count
        ends = kept.split(
            [each * (self.start + self.count - self.batch), each * (self.batch - self.start)], dim
        )
        return _joined([ends[0], middle, ends[1]], dim, _order(kept))

    def _wraps(self) -> bool:
        return self.start + self.count > self.batch

    def _lengths(self, full: Tensor, dim: int) -> list[int]:
        """Of the three parts that the window cuts a tensor into; it is the middle, or the ends."""
        each = full.shape[dim] // self.batch
        stop = self.start + self.count
        cuts = (stop - self.batch, self.start) if self._wraps() else (self.start, stop)
        return [each * cuts[0], each * (cuts[1] - cuts[0]), each * (self.batch - cuts[1])]


def _order(x: Tensor) -> list[int] | None:
    """Its dimensions as they follow each other in memory; None where that is as they are numbered.

    None as well where one of them takes no memory of its own. What is put together keeps the order:
    all that follows would be slow in another one.
    """
    strides = x.stride()
    if x.is_contiguous() or 0 in strides:
        return None
    order = sorted(range(x.ndim), key=lambda dim: -strides[dim])
    return None if order == [*range(x.ndim)] else order


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _joined(parts: Sequence[Tensor | None], dim: int, order: list[int] | None) -> Tensor:
    """The parts one after the other, in this order of dimensions in memory."""
    some = [part for part in parts if part is not None and part.shape[dim]]
    if order is None:
        return torch.cat(some, dim)
    joined = torch.cat([part.permute(order) for part in some], order.index(dim))
    return joined.permute(_inverse(order))


def _one_format(joined: Tensor, order: list[int] | None) -> Tensor:
    """The same; its gradient will come in its own memory format.

    A gradient in another one goes through dropped rows as it is, from block to block, and every
    operation on the way back is slow.
    """
    if joined.requires_grad and order is not None:
        back = _inverse(order)
        joined.register_hook(lambda grad: grad.permute(order).contiguous().permute(back))
    return joined


def _zeros(like: Tensor, shape: list[int]) -> Tensor:
    """Zeros in the memory format of another tensor."""
    order = _order(like)
    if order is None:
        return like.new_zeros(shape)
    return like.new_zeros([shape[dim] for dim in order]).permute(_inverse(order))


def change_leaves(output: Any, numbers: Any, change: Callable[[Tensor, int], Tensor]) -> Any:
    """The output with these of its leaves changed."""
    if isinstance(output, Tensor):
        return change(output, 0) if 0 in numbers else output
    leaves, spec = tree_flatten(output)
    for number in numbers:
        leaves[number] = change(leaves[number], number)
    return tree_unflatten(leaves, spec)


@dataclass(frozen=True)
class Counts:
    """Which numbers of rows a block may run on; none and all are always allowed.

    Attributes:
        lone: Whether a single row is; where BatchNorm has to make a mean of it, not.
        fewest_dropped: The part of a batch that is dropped at least, where any rows are: what is
            dropped has to pay for taking the others out and putting them back.
    """

    lone: bool
    fewest_dropped: float

    def around(self, wanted: float, batch: int) -> tuple[int, int]:
        """The allowed numbers next to a wanted one, below and above."""
        fewest, most = (1 if self.lone else 2), math.floor(batch * (1.0 - self.fewest_dropped))
        if fewest > most:
            return 0, batch
        if wanted > most:
            return most, batch
        if wanted < fewest:
            return 0, fewest
        return math.floor(wanted), math.ceil(wanted)


def kept_count(u: float, batch: int, rate: float, counts: Counts) -> int:
    """How many rows of a batch are kept: one of the two allowed numbers around `batch * (1 - p)`.

    They are taken with the chances that make it `batch * (1 - p)` on average, so that a row that
    stands anywhere in the batch is kept with exactly `1 - p`. (A fixed number, as in DINOv2's
    subset, is biased by its rounding.)

    Args:
        u: A number in [0, 1).
        batch: The number of rows.
        rate: The drop rate p.
        counts: Which numbers are allowed.

    Example:
        >>> any_number = Counts(lone=True, fewest_dropped=0.0)
        >>> kept_count(0.5, 16, 0.4, any_number), kept_count(0.7, 16, 0.4, any_number)
        (10, 9)
        >>> of_images = Counts(lone=False, fewest_dropped=0.5)
        >>> kept_count(0.5, 16, 0.1, of_images), kept_count(0.9, 16, 0.1, of_images)
        (16, 8)
    """
    wanted = batch * (1.0 - rate)
    below, above = counts.around(wanted, batch)
    return above if below == above or u < (wanted - below) / (above - below) else below
