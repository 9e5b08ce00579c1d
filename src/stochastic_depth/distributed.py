"""What DistributedDataParallel and FullyShardedDataParallel need of a skipped block.

Not yet supported: a skipped block's gradients would be missing from the reduction, so training
under either is refused at the first forward.
"""

from __future__ import annotations

import torch.distributed
from torch import nn

from stochastic_depth.errors import NotYetSupportedError
from stochastic_depth.torch_private import inside_ddp, inside_fsdp


def refuse(block: str, module: nn.Module) -> None:
    """Raises where the block is trained under a wrapper that is not yet supported."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if inside_ddp():
            raise _not_yet(f'block "{block}"', "DistributedDataParallel")
        refuse_sharded(module, block)


def refuse_sharded(module: nn.Module, block: str = "") -> None:
    """Raises where the module's parameters are sharded."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        wrapper = inside_fsdp(module)
        if wrapper:
            raise _not_yet(f'block "{block}"' if block else type(module).__name__, wrapper)


def _not_yet(what: str, wrapper: str) -> NotYetSupportedError:
    return NotYetSupportedError(
        f"{what} is trained under {wrapper}, which is not yet supported",
        expected="a model on one process",
        instead="train on one process, or wait for the version that supports it",
    )
