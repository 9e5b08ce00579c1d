"""Promise: looking at a model, and applying to it, leaves all that it and its example hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd

pytestmark = pytest.mark.oldest


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.act()
        return x + self.branch(x)

    def act(self) -> None:
        """What it does besides."""


class ForcesWeights(Block):
    """As EDM2's layers do in training."""

    def act(self) -> None:
        with torch.no_grad():
            for parameter in self.branch.parameters() if self.training else ():
                parameter.mul_(0.5)


class ForcesByData(Block):
    def act(self) -> None:
        next(self.branch.parameters()).data.clamp_(-0.01, 0.01)


class Counts(Block):
    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.zeros(())
        self.largest = [torch.zeros(2)]

    def act(self) -> None:
        self.seen += 1
        self.largest[0].add_(1)


class Notes(Block):
    def __init__(self) -> None:
        super().__init__()
        self._log = {"train": {"calls": 0}, "order": []}

    def act(self) -> None:
        self._log["train"]["calls"] += 1  # type: ignore[index]
        self._log["order"].append("forward")  # type: ignore[attr-defined]


class Statistics:
    def __init__(self) -> None:
        self.calls = 0
        self.by_name: dict[str, int] = {}


class NotesInAnObject(Block):
    def __init__(self) -> None:
        super().__init__()
        self.statistics = Statistics()

    def act(self) -> None:
        self.statistics.calls += 1
        self.statistics.by_name["forward"] = self.statistics.calls


class DrawsForItself(Block):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def act(self) -> None:
        torch.rand(1, generator=self.generator)


class Chain(nn.Module):
    def __init__(self, block: type[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2.0)
        for block in self.blocks:
            x = block(x)
        return x


def held(model: Any) -> list[Any]:
    found: list[Any] = []
    for block in model.blocks:
        found += [value.tolist() for value in block.state_dict().values()]
        found += [str(v) for k, v in vars(block).items() if k in ("seen", "largest", "_log")]
        if isinstance(block, NotesInAnObject):
            found.append(copy.deepcopy(vars(block.statistics)))
        if isinstance(block, DrawsForItself):
            found.append(block.generator.get_state().tolist())
    return found


def apply(mode: Any) -> Callable[[nn.Module, Tensor], Any]:
    options: Any = {"mode": mode, "scale": "none"}
    return lambda model, x: sd.apply_stochastic_depth(model, 0.1, example_inputs=x, **options)


CALLS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "find": sd.find_residual_blocks,
    "batch": apply("batch"),
    "sample": apply("sample"),
    "estimate": lambda model, x: sd.estimate_saving(model, 0.1, example_inputs=x, scale="none"),
    "prune": lambda model, x: sd.prune(model, 3, example_inputs=x),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "block", [ForcesWeights, ForcesByData, Counts, Notes, NotesInAnObject, DrawsForItself]
)
def test_nothing_is_otherwise_afterwards(block: type[Block], call: str) -> None:
    torch.manual_seed(0)
    model, x = Chain(block).train(), torch.randn(4, 4)
    before, example = held(model), x.clone()
    CALLS[call](model, x)
    assert held(model) == before
    assert torch.equal(x, example)


def test_a_generator_of_numpys() -> None:
    numpy = pytest.importorskip("numpy")

    class Draws(Block):
        def act(self) -> None:
            self.source.random()

        def __init__(self) -> None:
            super().__init__()
            self.source: Any = numpy.random.default_rng(0)

    model = Chain(Draws)
    states = [block.source.bit_generator.state for block in model.blocks]  # type: ignore[union-attr]
    sd.apply_stochastic_depth(model, 0.1, example_inputs=torch.randn(4, 4))
    assert [block.source.bit_generator.state for block in model.blocks] == states  # type: ignore[union-attr]


@pytest.mark.parametrize("block", [Counts])
def test_a_dropped_block_goes_on_counting(block: type[Block]) -> None:
    model: Any = Chain(block).train()
    x = torch.randn(4, 4)
    depth = sd.apply_stochastic_depth(model, 0.1, example_inputs=x, scale="none")
    with depth.fixed({"blocks.1": False}):
        model(x)
    assert [each.seen.item() for each in model.blocks] == [1, 1, 1]


class Tagged(Block):
    """A class that no other may be derived from."""

    def __init_subclass__(cls) -> None:
        raise TypeError("it is final")


def test_a_class_that_cannot_be_gated_leaves_all_others_plain() -> None:
    model = nn.Sequential(Block(), Tagged(), Block())
    classes = [type(module) for module in model]
    with pytest.raises(TypeError, match="it is final"):
        sd.apply_stochastic_depth(model, 0.1, example_inputs=torch.randn(4, 4))
    assert [type(module) for module in model] == classes
    assert not any("_stochastic_depth" in vars(module) for module in model.modules())
