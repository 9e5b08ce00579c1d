"""Ways through a recording: what they reach, and which values every way back leads through.

The latter are dominators, kept as a forest. A value's parent is the youngest value that all of its
data comes through; a value that is made by an operation which the way may not pass has none. The
forest grows with the recording in logarithmic time for each value, by pointers that jump over many
parents at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence


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
        self._depth: list[int] = []
        self._jump: list[int] = []

    def add(self, sources: Sequence[int]) -> None:
        """Add the next value, whose data comes from these; none: the way ends there."""
        value, parent = len(self._parent), -1
        if sources:
            parent = sources[0]
            for other in sources[1:]:
                parent = self._common(parent, other)
        self._parent.append(parent)
        if parent < 0:
            self._depth.append(0)
            self._jump.append(value)
            return
        self._depth.append(self._depth[parent] + 1)
        far = self._jump[parent]
        even = (
            self._depth[parent] - self._depth[far]
            == self._depth[far] - self._depth[self._jump[far]]
        )
        self._jump.append(self._jump[far] if even else parent)

    def from_value(self, value: int) -> Iterator[int]:
        """The value itself and all that every way back from it leads through, youngest first."""
        while value >= 0:
            yield value
            value = self._parent[value]

    def _common(self, one: int, other: int) -> int:
        """The youngest value that all ways back from both lead through, or -1."""
        while one != other and min(one, other) >= 0:
            if one < other:
                one, other = other, one
            jump = self._jump[one]
            one = jump if other <= jump < one else self._parent[one]
        return one if one == other else -1
