"""Promise: a branch is multiplied exactly once, or refused where somebody else reads its end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd

pytestmark = pytest.mark.oldest


def mlp() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = mlp(), mlp()


class ReadBehindTheSum(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        x = x + y
        return x + self.g(x + y)


class ReadByTheOther(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        return x + y + self.g(y)


class ReadAsAGate(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        return (x + y) * y.sigmoid()


class ReadInPart(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        return torch.cat([x[:, :4] + y[:, :4], y[:, 4:]], -1)


@pytest.mark.parametrize("kind", [ReadBehindTheSum, ReadByTheOther, ReadAsAGate, ReadInPart])
def test_it_is_refused_by_name(kind: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(3, 8), *(kind() for _ in range(6)))
    with pytest.raises(sd.StochasticDepthError, match=r"computes with|no residual block"):
        sd.apply_stochastic_depth(model, 0.5, example_inputs=torch.randn(4, 3), scale="train")


class Layer(nn.Module):
    """Equivariant: what is added to v is linear in v, with factors made of x."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f = nn.LayerNorm(8), nn.Linear(8, 16)
        self.mix = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        a, b = torch.tanh(self.f(self.norm(x))).chunk(2, -1)
        w = self.mix(v)
        return a * (w * w).sum(-2), b[:, None] * w


class Equivariant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.direct = nn.Linear(3, 8), nn.Linear(1, 8, bias=False)
        self.layers = nn.ModuleList(Layer() for _ in range(6))
        self.factor = 1.0

    def forward(self, z: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        x, v = self.embed(z), self.direct(position[..., None])
        for layer in self.layers:
            dx, dv = layer(x, v)
            x, v = x + self.factor * dx, v + self.factor * dv
        return x, v


@pytest.mark.filterwarnings("ignore:fold")
def test_a_branch_that_is_affine_in_one_input_only_is_one() -> None:
    example = torch.randn(4, 3), torch.randn(4, 3)
    model = Equivariant()
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=example, scale="none")
    assert [block.name for block in depth.blocks] == [f"layers.{n}" for n in range(6)]
    assert [len(block.branches) for block in depth.blocks] == [2] * 6
    with depth.fixed({block.name: False for block in depth.blocks}):
        x, v = model(*example)
    assert torch.equal(x, model.embed(example[0]))
    assert torch.equal(v, model.direct(example[1][..., None]))
