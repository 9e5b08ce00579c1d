"""How often each block was called in training, and dropped: counted from the rows of draws.

A row is a pure function of (seed, step, number), so a gate need not write anything down: when a
step ends it is noted how often each was called in it, and the rows are looked at later, many at a
time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_MANY = 32  # steps, or rows, that are looked at together

RowOf = Callable[[int, int], Any]
"""The row of a step and a number."""


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
        self.counted: list[int] | None = None  # calls of the step under way that are in these
        self.rows: dict[tuple[int, int], Any] = {}  # drawn since; another schedule may hold later
        self._waiting: list[tuple[int, list[int] | None, list[int]]] = []

    def copy(self) -> Tally:
        """Another one with the same numbers."""
        twin = Tally(0)
        for name, value in vars(self).items():
            setattr(twin, name, copy.copy(value))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "rows": {}}

    def start_from(self, calls: list[int], dropped: list[float]) -> None:
        """Take over the numbers of an earlier run."""
        self.calls, self.dropped, self._waiting, self.rows = calls, dropped, [], {}

    def end_step(self, step: int, calls: list[int], row_of: RowOf) -> None:
        """Note how often each unit was called in a step that is over."""
        self._waiting.append((step, self.counted, calls))
        if len(self._waiting) >= _MANY:
            self._count(row_of)
            self.rows = {}

    def note(self, row: Any) -> bool:
        """Note a row that was drawn; returns whether it is time to count."""
        self.rows[row.step, row.number] = row
        return len(self.rows) > 2 * _MANY

    def count(self, step: int, calls: list[int], row_of: RowOf) -> None:
        """Count all calls so far, those of the step under way among them."""
        self._waiting.append((step, self.counted, calls))
        self._count(row_of)
        self.counted = calls
        self.rows = {key: row for key, row in [*self.rows.items()][-_MANY:] if key[0] == step}

    def _count(self, row_of: RowOf) -> None:
        together: list[Sequence[bool]] = []  # rows that all units were called in
        for step, before, after in self._waiting:
            first, last = max(before or (0,)), min(after, default=0)
            together += [row_of(step, number).kept for number in range(first, last)]
            if _are_equal(before or after) and _are_equal(after):
                continue
            for unit, end in enumerate(after):
                begin = before[unit] if before else 0
                apart = [*range(begin, min(first, end)), *range(max(begin, first, last), end)]
                self._add(unit, [row_of(step, number).kept[unit] for number in apart])
        for unit, kept in enumerate(zip(*together, strict=True)):
            self._add(unit, kept)
        self._waiting = []

    def _add(self, unit: int, kept: Sequence[bool]) -> None:
        self.calls[unit] += len(kept)
        self.dropped[unit] += kept.count(False)


def _are_equal(numbers: list[int]) -> bool:
    return numbers.count(numbers[0]) == len(numbers)
