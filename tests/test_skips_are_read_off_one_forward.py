"""Promise: what a dropped block returns is read off one open forward: its input, where only moves
of elements lie between; and a copy of it where somebody would notice.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stochastic_depth.discovery import watch
from stochastic_depth.discovery.blocks import Discovery

pytestmark = pytest.mark.oldest


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def branch(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x).tanh())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class ThereAndBack(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1).roll(1, 0)
        return (x + self.branch(x)).roll(-1, 0).transpose(0, 1)


class Turned(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return (x + self.branch(x)).transpose(0, 1)


class Rolled(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return (x + self.branch(x)).roll(1, 0)


class Rounded(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return (x + self.branch(x)).half().float()


class Widened(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = x.double()
        return (x + self.branch(x.float())).float()


class Doubled(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x + self.branch(x)


class Activated(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.branch(x))


class Detached(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return (x + self.branch(x)).detach()


class InPlace(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x += self.branch(x)
        return x


def found(*layers: nn.Module) -> Discovery:
    torch.manual_seed(0)
    return watch(nn.Sequential(*layers), torch.randn(6, 6, 8), None)[0]


def whole_blocks(shown: Discovery) -> set[str]:
    return {block.name for block in shown.blocks if block.whole is not None}


@pytest.mark.parametrize(
    ("kind", "whole"),
    [
        (Plain, True),
        (ThereAndBack, True),
        (Turned, False),
        (Rolled, False),
        (Rounded, False),
        (Widened, True),
        (Doubled, False),
        (Detached, False),
        (InPlace, True),
    ],
)
def test_only_where_it_is_the_input(kind: type[nn.Module], whole: bool) -> None:
    shown = found(nn.Linear(8, 8), kind(), kind())
    assert [block.name for block in shown.blocks] == ["1", "2"]
    assert whole_blocks(shown) == ({"1", "2"} if whole else set())


def test_a_relu_does_nothing_behind_a_relu() -> None:
    shown = found(nn.Linear(8, 8), nn.ReLU(), Activated(), Activated())
    assert whole_blocks(shown) == {"2", "3"}
    shown = found(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), Activated(), Activated())
    assert whole_blocks(shown) == {"4"}  # whose input comes out of the other's


def copies(*layers: nn.Module) -> dict[str, bool]:
    return {block.name: block.copies_input for block in found(*layers).blocks}


def test_the_callers_own_tensor_is_copied() -> None:
    assert copies(Plain(), Plain()) == {"0": True, "1": False}  # the second one gets the copy
    assert copies(nn.Linear(8, 8), Plain(), Plain()) == {"1": False, "2": False}


def test_what_is_changed_in_place_later_is_copied() -> None:
    shown = copies(nn.Linear(8, 8), Plain(), Plain(), nn.ReLU(inplace=True))
    assert shown == {"1": False, "2": True}  # the second one shields the first
    assert copies(nn.Linear(8, 8), InPlace(), InPlace()) == {"1": False, "2": False}
