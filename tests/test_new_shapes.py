"""Promise: a closed gate knows what to hand out for inputs of shapes that were never watched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import stochastic_depth as sd
from comparing import assert_identical_gradients
from networks import ResNet

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
