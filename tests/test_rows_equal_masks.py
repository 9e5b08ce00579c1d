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
from comparing import every_model_and_unit, run, with_factors
from specimen import Specimen

pytestmark = [
    pytest.mark.oldest,
    pytest.mark.filterwarnings("ignore::stochastic_depth.StochasticDepthWarning"),
]
Unit = Literal["block", "branch"]
BATCH = 5


def more_rows(example: Any) -> Any:
    """The example with rows of its own for `BATCH` examples."""
    torch.manual_seed(2)
    if isinstance(example, dict):
        return {name: more_rows(value) for name, value in example.items()}
    if isinstance(example, tuple):
        return tuple(map(more_rows, example))
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


def masks(depth: sd.StochasticDepth) -> dict[str, Tensor]:
    """The factor of each row of each branch, by what the last call drew."""
    gates, found = depth.last_gates, {}
    for block in depth.blocks:
        for branch in block.branches:
            kept = gates.get(block.name, gates.get(branch.name, ()))
            found[branch.name] = torch.zeros(BATCH)
            found[branch.name][list(kept)] = 1 / branch.survival_probability
    return found


@every_model_and_unit
def test_outputs_and_gradients_equal_the_masking_reference(specimen: Specimen, unit: Unit) -> None:
    plain, example = specimen.model(), specimen.example_inputs()
    gated = copy.deepcopy(plain)
    options: dict[str, Any] = {"mode": "sample", "unit": unit, "blocks": specimen.gated_blocks}
    if specimen.rowless:
        with pytest.raises(sd.RefusedBlockError, match=specimen.rowless):
            sd.apply_stochastic_depth(gated, 0.5, "uniform", example_inputs=example, **options)
        return
    example = more_rows(example) if specimen.masks else example
    depth = sd.apply_stochastic_depth(gated, 0.5, "uniform", example_inputs=example, **options)
    if not specimen.masks:
        assert run(gated.train(), example).isfinite().all()
        return
    for _ in range(2):
        gated.zero_grad()
        output = run(still(gated), example)
        output.square().mean().backward()
        reference = still(with_factors(plain, specimen, masks(depth)))
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
