"""Promise: a closed gate knows what to hand out for inputs of shapes that were never watched."""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import stochastic_depth as sd
from comparing import assert_identical_gradients
from networks import ResNet
from stochastic_depth.gating import stand_in

pytestmark = pytest.mark.oldest


def _zeroed(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(output)


@pytest.mark.parametrize("shape", [(3, 3, 8, 8), (1, 3, 12, 16), (2, 3, 9, 11)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("autocast", [False, True])
def test_projection_blocks(
    shape: tuple[int, ...], memory_format: torch.memory_format, autocast: bool
) -> None:
    torch.manual_seed(0)
    plain = ResNet().train()
    gated = copy.deepcopy(plain)
    depth = sd.apply_stochastic_depth(gated, 0.2, example_inputs=torch.randn(2, 3, 8, 8))
    plain.stages[1][0].bn2.register_forward_hook(_zeroed)  # type: ignore[index]
    gates = {"stages.1.0": False}
    x = torch.randn(shape).to(memory_format=memory_format)
    before = {name: b.clone() for name, b in gated.stages[1][0].bn2.named_buffers()}  # type: ignore[index]
    for _ in range(2):  # looked up, then known
        outputs = []
        for model in (gated, plain):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast), depth.fixed(gates):
                outputs.append(model(x))
            outputs[-1].float().square().sum().backward()
        assert outputs[0].dtype == outputs[1].dtype
        assert torch.equal(*outputs)
    for name, buffer in gated.stages[1][0].bn2.named_buffers():  # type: ignore[index]
        assert torch.equal(buffer, before[name]), name
    assert_identical_gradients(gated, plain)


class Places:
    """An object that is no module, and keeps what it has computed."""

    def __init__(self) -> None:
        self.last: torch.Tensor | None = None
        self.by_length: dict[int, torch.Tensor] = {}


class Attribute(nn.Module):
    """Keeps the longest table in itself, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)
        self.table: torch.Tensor | None = None
        self._tables: dict[int, torch.Tensor] = {}
        self.places = Places()

    def kept(self, length: int) -> torch.Tensor:
        if self.table is None or len(self.table) < length:
            self.table = self.made(length)
        return self.table[:length]

    def made(self, length: int) -> torch.Tensor:
        return torch.arange(length, dtype=torch.float32).cos()[:, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(x).tanh() * self.kept(x.shape[1])


class PrivateDict(Attribute):
    def kept(self, length: int) -> torch.Tensor:
        return self._tables.setdefault(length, self.made(length))


class DictOfAnObject(Attribute):
    def kept(self, length: int) -> torch.Tensor:
        return self.places.by_length.setdefault(length, self.made(length))


class AttributeOfAnObject(Attribute):
    def kept(self, length: int) -> torch.Tensor:
        if self.places.last is None or len(self.places.last) != length:
            self.places.last = self.made(length)
        return self.places.last


class Loop(nn.Module):
    def __init__(self, branch: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([branch() for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize("branch", [Attribute, PrivateDict, DictOfAnObject, AttributeOfAnObject])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_no_tensor_without_values_stays_where_a_branch_keeps_its_own(
    branch: type[nn.Module], mode: str
) -> None:
    torch.manual_seed(0)
    plain = Loop(branch)
    gated = copy.deepcopy(plain)
    depth = sd.apply_stochastic_depth(gated, 0.2, example_inputs=torch.randn(2, 5, 4), scale="none")
    for model in (plain, gated):
        model.train(mode == "train")
    x = torch.randn(2, 9, 4)
    with depth.fixed({"layers.1": False}):
        gated(x)
    with depth.disabled():
        assert torch.equal(gated(x), plain(x))


class Experts(nn.Module):
    """Each expert computes for the rows that are sent to it: how many is told by values alone."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.noise = nn.Linear(8, 3), nn.Dropout(0.1)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = x.flatten(0, 1)
        logits = self.router(rows)
        weight, chosen = logits.softmax(-1).max(-1)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            (row,) = torch.where(chosen == number)
            out.index_add_(0, row, expert(self.noise(rows[row])) * weight[row, None])
        return out.view_as(x), logits


class OfExperts(nn.Module):
    """Hands out what its router says."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.experts = nn.LayerNorm(8), Experts()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, logits = self.experts(self.norm(x))
        return x + out, logits


class NormedExperts(OfExperts):
    """A norm stands behind the sum."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, logits = self.experts(x)
        return self.norm(x + out), logits


class Layers(nn.Module):
    def __init__(self, kind: type[OfExperts]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x, _ = layer(x)
        return x


@pytest.mark.filterwarnings("ignore:dropout is active")
@pytest.mark.parametrize("kind", [OfExperts, NormedExperts])
@pytest.mark.parametrize("shape", [(3, 5, 8), (2, 9, 8), (1, 1, 8)])
def test_shapes_that_values_tell(kind: type[OfExperts], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = Layers(kind), torch.randn(shape)
    depth = sd.apply_stochastic_depth(
        model, 0.1, example_inputs=torch.randn(4, 5, 8), scale="none", blocks=["layers.*"]
    )
    state = copy.deepcopy(model.state_dict())
    for _ in range(2):  # looked up, then known
        generator = torch.get_rng_state()
        with depth.fixed(dict.fromkeys(["layers.0", "layers.1", "layers.2"], False)):
            found = model(x)
        assert torch.equal(torch.get_rng_state(), generator)
        expected = x
        for layer in model.layers if kind is NormedExperts else ():
            expected = layer.norm(expected)  # type: ignore[operator]
        assert torch.equal(found, expected)
    assert all(map(torch.equal, state.values(), model.state_dict().values()))


class Averaged(nn.Module):
    """Has a moving average, which no operation with a new tensor makes smaller."""

    average: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("average", torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.average.mul_(0.5).add_(x.detach().abs().mean((0, 1)), alpha=0.5)
        return self.linear(x / (self.average + 1)).tanh()


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch, self.norm = Averaged(), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.branch(x))


def test_buffers_stay_where_shapes_are_looked_up() -> None:
    model = nn.Sequential(*(Normed() for _ in range(6)))
    x = torch.randn(4, 5, 8)
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=x, scale="none")
    with depth.fixed({block.name: False for block in depth.blocks}):
        model(torch.randn(3, 5, 8))
    assert all(bool((buffer == 1).all()) for buffer in model.buffers())


def test_shapes_beyond_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first ones came to is forgotten, and found anew."""
    monkeypatch.setattr(stand_in, "_KEPT", 4)
    model = nn.Sequential(*(Normed() for _ in range(6)))
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=torch.randn(4, 5, 8), scale="none")
    with depth.fixed({block.name: False for block in depth.blocks}):
        for length in [*range(1, 9), 1, 2]:
            x = expected = torch.randn(1, length, 8)
            for block in model:
                expected = block.norm(expected)  # type: ignore[operator]
            assert torch.equal(model(x), expected)


class Around(nn.Module):
    """Has a connection of its own inside of its branch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = sd.Residual(Averaged()), Averaged()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.outer(self.inner(x)))


def test_connections_inside_of_the_branch() -> None:
    model = nn.Sequential(*(Around() for _ in range(6)))
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=torch.randn(4, 5, 8), scale="none")
    x = expected = torch.randn(3, 5, 8)
    for block in model:
        expected = block.norm(expected)  # type: ignore[operator]
    with depth.fixed({block.name: False for block in depth.blocks}):
        assert torch.equal(model(x), expected)
    assert all(gate.calls <= 1 for gate in depth._plan.gates)  # none by the look-up


class Kept:
    """An object that the branches put values into."""

    def __init__(self) -> None:
        self.kept: dict[int, Any] = {}


class Putting(nn.Module):
    def __init__(self, number: int, *, reads: bool) -> None:
        super().__init__()
        self.number, self.reads = number, reads
        self.enter, self.leave = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, store: Kept) -> torch.Tensor:
        y = self.enter(x) * (1 + 0 * random.random()) * (1 + 0 * np.random.rand())
        store.kept[self.number] = y
        if self.reads and float(y.sum()) == 12345.0:  # so it has to be run with values
            y = -y
        return self.leave(y.tanh())


