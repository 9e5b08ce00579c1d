"""Promise: of branches inside of each other, written in one forward, the outer one is gated, and
the block says so; of branches that one module ends, each is multiplied once.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from networks import WIDTH, settled, vectors
from stochastic_depth.discovery import watch

pytestmark = [
    pytest.mark.oldest,
    pytest.mark.filterwarnings("ignore::stochastic_depth.StochasticDepthWarning"),
]


class Interlaced(nn.Module):
    """As EdgeNeXt's: `x + g(y + f(y))` with `y = h(x)`."""

    def __init__(self) -> None:
        super().__init__()
        self.h, self.f, self.g = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.h(x).relu()
        y = y + self.f(y.tanh())
        return x + self.g(y.sigmoid())


def network(kind: type[nn.Module]) -> Any:
    return settled(lambda: nn.Sequential(*(kind() for _ in range(6))))


@pytest.mark.parametrize("unit", ["block", "branch"])
def test_the_inner_one_is_left_out_and_named(unit: Any) -> None:
    model, x = network(Interlaced), vectors(3, WIDTH)
    plain = copy.deepcopy(model)
    depth = sd.apply_stochastic_depth(model, 0.5, example_inputs=x, unit=unit)
    assert [len(block.branches) for block in depth.blocks] == [1] * 6
    assert sd.find_residual_blocks(plain, x)[2].left_out == ("2.f",)
    assert torch.equal(plain.train()(x), _open(model.train(), depth, x))
    for layer in plain:
        layer.g.weight.data *= 0.5
        layer.g.bias.data *= 0.5
    for block, rate in zip(plain, [b.drop_rate for b in depth.blocks], strict=True):
        block.g.weight.data *= 2 * (1 - rate)
        block.g.bias.data *= 2 * (1 - rate)
    torch.testing.assert_close(plain.eval()(x), model.eval()(x))


def _open(model: nn.Module, depth: sd.StochasticDepth, x: Tensor) -> Tensor:
    with depth.fixed({}):
        return model(x)


class Joint(nn.Module):
    """Ends two branches: of two streams."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.a, self.b = (nn.Linear(2 * WIDTH, n * WIDTH) for n in (2, 1, 1))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.q(torch.cat([a, b], -1)))
        return self.a(h), self.b(h)


class OneLayer(Joint):
    """Ends both in parts of one layer's output."""

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        y, z = self.q(torch.cat([a, b], -1).tanh()).chunk(2, -1)
        return y, z


class Streams(nn.Module):
    def __init__(self, joint: type[nn.Module]) -> None:
        super().__init__()
        self.norm_a, self.norm_b, self.attn = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), joint()

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        a, b = pair
        y, z = self.attn(self.norm_a(a), self.norm_b(b))
        return a + y, b + z


@pytest.mark.parametrize("joint", [Joint, OneLayer])
def test_one_module_that_ends_two_branches(joint: type[nn.Module]) -> None:
    model = nn.Sequential(*(Streams(joint) for _ in range(6)))
    example = ((vectors(3, WIDTH), vectors(3, WIDTH, seed=2)),)
    found, _ = watch(model, example, None)
    for block in found.blocks:
        assert block.branches_leak  # so that both are drawn together
        assert block.refusal is None
        ends = [(b.modules[place], own) for b in block.branches for place, own in b.scaled]
        attn = f"{block.name}.attn"
        assert ends == [(attn, 0), (attn, 1)]
        assert [branch.unscalable for branch in block.branches] == [None, None]
        parts = ("a", "b") if joint is Joint else ("q", "q")
        assert [branch.fold.parameters for branch in block.branches] == [
            (f"{attn}.{part}.bias", f"{attn}.{part}.weight") for part in parts
        ]
