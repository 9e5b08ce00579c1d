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
