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
from torch.autograd.function import FunctionCtx
from torch.utils.checkpoint import _CheckpointFrame

_TOP_HOOKS: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
HOOKS_CAN_BE_READ = _TOP_HOOKS is not None  # not in torch 2.6

# A log that lives as long as a checkpoint, and (in its recomputation) how far it was read.
Log = dict[Any, list[Any]]
Cursor = dict[Any, int]


top_hooks: Callable[[bool], Any] = _TOP_HOOKS if HOOKS_CAN_BE_READ else lambda _: ()
"""The hooks on saved tensors that are in force, or None.

Where they cannot be read something else than None, so that who looks closer is asked.
"""

backward_task: Callable[[], int] = torch._C._current_graph_task_id
"""The number of the backward pass that autograd runs in this thread just now; -1: none."""


def after_backward(call: Callable[[], None]) -> None:
    """Call this at the end of the backward that runs just now, behind what is queued already."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def checkpoints() -> tuple[list[Log], tuple[Log, Cursor] | None]:
    """The checkpoints around this call.

    Returns:
        The logs of those whose forward runs; and the log of the innermost one that is recomputed,
        with the cursor of this recomputation.
    """
    logs, recomputed = _non_reentrant()
    if recomputed is None and (backward_task() != -1 or not torch.is_grad_enabled()):
        more, recomputed = _reentrant()
        logs += more
    return logs, recomputed


def _log(holder: Any) -> Log:
    log: Log = holder.__dict__.setdefault("_stochastic_depth", {})
    return log


def _cursor(holder: Any, key: str = "_stochastic_depth_cursor") -> Cursor:
    cursor: Cursor = holder.__dict__.setdefault(key, {})
    return cursor


def _non_reentrant() -> tuple[list[Log], tuple[Log, Cursor] | None]:
    """Forward and recomputation share a frame, which the hooks on saved tensors hold."""
    if not HOOKS_CAN_BE_READ:
        return _frames_of_callers()
    logs: list[Log] = []
    for pack in _saved_tensor_hooks():
        pack = getattr(pack, "_torchdynamo_orig_callable", pack)
        for cell in getattr(pack, "__closure__", None) or ():
            held = cell.cell_contents
            if isinstance(held, _CheckpointFrame):
                logs.append(_log(held))
            elif isinstance(held, weakref.ref) and isinstance(held(), _CheckpointFrame):
                return logs, (_log(held()), _cursor(pack))
    return logs, None


def _frames_of_callers() -> tuple[list[Log], tuple[Log, Cursor] | None]:
    """The same for torch 2.6, whose hooks cannot be read: from the Python frames of the callers."""
    logs: list[Log] = []
    for caller in _callers():
        if caller.f_code.co_filename == torch.utils.checkpoint.__file__:
            held = caller.f_locals
            if caller.f_code.co_name == "checkpoint" and "gen" in held:
                logs.append(_log(held["gen"].gi_frame.f_locals["new_frame"]))
            elif caller.f_code.co_name == "unpack_hook" and "frame" in held:
                return logs, (_log(held["frame"]), _cursor(held["frame"], f"_{held['gid']}"))
    return logs, None


def _reentrant() -> tuple[list[Log], tuple[Log, Cursor] | None]:
    """Forward and recomputation are those of one `autograd.Function`, and share its context."""
    logs: list[Log] = []
    for caller in _callers():
        name = caller.f_code.co_name
        if name in ("forward", "backward") and caller.f_code.co_argcount:
            context = caller.f_locals.get(caller.f_code.co_varnames[0])
            if isinstance(context, FunctionCtx):
                if name == "backward":
                    cursor = _cursor(context, f"_{backward_task()}")
                    return logs, (_log(context), cursor)
                logs.append(_log(context))
    return logs, None


def _callers() -> Iterator[FrameType]:
    caller: FrameType | None = sys._getframe(1)
    while caller is not None:
        yield caller
        caller = caller.f_back


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
