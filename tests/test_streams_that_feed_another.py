"""Promise: where one stream feeds another in every block, each has its own branches.

As in a Transformer in Transformer (Han et al. 2021): pixels within a patch, and patches. What the
inner stream adds to the outer one is a projection of it, and always runs.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd

pytestmark = pytest.mark.oldest


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = mlp(), mlp()
        self.norm, self.project = nn.LayerNorm(8), nn.Linear(16, 8)

    def forward(self, pixels: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        pixels = pixels + self.inner(pixels)
        return self.outwards(pixels, patches, self.outer)

    def closed(self, pixels: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        return self.outwards(pixels, patches, torch.zeros_like)

    def outwards(self, pixels: Tensor, patches: Tensor, outer: Any) -> tuple[Tensor, Tensor]:
        more = self.project(self.norm(pixels).flatten(2))
        patches = torch.cat([patches[:, :1], patches[:, 1:] + more], dim=1)
        return pixels, patches + outer(patches)


class Network(nn.Module):
    """Without a nonlinearity from the pixels to the first patches."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.pixels, self.norm, self.project = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(16, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.pixels(x)
        patches = self.project(self.norm(pixels).flatten(2))
        patches = torch.cat([self.token.expand(len(x), -1, -1), patches], dim=1)
        for block in self.blocks:
            pixels, patches = block(pixels, patches)
        return self.head(patches[:, 0])


@pytest.mark.parametrize("blocks", [2, 4, 7])
def test_each_stream_has_its_own_branches(blocks: int) -> None:
    torch.manual_seed(0)
    model, x = Network(blocks), torch.randn(3, 4, 2, 3)
    plain = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        depth = sd.apply_stochastic_depth(model, 0.1, example_inputs=x, scale="none")
    assert [block.name for block in depth.blocks] == [f"blocks.{n}" for n in range(blocks)]
    assert all(len(block.branches) == 2 for block in depth.blocks)
    dropped: Any = plain.blocks
    for number in (0, blocks - 1):
        dropped[number].forward = dropped[number].closed
    with depth.fixed({"blocks.0": False, f"blocks.{blocks - 1}": False}):
        assert torch.equal(model(x), plain(x))
