"""Promise: who writes to a part of the stream hides no block, and changes no dropped one's output.

Set beside twins whose dropped branches are multiplied by zero.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain, combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from networks import settled

pytestmark = pytest.mark.oldest
BLOCKS = 4


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = mlp(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class Network(nn.Module):
    """Calls its layers by a function."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.place = nn.Linear(4, 8), nn.Parameter(torch.randn(4, 8))
        self.layers, self.run = nn.ModuleList(Layer() for _ in range(BLOCKS)), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, self.stem(x))


def places_for_all_but_the_first(net: Any, x: Tensor) -> Tensor:
    x = torch.cat([x.new_zeros(len(x), 1, 8), x], 1)
    x[:, 1:] += net.place
    for layer in net.layers:
        x = layer(x)
    return x


def zeros_in_each_iteration(net: Any, x: Tensor) -> Tensor:
    for layer in net.layers:
        x = layer(x)
        x[:, 0] = 0
    return x


def the_first_by_a_view(net: Any, x: Tensor) -> Tensor:
    first = x[:, 0]
    for layer in net.layers:
        x = layer(x)
        first.mul_(1.5)  # of the stem's output, which the first block was given
    return x


def by_way_of_all_rows_as_one(net: Any, x: Tensor) -> Tensor:
    for layer in net.layers:
        x = layer(x)
        x.view(-1, 8).mul_(1.5)
    return x


def an_input_that_is_kept(net: Any, x: Tensor) -> Tensor:
    kept = []
    for layer in net.layers:
        kept.append(x)
        x = layer(x)
    for skip in reversed(kept):
        skip += x
        x = 0.5 * x + 0.5 * skip
    return x


def a_part_of_the_input_that_is_kept(net: Any, x: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for layer in net.layers:
        y = layer(x)
        x[:, 0] = 1.0
        total, x = total + x, y
    return total + x


RUNS = [
    places_for_all_but_the_first,
    zeros_in_each_iteration,
    the_first_by_a_view,
    by_way_of_all_rows_as_one,
    an_input_that_is_kept,
    a_part_of_the_input_that_is_kept,
]


@pytest.mark.parametrize("run", RUNS)
def test_all_blocks_are_found_and_exact(run: Callable[[Any, Tensor], Tensor]) -> None:
    plain = settled(lambda: Network(run)).train()
    x = torch.randn(2, 4, 4)
    model = copy.deepcopy(plain)
    depth = sd.apply_stochastic_depth(model, 0.1, example_inputs=x, scale="none")
    assert [len(block.branches) for block in depth.blocks] == [2] * BLOCKS
    numbers = range(BLOCKS)
    for closed in chain.from_iterable(combinations(numbers, size) for size in range(BLOCKS + 1)):
        with depth.fixed({f"layers.{number}": False for number in closed}):
            found = model(x)
        twin = copy.deepcopy(plain)
        for number in closed:
            for part in (twin.layers[number].attn, twin.layers[number].mlp):
                part.register_forward_hook(lambda module, args, output: output * 0)
        assert torch.equal(found, twin(x))


class InPart(Layer):
    """Its second branch is added to a part of the stream."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        y = x.clone()
        y[:, 1:] += self.mlp(x)[:, 1:]
        return y


def test_a_branch_that_is_added_to_a_part() -> None:
    plain: Any = settled(lambda: nn.Sequential(nn.Linear(4, 8), InPart(), InPart(), InPart()))
    model, x = copy.deepcopy(plain.train()), torch.randn(2, 4, 4)
    depth = sd.apply_stochastic_depth(
        model, 0.1, example_inputs=x, scale="none", unit="branch", blocks="*"
    )
    assert [len(block.branches) for block in depth.blocks] == [2, 2, 2]
    with depth.fixed({"2:1": False}):
        found = model(x)
    plain[2].mlp.register_forward_hook(lambda module, args, output: output * 0)
    assert torch.equal(found, plain(x))


class AddsInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp()

    def forward(self, x: Tensor) -> Tensor:
        x += self.mlp(1 * x)
        return x


class UnderAnotherName(nn.Module):
    """Goes on with the tensor that its blocks wrote to, which has two names."""

    def __init__(self, *, by_return: bool) -> None:
        super().__init__()
        self.stem, self.by_return = nn.Linear(8, 8), by_return
        self.blocks = nn.ModuleList(AddsInPlace() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        kept = x = self.stem(x)
        for block in self.blocks:
            out = block(x)
            x = out if self.by_return else x
        return kept * x


@pytest.mark.parametrize("by_return", [False, True])
def test_rows_that_are_taken_out_are_written_back(by_return: bool) -> None:
    torch.manual_seed(0)
    model, x = UnderAnotherName(by_return=by_return), torch.randn(8, 8)
    twin = copy.deepcopy(model)
    depth = sd.apply_stochastic_depth(model, 0.3, "uniform", example_inputs=x, mode="sample")
    in_part = 0
    for _ in range(10):
        model.zero_grad()
        twin.zero_grad()
        mine, its = (x.clone().requires_grad_() for _ in range(2))
        y = model(mine)
        expected = twin.stem(its)
        for name, kept in depth.last_gates.items():
            rows = torch.zeros(8, 1).index_fill_(0, torch.tensor(kept, dtype=torch.long), 1.0)
            in_part += 0 < len(kept) < 8
            branch: Any = twin.get_submodule(name)
            expected = expected + rows * branch.mlp(expected) / 0.7
        # Other kernels for other numbers of rows: rounding.
        torch.testing.assert_close(y, expected * expected)
        y.sum().backward()
        (expected * expected).sum().backward()
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-4, atol=1e-4)
    assert in_part > 10
