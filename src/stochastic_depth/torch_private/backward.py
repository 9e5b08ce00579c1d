"""The backward that runs just now, and the checkpoints of a forward and its recomputation."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch.utils.checkpoint import _CheckpointFrame

_TOP_HOOKS: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
_HOOKS_CAN_BE_READ = _TOP_HOOKS is not None

Recomputed = tuple[Any, dict[Any, int]]


def backward_task() -> int:
    """The number of the backward pass that autograd runs in this thread just now; -1: none."""
    return int(torch._C._current_graph_task_id())


def backward_is_running() -> bool:
    """Whether autograd runs a backward pass in this thread just now."""
    return backward_task() != -1


def after_backward(call: Callable[[], None]) -> None:
    """Call this at the end of the backward that runs just now, behind what is queued already."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def checkpoint_frames() -> tuple[list[Any], Recomputed | None]:
    """The non-reentrant checkpoint frames around this call.

    Returns:
        The frames whose forward runs; and the innermost one that is recomputed, with a dictionary
        that lives as long as this recomputation does.
    """
    if not _HOOKS_CAN_BE_READ:
        return _frames_of_callers()
    if _TOP_HOOKS(False) is None:  # noqa: FBT003  (at every call of a gate, so first)
        return [], None
    return _frames_of_hooks()


def _frames_of_hooks() -> tuple[list[Any], Recomputed | None]:
    forward: list[Any] = []
    for pack in _saved_tensor_hooks():
        pack = getattr(pack, "_torchdynamo_orig_callable", pack)
        for cell in getattr(pack, "__closure__", None) or ():
            held = cell.cell_contents
            if isinstance(held, _CheckpointFrame):
                forward.append(held)
            elif isinstance(held, weakref.ref) and isinstance(held(), _CheckpointFrame):
                return forward, (held(), pack.__dict__.setdefault("_stochastic_depth", {}))
    return forward, None


def _frames_of_callers() -> tuple[list[Any], Recomputed | None]:
    """The same for torch 2.6, whose hooks cannot be read: from the Python frames of the callers."""
    forward: list[Any] = []
    caller: FrameType | None = sys._getframe(1)
    while caller is not None:
        if caller.f_code.co_filename == torch.utils.checkpoint.__file__:
            held = caller.f_locals
            if caller.f_code.co_name == "checkpoint" and "gen" in held:
                forward.append(held["gen"].gi_frame.f_locals["new_frame"])
            elif caller.f_code.co_name == "unpack_hook" and "frame" in held:
                cursors = held["frame"].__dict__.setdefault("_stochastic_depth_cursors", {})
                return forward, (held["frame"], cursors.setdefault(held["gid"], {}))
        caller = caller.f_back
    return forward, None


def _saved_tensor_hooks() -> list[Any]:
    """The pack hooks in force, innermost first.

    Only the top of the stack can be read, so the ones below are read by lifting it off.
    """
    top = _TOP_HOOKS(False)  # noqa: FBT003
    if top is None:
        return []
    with _lifted(top):
        return [top[0], *_saved_tensor_hooks()]


@contextmanager
def _lifted(hooks: tuple[Any, Any]) -> Iterator[None]:
    torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        torch._C._autograd._push_saved_tensors_default_hooks(*hooks)
