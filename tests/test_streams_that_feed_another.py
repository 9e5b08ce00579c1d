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


class TwoStreams(nn.Module):
    """A layer of two streams, each of which reads the other."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.between = mlp(), mlp(), nn.Linear(8, 8)


class OneAfterTheOther(TwoStreams):
    """As sequential cross attention: the second stream reads what the first has become."""

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.f(self.between(x * z.tanh()))
        return x, z + self.g(z * x.tanh())


class Added(TwoStreams):
    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.f(x + z)
        return x, z + self.g(x)


class Conditioned(TwoStreams):
    """As an Evoformer: the second stream is a condition of the first."""

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.f(x + self.between(z))
        return x, z + self.g(x)


class Sent(TwoStreams):
    """As a graph network: edges of nodes, and nodes of what their edges send."""

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(len(x)).roll(1)
        z = z + self.f(self.between(z) + x[places])
        return x + self.g(x + torch.zeros_like(x).index_add(0, places, z)), z


class TwoWay(TwoStreams):
    """As in a mask decoder: the first stream has a sum of its own behind the one that reads."""

    def __init__(self) -> None:
        super().__init__()
        self.h, self.norm = mlp(), nn.LayerNorm(8)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(x + self.f(x * z.tanh()))
        x = x + self.h(x)
        return x, z + self.g(z * x.tanh())


class OfTwoStreams(nn.Module):
    def __init__(self, kind: type[TwoStreams], layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(layers))
        self.head, self.other = nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            x, z = layer(x, z)
        return self.head(x), self.other(z)


BRANCHES = {OneAfterTheOther: "fg", Added: "fg", Conditioned: "fg", Sent: "fg", TwoWay: "fhg"}


@pytest.mark.parametrize("scale", ["none", "eval", "train"])
@pytest.mark.parametrize("layers", [2, 4])
@pytest.mark.parametrize("kind", BRANCHES)
def test_streams_that_read_each_other(kind: type[TwoStreams], layers: int, scale: Any) -> None:
    torch.manual_seed(0)
    model, x, z = OfTwoStreams(kind, layers), torch.randn(5, 8), torch.randn(5, 8)
    options: Any = {"example_inputs": (x, z), "scale": scale, "unit": "branch"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        depth = sd.apply_stochastic_depth(model, 0.2, "uniform", **options)
    names = [branch.name for block in depth.blocks for branch in block.branches]
    each = BRANCHES[kind]
    assert names == [f"layers.{n}:{b}" for n in range(layers) for b in range(len(each))]
    for number, name in enumerate(names):
        plain = copy.deepcopy(model)
        sd.get_stochastic_depth(plain).remove()
        for place in range(len(names)):
            layer: Any = plain.layers[place // len(each)]
            factor = 0.0 if place == number else 1.25 if scale == "train" else 1.0
            end = getattr(layer, each[place % len(each)])
            end.register_forward_hook(lambda module, args, output, factor=factor: output * factor)
        with depth.fixed({name: False}):
            torch.testing.assert_close(model(x, z), plain(x, z), rtol=1e-5, atol=1e-6)
