"""Mode "sample": where a call of a block holds the batch, also one of fewer arguments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from stochastic_depth.errors import ChangedModelError
from stochastic_depth.rows import Dims, Held, Place
from stochastic_depth.torch_private.trees import tree_leaves

Leaf = tuple[Place, int, int]  # an argument's place, how many leaves it has, and which of them


class CallDims(NamedTuple):
    """Of one call, by the numbers of leaves."""

    takes: Dims
    handed_on: dict[int, tuple[int, int]]


@dataclass(frozen=True)
class BatchDims:
    """Of the calls of a block.

    Attributes:
        name: The block's.
        positional: The names of its forward's parameters.
        inputs: For leaves of arguments: the batch dimension, and the rows of each example.
        handed_on: For leaves of the output: the dimension, and the argument a dropped row comes to.
        outputs: For leaves of the output: the dimension.
    """

    name: str
    positional: tuple[str, ...]
    inputs: dict[Leaf, tuple[int, int]]
    handed_on: dict[int, tuple[int, Leaf]]
    outputs: Dims

    def size(self, args: Any, kwargs: Any) -> int:
        """The number of examples in the batch of a call."""
        sizes = set()
        for where, leaf in self.leaves(args, kwargs):
            if where in self.inputs and isinstance(leaf, Tensor):
                dim, each = self.inputs[where]
                examples, rest = divmod(leaf.shape[dim], each)
                if rest:
                    raise self._uneven(where[0], leaf.shape[dim], each)
                sizes.add(examples)
        if len(sizes) == 2:
            sizes.discard(1)  # a leaf that has a single row holds for all rows
        if len(sizes) > 1:
            raise self._uneven("its arguments", sorted(sizes), 1)
        if not sizes:
            raise ChangedModelError(
                f'"{self.name}" is called without any argument that is known to hold the batch',
                expected="the arguments that it was watched with: "
                + ", ".join(dict.fromkeys(str(place) for place, _, _ in self.inputs)),
                instead="pass example_inputs as in the training (with the mask, say), or "
                'mode="batch"',
            )
        return sizes.pop()

    def _uneven(self, what: object, found: object, each: int) -> ChangedModelError:
        return ChangedModelError(
            f'"{self.name}" is called with {found} rows in {what}, where each example had {each} '
            "when it was watched",
            expected="the same number of rows for every example (no packed or ragged sequences)",
            instead='pass mode="batch", which takes no rows apart; or pad the sequences',
        )

    def of_call(self, args: Any, kwargs: Any) -> CallDims:
        """Which leaves of a call hold the batch."""
        numbers = {where: n for n, (where, _) in enumerate(self.leaves(args, kwargs))}
        return CallDims(
            {numbers[w]: dim for w, (dim, _) in self.inputs.items() if w in numbers},
            {n: (dim, numbers[w]) for n, (dim, w) in self.handed_on.items() if w in numbers},
        )

    def leaves(self, args: Any, kwargs: Any) -> Iterator[tuple[Leaf, Any]]:
        for place, value in [*enumerate(args), *kwargs.items()]:
            leaves = [value] if isinstance(value, Tensor) else tree_leaves(value)
            name = named(place, self.positional)
            for index, leaf in enumerate(leaves):
                yield (name, len(leaves), index), leaf


def named(place: Place, positional: Sequence[str]) -> Place:
    """An argument's name, also where it is passed by position."""
    known = isinstance(place, int) and place < len(positional)
    return positional[place] if known else place  # type: ignore[index]


def batch_dims(name: str, positional: tuple[str, ...], watched: Sequence[Held]) -> BatchDims:
    """What watched calls of a block tell."""
    inputs: dict[Leaf, tuple[int, int]] = {}
    handed_on: dict[int, tuple[int, Leaf]] = {}
    outputs: Dims = {}
    for held in watched:
        leaves: list[Leaf] = [
            (named(place, positional), count, index)
            for place, count in held.order
            for index in range(count)
        ]
        inputs |= {leaves[n]: (dim, held.each[n]) for n, dim in held.takes.items()}
        handed_on |= {n: (dim, leaves[m]) for n, (dim, m) in held.gives.items()}
        outputs |= held.outputs
    return BatchDims(name, positional, inputs, handed_on, outputs)
