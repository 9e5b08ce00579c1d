"""Promise: what a dropped block returns is read off one open forward: its input, where only moves
of elements lie between; and a copy of it where somebody would notice.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stochastic_depth as sd
from networks import Residual
from stochastic_depth.discovery import watch
from stochastic_depth.discovery.blocks import Discovery

pytestmark = pytest.mark.oldest


Move = Callable[[Tensor], Tensor]


class Arranged(nn.Module):
    """Hands its input on in another order of dimensions in memory."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(2, 0, 1).contiguous().permute(1, 2, 0)


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


class Moved(Residual):
    """Computes in another arrangement of its input's elements."""

    def __init__(self, there: Move, back: Move) -> None:
        super().__init__()
        self.there, self.back = there, back

    def forward(self, x: Tensor) -> Tensor:
        y = self.there(x)
        return self.back(y + self.branch(y))


# Most copy their elements in between; a copy of another input lies otherwise in memory.
MOVES: dict[str, tuple[Move, Move]] = {
    "permute, contiguous, view": (
        lambda x: x.permute(1, 0, 2).contiguous().view(36, 8),
        lambda y: y.view(6, 6, 8).permute(1, 0, 2),
    ),
    "permute, reshape": (
        lambda x: x.permute(1, 0, 2).reshape(-1, 8),
        lambda y: y.reshape(6, 6, 8).permute(1, 0, 2).contiguous(),
    ),
    "transpose, flatten": (
        lambda x: x.transpose(0, 1).flatten(0, 1),
        lambda y: y.unflatten(0, (6, 6)).transpose(0, 1),
    ),
    "windows": (
        lambda x: x.view(3, 2, 3, 2, 8).transpose(1, 2).reshape(9, 4, 8),
        lambda y: y.view(3, 3, 2, 2, 8).transpose(1, 2).reshape(6, 6, 8),
    ),
    "channels last": (
        lambda x: x.reshape(6, 2, 3, 8).to(memory_format=torch.channels_last),
        lambda y: y.contiguous().view(6, 6, 8),
    ),
    "clone, view": (lambda x: x.mT.clone().mT.reshape(36, 8), lambda y: y.view(6, 6, 8)),
    "squeeze": (lambda x: x.unsqueeze(1).squeeze(1), lambda y: y.unsqueeze(0).reshape(6, 6, 8)),
}


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("strange_memory", [False, True])
def test_moves_there_and_back_hand_on_the_input(name: str, strange_memory: bool) -> None:
    torch.manual_seed(0)
    before = nn.Sequential(nn.Linear(8, 8), *([Arranged()] if strange_memory else []))
    model, x = nn.Sequential(before, *(Moved(*MOVES[name]) for _ in range(6))), torch.randn(6, 6, 8)
    expected = model[0](x)
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    assert str(depth).count("skipped whole") == 6
    with depth.fixed({block.name: False for block in depth.blocks}):
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("back", ["view", "permute"])
def test_moves_that_do_not_come_back_need_the_forward(back: str) -> None:
    """Every element arrives, but elsewhere."""
    there, _ = MOVES["permute, reshape"]
    moves: dict[str, Move] = {
        "view": lambda y: y.view(6, 6, 8),
        "permute": lambda y: y.view(6, 6, 8).flip(0).permute(1, 0, 2),
    }
    model = nn.Sequential(nn.Linear(8, 8), *(Moved(there, moves[back]) for _ in range(6)))
    x = torch.randn(6, 6, 8)
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    assert "whole" not in str(depth)
    expected = model[0](x)
    for _ in range(6):
        expected = moves[back](there(expected))
    with depth.fixed({block.name: False for block in depth.blocks}):
        assert torch.equal(model(x), expected)


def copies(*layers: nn.Module) -> dict[str, bool]:
    return {block.name: block.copies_input for block in found(*layers).blocks}


def test_the_callers_own_tensor_is_copied() -> None:
    assert copies(Residual(), Residual()) == {"0": True, "1": False}  # the second one gets the copy
    assert copies(nn.Linear(8, 8), Residual(), Residual()) == {"1": False, "2": False}


def test_what_is_changed_in_place_later_is_copied() -> None:
    shown = copies(nn.Linear(8, 8), Residual(), Residual(), nn.ReLU(inplace=True))
    assert shown == {"1": False, "2": True}  # the second one shields the first
    assert copies(nn.Linear(8, 8), InPlace(), InPlace()) == {"1": False, "2": False}
