"""What a module call does besides its output: attributes that it changes, values that are kept.

Constants that a module makes once and keeps (position tables) are no effects.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.discovery.memory import memory_of, uses_of
from stochastic_depth.discovery.operations import Kind, tensors_in
from stochastic_depth.discovery.recording import Call, Recording
from stochastic_depth.torch_private.trees import tree_leaves

_PLAIN = (int, float, str, bool, type(None), torch.dtype, torch.device)
_LISTS = (list, tuple, set, deque)
_DEEP, _MANY = 2, 1000  # how many levels inside of a container, and entries of each, are compared


class Before:
    """The state of a module, and of its arguments, when it was called.

    Args:
        call: The call.
        module: What is called.
        arguments: Its positional and keyword arguments.
    """

    def __init__(self, call: Call, module: nn.Module, arguments: Sequence[Any]) -> None:
        self.call, self.module, self.arguments = call, module, arguments
        self.made: list[weakref.ref[Tensor]] = []  # the values that are made in its own forward
        self.is_kept = False  # by a hook, what it was called with or returns
        self.changed: set[int] = set()  # what calls inside of it have changed already
        self._kept = _kept(module)
        self._held = {key: _content(value) for key, value in self._kept.items()}
        self._filled = [_content(value) for value in arguments]
        self._references = _references(arguments)

    def effects(
        self, results: Sequence[Tensor], is_constant: Callable[[Tensor], bool]
    ) -> Iterator[tuple[str, Tensor | None]]:
        """What is otherwise now, at the end of the call: a name or description, and the value.

        Args:
            results: The tensors in its output.
            is_constant: Whether a tensor was made of weights and constants alone.
        """
        yield from self._changes(is_constant)
        memories = {memory_of(tensor) for tensor in results}
        for reference in self.made:
            tensor = reference()
            if tensor is None or memory_of(tensor) in memories or is_constant(tensor):
                continue
            del tensor
            gc.collect(0)  # an error that was caught inside may hold the frames of this call
            if (kept := reference()) is not None:
                yield "a value that somebody keeps", kept
                return
        counts = zip(self.arguments, _references(self.arguments), self._references, strict=True)
        for value, after, before in counts:
            if after > before and memory_of(value) not in memories:
                yield "its input, which somebody keeps", value

    def _changes(
        self, is_constant: Callable[[Tensor], bool]
    ) -> Iterator[tuple[str, Tensor | None]]:
        """The attributes of the module, and the arguments, that hold something else now."""
        now = _kept(self.module)
        for key in {**self._kept, **now}:
            old, new = self._kept.get(key), now.get(key)
            if old is None and isinstance(new, Tensor) and is_constant(new):
                continue
            is_own = key[0] != "_" or key in self.module._buffers
            if is_own and not (_is_equal(old, new) and _same(self._held.get(key), new)):
                yield key, new if isinstance(new, Tensor) else None
        for value, content in zip(self.arguments, self._filled, strict=True):
            if not _same(content, value):
                if id(value) not in self.changed:
                    yield f"its argument, a {type(value).__name__}", None
                self.changed.add(id(value))


def _kept(module: nn.Module) -> dict[str, Any]:
    """Attributes and buffers."""
    return {**vars(module), **module._buffers}


def _content(value: Any, deep: int = _DEEP) -> dict[Any, Any] | None:
    """What a container or an object holds, and those inside of it; None: it is neither."""
    if isinstance(value, dict):
        found = dict(islice(value.items(), _MANY))
    elif isinstance(value, _LISTS):
        found = dict(enumerate(islice(value, _MANY)))
    elif isinstance(value, (Tensor, nn.Module, ModuleType, *_PLAIN)) or callable(value):
        return None
    else:
        slots = [name for kind in type(value).__mro__ for name in vars(kind).get("__slots__", ())]
        found = {name: getattr(value, name) for name in slots if hasattr(value, name)}
        found |= getattr(value, "__dict__", {})
    for key, each in [*found.items()] if deep else ():
        inside = _content(each, deep - 1)
        found |= {(key, name): item for name, item in (inside or {}).items()}
    return found


def _same(before: dict[Any, Any] | None, value: Any) -> bool:
    """Whether something holds what it held before."""
    now = _content(value)
    if before is None or now is None:
        return True
    return before.keys() == now.keys() and all(_is_equal(before[key], now[key]) for key in now)


def _references(arguments: Sequence[Any]) -> list[int]:
    """How often each tensor among the arguments is referred to."""
    return [sys.getrefcount(value) if isinstance(value, Tensor) else 0 for value in arguments]


def references(values: Any) -> list[int]:
    """How often the tensors in something nested, and their memories, are referred to."""
    tensors = tensors_in(tree_leaves(values))
    return [*_references(tensors), *map(uses_of, tensors)]


def _is_equal(old: Any, new: Any) -> bool:
    if old is new or type(old) is not type(new):
        return old is new
    if isinstance(old, tuple):
        return len(old) == len(new) and all(map(_is_equal, old, new))
    return isinstance(old, _PLAIN) and bool(old == new)


def effects_of(recording: Recording, call: Call, parts: Sequence[Call]) -> list[tuple[str, int]]:
    """What a call does besides its output, outside of these modules inside of it, and the value.

    The value is -1 where it is none.
    """
    left = within(parts)
    outside = [recording.calls[number] for number in call.inside if number not in left]
    found = [effect for inner in outside for effect in inner.effects]
    for node in recording.nodes[call.start : call.end]:
        if node.call in left:
            continue
        if node.kind is Kind.BATCH_NORM and node.operation == node.index:
            found.append((f"the running mean of {recording.module_at(node.index)}", -1))
        elif node.overwrites and recording.is_state(node.index):
            found.append((f"a buffer of {recording.module_at(node.index)}", node.index))
    return found


def within(branch_calls: Sequence[Call]) -> set[int]:
    """The numbers of these calls and of all calls inside of them."""
    return {number for call in branch_calls for number in call.inside}
