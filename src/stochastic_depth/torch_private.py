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
_is_fsdp_managed_module,        telling who holds a module's          a block whose unit lies around
_fsdp_flattened                 parameters                            it is taken for whole: hangs
_get_fsdp_state, _state_ctx,    what fully_shard casts, and what it   a skipped block's input keeps
_mp_policy, _states_to_*_       prefetches by explicit lists          its dtype; such lists gather
prefetch, _post_forward_indices                                       skipped blocks
_orig_mod,                      gating the wrapper of a block; "did   a block that its user
_compiled_call_impl,            its user compile it?"                 compiled raises when called
_checkpoint_wrapped_module
_dynamo_marked_constant         what runs while torch.compile traces  a compiled block is traced at
                                a call, and not when it is made       every call
Unsupported, UserError,         blocks that are not one graph run     compiling them raises
FailOnRecompileLimitHit         eagerly
activation_relu_or_gelu         calling the parts of torch's own      inference under no_grad
                                encoder layer in inference, too       raises
ProcessGroup.unbox,             among which ranks a collective is,    a collective in a branch is
_resolve_process_group          seen as an operation                  not refused, and may hang
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
    "awaits_backward",
    "backward_is_running",
    "backward_task",
    "called_by_fully_shard",
    "checkpoint_frames",
    "fake_mode",
    "group_of_collective",
    "holds_fsdp1",
    "inside_ddp",
    "inside_fsdp1",
    "is_compiled",
    "is_fully_sharded_unit",
    "is_managed_by_fsdp",
    "is_marked_by_fsdp",
    "is_wrapper",
    "left_out_of_graphs",
    "mesh_of",
    "modules_of_unit",
    "no_graph",
    "once_in_a_trace",
    "prefetched_by",
    "set_prefetched",
    "sharded_dtypes",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
    "without_fused_path",
    "without_modes",
    "without_sharding",
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


def group_of_collective(operation: Any, args: tuple[Any, ...]) -> Any:
    """The process group that an operation talks to; None where it talks to nobody."""
    if operation.namespace not in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
        return None
    processes: Any = torch.distributed.distributed_c10d
    for argument, given in zip(operation._schema.arguments, args, strict=False):
        if argument.name == "group_name":
            return processes._resolve_process_group(given)
        if argument.name == "process_group":
            kind = processes.ProcessGroup
            return given if isinstance(given, kind) else kind.unbox(given)
    return None


def is_fully_sharded_unit(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on it."""
    sharded = sys.modules.get("torch.distributed.fsdp")  # importing it takes seconds
    return sharded is not None and isinstance(module, sharded.FSDPModule)


def is_managed_by_fsdp(module: nn.Module) -> bool:
    """Whether its parameters belong to a unit of `fully_shard`, or of FSDP1."""
    return any(map(is_marked_by_fsdp, module.modules()))


def is_marked_by_fsdp(module: nn.Module) -> bool:
    """Whether parameters of its own, if it has any, would belong to such a unit."""
    return bool(module.__dict__.get("_is_fsdp_managed_module"))


def inside_fsdp1(module: nn.Module) -> bool:
    """Whether a FullyShardedDataParallel around it or in it holds its parameters."""
    parameters = list(module.parameters())
    if any(getattr(parameter, "_fsdp_flattened", False) for parameter in parameters):
        return True
    # While its forward runs they are plain tensors, or not even listed.
    listed = bool(parameters) and all(isinstance(p, nn.Parameter) for p in parameters)
    return is_managed_by_fsdp(module) and not listed


def holds_fsdp1(model: nn.Module) -> bool:
    """Whether it is, holds or lies in a FullyShardedDataParallel, told while no forward runs."""
    named = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    in_parts = any(hasattr(parameter, "device_mesh") for parameter in model.parameters())
    units = any(map(is_fully_sharded_unit, model.modules()))
    return named or (is_managed_by_fsdp(model) and not in_parts and not units)


def mesh_of(module: nn.Module) -> tuple[tuple[int, ...] | None, int]:
    """The ranks that hold a part of its parameters each, and along how many dimensions of a mesh.

    None and 0 where they are no distributed tensors.
    """
    ranks, dims = None, 0
    for parameter in module.parameters():
        if hasattr(parameter, "device_mesh"):
            ranks = tuple(sorted(parameter.device_mesh.mesh.flatten().tolist()))
            shards = [p for p in getattr(parameter, "placements", ()) if p.is_shard()]
            dims = max(dims, len(shards))
    return ranks, dims


def called_by_fully_shard() -> bool:
    """Whether it is a hook of `fully_shard` that runs just now."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if "_fully_shard" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def sharded_dtypes(module: nn.Module) -> tuple[torch.dtype | None, torch.dtype | None]:
    """What a unit of `fully_shard` casts the inputs of its module to, and its outputs."""
    policy = _sharding_state(module)._mp_policy
    inputs = policy.param_dtype if policy.cast_forward_inputs else None
    return inputs, policy.output_dtype


def set_prefetched(unit: nn.Module, forward: Any, backward: Any) -> None:
    """Replace the lists of units that a unit of `fully_shard` prefetches, in its whole model.

    Args:
        unit: Any unit.
        forward: Makes a new list of the old one.
        backward: The same for the backward.
    """
    for state in _sharding_state(unit)._state_ctx.all_states:
        state._states_to_forward_prefetch = forward(state._states_to_forward_prefetch)
        state._states_to_backward_prefetch = backward(state._states_to_backward_prefetch)


def prefetched_by(state: Any, *, forward: bool) -> list[Any]:
    """The states of the units that a unit prefetches."""
    name = "_states_to_forward_prefetch" if forward else "_states_to_backward_prefetch"
    found: list[Any] = getattr(state, name)
    return found


def modules_of_unit(state: Any) -> tuple[nn.Module, ...]:
    """The modules that a unit of `fully_shard` was made of."""
    modules: tuple[nn.Module, ...] = state._modules
    return modules


def awaits_backward(state: Any) -> bool:
    """Whether a unit ran in a forward whose backward is not over."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # torch before 2.11 has one for each unit
        groups = [state._fsdp_param_group]
    return any(group is not None and group._post_forward_indices for group in groups)


def _sharding_state(module: nn.Module) -> Any:
    return module._get_fsdp_state()  # type: ignore[operator]


def without_sharding(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a module before `fully_shard` put its own over it."""
    sharded = sys.modules.get("torch.distributed.fsdp")
    if sharded is None or not issubclass(kind, sharded.FSDPModule):
        return kind
    place = kind.__mro__.index(sharded.FSDPModule)
    return kind.__mro__[place + 1]