class WithAStore(nn.Module):
    def __init__(self, *, reads: bool) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Putting(n, reads=reads) for n in range(6))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(6))

    def forward(self, x: torch.Tensor, store: Kept) -> torch.Tensor:
        for branch, norm in zip(self.branches, self.norms, strict=True):
            x = norm(x + branch(x, store))
        return x


def of_torch(module: nn.Module, args: Any, output: Any) -> None:
    """A hook that may be needed: it stays."""


of_torch.__module__ = "torch.nn.utils.made_up"


def generators() -> Any:
    numpys: Any = np.random.get_state(legacy=False)
    return random.getstate(), numpys["state"]["key"].tolist(), numpys["state"]["pos"]


@pytest.mark.parametrize("reads", [False, True])
def test_looking_leaves_no_trace_outside_of_the_model(reads: bool) -> None:
    """Not in an object, not in a hook, not in the generators of Python and numpy."""
    model = WithAStore(reads=reads)
    example = torch.randn(2, 5, 8), Kept()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sd.StochasticDepthWarning)
        depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=example, scale="none")
    seen: list[Any] = []
    hooked: list[Any] = [branch.enter for branch in model.branches]
    for module in hooked:
        for hook in (lambda *call: seen.append(call), of_torch, lambda *call: seen.append(call)):
            module.register_forward_hook(hook)
    before = [list(module._forward_hooks.items()) for module in hooked]
    for length in (5, 7, 7):
        store, states = Kept(), generators()
        with depth.fixed({block.name: False for block in depth.blocks}):
            model(torch.randn(2, length, 8), store)
        assert not store.kept
        assert not seen
        assert states == generators()
    assert before == [list(module._forward_hooks.items()) for module in hooked]
