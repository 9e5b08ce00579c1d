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
    """The state of a module, and of its arguments, when it was called.

    Args:
        call: The call.
        module: What is called.
        arguments: Its positional and keyword arguments.
    """

    def __init__(self, call: Call, module: nn.Module, arguments: Sequence[Any]) -> None:
        self.call, self.module, self.arguments = call, module, arguments
        self.made: list[weakref.ref[Tensor]] = []  # the values that are made in its own forward
        self._kept, self._sizes = _kept(module)
        self._references = _references(arguments)

    def effects(
        self, results: Sequence[Tensor], is_constant: Callable[[Tensor], bool]
    ) -> Iterator[tuple[str, Tensor | None]]:
        """What is otherwise now, at the end of the call: a name or description, and the value.

        Args:
            results: The tensors in its output.
            is_constant: Whether a tensor was made of weights and constants alone.
        """
        now, sizes = _kept(self.module)
        same = len(now) == len(self._kept) and all(map(is_, now.values(), self._kept.values()))
        for key in {**self._kept, **now} if not same or sizes != self._sizes else ():
            old, new = self._kept.get(key), now.get(key)
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
        counts = zip(self.arguments, _references(self.arguments), self._references, strict=True)
        for value, after, before in counts:
            if after > before and memory_of(value) not in memories:
                yield "its input, which somebody keeps", value


def _kept(module: nn.Module) -> tuple[dict[str, Any], dict[str, int]]:
    """Attributes and buffers, and how many values are in those that hold some."""
    kept = {**vars(module), **module._buffers}
    return kept, {key: len(value) for key, value in kept.items() if isinstance(value, _SIZED)}


def _references(arguments: Sequence[Any]) -> list[int]:
    """How often each tensor among the arguments is referred to."""
    return [sys.getrefcount(value) if isinstance(value, Tensor) else 0 for value in arguments]


def _is_equal(old: Any, new: Any) -> bool:
    return isinstance(old, _PLAIN) and type(old) is type(new) and bool(old == new)


def memory_of(tensor: Tensor) -> int:
    """The memory that a tensor lies in; others that lie there, too, have the same."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return -id(tensor)  # sparse tensors and their like share no storage


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
