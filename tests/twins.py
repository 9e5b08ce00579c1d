"""Slow readable reference twins: what the networks compute when their gates are as given.

They read the weights of the real modules, multiply each branch in the open, and leave out what is
dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

Factor = Callable[[str], float]  # of each branch by its name; 0 where it is dropped


def resnet(model: Any, x: Tensor, factor: Factor) -> Tensor:
    x = model.stem(x)
    for stage in (0, 1):
        for number, block in enumerate(model.stages[stage]):
            skip = x if block.downsample is None else block.downsample(x)
            if by := factor(f"stages.{stage}.{number}:0"):
                branch = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
                skip = skip + branch * by
            x = F.relu(skip)
    return model.head(x.mean((2, 3)))


def pre_norm(model: Any, x: Tensor, factor: Factor) -> Tensor:
    x = model.embed(x)
    for number, layer in enumerate(model.layers):
        if by := factor(f"layers.{number}:0"):
            y = layer.norm1(x)
            x = x + layer.attention(y, y, y, need_weights=False)[0] * by
        if by := factor(f"layers.{number}:1"):
            x = x + layer.mlp(layer.norm2(x)) * by
    return model.head(x.mean(1))


def post_norm(model: Any, x: Tensor, factor: Factor) -> Tensor:
    x = model.embed(x)
    for number, layer in enumerate(model.layers):
        if by := factor(f"layers.{number}:0"):
            x = x + layer.attention(x, x, x, need_weights=False)[0] * by
        x = layer.norm1(x)
        if by := factor(f"layers.{number}:1"):
            x = x + layer.mlp(x) * by
        x = layer.norm2(x)
    return model.head(x.mean(1))


def shared(model: Any, x: Tensor, factor: Factor) -> Tensor:
    x = model.embed(x)
    for _ in range(model.calls):
        x = x + model.layer.linear(F.gelu(model.layer.norm(x))) * factor("layer:0")
    return model.head(x)


def nested(model: Any, x: Tensor, factor: Factor) -> Tensor:
    x = model[0](x)
    for number, outer in enumerate(model[1:], start=1):
        if not (by := factor(f"{number}:0")):
            continue
        y = x
        for inner_number, inner in enumerate(outer.inner):
            if inner_by := factor(f"{number}.inner.{inner_number}:0"):
                y = y + inner.linear(F.gelu(inner.norm(y))) * inner_by
        x = x + outer.last(y) * by
    return x


Twin = Callable[[Any, Tensor, Factor], Tensor]
TWINS: dict[str, Twin] = {
    "resnet": resnet,
    "pre-norm": pre_norm,
    "post-norm": post_norm,
    "shared": shared,
    "nested": nested,
}


def of_blocks(kept: Mapping[str, float]) -> Factor:
    """One number for all branches of a block."""
    return lambda branch: float(kept[branch.partition(":")[0]])
