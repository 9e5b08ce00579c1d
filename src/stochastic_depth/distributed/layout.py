"""How a gated module's parameters lie over the processes, and which ways of that are refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stochastic_depth.distributed.groups import is_running
from stochastic_depth.errors import SetupError
from stochastic_depth.torch_private.processes import (
    called_by_a_pipeline,
    holds_fsdp1,
    inside_ddp,
    inside_fsdp1,
    is_fully_sharded_unit,
    is_in_parts,
    is_managed_by_fsdp,
    mesh_of,
    prefetches_explicitly,
    sharded_dtypes,
)
from stochastic_depth.torch_private.trees import tree_map


@dataclass(frozen=True)
class Layout:
    """Where a module's parameters are, as seen from its call.

    Attributes:
        sharded: They belong to a unit of `fully_shard`: the module itself, one in it or around it.
        tensor_parallel: Ranks compute parts of the same examples with them.
        ranks: Of the processes that hold a part of them each, where that can be told.
    """

    sharded: bool = False
    tensor_parallel: bool = False
    ranks: tuple[int, ...] | None = None

    @property
    def in_parts(self) -> bool:
        """Whether ranks have to run the same blocks, as each needs the others' parts."""
        return self.sharded or self.tensor_parallel


WHOLE = Layout()  # each process has all of them


def layout_of(module: nn.Module, name: str) -> Layout:
    """How the module's parameters lie over the processes.

    Raises:
        SetupError: They lie in a way that cannot be served.
    """
    if any(hasattr(p, "ds_id") for p in module.parameters()):
        raise _refused(name, "DeepSpeed's ZeRO-3", _SHARD)
    if inside_fsdp1(module):
        raise _refused(name, "FullyShardedDataParallel (FSDP1)", _SHARD)
    if called_by_a_pipeline():
        raise _refused(name, "a pipeline of torch.distributed.pipelining", _PIPELINE)
    sharded = is_managed_by_fsdp(module) or any(map(is_fully_sharded_unit, module.modules()))
    ranks, dims = mesh_of(module)
    return Layout(sharded, dims > sharded, ranks)


def refuse_wrappers(model: nn.Module) -> None:
    """Raises where a model is wrapped, or holds something, that cannot be served."""
    if isinstance(model, nn.DataParallel):
        raise _refused("", "torch.nn.DataParallel", _DATA_PARALLEL)
    if holds_fsdp1(model):
        raise _refused("", "FullyShardedDataParallel (FSDP1)", _SHARD)
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise _refused("", "DeepSpeed's ZeRO-3", _SHARD)
    if is_in_parts(model):
        raise SetupError(
            f"the weights of {type(model).__name__} lie in parts on several processes "
            "(fully_shard, or tensor parallel)",
            expected="the model before it is taken apart; it may be on the meta device",
            instead="apply stochastic depth first, then fully_shard or parallelize_module",
        )


def refuse_replica(module: nn.Module, name: str) -> None:
    """Raises where the module is a replica of `torch.nn.DataParallel`."""
    if module.__dict__.get("_is_replica"):
        raise _refused(name, "torch.nn.DataParallel", _DATA_PARALLEL)


def refuse_explicit_prefetch(unit: nn.Module, name: str) -> None:
    """Raises where units of `fully_shard` list others to prefetch.

    A skipped block would be gathered all the same, and what was gathered would lie there until its
    next call, with weights that may have changed meanwhile.
    """
    if is_fully_sharded_unit(unit) and prefetches_explicitly(unit):
        raise SetupError(
            f'block "{name}" is sharded with explicit lists of units to prefetch '
            "(set_modules_to_forward_prefetch, set_modules_to_backward_prefetch)",
            expected="the implicit prefetching of fully_shard, which skipped blocks do not disturb",
            instead="leave set_modules_to_forward_prefetch and set_modules_to_backward_prefetch "
            "out; implicit prefetching works",
        )


def wrapper_of(block: str) -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward runs just now.

    Raises:
        SetupError: Its graph is static.
    """
    wrapper = inside_ddp() if is_running() else None
    if wrapper is not None and wrapper.static_graph:
        raise SetupError(
            f'block "{block}" is trained under DistributedDataParallel(static_graph=True)',
            expected="a wrapper that does not take the first step's graph for that of every step: "
            "stochastic depth changes it, and the gradients would silently be wrong",
            instead="leave static_graph=True out; find_unused_parameters is not needed either",
        )
    return wrapper


def as_unit_would(module: nn.Module, value: Any) -> Any:
    """What a skipped block hands on, as if it had been called.

    A unit casts its inputs and outputs. Where the unit lies around the block, its hooks want no
    view of its own input for an output.
    """
    if not is_fully_sharded_unit(module):
        return tree_map(_no_view, value)
    for dtype in sharded_dtypes(module):
        if dtype is not None:
            value = tree_map(lambda x, to=dtype: _cast(x, to), value)
    return value


def _no_view(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value._is_view() else value


def _cast(value: Any, dtype: Any) -> Any:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if is_float else value


_DATA_PARALLEL = "use DistributedDataParallel, on one device, too: torchrun --nproc-per-node N"
_SHARD = "shard with torch.distributed.fsdp.fully_shard, or use DistributedDataParallel"
_PIPELINE = "train each stage's blocks under DistributedDataParallel or fully_shard, without stages"


def _refused(name: str, kind: str, instead: str) -> SetupError:
    what = f'block "{name}"' if name else "the model"
    return SetupError(
        f"{what} is trained under {kind}, where blocks cannot be skipped exactly",
        expected="one process, DistributedDataParallel, fully_shard or tensor parallel",
        instead=instead,
    )
