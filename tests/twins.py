"""Slow readable reference twins: what a network computes when its gates are as given.

They read the weights of the real modules, multiply each branch in the open, and leave out what is
dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def basic_block(block: Any, x: Tensor, kept: bool, factor: float = 1.0) -> Tensor:
    """torchvision's BasicBlock: `relu(skip(x) + branch(x))` (He et al. 2016, figure 5, left)."""
    skip = x if block.downsample is None else block.downsample(x)
    if not kept:
        return F.relu(skip)
    branch = F.relu(block.bn1(block.conv1(x)))
    branch = block.bn2(block.conv2(branch))
    return F.relu(skip + factor * branch)


def bottleneck(block: Any, x: Tensor, kept: bool, factor: float = 1.0) -> Tensor:
    """torchvision's Bottleneck (He et al. 2016, figure 5, right)."""
    skip = x if block.downsample is None else block.downsample(x)
    if not kept:
        return F.relu(skip)
    branch = F.relu(block.bn1(block.conv1(x)))
    branch = F.relu(block.bn2(block.conv2(branch)))
    branch = block.bn3(block.conv3(branch))
    return F.relu(skip + factor * branch)


def vit_layer(
    layer: Any, x: Tensor, kept: Sequence[bool], factors: Sequence[float] = (1.0, 1.0)
) -> Tensor:
    """torchvision's EncoderBlock: pre-norm attention, then pre-norm feed-forward."""
    if kept[0]:
        normed = layer.ln_1(x)
        x = x + factors[0] * layer.self_attention(normed, normed, normed, need_weights=False)[0]
    if kept[1]:
        x = x + factors[1] * layer.mlp(layer.ln_2(x))
    return x


def torchvision_resnet(model: Any, x: Tensor, kept: Mapping[str, bool]) -> Tensor:
    """A torchvision ResNet of any depth, block by block."""
    x = model.maxpool(F.relu(model.bn1(model.conv1(x))))
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for number, block in enumerate(getattr(model, stage)):
            name = f"{stage}.{number}"
            twin = bottleneck if hasattr(block, "conv3") else basic_block
            x = twin(block, x, kept[name])
    return model.fc(model.avgpool(x).flatten(1))


# Of the networks of `networks.py`.

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
