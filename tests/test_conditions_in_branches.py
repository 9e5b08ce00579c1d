"""Promise: what a branch adds to its own values (a position, a condition, a bias) is no stream.

The sum lies inside of the branch, and neither makes a gate of its own nor cuts the branch short.
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
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


class Layer(nn.Module):
    """Two branches, the ends of which are `first` and `second`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = mlp(), nn.LayerNorm(8), mlp()


class ToANorm(Layer):
    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.second(self.norm(x) + e)


class ToALayer(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(8, 8)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        x = x + self.first(x + e)
        return x + self.second((self.enter(self.norm(x)) + e).relu())


class ToQueries(Layer):
    """Attention with positions, as in a decoder of objects."""

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        x = x + self.first(x)
        y = self.norm(x)
        scores = (y + e) @ (y + e).mT
        return x + self.second(scores.softmax(-1) @ y)


class ToScores(Layer):
    """Attention with a bias that is made of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.bias = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        x = x + self.first(x)
        scores = self.query(x) @ self.key(x).mT + self.bias(x)
        return x + self.second(scores.softmax(-1) @ self.norm(x))


class Network(nn.Module):
    def __init__(self, kind: type[Layer]) -> None:
        super().__init__()
        self.condition, self.enter = nn.Linear(8, 8), nn.Linear(8, 8)
        self.layers = nn.ModuleList(kind() for _ in range(3))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        e = torch.tanh(self.condition(c))
        x = self.enter(x) + e  # so that the stream is made of the condition
        for layer in self.layers:
            x = layer(x, e)
        return x


@pytest.mark.parametrize("scale", ["none", "eval"])
@pytest.mark.parametrize("kind", [ToANorm, ToALayer, ToQueries, ToScores])
def test_a_condition_is_a_part_of_its_branch(kind: type[Layer], scale: Any) -> None:
    torch.manual_seed(0)
    model, example = Network(kind).eval(), (torch.randn(4, 5, 8), torch.randn(4, 5, 8))
    options: Any = {"example_inputs": example, "scale": scale, "unit": "branch"}
    plain = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        depth = sd.apply_stochastic_depth(model, 0.2, "uniform", **options)
    names = [branch.name for block in depth.blocks for branch in block.branches]
    assert names == [f"layers.{n}:{b}" for n in range(3) for b in range(2)]
    factor = {f"layers.{n}.{end}": 1.0 for n in range(3) for end in ("first", "second")}
    if scale == "eval":
        factor = dict.fromkeys(factor, 0.8)
    factor["layers.1.second"] = 0.0
    for name, by in factor.items():
        end = plain.get_submodule(name)
        end.register_forward_hook(lambda module, args, output, by=by: output * by)
    with depth.fixed({"layers.1:1": False}):
        # A factor in the weights or on the value: up to rounding.
        torch.testing.assert_close(model(*example), plain(*example), rtol=1e-5, atol=1e-6)


CUT: dict[str, Any] = {
    "a number": lambda y, mask: torch.where(mask, y, 0.0),
    "a tensor": lambda y, mask: torch.where(mask, y, torch.tensor(0.0)),
    "zeros": lambda y, mask: torch.where(mask, y, torch.zeros_like(y)),
    "masked_fill": lambda y, mask: y.masked_fill(~mask, 0.0),
}


class Cut(nn.Module):
    """Adds where a mask says so."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.branch, self.cut = mlp(), CUT[how]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = self.cut(self.branch(x), mask)
        return x + y


class OfCut(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Cut(how) for _ in range(6))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, mask)
        return x


@pytest.mark.parametrize("how", [*CUT])
def test_zeros_in_the_place_of_what_is_masked(how: str) -> None:
    model, x, mask = OfCut(how), torch.randn(4, 5, 8), torch.rand(4, 5, 1) > 0.3
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=(x, mask), scale="none")
    assert len(depth.blocks) == 6
    with depth.fixed({block.name: False for block in depth.blocks}):
        assert torch.equal(model(x, mask), x)
    ones = OfCut(how)
    for block in ones.blocks:
        block.cut = lambda y, mask: torch.where(mask, y, 1.0)  # type: ignore[assignment]
    with pytest.raises(sd.RefusedBlockError, match="is not zero"):
        sd.apply_stochastic_depth(ones, 0.2, example_inputs=(x, mask), scale="none")
