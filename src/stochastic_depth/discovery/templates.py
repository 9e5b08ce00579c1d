"""How the output of a module call is built: what it hands through and the shapes of what it makes.

A dropped module hands out a stand-in that is made from such a template.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochastic_depth.errors import ChangedModelError
from stochastic_depth.torch_private.trees import (
    TreeSpec,
    tree_flatten,
    tree_leaves,
    tree_outline,
    tree_unflatten,
)

Place = int | str  # where an argument stands in a call: its position or its keyword
Form = tuple[tuple[Place, object], ...]  # of a call: its arguments but for their shapes

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclass(frozen=True, slots=True)
class Given:
    """An output that is an argument handed through, or one of the tensors in an argument."""

    place: Place
    leaf: int | None = None  # which leaf of the argument; None: the argument itself

    def find(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], positional: tuple[str, ...]
    ) -> Any:
        """The argument, also where it is passed by keyword this time, or by position."""
        place = self.place
        if isinstance(place, int) and place >= len(args):
            place = positional[place]
        elif isinstance(place, str) and place not in kwargs:
            place = positional.index(place)
        argument = args[place] if isinstance(place, int) else kwargs[place]
        return argument if self.leaf is None else tree_leaves(argument)[self.leaf]


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor that the call makes."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def new(self, *, unread: bool) -> Tensor:
        out = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        # Who reads memory that nobody wrote to may find NaN, and 0 times NaN is NaN.
        return out if unread else out.zero_()


@dataclass(frozen=True, slots=True)
class Constant:
    """A plain value: None, a number, a string."""

    value: object


@dataclass(frozen=True, slots=True)
class Opaque:
    """Something that cannot be made without running the module."""

    kind: str


@dataclass(frozen=True, slots=True)
class Template:
    """The leaves of an output and the structure around them."""

    leaves: tuple[Given | Made | Constant | Opaque, ...]
    spec: TreeSpec

    @property
    def is_leaf(self) -> bool:
        """Whether it is of a single value, not of a tuple or dict."""
        return self.spec.is_leaf()

    def __deepcopy__(self, memo: dict[int, Any]) -> Template:
        return self  # nothing in it changes; and torch 2.11 warns where a TreeSpec is copied

    def is_like(self, tensor: Tensor) -> bool:
        """Whether it is of a single tensor of the form of this one, the first argument."""
        leaf = self.leaves[0]
        if isinstance(leaf, Made):
            form = (tensor.shape, tensor.dtype, tensor.device)
            return (leaf.shape, leaf.dtype, leaf.device) == form and self.spec.is_leaf()
        return leaf == Given(0) and self.spec.is_leaf()

    def handing_on(self, other: Template) -> Template:
        """The same, with states handed on as they are in the template for other shapes."""
        if len(other.leaves) != len(self.leaves):
            return self
        leaves = (
            known if isinstance(own, Made) and isinstance(known, Given) else own
            for own, known in zip(self.leaves, other.leaves, strict=True)
        )
        return Template(tuple(leaves), self.spec)

    def build(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        zeros: frozenset[int] = frozenset(),
        unread: frozenset[int] = frozenset(),
        positional: tuple[str, ...] = (),
    ) -> Any:
        """An output of that form; what the call made and the leaves in `zeros` are fresh zeros.

        Args:
            args: The positional arguments of the call that is stood in for.
            kwargs: Its keyword arguments.
            zeros: Numbers of leaves that are zeros also where they were handed through.
            unread: Numbers of leaves that may hold anything.
            positional: The names of the parameters of the module's forward.
        """
        leaves: list[Any] = []
        for number, leaf in enumerate(self.leaves):
            if isinstance(leaf, Given):
                given = leaf.find(args, kwargs, positional)
                leaves.append(torch.zeros_like(given) if number in zeros else given)
            elif isinstance(leaf, Made):
                leaves.append(leaf.new(unread=number in unread - zeros))
            elif isinstance(leaf, Constant):
                leaves.append(leaf.value)
            else:
                raise ChangedModelError(
                    f"a module of a dropped branch hands out a {leaf.kind}, for which nothing "
                    "can stand in",
                    expected="tensors, plain values and arguments that are handed through",
                    instead="leave the block out with blocks=",
                )
        return leaves[0] if self.is_leaf else tree_unflatten(leaves, self.spec)


def describe(output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Template:
    """The template of an output that was made from these arguments."""
    places = {id(value): given for value, given in handed(args, kwargs)}
    leaves, spec = tree_flatten(output)

    def leaf(value: Any) -> Given | Made | Constant | Opaque:
        if isinstance(value, _PLAIN):
            return Constant(value)
        if id(value) in places:
            return places[id(value)]
        if isinstance(value, Tensor) and value.layout == torch.strided:
            return Made(value.shape, value.stride(), value.dtype, value.device)
        return Opaque(type(value).__name__)

    return Template(tuple(leaf(value) for value in leaves), spec)


def handed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Any, Given]]:
    """The arguments of a call and the tensors in them, with where they stand; what counts last."""
    given: list[tuple[Place, Any]] = [*enumerate(args), *kwargs.items()]
    for place, argument in given:
        if isinstance(argument, tuple | list | dict):
            for number, leaf in enumerate(tree_leaves(argument)):
                if isinstance(leaf, Tensor):
                    yield leaf, Given(place, number)
    for place, argument in given:
        yield argument, Given(place)


def signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[object, ...]:
    """What the shapes of a module's output may depend on, hashable."""
    leaves = tree_leaves((args, kwargs))
    described = tuple(_describe_argument(leaf) for leaf in leaves)
    kinds = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
    autocast = tuple(
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        for kind in sorted(kinds)
    )
    return (*described, autocast, tree_outline((args, kwargs)))


def form(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Form:
    """What the control flow of a forward usually depends on: arguments but for shapes.

    A tensor stands there as its number of dimensions, a plain value with its type.
    """
    given: list[tuple[Place, Any]] = [*enumerate(args), *kwargs.items()]
    return tuple((place, _kind_of(value)) for place, value in given)


def order(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Place, int], ...]:
    """How many leaves each argument has, in the order of the call."""
    given: list[tuple[Place, Any]] = [*enumerate(args), *kwargs.items()]
    return tuple((place, len(tree_leaves(value))) for place, value in given)


def _kind_of(value: object) -> object:
    if isinstance(value, Tensor):
        return value.ndim
    return (type(value), value) if isinstance(value, _PLAIN) else type(value)


def _describe_argument(leaf: object) -> object:
    if isinstance(leaf, Tensor):
        strided = leaf.layout == torch.strided
        return (leaf.shape, leaf.stride() if strided else None, leaf.dtype, leaf.device)
    return (type(leaf), leaf) if isinstance(leaf, _PLAIN) else type(leaf)
