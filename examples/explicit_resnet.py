"""A ResNet-18 or -34 written with `sd.Residual`; its weights fit torchvision's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

import stochastic_depth as sd


class BasicBlock(nn.Module):
    def __init__(self, given: int, made: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(given, made, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(made)
        self.conv2 = nn.Conv2d(made, made, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(made)
        self.relu = nn.ReLU(inplace=True)
        self.add = sd.Residual()
        if stride != 1 or given != made:
            conv = nn.Conv2d(given, made, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(made))

    def branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))

    def forward(self, x: Tensor) -> Tensor:
        skip = self.downsample(x) if hasattr(self, "downsample") else x
        return self.add(x, self.branch, skip=skip).relu()


class ResNet(nn.Module):
    def __init__(self, classes: int, depths: Sequence[int] = (2, 2, 2, 2)) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        given = 64
        for number, depth in enumerate(depths):
            made = 64 * 2**number
            strides = [1 if number == 0 else 2] + [1] * (depth - 1)
            blocks = [BasicBlock(given if n == 0 else made, made, s) for n, s in enumerate(strides)]
            setattr(self, f"layer{number + 1}", nn.Sequential(*blocks))
            given = made
        self.maxpool, self.fc = nn.MaxPool2d(3, 2, 1), nn.Linear(given, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.bn1(self.conv1(images)).relu())
        for number in range(1, 5):
            x = self.get_submodule(f"layer{number}")(x)
        return self.fc(x.mean((2, 3)))
