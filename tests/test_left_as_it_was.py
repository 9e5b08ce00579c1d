"""Promise: looking at a model, and applying to it, leaves all that it and its example hold."""

from __future__ import annotations

import copy
import queue
import random
import threading
from collections import Counter
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


class SetsData(Block):
    """As BinaryNet's layers do: other weights take the place of the old, whose memory is free."""

    def act(self) -> None:
        weight = next(self.branch.parameters())
        weight.data = weight.data.sign()


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
        self._log = {"train": {"calls": 0}, "order": [], "kinds": Counter(plain=3)}

    def act(self) -> None:
        self._log["train"]["calls"] += 1  # type: ignore[index]
        self._log["order"].append("forward")  # type: ignore[attr-defined]
        self._log["kinds"].update(["plain", "other"])  # type: ignore[attr-defined]


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
    "block",
    [ForcesWeights, ForcesByData, SetsData, Counts, Notes, NotesInAnObject, DrawsForItself],
)
def test_nothing_is_otherwise_afterwards(block: type[Block], call: str) -> None:
    torch.manual_seed(0)
    model, x = Chain(block).train(), torch.randn(4, 4)
    before, example = held(model), x.clone()
    CALLS[call](model, x)
    assert held(model) == before
    assert torch.equal(x, example)


@pytest.mark.parametrize("kind", ["random", "RandomState", "default_rng"])
def test_other_generators(kind: str) -> None:
    numpy: Any = pytest.importorskip("numpy")

    class Draws(Block):
        def act(self) -> None:
            self.source.random()

        def __init__(self) -> None:
            super().__init__()
            make = random.Random if kind == "random" else getattr(numpy.random, kind)
            self.source: Any = make(0)

    model = Chain(Draws)
    twins: list[Any] = copy.deepcopy(list(model.blocks))
    sd.apply_stochastic_depth(model, 0.1, example_inputs=torch.randn(4, 4), scale="none")
    for block, twin in zip(model.blocks, twins, strict=True):
        source: Any = block.source
        assert source.random() == twin.source.random()


class Worker:
    """Another thread puts something into its list all the while."""

    def __init__(self) -> None:
        self.lock, self.found = threading.Lock(), [0]


class Fed(Block):
    def __init__(self) -> None:
        super().__init__()
        self.queue: queue.Queue[int] = queue.Queue()
        self.worker = Worker()

    def act(self) -> None:
        self.queue.put(1)
        self.worker.found.append(1)


def test_what_other_threads_may_work_with_is_left_alone() -> None:
    model = Chain(Fed)
    sd.apply_stochastic_depth(model, 0.1, example_inputs=torch.randn(4, 4), scale="none")
    for block in model.blocks:
        fed: Any = block
        assert fed.queue.qsize() == len(fed.worker.found) - 1 > 0


class Shy:
    """An object that does not like to be looked at."""

    __module__ = None  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


class WithAShyOne(Block):
    def __init__(self) -> None:
        super().__init__()
        self.shy = Shy()


def test_what_cannot_be_looked_into_does_no_harm() -> None:
    model, x = Chain(WithAShyOne), torch.randn(4, 4)
    depth = sd.apply_stochastic_depth(model, 0.1, example_inputs=x, scale="none")
    assert len(depth.blocks) == 3


def test_seeds_of_gpus_that_are_not_used_yet() -> None:
    asked: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "manual_seed_all", asked.append)
        apply("sample")(Chain(Block), torch.randn(4, 4))
    assert not asked


NOTHING = object()


class Picky(nn.Module):
    """Looks at what it is called with: a mark by its identity, and a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor, mask: Any = NOTHING) -> Tensor:
        with torch.enable_grad():
            (force,) = torch.autograd.grad(x.square().sum(), x)
        for block in self.blocks:
            x = block(x + 0.0 * force)
        return x if mask is NOTHING else x * mask


def test_copies_of_the_example_are_like_it() -> None:
    example = {"x": torch.randn(4, 4, requires_grad=True), "mask": NOTHING}
    assert len(sd.find_residual_blocks(Picky(), example)) == 3


class FromAnAttribute(nn.Module):
    """A deep image prior: its input is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = torch.randn(4, 4)
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))

    def forward(self, target: Tensor) -> Tensor:
        return (self.blocks(self.noise) - target).square().mean()


def test_a_stream_that_starts_in_an_attribute_is_no_weight() -> None:
    blocks = sd.find_residual_blocks(FromAnAttribute(), torch.randn(4, 4))
    assert [block.name for block in blocks] == ["blocks.0", "blocks.1", "blocks.2"]


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


class ClampedGru(nn.GRU):
    """Writes to its weights in its forward, of which torch sees one operation alone."""

    weight_hh_l0: Tensor

    def forward(self, x: Tensor, state: Any = None) -> Any:  # type: ignore[override]
        with torch.no_grad():
            self.weight_hh_l0.clamp_(-0.1, 0.1)
        return super().forward(x, state)[0]


def clamp_in_inference(module: nn.Module, args: Any) -> None:
    if not module.training:
        module.weight.data.clamp_(-0.1, 0.1)  # type: ignore[operator]


def clamped_in_inference() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.register_forward_pre_hook(clamp_in_inference)
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(8, 8))


class Adding(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


@pytest.mark.filterwarnings("ignore:fold\\(\\) will not be able")
@pytest.mark.parametrize("mode", ["batch", "sample"])
@pytest.mark.parametrize("make", [lambda: ClampedGru(8, 8, batch_first=True), clamped_in_inference])
def test_weights_that_are_written_to_unseen(make: Any, mode: Any) -> None:
    model = nn.Sequential(*(Adding(make()) for _ in range(6)))
    before = copy.deepcopy(model.state_dict())
    sd.apply_stochastic_depth(model, 0.2, example_inputs=torch.randn(4, 5, 8), mode=mode)
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
