"""The CIFAR ResNets of He et al. 2016: depth 6n + 2, three stages, shortcuts without parameters.

Plain PyTorch that knows nothing of stochastic depth. Where a block halves the image and doubles
the channels, its shortcut is "option A": fewer pixels, and zeros for the new channels.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Shrink = Literal["pool", "subsample"]


class PaddedShortcut(nn.Module):
    """Halves the image and appends channels of zeros: no parameters.

    "pool" averages 2 x 2 pixels, as Huang et al. 2016 do; "subsample" takes every other pixel,
    as He et al. 2016 do.
    """

    def __init__(self, new_channels: int, shrink: Shrink) -> None:
        super().__init__()
        self.new_channels = new_channels
        self.shrink = shrink

    def forward(self, x: Tensor) -> Tensor:
        smaller = F.avg_pool2d(x, 2, ceil_mode=True) if self.shrink == "pool" else x[:, :, ::2, ::2]
        return F.pad(smaller, (0, 0, 0, 0, 0, self.new_channels))

    def extra_repr(self) -> str:
        return f"new_channels={self.new_channels}, shrink={self.shrink!r}"


class BasicBlock(nn.Module):
    """`relu(shortcut(x) + branch(x))`, the branch being two 3 x 3 convolutions."""

    def __init__(self, channels_in: int, channels: int, shrink: Shrink) -> None:
        super().__init__()
        grows = channels != channels_in
        stride = 2 if grows else 1
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = PaddedShortcut(channels - channels_in, shrink) if grows else nn.Identity()
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.relu1(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        return self.relu2(self.shortcut(x) + branch)


class CifarResNet(nn.Module):
    """A stem, three stages of n blocks with 16, 32 and 64 channels, and a linear classifier."""

    def __init__(self, depth: int, num_classes: int = 10, shrink: Shrink = "pool") -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"a CIFAR ResNet has 6n + 2 layers, but depth is {depth}")
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(16, 16, n, shrink)
        self.layer2 = _stage(16, 32, n, shrink)
        self.layer3 = _stage(32, 64, n, shrink)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(self.pool(x).flatten(1))
        return logits


def _stage(channels_in: int, channels: int, n: int, shrink: Shrink) -> nn.Sequential:
    blocks = [BasicBlock(channels_in, channels, shrink)]
    blocks += [BasicBlock(channels, channels, shrink) for _ in range(n - 1)]
    return nn.Sequential(*blocks)
