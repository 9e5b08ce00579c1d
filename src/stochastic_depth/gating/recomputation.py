"""Activation checkpointing: a recomputed call sees what its forward decided, and never counts.

What is decided in a forward is written into the log of every checkpoint around it, and read from
that of the innermost one that is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from stochastic_depth.errors import RecomputationError
from stochastic_depth.torch_private.backward import Cursor, Log, checkpoints

T = TypeVar("T")


class AsPart(NamedTuple):
    """The key for what is noted for a gate as a branch's module; of a block it is the gate."""

    gate: Any
    name: str


def remembered(gate: Any, make: Callable[[], T], *, is_certain: bool = False) -> T:
    """`make()` in a forward; in a recomputation what it gave in the forward that is recomputed.

    Args:
        gate: Whose decision it is (compared by identity).
        make: Decides; counts as a call.
        is_certain: Whether it decides the same again, where the forward noted nothing.

    Raises:
        RecomputationError: The recomputation calls it more often than the forward did.
    """
    logs, recomputed = checkpoints()
    if recomputed is None or (is_certain and gate not in recomputed[0]):
        value = make()
    else:
        value = next_noted(gate, recomputed)
    note(logs, gate, value)
    return value


def note(logs: Iterable[Log], key: Any, value: Any) -> None:
    """Write a decision into the logs of the checkpoints around a call."""
    for log in logs:
        log.setdefault(key, []).append(value)


def next_noted(gate: Any, recomputed: tuple[Log, Cursor]) -> Any:
    """What the recomputed forward noted at this call of a gate.

    Raises:
        RecomputationError: It noted fewer calls.
    """
    log, cursor = recomputed
    position, decided = cursor.get(gate, 0), log.get(gate, ())
    if position >= len(decided):
        raise RecomputationError(
            f"{gate.name} is called in a recomputation more often ({position + 1}) than in the "
            f"forward that is recomputed ({len(decided)})",
            expected="a recomputation that repeats its forward",
            instead="look for control flow in the checkpointed function that depends on state",
        )
    cursor[gate] = position + 1
    return decided[position]


def recalled(gate: Any) -> tuple[bool, Any | None]:
    """What was noted for a gate whose block is not running: that is, in a recomputation.

    Returns:
        Whether a checkpoint is recomputed; and what was noted, where something was.
    """
    _, recomputed = checkpoints()
    if recomputed is None:
        return False, None
    key = AsPart(gate, gate.name)
    return True, remembered(key, lambda: None) if key in recomputed[0] else None


def noted(gate: Any) -> Iterable[Any]:
    """What the forward that is recomputed noted for a block."""
    _, recomputed = checkpoints()
    return recomputed[0].get(gate, ()) if recomputed else ()


def note_part(gate: Any, value: Any) -> None:
    """Write a decision down for a recomputation that starts inside of the block's `forward`."""
    note(checkpoints()[0], AsPart(gate, gate.name), value)
