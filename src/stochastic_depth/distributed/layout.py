"""How a gated module's parameters lie over the processes, and which ways of that are refused."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stochastic_depth.distributed.groups import is_running
from stochastic_depth.errors import SetupError
from stochastic_depth.torch_private import (
    called_by_a_pipeline,
    holds_fsdp1,
    inside_ddp,
    inside_fsdp1,
    is_fully_sharded_unit,
    is_managed_by_fsdp,
    mesh_of,
)


@dataclass(frozen=True)
class Layout:
    """Where a module's parameters are, as seen from its call.

    Attributes:
        sharded: They belong to a unit of `fully_shard`: the module itself, one in it or around it.
        unit: The module is such a unit, or holds one: its call gathers them.
        inner_units: The names of units inside of it.
        tensor_parallel: Ranks compute parts of the same examples with them.
        ranks: Of the processes that hold a part of them each, where that can be told.
    """

    sharded: bool = False
    unit: bool = False
    inner_units: tuple[str, ...] = ()
    tensor_parallel: bool = False
    ranks: tuple[int, ...] | None = None

    @property
    def in_parts(self) -> bool:
        """Whether ranks have to run the same blocks, as each needs the others' parts."""
        return self.sharded or self.tensor_parallel


WHOLE = Layout()  # each process has all of them


def layout_of(module: nn.Module, name: str) -> Layout:
    """How the module's parameters lie over the processes.

    Args:
        module: The module that is called.
        name: Its name.

    Raises:
        SetupError: They lie in a way that cannot be served.
    """
    if module.__dict__.get("_is_replica"):
        raise _refused(name, "torch.nn.DataParallel", _DATA_PARALLEL)
    if not is_running():
        return WHOLE
    if any(hasattr(p, "ds_id") for p in module.parameters()):
        raise _refused(name, "DeepSpeed's ZeRO-3", _SHARD)
    if inside_fsdp1(module):
        raise _refused(name, "FullyShardedDataParallel (FSDP1)", _SHARD)
    if called_by_a_pipeline():
        raise _refused(name, "a pipeline of torch.distributed.pipelining", _PIPELINE)
    inner = tuple(
        n
        for n, part in module.named_modules()
        if part is not module and is_fully_sharded_unit(part)
    )
    unit = is_fully_sharded_unit(module) or bool(inner)
    sharded = unit or is_managed_by_fsdp(module)
    ranks, dims = mesh_of(module)
    return Layout(sharded, unit, inner, tensor_parallel=dims > sharded, ranks=ranks)


def refuse_wrappers(model: nn.Module) -> None:
    """Raises where a model is wrapped, or holds something, that cannot be served."""
    if isinstance(model, nn.DataParallel):
        raise _refused("", "torch.nn.DataParallel", _DATA_PARALLEL)
    if holds_fsdp1(model):
        raise _refused("", "FullyShardedDataParallel (FSDP1)", _SHARD)
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise _refused("", "DeepSpeed's ZeRO-3", _SHARD)


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
