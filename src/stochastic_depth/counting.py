"""How often each block was called in training, and dropped: counted from the rows of draws.

A row is a pure function of (seed, step, number), so a gate need not write anything down: when a
step ends it is noted how often each was called in it, and the rows are looked at later, many at a
time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_MANY_STEPS = 32  # of which the rows are counted together: about as long as they are remembered


@dataclass(frozen=True)
class CallCount:
    """The training calls of a gate so far.

    Attributes:
        calls: How many there were.
        dropped: In how many of them it was closed; in mode "sample" each call counts as much as
            the fraction of its rows that were dropped.
    """

    calls: int
    dropped: float


class Tally:
    """The calls and drops of each unit, a block or a branch that draws by itself.

    Args:
        units: How many there are.
    """

    def __init__(self, units: int) -> None:
        self.calls, self.dropped = [0] * units, [0.0] * units
        self.counted = [0] * units  # calls of the step under way that are in these numbers
        self._waiting: list[tuple[int, list[int], list[int]]] = []

    def copy(self) -> Tally:
        """Another one with the same numbers."""
        twin = Tally(0)
        for name, value in vars(self).items():
            setattr(twin, name, list(value))
        return twin

    def start_from(self, calls: list[int], dropped: list[float]) -> None:
        """Take over the numbers of an earlier run."""
        self.calls, self.dropped, self._waiting = calls, dropped, []

    def end_step(self, step: int, calls: list[int], row_of: Callable[[int, int], Any]) -> None:
        """Note how often each unit was called in a step that is over."""
        self._waiting.append((step, self.counted, calls))
        self.counted = [0] * len(calls)
        if len(self._waiting) >= _MANY_STEPS:
            self._count(row_of)

    def count(self, step: int, calls: list[int], row_of: Callable[[int, int], Any]) -> None:
        """Count all calls so far, those of the step under way among them."""
        self.end_step(step, calls, row_of)
        self._count(row_of)
        self.counted = calls

    def _count(self, row_of: Callable[[int, int], Any]) -> None:
        together: list[Sequence[bool]] = []  # rows that all units were called in
        for step, before, after in self._waiting:
            first, last = max(before, default=0), min(after, default=0)
            together += [row_of(step, number).kept for number in range(first, last)]
            for unit, (begin, end) in enumerate(zip(before, after, strict=True)):
                alone = [n for n in range(begin, end) if not first <= n < last]
                self._add(unit, [row_of(step, number).kept[unit] for number in alone])
        for unit, kept in enumerate(zip(*together, strict=True)):
            self._add(unit, kept)
        self._waiting = []

    def _add(self, unit: int, kept: Sequence[bool]) -> None:
        self.calls[unit] += len(kept)
        self.dropped[unit] += kept.count(False)
