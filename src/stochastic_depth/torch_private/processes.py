"""What several processes train: DistributedDataParallel, FSDP, distributed tensors."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stochastic_depth.errors import SetupError

TAKES_THE_OUTPUT = "_post_forward"
"""The method by which a DistributedDataParallel takes the output of its module's forward."""

_MANAGED = "_is_fsdp_managed_module"


def inside_ddp() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward runs just now."""
    wrapper: DistributedDataParallel | None = known(DistributedDataParallel, "_active_ddp_module")
    return wrapper


def ranks_that_talk(operation: Any, args: tuple[Any, ...]) -> tuple[int, ...] | None:
    """The ranks among which an operation is a collective; None where it is none."""
    if operation.namespace not in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
        return None
    processes: Any = torch.distributed.distributed_c10d
    for argument, group in zip(operation._schema.arguments, args, strict=False):
        if argument.name == "group_name":
            group = processes._resolve_process_group(group)
        elif argument.name != "process_group":
            continue
        elif not isinstance(group, processes.ProcessGroup):
            group = processes.ProcessGroup.unbox(group)
        return tuple(processes.get_process_group_ranks(group))
    return None


def is_fully_sharded_unit(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on it."""
    sharded = sys.modules.get("torch.distributed.fsdp")  # importing it takes seconds
    return sharded is not None and isinstance(module, sharded.FSDPModule)


def is_managed_by_fsdp(module: nn.Module) -> bool:
    """Whether parameters of it belong to a unit of `fully_shard`, or of FSDP1."""
    return any(
        known(part, _MANAGED) if is_fully_sharded_unit(part) else part.__dict__.get(_MANAGED)
        for part in module.modules()
    )


def is_in_fsdp1(module: nn.Module) -> bool:
    """Whether it is a FullyShardedDataParallel, holds one, or lies in one."""
    parameters = list(module.parameters())
    if any(hasattr(parameter, "_fsdp_flattened") for parameter in parameters):
        return True
    # While its forward runs they are plain tensors, or not even listed.
    listed = bool(parameters) and all(isinstance(p, nn.Parameter) for p in parameters)
    return is_managed_by_fsdp(module) and not listed


def is_part(tensor: Any) -> bool:
    """Whether this process holds a part of it alone."""
    return hasattr(tensor, "device_mesh")


def is_in_parts(model: nn.Module) -> bool:
    """Whether this process holds a part of its weights: `fully_shard`, or tensor parallel."""
    return any(map(is_fully_sharded_unit, model.modules())) or any(map(is_part, model.parameters()))


def mesh_of(module: nn.Module) -> tuple[tuple[int, ...] | None, int]:
    """The ranks that hold a part of its parameters each, and along how many dimensions of a mesh.

    None and 0 where they are no distributed tensors.
    """
    parts: list[Any] = [parameter for parameter in module.parameters() if is_part(parameter)]
    if not parts:
        return None, 0
    ranks = tuple(sorted(parts[-1].device_mesh.mesh.flatten().tolist()))
    return ranks, max(sum(dim.is_shard() for dim in part.placements) for part in parts)


def is_in_a_pipeline() -> bool:
    """Whether it is a stage of a pipeline that runs just now."""
    frame: Any = None
    if "torch.distributed.pipelining.stage" in sys.modules:
        frame = sys._getframe(1)
    while frame is not None and "distributed/pipelining" not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None


def is_made_up_step() -> bool:
    """Whether torch steps an optimizer just now to have it make its state, without gradients."""
    frame: Any = None
    if "torch.distributed.checkpoint.state_dict" in sys.modules:
        frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "_init_optim_state":
        frame = frame.f_back
    return frame is not None


def is_inner_step(optimizer: Any) -> bool:
    """Whether this step is one that the `step` of a subclass calls: torch runs hooks in both.

    Called by such a hook.
    """
    steps = [vars(kind)["step"] for kind in type(optimizer).__mro__ if "step" in vars(kind)]
    if sum(hasattr(step, "hooked") for step in steps) < 2:
        return False
    calls_hooks = sys._getframe(2)
    frame, code = calls_hooks.f_back, calls_hooks.f_code
    while frame and not (frame.f_code is code and frame.f_locals.get("self") is optimizer):
        frame = frame.f_back
    return frame is not None


def sharded_dtypes(module: nn.Module) -> tuple[torch.dtype | None, torch.dtype | None]:
    """What a unit of `fully_shard` casts the inputs of its module to, and its outputs."""
    policy = known(known(module, "_get_fsdp_state")(), "_mp_policy")
    inputs = policy.param_dtype if policy.cast_forward_inputs else None
    return inputs, policy.output_dtype


def prefetches_explicitly(unit: nn.Module) -> bool:
    """Whether any unit of the model around this one lists others to prefetch."""
    states = known(known(known(unit, "_get_fsdp_state")(), "_state_ctx"), "all_states")
    ways = ("_states_to_forward_prefetch", "_states_to_backward_prefetch")
    return any(known(state, way) for state in states for way in ways)


def known(owner: Any, name: str) -> Any:
    """An attribute that some torch may not have.

    Raises:
        SetupError: This one has not.
    """
    try:
        return getattr(owner, name)
    except AttributeError as error:
        kind = owner if isinstance(owner, type) else type(owner)
        raise SetupError(
            f"{kind.__name__} has no {name} in torch {torch.__version__}",
            expected="a torch in which it can be told how several processes train a block",
            instead="use another version of torch, or train on one process",
        ) from error
