"""Promise: where a residual sum is spelled so that no factor passes it is refused, and where its
branch cannot be followed the whole block is left out, with a warning that names what was seen.

The spellings that are followed are in the zoo.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from spellings import SUMS, Sum, Summed

pytestmark = pytest.mark.oldest


def network(add: Sum) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), *(Summed(add) for _ in range(6)))


def shifted(block: Summed, x: Tensor, y: Tensor) -> Tensor:
    return x + (y + 1.0)


def floored(block: Summed, x: Tensor, y: Tensor) -> Tensor:
    return x + torch.div(y, 0.1, rounding_mode="floor")


def padded(block: Summed, x: Tensor, y: Tensor) -> Tensor:
    return x + nn.functional.pad(y, (0, 1), value=2.0)[:, :8]


def whole_numbers(block: Summed, x: Tensor, y: Tensor) -> Tensor:
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


def largest(block: Summed, x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x, y)


def chosen(block: Summed, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x > 0, x, y)


def some_rows(block: Summed, x: Tensor, y: Tensor) -> Tensor:
    return x.index_add(0, torch.tensor([0, 1]), y[:2])


@pytest.mark.parametrize("add", [largest, chosen, some_rows])
def test_half_a_block_is_left_out_with_a_warning(add: Sum) -> None:
    plain = nn.Sequential(nn.Linear(3, 8), *(Summed(SUMS["add"]) for _ in range(3)), Summed(add))
    with pytest.warns(sd.StochasticDepthWarning, match='block "4" is left out: .* in 4 may add'):
        blocks = sd.find_residual_blocks(plain, torch.randn(4, 3))
    assert [block.name for block in blocks] == ["1", "2", "3"]
