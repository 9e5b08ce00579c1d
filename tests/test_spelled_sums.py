"""Promise: however a residual sum is spelled, its branch is found, skipped and scaled exactly; or
the whole block is left out, with a warning that names what was seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd

pytestmark = pytest.mark.oldest
Sum = Callable[["Block", Tensor, Tensor], Tensor]


class Add(nn.Module):
    """A sum that is a module of its own, with a factor on the skip connection."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * x + y


class Block(nn.Module):
    """Two branches: one added as usual, one as the subclass has it."""

    def __init__(self, add: Sum) -> None:
        super().__init__()
        self.attn, self.ffn = (
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
            for _ in "ab"
        )
        self.gate, self.own, self.add = nn.Parameter(torch.rand(8)), Add(), add
        self.factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.factor * self.attn(x) if self.factor != 1 else x + self.attn(x)
        y = self.ffn(x)
        return self.add(self, x, self.factor * y if self.factor != 1 else y)


SUMS: dict[str, Sum] = {
    "add": lambda block, x, y: torch.add(x, y),
    "add with alpha": lambda block, x, y: torch.add(x, y, alpha=0.5),
    "add to the branch": lambda block, x, y: torch.add(y, x, alpha=0.5),
    "sub": lambda block, x, y: x - y,
    "sub from the branch": lambda block, x, y: y - x,
    "rsub": lambda block, x, y: torch.rsub(y, x),
    "addcmul": lambda block, x, y: torch.addcmul(x, block.gate, y),
    "addcmul with value": lambda block, x, y: torch.addcmul(x, y, block.gate, value=0.5),
    "addcmul that broadcasts": lambda block, x, y: torch.addcmul(
        x, y.mean(-1, keepdim=True), block.gate
    ),
    "addcdiv": lambda block, x, y: torch.addcdiv(x, y, block.gate + 1),
    "lerp": lambda block, x, y: torch.lerp(x, y, 0.3),
    "lerp by a weight": lambda block, x, y: torch.lerp(x, y, block.gate),
    "stack": lambda block, x, y: torch.stack([x, y]).sum(0),
    "stack at the end": lambda block, x, y: torch.stack([y, x], -1).sum(-1),
    "mean": lambda block, x, y: torch.stack([x, y]).mean(0),
    "python's sum": lambda block, x, y: sum([x, y]),  # type: ignore[dict-item, return-value]
    "in place": lambda block, x, y: y.add_(x, alpha=0.5),
    "own module": lambda block, x, y: block.own(x, y),
    "addmm": lambda block, x, y: torch.addmm(x, y, torch.eye(8)),
}


def network(add: Sum) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), *(Block(add) for _ in range(6)))


@pytest.mark.filterwarnings("ignore:fold")
@pytest.mark.parametrize("name", SUMS)
def test_both_branches_are_skipped_and_scaled_exactly(name: str) -> None:
    x = torch.randn(4, 3)
    model, by_hand = network(SUMS[name]), network(SUMS[name])
    depth = sd.apply_stochastic_depth(
        model, 0.5, "uniform", example_inputs=x, scale="train", unit="branch"
    )
    assert [len(block.branches) for block in depth.blocks] == [2] * 6
    for factor, is_open in ((2.0, True), (0.0, False)):
        for block in by_hand[1:]:
            block.factor = factor
        gates = {f"{n}:{b}": is_open for n in range(1, 7) for b in range(2)}
        with depth.fixed(gates):
            torch.testing.assert_close(model.train()(x), by_hand(x))


def test_a_factor_on_the_skip_is_not_skipped() -> None:
    depth = sd.apply_stochastic_depth(
        network(SUMS["lerp"]), 0.1, example_inputs=torch.randn(4, 3), scale="none"
    )
    assert "whole" not in str(depth)


def shifted(block: Block, x: Tensor, y: Tensor) -> Tensor:
    return x + (y + 1.0)


def floored(block: Block, x: Tensor, y: Tensor) -> Tensor:
    return x + torch.div(y, 0.1, rounding_mode="floor")


def padded(block: Block, x: Tensor, y: Tensor) -> Tensor:
    return x + nn.functional.pad(y, (0, 1), value=2.0)[:, :8]


def whole_numbers(block: Block, x: Tensor, y: Tensor) -> Tensor:
    return x + y.long()


@pytest.mark.parametrize("add", [shifted, floored, padded, whole_numbers])
def test_what_is_not_homogeneous_is_refused(add: Sum) -> None:
    with pytest.raises(sd.RefusedBlockError, match=r"1:1 (cannot be scaled|is not zero)"):
        sd.apply_stochastic_depth(network(add), 0.1, example_inputs=torch.randn(4, 3))


def test_advice_helps() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(sd.RefusedBlockError, match='scale="none" works'):
        sd.apply_stochastic_depth(network(floored), 0.1, example_inputs=x)
    sd.apply_stochastic_depth(network(floored), 0.1, example_inputs=x, scale="none")
    with pytest.raises(sd.RefusedBlockError, match="1:1 is not zero") as caught:
        sd.apply_stochastic_depth(network(shifted), 0.1, example_inputs=x)
    assert "works" not in str(caught.value)


def largest(block: Block, x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x, y)


def chosen(block: Block, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x > 0, x, y)


def some_rows(block: Block, x: Tensor, y: Tensor) -> Tensor:
    return x.index_add(0, torch.tensor([0, 1]), y[:2])


@pytest.mark.parametrize("add", [largest, chosen, some_rows])
def test_half_a_block_is_left_out_with_a_warning(add: Sum) -> None:
    plain = nn.Sequential(nn.Linear(3, 8), *(Block(SUMS["add"]) for _ in range(3)), Block(add))
    with pytest.warns(sd.StochasticDepthWarning, match='block "4" is left out: .* in 4 may add'):
        blocks = sd.find_residual_blocks(plain, torch.randn(4, 3))
    assert [block.name for block in blocks] == ["1", "2", "3"]
