"""Promise: a block of which one branch cannot be told apart is left out with a word, not kept.

Where a decoder's first value is the encoder's, too, its first cross attention seems to go around
the whole encoder.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd

pytestmark = pytest.mark.oldest


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cross, self.branch = mlp(), mlp()

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.cross(x * memory)
        return x + self.branch(x)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.encoder = nn.ModuleList(Encoder() for _ in range(3))
        self.decoder = nn.ModuleList(Decoder() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = memory = self.embed(x)
        for layer in self.encoder:
            memory = layer(memory)
        for layer in self.decoder:
            x = layer(x, memory)
        return x


def test_a_block_is_whole_or_left_out_with_a_word() -> None:
    with pytest.warns(sd.StochasticDepthWarning, match=r'block "decoder\.0" is left out: add in'):
        blocks = sd.find_residual_blocks(Shared(), torch.randn(2, 5, 8))
    names = [f"{kind}.{number}" for kind in ("encoder", "decoder") for number in range(3)]
    assert [block.name for block in blocks] == [name for name in names if name != "decoder.0"]
    assert [len(block.branches) for block in blocks] == [1, 1, 1, 2, 2]
