"""The private names of torch that the library leans on, all of them, and what a lack of each means.

==============================  ====================================  ============================
name                            what for                              on a torch without it
==============================  ====================================  ============================
TorchDispatchMode               seeing every operation of a forward   import fails: no support
pytree                          leaves of nested outputs              import fails: no support
_disable_current_modes          keeping the shape look-up of a        the look-up is seen by the
                                dropped module out of user's modes    user's own dispatch modes
FakeTensorMode                  shapes of a dropped module's output   a new input shape at a
                                for inputs of a new shape             closed gate raises
_current_graph_task_id          "is a backward running?"              import fails: no support
_top/_push/_pop_saved_          the checkpoint frame of a forward     2.6 has no _top: found on the
tensors_default_hooks,          and of its recomputation              Python stack instead
_CheckpointFrame
queue_callback                  None instead of zeros for what no     import fails: no support
                                rank ran, after the reduction
_active_ddp_module              "is this DistributedDataParallel?"    training under it hangs
_orig_mod,                      gating the wrapper of a block; "did   a block that its user
_compiled_call_impl,            its user compile it?"                 compiled raises when called
_checkpoint_wrapped_module
_dynamo_marked_constant         what runs while torch.compile traces  a compiled block is traced at
                                a call, and not when it is made       every call
Unsupported, UserError,         blocks that are not one graph run     compiling them raises
FailOnRecompileLimitHit         eagerly
activation_relu_or_gelu         calling the parts of torch's own      inference under no_grad
                                encoder layer in inference, too       raises
==============================  ====================================  ============================

`tests/test_private_torch_names.py` fails loudly where one of them changed its meaning.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.checkpoint import _CheckpointFrame

Call = TypeVar("Call", bound=Callable[..., Any])

_TOP_HOOKS: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
_HOOKS_CAN_BE_READ = _TOP_HOOKS is not None

__all__ = [
    "TorchDispatchMode",
    "TreeSpec",
    "after_backward",
    "backward_is_running",
    "backward_task",
    "checkpoint_frames",
    "fake_mode",
    "inside_ddp",
    "inside_fsdp",
    "is_compiled",
    "is_wrapper",
    "left_out_of_graphs",
    "no_graph",
    "once_in_a_trace",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
    "without_fused_path",
    "without_modes",
]


def without_modes() -> Any:
    """A context in which no dispatch mode of the user's sees the operations."""
    try:
        from torch.utils._python_dispatch import _disable_current_modes
    except ImportError:
        return nullcontext()
    return _disable_current_modes()


def without_fused_path(kind: type[nn.Module]) -> dict[str, Any]:
    """What to override in a subclass, so that its modules' parts are called in inference, too.

    torch's encoder layer computes itself in one operation then, which no gate can look into; an
    encoder asks its first layer whether to prepare for that.
    """
    if not issubclass(kind, nn.TransformerEncoderLayer):
        return {}
    return {"activation_relu_or_gelu": property(lambda self: 0)}


def fake_mode() -> Any:
    """A context in which tensors have shapes but no values; real tensors may be met."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def backward_task() -> int:
    """The number of the backward pass that autograd runs in this thread just now; -1: none."""
    return int(torch._C._current_graph_task_id())


def backward_is_running() -> bool:
    """Whether autograd runs a backward pass in this thread just now."""
    return backward_task() != -1


Recomputed = tuple[Any, dict[Any, int]]


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


def is_wrapper(module: nn.Module) -> bool:
    """Whether it is what `torch.compile` or `checkpoint_wrapper` made around another module."""
    return "_orig_mod" in module._modules or "_checkpoint_wrapped_module" in module._modules


def is_compiled(module: nn.Module) -> bool:
    """Whether a call of the module runs a graph that its user had compiled."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def no_graph() -> tuple[type[Exception], ...]:
    """What torch.compile raises with `fullgraph=True` where there is no graph, or too many."""
    from torch._dynamo import exc

    too_many = getattr(exc, "FailOnRecompileLimitHit", exc.Unsupported)
    return exc.Unsupported, exc.UserError, too_many


def left_out_of_graphs(function: Call, why: str) -> Call:
    """A function that torch.compile does not look into; it tells why where it may not do so."""
    try:
        return torch.compiler.disable(function, reason=why)
    except TypeError:  # torch 2.6 takes no reason
        return torch.compiler.disable(function)


def once_in_a_trace(function: Call) -> Call:
    """Have a function run while torch.compile traces a call of it, and its result be a constant.

    As `torch.compiler.assume_constant_result`, which takes a second to import.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def inside_ddp() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward runs just now."""
    return getattr(DistributedDataParallel, "_active_ddp_module", None)


def after_backward(call: Callable[[], None]) -> None:
    """Call this at the end of the backward that runs just now, behind what is queued already."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def inside_fsdp(module: nn.Module) -> str:
    """The name of the sharding wrapper that holds the module's parameters, or ""."""
    for parameter in module.parameters():
        if hasattr(parameter, "device_mesh"):
            return "fully_shard"
        if getattr(parameter, "_is_fsdp_flattened", False):
            return "FullyShardedDataParallel"
    for handle in module.modules():
        if hasattr(handle, "_is_fsdp_managed_module"):  # both set it
            from torch.distributed.fsdp import FSDPModule

            inside = any(isinstance(part, FSDPModule) for part in module.modules())
            return "fully_shard" if inside else "fully_shard or FullyShardedDataParallel"
    return ""
