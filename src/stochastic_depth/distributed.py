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
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    wrapper = "DistributedDataParallel" if inside_ddp() else inside_fsdp(module)
    if wrapper:
        raise NotYetSupportedError(
            f'block "{block}" is trained under {wrapper}, which is not yet supported',
            expected="a model on one process",
            instead="train on one process, or wait for the version that supports it",
        )
