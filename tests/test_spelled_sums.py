"""Promise: where a residual sum is spelled so that no factor passes it is refused, and where its
branch cannot be followed the whole block is left out, with a warning that names what was seen.

The spellings that are followed are in the zoo.
"""

from __future__ import annotations

import copy
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


def put(block: Summed, x: Tensor, y: Tensor) -> Tensor:
    return x.clone().put_(torch.arange(x.numel()), y.reshape(-1), accumulate=True)


def as_complex(block: Summed, x: Tensor, y: Tensor) -> Tensor:
    pair = torch.complex(x, y)
    return pair.real + pair.imag


def by_einsum(block: Summed, x: Tensor, y: Tensor) -> Tensor:
    return torch.einsum("k,kbc->bc", torch.ones(2), torch.stack([x, y]))


def by_nansum(block: Summed, x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([x, y]).nansum(0)


def by_cumsum(block: Summed, x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([x, y]).cumsum(0)[-1]


def by_foreach(block: Summed, x: Tensor, y: Tensor) -> Tensor:
    (total,) = torch._foreach_add([x], [y])
    return total


def by_halves(block: Summed, x: Tensor, y: Tensor) -> Tensor:
    pairs = zip(x.chunk(2, -1), y.chunk(2, -1), strict=True)
    return torch.cat([one + other for one, other in pairs], -1)


def highway(block: Summed, x: Tensor, y: Tensor) -> Tensor:
    gate = block.gate.sigmoid() * x.sigmoid()
    return gate * y + (1 - gate) * x


def by_a_gate(block: Summed, x: Tensor, y: Tensor) -> Tensor:
    return torch.lerp(x, y, x.sigmoid())


def by_its_forward(block: Summed, x: Tensor, y: Tensor) -> Tensor:
    return x + block.ffn[3].forward(x).tanh()


def by_a_matrix(block: Summed, x: Tensor, y: Tensor) -> Tensor:
    weight: Any = block.ffn[1].weight
    product: Tensor = x @ weight
    return x + product.tanh()


def broadcast(block: Summed, x: Tensor, y: Tensor) -> Tensor:
    return x + y.mean(-1, keepdim=True)


LEFT_OUT = [
    largest, chosen, some_rows, put, as_complex, by_einsum, by_nansum, by_cumsum, by_foreach,
    by_halves, highway, by_a_gate, by_its_forward, by_a_matrix, broadcast,
]  # fmt: skip


@pytest.mark.parametrize("add", LEFT_OUT)
def test_half_a_block_is_left_out_with_a_warning(add: Sum) -> None:
    plain = nn.Sequential(nn.Linear(3, 8), *(Summed(SUMS["add"]) for _ in range(3)), Summed(add))
    with pytest.warns(sd.StochasticDepthWarning, match='block "4" is left out: .* in 4 may add'):
        blocks = sd.find_residual_blocks(plain, torch.randn(4, 3))
    assert [block.name for block in blocks] == ["1", "2", "3"]


def joined_and_summed(block: Summed, x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x[None], y[None]]).sum(0)


def joined_behind(block: Summed, x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x[..., None], y[..., None]], dim=-1).mean(-1)


def gated(block: Summed, x: Tensor, y: Tensor) -> Tensor:
    """No sum: the second part only ever scales the stream."""
    return x * (1 + y)


@pytest.mark.parametrize("mode", ["batch", "sample"])
@pytest.mark.parametrize("add", [joined_and_summed, joined_behind, gated])
def test_these_are_followed(add: Sum, mode: Any) -> None:
    model, x = network(add), torch.randn(4, 3)
    depth = sd.apply_stochastic_depth(
        model, 0.1, example_inputs=x, mode=mode, scale="none", unit="branch"
    )
    both = add is not gated
    assert [len(block.branches) for block in depth.blocks] == [1 + both] * 6
    twin = copy.deepcopy(model)
    sd.get_stochastic_depth(twin).remove()
    closed = ["2:0", "4:0", *(["4:1", "5:1"] if both else [])]
    with depth.fixed(dict.fromkeys(closed, False)):
        found = model.train()(x)
    for name in closed:
        number, _, branch = name.partition(":")
        part = twin[int(number)].ffn if branch == "1" else twin[int(number)].attn
        part.register_forward_hook(lambda module, args, output: output * 0)
    assert torch.equal(found, twin.train()(x))


class OneVector(nn.Module):
    """Without a batch."""

    def __init__(self, add: Any) -> None:
        super().__init__()
        self.branch, self.add = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), add

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.add(x, self.branch(x))
        return total


@pytest.mark.parametrize(
    "add",
    [
        lambda x, y: torch.addmv(x, torch.eye(8), y),
        lambda x, y: torch.addr(x[None], torch.ones(1), y)[0],
    ],
)
def test_sums_with_a_product_of_vectors(add: Any) -> None:
    model, x = nn.Sequential(*(OneVector(add) for _ in range(6))), torch.randn(8)
    twin = copy.deepcopy(model)
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x, scale="none")
    with depth.fixed({str(number): False for number in (1, 3, 4)}):
        expected = x
        for number in (0, 2, 5):
            expected = twin[number](expected)
        assert torch.equal(model(x), expected)
