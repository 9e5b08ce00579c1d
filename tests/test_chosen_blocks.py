"""Promise: `blocks=` chooses what it names, once; and what is chosen unwisely warns."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import refusing
import stochastic_depth as sd
from networks import (
    WIDTH,
    BasicBlock,
    Residual,
    nested,
    residuals,
    sequences,
    settled,
)
from refusing import Model, X, gate, pasted, stack

oldest = pytest.mark.oldest


# Applying twice.


@oldest
@pytest.mark.parametrize("blocks", [None, ["1", "2"], ["1"], [Residual]])
def test_applying_twice_to_a_block_is_refused(blocks: Any) -> None:
    model = stack()
    depth = gate(model, blocks=["0", "1"])
    before = model.eval()(X)
    with pytest.raises(sd.OptionError) as caught:
        gate(model, blocks=blocks)
    name = "0" if blocks in (None, [Residual]) else "1"
    for part in (f'block "{name}" has stochastic depth already', ".remove() first", "blocks="):
        assert part in str(caught.value)
    assert torch.equal(model(X), before)
    assert sd.get_stochastic_depth(model) is depth
    depth.remove()
    assert gate(model, blocks=blocks).blocks


@oldest
def test_applying_twice_to_a_copy_or_to_a_whole_with_a_gated_part_is_refused() -> None:
    model = stack()
    gate(model)
    for again in (copy.deepcopy(model), nn.Sequential(nn.Linear(WIDTH, WIDTH), model)):
        with pytest.raises(sd.OptionError, match="has stochastic depth already"):
            gate(again)


# Warnings.


@oldest
@pytest.mark.parametrize(
    ("blocks", "rate", "warns"),
    [(5, 0.21, True), (1, 0.9, True), (5, 0.2, False), (6, 0.9, False), (8, 0.5, False)],
)
def test_few_blocks_with_a_high_rate_warn(blocks: int, rate: float, warns: bool) -> None:
    model = settled(lambda: residuals(blocks))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gate(model, rate)
    assert len(caught) == warns
    for warning in caught:
        assert warning.category is sd.StochasticDepthWarning
        number = "1 block" if blocks == 1 else f"{blocks} blocks"
        assert f"{number} with a drop rate of {rate}" in str(warning.message)
        assert warning.filename == refusing.__file__  # the user's own line
        assert "at most 0.2" in str(warning.message)


@oldest
def test_dropout_inside_of_the_gated_blocks_is_named_once() -> None:
    stages = [nn.Sequential(Residual(), nn.Dropout(0.5)) for _ in range(6)]
    model = nn.Sequential(*stages)
    gate(model)  # behind the blocks: no word
    for stage in stages:
        stage[0].norm = nn.Sequential(nn.LayerNorm(WIDTH), nn.Dropout(0.1))
    with pytest.warns(sd.StochasticDepthWarning, match="several regularisers") as caught:
        gate(sd.get_stochastic_depth(model).remove())
    assert len(caught) == 1
    assert "0.0.norm.1 p=0.1, 1.0.norm.1 p=0.1 and 4 more" in str(caught[0].message)


@oldest
def test_few_blocks_are_those_that_are_gated_and_their_highest_rate_counts() -> None:
    with pytest.warns(sd.StochasticDepthWarning, match="2 blocks with a drop rate of 0.4"):
        gate(stack(), [0.0, 0.4], blocks=["0", "1"])


# What blocks= can choose.


def chosen(blocks: Any, model: Model = stack, **options: Any) -> list[str]:
    return [block.name for block in gate(model(), blocks=blocks, **options).blocks]


ALL = [str(block) for block in range(8)]


@oldest
@pytest.mark.parametrize(
    ("blocks", "names"),
    [
        (None, ALL),
        ("3", ["3"]),
        (["5", "2"], ["2", "5"]),  # always in forward order
        ("[2-4]", ["2", "3", "4"]),
        (["[01]", "7"], ["0", "1", "7"]),
        ("!0", ALL[1:]),
        (["!0", "![67]"], ALL[1:6]),
        (["[0-4]", "!2"], ["0", "1", "3", "4"]),
        (["!2", "[0-4]"], ["0", "1", "3", "4"]),
        (Residual, ALL),
        ([Residual, "!7"], ALL[:7]),
        (nn.Module, ALL),
        (lambda block: int(block.name) % 2 == 0, ["0", "2", "4", "6"]),
        ([lambda block: block.name == "1", "3", Residual], ALL),
        (("1", "1"), ["1"]),
    ],
)
def test_blocks_by_name_glob_class_or_predicate(blocks: Any, names: list[str]) -> None:
    assert chosen(blocks) == names


@oldest
def test_blocks_that_were_found_can_be_passed_on() -> None:
    model = stack()
    found = sd.find_residual_blocks(model, X)
    assert [block.name for block in gate(model, blocks=found[2:4]).blocks] == ["2", "3"]
    assert chosen(found[5]) == ["5"]
    assert chosen([block for block in found if len(block.branches) == 1]) == ALL
    assert chosen([found[0], "!1", "7"]) == ["0", "7"]


@oldest
def test_a_distribution_runs_over_the_blocks_that_are_gated() -> None:
    depth = gate(stack(), 0.2, blocks=["1", "3", "5", "7"])
    assert [block.drop_rate for block in depth.blocks] == pytest.approx([0.05, 0.1, 0.15, 0.2])
    depth.model.train()(X)
    assert list(depth.last_gates) == ["1", "3", "5", "7"]


@oldest
def test_nested_blocks_are_chosen_one_by_one() -> None:
    options: dict[str, Any] = {"model": lambda: settled(nested), "example_inputs": sequences()}
    assert chosen("*.inner.*", **options) == [f"{o}.inner.{i}" for o in (1, 2, 3) for i in (0, 1)]
    assert chosen(["!*.inner.*"], **options) == ["1", "2", "3"]
    assert chosen(["2", "2.inner.1"], **options) == ["2.inner.1", "2"]


class Position(nn.Module):
    """`x + dwconv(x)`, an affine branch, as transformers for images encode positions."""

    def __init__(self) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dwconv(x)


def with_positions() -> nn.Module:
    return nn.Sequential(Position(), BasicBlock(8, 8), Position(), BasicBlock(8, 8))


@oldest
def test_affine_branches_are_gated_only_where_a_name_says_so() -> None:
    example = torch.randn(2, 8, 6, 6)
    options: dict[str, Any] = {"model": with_positions, "example_inputs": example}
    assert [block.name for block in sd.find_residual_blocks(with_positions(), example)] == [
        "1",
        "3",
    ]
    assert chosen(None, **options) == ["1", "3"]
    assert chosen("*", **options) == ["1", "3"]
    assert chosen(["*", "0"], **options) == ["0", "1", "3"]

    def positions() -> nn.Module:
        return nn.Sequential(Position(), Position())

    with pytest.raises(sd.NoResidualBlocksError) as caught:
        gate(positions(), example_inputs=example)
    assert chosen(pasted(caught.value), positions, example_inputs=example) == ["0", "1"]


class Straight(nn.Module):
    """A branch without a nonlinearity, and maybe one with."""

    def __init__(self, *, bent: bool) -> None:
        super().__init__()
        self.straight, self.bent = nn.Linear(8, 8), None
        if bent:
            self.bent = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.straight(x)
        return x if self.bent is None else x + self.bent(x)


@pytest.mark.oldest
def test_affine_branches_are_named_and_gated_where_there_are_no_others() -> None:
    x = torch.randn(2, 8)
    model = nn.Sequential(*(Straight(bent=False) for _ in range(6)))
    with pytest.raises(sd.NoResidualBlocksError, match=r'affine \(0, 1, 2, 3 and 2 more\).*"\*"'):
        sd.apply_stochastic_depth(model, 0.2, example_inputs=x)
    for chosen in ("*", Straight):
        depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x, blocks=chosen)
        assert len(depth.blocks) == 6
        depth.remove()
    beside = nn.Sequential(*(Straight(bent=True) for _ in range(6)))
    depth = sd.apply_stochastic_depth(beside, 0.2, example_inputs=x, unit="branch")
    assert str(depth).count("straight, which is affine, always runs") == 6
