"""Residual blocks that are odd in what ends their branch, or in what they are given or return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from networks import WIDTH, Residual


class Stack(nn.Module):
    """A stem, and blocks that hand on what they return, with what else the network is given."""

    def __init__(self, kind: Callable[[], nn.Module], blocks: int = 6, given: int = 3) -> None:
        super().__init__()
        self.stem, self.blocks = (
            nn.Linear(given, WIDTH),
            nn.ModuleList(kind() for _ in range(blocks)),
        )

    def forward(self, x: Tensor, *more: Any) -> Any:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, *more)
        return x


class Layers(nn.Module):
    """Six of a kind, each called with what the network is called with."""

    layers: Any

    def __init__(self, kind: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(6))

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        for layer in self.layers:
            x = layer(x, *more)
        return x


# What ends the branch.


class TwiceTheSame(nn.Module):
    """Two branches that end in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.linear(F.gelu(self.norm1(x)))
        return x + self.linear(F.gelu(self.norm2(x)))


class LayerScale(Residual):
    """A raw parameter behind the branch's last module."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.branch(x)


class Conv1D(nn.Module):
    """transformers' Conv1D is a Linear with its weight the other way around; this is one, too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)
        self.bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class BehindMoves(nn.Module):
    """Dropout, Identity, a reshape and a ReLU come after the last affine operation."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.conv, self.drop, self.identity = Conv1D(), nn.Dropout(dropout), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.conv(x.tanh())).view(-1, 2, WIDTH // 2)
        return x + self.identity(F.relu(y.flatten(1)))


class Parallel(nn.Module):
    """A branch that is the sum of two (GPT-NeoX)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.first(y.tanh()) + self.second(F.gelu(y)) + x


class Interlaced(nn.Module):
    """As EdgeNeXt's: `x + g(y + f(y))` with `y = h(x)`; the inner sum is no block of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.h, self.f, self.g = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.h(x).relu()
        y = y + self.f(y.tanh())
        return x + self.g(y.sigmoid())


class EndsInBlocks(nn.Module):
    """An affine operation whose output residual connections of its own go around.

    A factor on what goes into the inner block is none on what comes out of its branch.
    """

    def __init__(self, inner: type[nn.Module]) -> None:
        super().__init__()
        self.linear, self.inner = nn.Linear(WIDTH, WIDTH), nn.Sequential(inner(), inner())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.linear(x.tanh()))


class Cubic(Residual):
    """A residual block that tells from the size of its input."""

    def branch(self, x: Tensor) -> Tensor:
        return self.linear(x.tanh())


class Ended(Residual):
    """The branch ends in this module."""

    def __init__(self, last: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.last = last()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.branch(x))


class Excite(nn.Module):
    """A product of two computed values, as in squeeze and excite."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x).sigmoid()


def weight_norm() -> nn.Module:
    """The weight that would take a factor is computed."""
    return parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))


def norm_without_weights() -> nn.Module:
    return nn.LayerNorm(WIDTH, elementwise_affine=False)


# More than one value, in an argument or in what is returned.


@dataclass
class Extra:
    hidden: Tensor
    name: str = "extra"


@dataclass(frozen=True)
class Whole:
    value: Tensor
    extra: Extra | None = None


class Beside(nn.Module):
    """A branch that hands an object out beside its value."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.form = nn.Linear(8, 8), nn.Linear(8, 8), form

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.a(x))
        return self.form(self.b(h), h)


class WithObjects(nn.Module):
    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(8), Beside(form)

    def forward(self, x: Tensor) -> Tensor:
        out = self.attn(self.norm(x))
        return x + (out.value if isinstance(out, Whole) else out[0])


OBJECTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a dataclass beside": lambda y, h: (y, Extra(h)),
    "a dataclass in a list": lambda y, h: (y, [Whole(h, Extra(h))]),
    "a value in a dataclass": lambda y, h: Whole(y, Extra(h)),
}


class InDict(Residual):
    """The stream and a mask travel in a dictionary."""

    def forward(self, given: Any) -> Any:
        return {"x": super().forward(given["x"]), "mask": given["mask"]}


# With a drop path.


class DropPath(nn.Module):
    """As other libraries have it; here it may not be active in training."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        assert not (self.training and self.drop_prob)
        return x


class Dropped(Residual):
    """A residual block with a drop path."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop = DropPath(drop_prob)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.branch(x))
