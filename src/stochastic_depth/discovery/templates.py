"""How the output of a module call is built: what it hands through and the shapes of what it makes.

A dropped module hands out a stand-in that is made from such a template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stochastic_depth.errors import ChangedModelError
from stochastic_depth.torch_private import trees
from stochastic_depth.torch_private.tracing import autocasts

Place = int | str  # where an argument stands in a call: its position or its keyword


class Argument(NamedTuple):
    """A leaf of an argument; in an output: handed through."""

    place: Place
    leaf: int = 0  # which of the argument's leaves; that of a tensor is the tensor itself


Placed = tuple[Argument, Any]
"""Where a leaf stands, and the leaf."""


class Made(NamedTuple):
    """A tensor that the call makes."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def new(self, *, scratch: bool) -> Tensor:
        out = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        # Who reads memory that nobody wrote to may find NaN, and 0 times NaN is NaN.
        return out if scratch else out.zero_()


class Constant(NamedTuple):
    """A plain value: None, a number, a string."""

    value: object

    @property
    def is_fixed(self) -> bool:
        """Whether it cannot have been computed from shapes or data."""
        return not isinstance(self.value, int | float)


class Opaque(NamedTuple):
    """Something that cannot be made without running the module."""

    kind: str


@dataclass(frozen=True, slots=True)
class Template:
    """The leaves of an output and the structure around them."""

    leaves: tuple[Argument | Made | Constant | Opaque, ...]
    spec: trees.TreeSpec

    @property
    def is_leaf(self) -> bool:
        """Whether it is of a single value, not of a tuple or dict."""
        return self.spec.is_leaf()

    def __deepcopy__(self, memo: dict[int, Any]) -> Template:
        return self  # nothing in it changes; and torch 2.11 warns where a TreeSpec is copied

    def is_like(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether it is of a single tensor of the form of the only argument."""
        if len(args) != 1 or kwargs or not self.is_leaf or not isinstance(args[0], Tensor):
            return False
        leaf, x = self.leaves[0], args[0]
        if isinstance(leaf, Made):
            return (leaf.shape, leaf.dtype, leaf.device) == (x.shape, x.dtype, x.device)
        return leaf == Argument(0)

    def handing_on(self, other: Template) -> Template:
        """The same, with states handed on as they are in the template for other shapes."""
        if len(other.leaves) != len(self.leaves):
            return self
        leaves = (
            known if isinstance(leaf, Made) and isinstance(known, Argument) else leaf
            for leaf, known in zip(self.leaves, other.leaves, strict=True)
        )
        return Template(tuple(leaves), self.spec)

    def build(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        zeros: frozenset[int] = frozenset(),
        scratch: frozenset[int] = frozenset(),
        positional: tuple[str, ...] = (),
    ) -> Any:
        """An output of that form; what the call made and the leaves in `zeros` are fresh zeros.

        Args:
            args: The positional arguments of the call that is stood in for.
            kwargs: Its keyword arguments.
            zeros: Numbers of leaves that are zeros also where they were handed through.
            scratch: Numbers of leaves that may hold anything.
            positional: The names of the parameters of the module's forward.
        """
        leaves: list[Any] = []
        for number, leaf in enumerate(self.leaves):
            if isinstance(leaf, Argument):
                value = _found(leaf, args, kwargs, positional)
                leaves.append(torch.zeros_like(value) if number in zeros else value)
            elif isinstance(leaf, Made):
                leaves.append(leaf.new(scratch=number in scratch - zeros))
            elif isinstance(leaf, Constant):
                leaves.append(leaf.value)
            else:
                raise ChangedModelError(
                    f"a module of a dropped branch hands out a {leaf.kind}, for which nothing "
                    "can stand in",
                    expected="tensors, plain values and arguments that are handed through",
                    instead="leave the block out with blocks=",
                )
        return leaves[0] if self.is_leaf else trees.tree_unflatten(leaves, self.spec)


def _found(leaf: Argument, args: Any, kwargs: Any, positional: Sequence[str]) -> Any:
    """What a call has there, by position or by name."""
    place = named(leaf.place, positional)
    position: Any = positional.index(place) if place in positional else place
    argument = kwargs[place] if place in kwargs else args[position]
    return argument if isinstance(argument, Tensor) else trees.tree_leaves(argument)[leaf.leaf]


def describe(
    output: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, reads_values: bool = False
) -> Template:
    """The template of an output that was made from these arguments.

    Args:
        output: The output.
        args: The positional arguments.
        kwargs: The keyword arguments.
        reads_values: Whether Python numbers were made of tensors in the call.
    """
    places = {id(value): place for place, value in reversed(placed_leaves(args, kwargs))}
    leaves, spec = trees.tree_flatten(output)

    def leaf(value: Any) -> Argument | Made | Constant | Opaque:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if id(value) in places and (is_number or not isinstance(value, trees.PLAIN_VALUES)):
            return places[id(value)]
        if isinstance(value, float) and reads_values:
            return Opaque("number that it computes")
        if isinstance(value, trees.PLAIN_VALUES):
            return Constant(value)
        if isinstance(value, Tensor) and value.layout == torch.strided:
            return Made(value.shape, value.stride(), value.dtype, value.device)
        return Opaque(type(value).__name__)

    return Template(tuple(leaf(value) for value in leaves), spec)


def placed_leaves(args: Any, kwargs: Any, positional: Sequence[str] = ()) -> list[Placed]:
    """The leaves of a call's arguments, with where they stand; by name, where names are given."""
    arguments: list[tuple[Place, Any]] = [*enumerate(args), *kwargs.items()]
    return [
        (Argument(named(place, positional), number), leaf)
        for place, argument in arguments
        for number, leaf in enumerate(trees.tree_leaves(argument))
    ]


def signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[object, ...]:
    """What the shapes of a module's output may depend on, hashable."""
    x = args[0] if len(args) == 1 and not kwargs else None
    if isinstance(x, Tensor) and x.layout == torch.strided:  # the short way, for most
        autocast = _autocast(x.device.type) if autocasts() else None
        return x.shape, x.stride(), x.dtype, x.device, autocast
    leaves = trees.tree_leaves((args, kwargs))
    kinds = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
    described = map(_describe_leaf, leaves)
    return (*described, *map(_autocast, sorted(kinds)), trees.tree_outline((args, kwargs)))


def _describe_leaf(leaf: object) -> object:
    if isinstance(leaf, Tensor):
        stride = leaf.stride() if leaf.layout == torch.strided else None
        return leaf.shape, stride, leaf.dtype, leaf.device
    return kind_of_value(leaf)


def _autocast(kind: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def kind_of_value(value: object) -> object:
    """The class of a value; of a flag its value, too."""
    flag = trees.as_flag(value)
    return type(value) if flag is trees.NO_FLAG else (type(value), flag)


def named(place: Place, positional: Sequence[str]) -> Place:
    """An argument's name, also where it is passed by position."""
    known = isinstance(place, int) and place < len(positional)
    return positional[place] if known else place  # type: ignore[index]
