"""Promise: what a dropped block returns is read off one open forward: its input, where only moves
of elements lie between; and a copy of it where somebody would notice.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import Residual
from stochastic_depth.discovery import watch
from stochastic_depth.discovery.blocks import Discovery

pytestmark = pytest.mark.oldest


class Activated(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.branch(x))


class Detached(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return (x + self.branch(x)).detach()


class InPlace(Residual):
    def forward(self, x: Tensor) -> Tensor:
        x += self.branch(x)
        return x


def found(*layers: nn.Module) -> Discovery:
    torch.manual_seed(0)
    return watch(nn.Sequential(*layers), torch.randn(6, 6, 8), None)[0]


def whole_blocks(shown: Discovery) -> set[str]:
    return {block.name for block in shown.blocks if block.whole is not None}


def test_only_where_gradients_pass() -> None:
    assert whole_blocks(found(nn.Linear(8, 8), Detached(), Residual())) == {"2"}


def test_a_relu_does_nothing_behind_a_relu() -> None:
    shown = found(nn.Linear(8, 8), nn.ReLU(), Activated(), Activated())
    assert whole_blocks(shown) == {"2", "3"}
    shown = found(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), Activated(), Activated())
    assert whole_blocks(shown) == {"4"}  # whose input comes out of the other's


def copies(*layers: nn.Module) -> dict[str, bool]:
    return {block.name: block.copies_input for block in found(*layers).blocks}


def test_the_callers_own_tensor_is_copied() -> None:
    assert copies(Residual(), Residual()) == {"0": True, "1": False}  # the second one gets the copy
    assert copies(nn.Linear(8, 8), Residual(), Residual()) == {"1": False, "2": False}


def test_what_is_changed_in_place_later_is_copied() -> None:
    shown = copies(nn.Linear(8, 8), Residual(), Residual(), nn.ReLU(inplace=True))
    assert shown == {"1": False, "2": True}  # the second one shields the first
    assert copies(nn.Linear(8, 8), InPlace(), InPlace()) == {"1": False, "2": False}
