"""Collectives inside of a branch: where ranks drop differently, some would wait for others forever.

A synchronised BatchNorm is known by its class, and refused on every rank at once. What else talks
to other ranks is noticed when it begins to, in the first call of its block that draws.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from stochastic_depth.distributed.groups import place
from stochastic_depth.errors import SetupError
from stochastic_depth.plan import Plan
from stochastic_depth.torch_private import (
    TorchDispatchMode,
    called_by_fully_shard,
    group_of_collective,
)


def synchronised(model: nn.Module, plan: Plan) -> dict[str, str]:
    """For each container whose branches hold a SyncBatchNorm, the name of one."""
    return {
        block.container: f"{name}.{inside}".removesuffix(".")
        for block, rate in zip(plan.blocks, plan.rates, strict=True)
        for branch in block.branches
        for name in branch.modules
        for inside, module in model.get_submodule(name).named_modules()
        if rate and isinstance(module, nn.SyncBatchNorm)
    }


def may_part(plan: Plan, container: str, blocks: tuple[int, ...]) -> bool:
    """Whether ranks may drop these blocks differently, so that no collective may be inside of them.

    False where they have run and talked to nobody.

    Raises:
        SetupError: There is a SyncBatchNorm inside.
    """
    dropped = any(plan.rates[block] for block in blocks)
    if container in plan.silent or not dropped or place(plan.draw.process_group)[1] == 1:
        return False
    if container in plan.synchronised:
        raise _talks(container, f'SyncBatchNorm "{plan.synchronised[container]}"')
    return True


class Refusal(TorchDispatchMode):
    """Raises where a collective begins among ranks that may drop the container differently."""

    def __init__(self, plan: Plan, container: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.container = container
        # Ranks that differ in their place in a mesh, but not in their data, draw alike.
        self.apart = set(dist.get_process_group_ranks(plan.draw.process_group or dist.group.WORLD))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        group = group_of_collective(func, args)
        met = set(dist.get_process_group_ranks(group)) & self.apart if group is not None else set()
        # A sharded block is called on every rank: its weights are gathered everywhere.
        if len(met) > 1 and not called_by_fully_shard():
            raise _talks(self.container, f"{func.overloadpacket.__name__}, a collective")
        return func(*args, **(kwargs or {}))


def _talks(container: str, what: str) -> SetupError:
    return SetupError(
        f'block "{container}" holds {what}, and ranks may drop it differently: one that runs it '
        "would wait forever for one that does not",
        expected="the same draws on every rank where they talk to each other inside of a branch",
        instead='pass mode="batch" with Draw(across_ranks="same"); or, where only ranks that train '
        "on the same data talk there, Draw(process_group=...), the group of those that do not; or "
        "leave the block out with blocks=",
    )
