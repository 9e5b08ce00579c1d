"""The ways in which others drop single examples, put on a network block by block.

timm's drop path and torchvision's operation compute every branch for all rows and mask it. DINOv2's
way, written after its description, runs a branch on a random subset of a fixed number of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import stochastic_depth as sd

TIMM, TORCHVISION, DINO = "timm's drop path", "torchvision's op", "DINOv2's way"


def drop_rows(model: nn.Module, depth: sd.StochasticDepth, way: str) -> None:
    """Have a plain model drop rows at the rates that another one is gated with."""
    for block in depth.blocks:
        module: Any = model.get_submodule(block.name)
        if way == TIMM:
            _with_timm(module, block.drop_rate)
        elif way == TORCHVISION:
            _with_torchvision(module, block.drop_rate)
        else:
            module.forward = partial(_dino_block, module, block.drop_rate)


def _with_timm(block: Any, rate: float) -> None:
    from timm.layers.drop import DropPath

    for name in ("drop_path", "drop_path1", "drop_path2"):
        if hasattr(block, name):
            setattr(block, name, DropPath(rate))


def _with_torchvision(block: Any, rate: float) -> None:
    from torchvision.ops import stochastic_depth

    def mask(module: nn.Module, args: Any, output: Tensor) -> Any:
        return stochastic_depth(output, rate, "row", training=True)

    block.bn3.register_forward_hook(mask)


def _dino_block(block: Any, rate: float, x: Tensor) -> Tensor:
    x = _dino_branch(x, lambda y: block.ls1(block.attn(block.norm1(y))), rate)
    return _dino_branch(x, lambda y: block.ls2(block.mlp(block.norm2(y))), rate)


def _dino_branch(x: Tensor, branch: Callable[[Tensor], Tensor], rate: float) -> Tensor:
    batch = len(x)
    count = max(int(batch * (1 - rate)), 1)
    rows = torch.randperm(batch, device=x.device)[:count]
    value = branch(x[rows])
    return torch.index_add(
        x.flatten(1), 0, rows, value.to(x.dtype).flatten(1), alpha=batch / count
    ).view_as(x)
