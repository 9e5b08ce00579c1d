"""Promise: a block that updates some tokens alone, by a mask or an index of the model's, is found.

The mask reaches every block; what earlier blocks made of it is no branch of a later one.
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


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        return x + self.branch(x)


class Where(Block):
    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        return torch.where(chosen[..., None], x + self.branch(x), x)


class Written(Block):
    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        out = x.clone()
        out[chosen] = (x + self.branch(x))[chosen]
        return out


class Scattered(Block):
    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        updated = x + self.branch(x)
        return x.masked_scatter(chosen[..., None], updated[chosen])


class Blended(Block):
    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        share = chosen[..., None].float()
        return x * (1 - share) + (x + self.branch(x)) * share


class Network(nn.Module):
    def __init__(self, kind: type[Block]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(4))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, chosen)
        return self.head(x)


@pytest.mark.parametrize("kind", [Where, Written, Scattered, Blended])
def test_every_block_is_found_and_dropped_exactly(kind: type[Block]) -> None:
    torch.manual_seed(0)
    model, x = Network(kind), torch.randn(3, 5, 8)
    chosen = torch.rand(3, 5) > 0.3
    plain = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        depth = sd.apply_stochastic_depth(model, 0.1, example_inputs=(x, chosen), scale="none")
    names = [f"layers.{number}" for number in range(4)]
    assert [block.name for block in depth.blocks] == names
    dropped: Any = plain.layers
    dropped[1] = dropped[3] = Skipped()
    with depth.fixed({"layers.1": False, "layers.3": False}):
        # x * (1 - share) + x * share is x to rounding, where the share is 0 or 1 exactly.
        assert torch.equal(model(x, chosen), plain(x, chosen))


class Skipped(nn.Module):
    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        return x
