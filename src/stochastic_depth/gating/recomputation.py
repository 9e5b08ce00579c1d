"""Activation checkpointing: a recomputed call sees what its forward decided, and never counts.

A non-reentrant checkpoint leaves a frame that forward and recomputation share: decisions are
written on every frame that is open in the forward, and read from the innermost frame that is
recomputed. A reentrant checkpoint leaves no trace; there the decision of the one forward that is
outstanding is taken, and where there are several, nobody can know.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from stochastic_depth.errors import RecomputationError
from stochastic_depth.torch_private import backward_is_running, checkpoint_frames

T = TypeVar("T")

_outstanding: weakref.WeakKeyDictionary[Any, Outstanding] = weakref.WeakKeyDictionary()


@dataclass
class Outstanding:
    """What was decided in forwards without gradients that may be recomputed later."""

    values: list[Any]  # of a container one, of a member one for each of its calls in that
    forward: Any
    step: int
    count: int = 1
    replayed: int = 0


def remembered(gate: Any, make: Callable[[], T], *, may_recompute: bool) -> T:
    """`make()` in a forward; in a recomputation what it gave in the forward that is recomputed.

    Args:
        gate: Whose decision it is (compared by identity).
        make: Decides; counts as a call.
        may_recompute: Whether a call without gradients may be the forward of a reentrant
            checkpoint: a training call.

    Raises:
        RecomputationError: Several forwards through a reentrant checkpoint wait for their
            backward.
    """
    forward_frames, recomputed = checkpoint_frames()
    if recomputed is not None:
        value = _replay(gate, *recomputed)
    elif backward_is_running() and gate in _outstanding:
        value = _the_outstanding(gate)
    else:
        value = make()
        if may_recompute and not torch.is_grad_enabled():
            _note(gate, value, value)
    for frame in forward_frames:
        _log(frame).setdefault(gate, []).append(value)
    return value


def recall(gate: Any) -> tuple[bool, Any | None]:
    """What was noted for a gate whose container is not running: that is, in a recomputation.

    Returns:
        Whether a non-reentrant checkpoint is recomputed; and what was noted, where something was.
    """
    forward_frames, recomputed = checkpoint_frames()
    if recomputed is not None:
        if gate not in _log(recomputed[0]):
            return True, None
        value = _replay(gate, *recomputed)
    elif backward_is_running() and gate in _outstanding:
        value = _the_outstanding(gate)
    else:
        return False, None
    for frame in forward_frames:
        _log(frame).setdefault(gate, []).append(value)
    return recomputed is not None, value


def note(gate: Any, value: Any, forward: Any, *, may_recompute: bool) -> None:
    """Write a decision down for a recomputation that starts inside of the container's `forward`."""
    for frame in checkpoint_frames()[0]:
        _log(frame).setdefault(gate, []).append(value)
    if may_recompute and not torch.is_grad_enabled() and not backward_is_running():
        _note(gate, value, forward)


def _log(frame: Any) -> dict[Any, list[Any]]:
    """The decisions on a frame; they live as long as the frame does."""
    log: dict[Any, list[Any]] = frame.__dict__.setdefault("_stochastic_depth", {})
    return log


def _replay(gate: Any, frame: Any, cursor: dict[Any, int]) -> Any:
    position = cursor.get(gate, 0)
    decided = _log(frame).get(gate, [])
    if position >= len(decided):
        raise RecomputationError(
            f"{gate.name} is called in a recomputation more often ({position + 1}) than in the "
            f"forward that is recomputed ({len(decided)})",
            expected="a recomputation that repeats its forward",
            instead="look for control flow in the checkpointed function that depends on state",
        )
    cursor[gate] = position + 1
    return decided[position]


def _note(gate: Any, value: Any, forward: Any) -> None:
    known, step = _outstanding.get(gate), gate.plan.clock.step
    if known is None or known.replayed or known.step != step:
        _outstanding[gate] = Outstanding([value], forward, step)
    elif known.forward is forward:
        known.values.append(value)
    else:
        known.values, known.forward, known.count = [value], forward, known.count + 1


def _the_outstanding(gate: Any) -> Any:
    known = _outstanding[gate]
    # With one draw for a whole step any of its forwards will do.
    if known.count > 1 and gate.plan.draw.redraw == "forward":
        raise RecomputationError(
            f"{gate.name} is recomputed by a reentrant checkpoint while {known.count} forwards "
            "through it wait for their backward; which of them this is cannot be known",
            expected="one forward for each backward",
            instead="use torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or "
            'sd.Draw(redraw="step"), where all forwards of a step drop the same blocks',
        )
    value = known.values[known.replayed % len(known.values)]
    known.replayed += 1
    return value
