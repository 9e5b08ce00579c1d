"""torch's pytrees, which look into dataclasses that hold tensors as well."""

from __future__ import annotations

import dataclasses
import enum
import io
import pickle
import sys
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, register_pytree_node, tree_map, tree_unflatten
from torch.utils._pytree import tree_flatten as _flatten

__all__ = [
    "TreeSpec",
    "tensors_in",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_outline",
    "tree_unflatten",
]

_PLAIN_TREES = (tuple, list, dict)
_LEAVES = (Tensor, bool, int, float, str, type(None))


class _Tensors(pickle.Pickler):
    """Finds the tensors in an object of any kind."""

    def __init__(self, value: object) -> None:
        super().__init__(io.BytesIO())
        self.found: list[Tensor] = []
        with suppress(Exception):  # what cannot be pickled holds none that could be found
            self.dump(value)

    def persistent_id(self, value: Any) -> int | None:
        """Says that a tensor lies elsewhere, and notes it."""
        if not isinstance(value, Tensor):
            return None
        self.found.append(value)
        return len(self.found)


def tensors_in(value: object) -> list[Tensor]:
    """The tensors in an object, also in one that is no tree (a cache)."""
    return _Tensors(value).found


class _Fields:
    """A dataclass that is looked into."""

    def __init__(self, value: Any) -> None:
        self.kind = type(value)
        self.fields = {key: _opened(item) for key, item in _fields(value).items()}


def tree_flatten(value: Any) -> tuple[list[Any], TreeSpec]:
    """The leaves of nested lists, tuples, dicts and dataclasses, and what puts them back."""
    leaves, spec = _flatten(value)
    return _flatten(_opened(value)) if any(map(_is_record, leaves)) else (leaves, spec)


def tree_leaves(value: Any) -> list[Any]:
    """The leaves alone."""
    if type(value) in _PLAIN_TREES:
        parts = value.values() if isinstance(value, dict) else value
        return [leaf for part in parts for leaf in tree_leaves(part)]
    return [value] if isinstance(value, _LEAVES) else tree_flatten(value)[0]


def tree_outline(value: Any) -> Any:
    """What is around the leaves, hashable."""
    if type(value) in _PLAIN_TREES:
        keys, parts = (value, value.values()) if isinstance(value, dict) else ((), value)
        return type(value), *keys, *map(tree_outline, parts)
    return None if isinstance(value, _LEAVES) else str(tree_flatten(value)[1])


def _opened(value: Any) -> Any:
    return tree_map(lambda leaf: _Fields(leaf) if _is_record(leaf) else leaf, value)


def _is_record(leaf: Any) -> bool:
    if isinstance(leaf, type) or not hasattr(type(leaf), "__dataclass_fields__"):
        return False
    return any(isinstance(item, Tensor) for item in _fields(leaf).values())


def _fields(value: Any) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(value)]
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def _together(values: Any, context: Any) -> Any:
    kind, names = context
    made = object.__new__(kind)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(made, name, value)  # it may be frozen
    return made


register_pytree_node(
    _Fields,
    lambda opened: (list(opened.fields.values()), (opened.kind, tuple(opened.fields))),
    _together,
)

_numpy: Any = sys.modules.get("numpy")  # torch loads it, where it is installed
PLAIN_VALUES = (
    *(type(None), bool, int, float, str, torch.dtype, torch.device, enum.Enum),
    *([_numpy.generic] if _numpy else ()),
)
"""What a flag may be: an argument that is no tensor and no object."""
_SWITCHES = (bool, str, enum.Enum)
MAY_BE_FLAGS = (*PLAIN_VALUES, *_PLAIN_TREES)
NO_FLAG = object()


def as_flag(value: Any) -> Any:
    """A plain value; what stands for the switches in a tuple, list or dict, hashable; or `NO_FLAG`.

    Numbers in a tuple are most often the size of an image, which may be another one each time.
    """
    if isinstance(value, PLAIN_VALUES):
        return value
    leaves = tree_leaves(value) if type(value) in _PLAIN_TREES else ()
    # Strings beside numbers may be names of files.
    kinds = _SWITCHES if all(isinstance(leaf, _SWITCHES) for leaf in leaves) else (bool, enum.Enum)
    switches = [leaf for leaf in leaves if isinstance(leaf, kinds)]
    is_flag = switches and all(isinstance(leaf, PLAIN_VALUES) for leaf in leaves)
    return (tree_outline(value), *switches) if is_flag else NO_FLAG
