"""Ways through a recording: what they reach, and which values every way back leads through.

The latter are dominators, kept as a forest. A value's parent is the youngest value that all of its
data comes through; a value that is made by an operation which the way may not pass has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce


def reached(starts: Iterable[int], onwards: Callable[[int], Iterable[int]]) -> Iterator[int]:
    """These values, and those that the ways from them lead to, each once.

    Args:
        starts: Where the ways begin.
        onwards: Where they lead to from a value.
    """
    waiting = list(starts)
    seen = set(waiting)
    while waiting:
        yield (value := waiting.pop())
        for other in onwards(value):
            if other not in seen:
                seen.add(other)
                waiting.append(other)


class Ways:
    """A forest over the values of a recording, numbered in the order in which they were made."""

    def __init__(self) -> None:
        self._parent: list[int] = []

    def add(self, sources: Sequence[int]) -> None:
        """Add the next value, whose data comes from these; none: the way ends there."""
        self._parent.append(reduce(self._common, sources) if sources else -1)

    def from_value(self, value: int) -> Iterator[int]:
        """The value itself and all that every way back from it leads through, youngest first."""
        while value >= 0:
            yield value
            value = self._parent[value]

    def _common(self, one: int, other: int) -> int:
        """The youngest value that all ways back from both lead through, or -1."""
        while one != other:
            if min(one, other) < 0:
                return -1
            one, other = min(one, other), self._parent[max(one, other)]
        return one
