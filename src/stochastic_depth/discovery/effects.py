"""What a module call does besides its output: attributes that it changes, values that are kept.

Constants that a module makes once and keeps (position tables) are no effects.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.discovery.operations import Kind
from stochastic_depth.discovery.recording import Call, Recording

_PLAIN = (int, float, str, bool, tuple, type(None), torch.dtype, torch.device)
_SIZED = (list, dict, set)


class Before:
    """What a module held and who referred to its arguments when it was called.

    Args:
        call: The call.
        module: What is called.
        given: Its positional and keyword arguments.
    """

    def __init__(self, call: Call, module: nn.Module, given: Sequence[Any]) -> None:
        self.call, self.module, self.given = call, module, given
        self.made: list[weakref.ref[Tensor]] = []  # the values that are made in its own forward
        self._held, self._sizes = _held(module)
        self._references = _references(given)

    def effects(
        self, results: Sequence[Tensor], is_constant: Callable[[Tensor], bool]
    ) -> Iterator[tuple[str, Tensor | None]]:
        """What is otherwise now, at the end of the call: a name or description, and the value.

        Args:
            results: The tensors in its output.
            is_constant: Whether a tensor was made of weights and constants alone.
        """
        now, sizes = _held(self.module)
        same = len(now) == len(self._held) and all(map(is_, now.values(), self._held.values()))
        for key in {**self._held, **now} if not same or sizes != self._sizes else ():
            old, new = self._held.get(key), now.get(key)
            if old is None and isinstance(new, Tensor) and is_constant(new):
                continue
            changed = old is not new and not _is_equal(old, new)
            is_own = key[0] != "_" or key in self.module._buffers
            if is_own and (changed or self._sizes.get(key) != sizes.get(key)):
                yield key, new if isinstance(new, Tensor) else None
        memories = {memory_of(tensor) for tensor in results}
        for reference in self.made:
            tensor = reference()
            if tensor is None or memory_of(tensor) in memories or is_constant(tensor):
                continue
            yield "a value that somebody keeps", tensor
            return
        counts = zip(self.given, _references(self.given), self._references, strict=True)
        for value, after, before in counts:
            if after > before and memory_of(value) not in memories:
                yield "its input, which somebody keeps", value


def _held(module: nn.Module) -> tuple[dict[str, Any], dict[str, int]]:
    """Attributes and buffers, and how many values are in those that hold some."""
    held = {**vars(module), **module._buffers}
    return held, {key: len(value) for key, value in held.items() if isinstance(value, _SIZED)}


def _references(given: Sequence[Any]) -> list[int]:
    """How often each tensor among the arguments is referred to."""
    return [sys.getrefcount(value) if isinstance(value, Tensor) else 0 for value in given]


def _is_equal(old: Any, new: Any) -> bool:
    return isinstance(old, _PLAIN) and type(old) is type(new) and bool(old == new)


def memory_of(tensor: Tensor) -> int:
    """The memory that a tensor lies in; others that lie there, too, have the same."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return -id(tensor)  # sparse tensors and their like share no storage


def effects_of(recording: Recording, call: Call, members: Sequence[Call]) -> list[tuple[str, int]]:
    """What a call does besides its output, outside of these modules inside of it, and the value.

    The value is -1 where it is none.
    """
    left = within(members)
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


def within(members: Sequence[Call]) -> set[int]:
    """The numbers of these calls and of all calls inside of them."""
    return {number for member in members for number in member.inside}
