"""Promise: a branch on some rows of the batch alone comes to the same as on all, with a mask.

BatchNorm sees the kept rows alone, so it stands in eval mode here; otherwise models train.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from comparing import branch_ends, run
from zoo import SPECIMENS, Specimen

pytestmark = [
    pytest.mark.oldest,
    pytest.mark.filterwarnings("ignore::stochastic_depth.StochasticDepthWarning"),
]
Unit = Literal["block", "branch"]
BATCH = 5
EXACT = 2e-6
"""Relative; kernels sum in another order for another number of rows."""


def more_rows(example: Any) -> Any:
    """The example with rows of its own for `BATCH` examples."""
    torch.manual_seed(2)
    if isinstance(example, dict):
        return {name: more_rows(value) for name, value in example.items()}
    if example.is_floating_point():
        return torch.randn(BATCH, *example.shape[1:])
    if not example.any() or bool((example == 1).all()):
        return example[:1].repeat(BATCH, *[1] * (example.ndim - 1))
    return torch.randint(0, int(example.max()) + 1, (BATCH, *example.shape[1:]))


def still(model: nn.Module) -> nn.Module:
    """In train mode, but for BatchNorm."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def masking(plain: nn.Module, specimen: Specimen, depth: sd.StochasticDepth) -> nn.Module:
    """A plain copy whose branches compute all rows and are multiplied by a mask."""
    model = copy.deepcopy(plain)
    gates = depth.last_gates
    for block in depth.blocks:
        for branch in block.branches:
            kept = gates.get(block.name, gates.get(branch.name))
            mask = torch.zeros(BATCH)
            assert kept is not None
            mask[list(kept)] = 1 / branch.survival_probability
            for end in branch_ends(model, specimen, branch.name):
                end.register_forward_hook(_by(mask))
    return model


def _by(mask: Tensor) -> Any:
    def multiply(module: nn.Module, args: Any, output: Any) -> Any:
        value = output if isinstance(output, Tensor) else output[0]
        each = mask.repeat_interleave(len(value) // BATCH)
        value = value * each.view(-1, *[1] * (value.ndim - 1))
        return value if isinstance(output, Tensor) else (value, *output[1:])

    return multiply


@pytest.mark.parametrize("unit", ["block", "branch"])
@pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda s: s.name)
def test_outputs_and_gradients_equal_the_masking_reference(specimen: Specimen, unit: Unit) -> None:
    plain = specimen.model()
    gated = copy.deepcopy(plain)
    example = more_rows(specimen.example_inputs())
    depth = sd.apply_stochastic_depth(
        gated,
        0.5,
        "uniform",
        example_inputs=example,
        mode="sample",
        unit=unit,
        blocks=specimen.gated_blocks,
    )
    for _ in range(2):
        gated.zero_grad()
        output = run(still(gated), example)
        output.square().mean().backward()
        reference = still(masking(plain, specimen, depth))
        expected = run(reference, example)
        expected.square().mean().backward()
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        for (name, mine), (_, other) in zip(
            gated.named_parameters(), reference.named_parameters(), strict=True
        ):
            if mine.grad is None or other.grad is None:
                assert mine.grad is None or not mine.grad.any(), name
                assert other.grad is None or not other.grad.any(), name
                continue
            difference = (mine.grad - other.grad).norm()
            assert difference <= 1e-4 * other.grad.norm() + 1e-7, name


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return x + self.branch(x + memory.sum(0))


class Memory(nn.Module):
    """Gives its blocks slots for each example, of which it has written the first alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(8, 8), nn.ModuleList(Reads() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        memory = x.repeat(3, 1, 1)
        memory[0] = 2 * x
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, memory)
        return x


def test_a_view_that_was_written_to_does_not_say_where_the_rows_of_the_whole_are() -> None:
    model, x = Memory(), torch.randn(BATCH, 8)
    depth = sd.apply_stochastic_depth(model, 0.5, "uniform", example_inputs=x, mode="sample")
    memory = torch.stack([2 * x, x, x])
    out, kept = model.blocks[0].train()(x, memory), depth.last_gates["blocks.0"]
    depth.remove()
    rows = torch.zeros(BATCH, 1)
    rows[list(kept)] = 2.0
    torch.testing.assert_close(out, x + rows * (model.blocks[0](x, memory) - x))
