"""The backward that runs just now, and the checkpoints of a forward and its recomputation."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch._C import _autograd
from torch.autograd.function import FunctionCtx
from torch.utils.checkpoint import _CheckpointFrame

HOOKS_CAN_BE_READ = hasattr(_autograd, "_top_saved_tensors_default_hooks")  # not in torch 2.6

# A log that lives as long as a checkpoint, and (in its recomputation) how far it was read.
Log = dict[Any, list[Any]]
Cursor = dict[Any, int]
Checkpoints = tuple[tuple[Log, ...], tuple[Log, Cursor] | None]

NO_CHECKPOINTS: Checkpoints = (), None
_FOUND, _LOG = "_stochastic_depth_found", "_stochastic_depth"
NOT_REENTRANT = object()  # a key in the cursors of such checkpoints

top_hooks: Callable[[bool], Any] = getattr(
    _autograd, "_top_saved_tensors_default_hooks", lambda _: ()
)
"""The hooks on saved tensors that are in force, or None.

Where they cannot be read something else than None, so that who looks closer is asked.
"""

backward_task: Callable[[], int] = torch._C._current_graph_task_id
"""The number of the backward pass that autograd runs in this thread just now; -1: none."""


def after_backward(call: Callable[[], None]) -> None:
    """Call this at the end of the backward that runs just now, behind what is queued already."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def checkpoints() -> Checkpoints:
    """The checkpoints around this call.

    Returns:
        The logs of those whose forward runs, innermost first; and the log of the innermost one that
        is recomputed, with the cursor of this recomputation.
    """
    logs, recomputed = of_hooks(top_hooks(False)) if HOOKS_CAN_BE_READ else NO_CHECKPOINTS  # noqa: FBT003
    may_be_called = not HOOKS_CAN_BE_READ or backward_task() != -1 or not torch.is_grad_enabled()
    if recomputed is None and may_be_called:
        more, recomputed = _of_callers()
        logs += more
    return logs, recomputed


def of_hooks(top: Any) -> Checkpoints:
    """The non-reentrant checkpoints around this call.

    Each has put its hooks on saved tensors in force. Those of a forward and of its recomputation
    refer to the same frame.

    Args:
        top: The hooks that were put in force last.
    """
    if top is None:
        return NO_CHECKPOINTS
    pack = getattr(top[0], "_torchdynamo_orig_callable", top[0])
    found: Checkpoints | None = getattr(pack, _FOUND, None)
    if found is not None:  # what lies below a checkpoint's own hooks stays there
        return found
    log: Log | None = None
    for cell in getattr(pack, "__closure__", None) or ():
        is_recomputed = isinstance(cell.cell_contents, weakref.ref)
        frame = cell.cell_contents() if is_recomputed else cell.cell_contents
        if isinstance(frame, _CheckpointFrame):
            log = _kept(frame, _LOG)
            found = ((), (log, {NOT_REENTRANT: 1})) if is_recomputed else None
            break
    if found is None:  # only the top of the stack can be read: what is below, by lifting it off
        _autograd._pop_saved_tensors_default_hooks()
        try:
            found = of_hooks(top_hooks(False))  # noqa: FBT003
        finally:
            _autograd._push_saved_tensors_default_hooks(*top)
        if log is None:
            return found
        found = (log, *found[0]), found[1]
    setattr(pack, _FOUND, found)
    return found


def _of_callers() -> Checkpoints:
    """The reentrant checkpoints around this call, found among its callers.

    Forward and recomputation are those of one `autograd.Function`, and share its context. In torch
    2.6, whose hooks cannot be read, the non-reentrant checkpoints are found in the same way.
    """
    logs: tuple[Log, ...] = ()
    caller: FrameType | None = sys._getframe(1)
    while caller is not None:
        code = caller.f_code
        if code.co_name in ("forward", "backward") and code.co_argcount:
            context = caller.f_locals.get(code.co_varnames[0])
            if isinstance(context, FunctionCtx):
                if code.co_name == "backward":
                    return logs, (_kept(context, _LOG), _kept(context, f"_{backward_task()}"))
                logs += (_kept(context, _LOG),)
        elif not HOOKS_CAN_BE_READ and code.co_filename == torch.utils.checkpoint.__file__:
            data = caller.f_locals
            if code.co_name == "checkpoint" and "gen" in data:
                logs += (_kept(data["gen"].gi_frame.f_locals["new_frame"], _LOG),)
            elif code.co_name == "unpack_hook" and "frame" in data:
                cursor = _kept(data["frame"], f"_{data['gid']}")
                cursor[NOT_REENTRANT] = 1
                return logs, (_kept(data["frame"], _LOG), cursor)
        caller = caller.f_back
    return logs, None


def _kept(holder: Any, key: str) -> Any:
    """A dictionary that lives as long as this object."""
    # Not by `__dict__`: Python would give the object a real one, which makes it slow for torch.
    if not hasattr(holder, key):
        setattr(holder, key, {})
    return getattr(holder, key)
