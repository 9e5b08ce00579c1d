"""Slow readable reference twins: what a block computes when its gates are as given.

They read the weights of the real module and leave out what is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def resnet(model: Any, x: Tensor, kept: dict[str, bool], factors: dict[str, float]) -> Tensor:
    """A torchvision ResNet of any depth, block by block."""
    x = model.maxpool(F.relu(model.bn1(model.conv1(x))))
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for number, block in enumerate(getattr(model, stage)):
            name = f"{stage}.{number}"
            twin = bottleneck if hasattr(block, "conv3") else basic_block
            x = twin(block, x, kept.get(name, True), factors.get(name, 1.0))
    return model.fc(model.avgpool(x).flatten(1))
