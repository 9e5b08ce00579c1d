"""FLOPs of a training step, forward and backward, for any draw: counted once, then added up."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import stochastic_depth as sd

_FUSED = "_scaled_dot_product_flash_attention"


def counting() -> FlopCounterMode:
    """Torch's counter, which counts fused attention on the CPU as it does the one on a GPU.

    As there, every pair of tokens counts, also those that a causal mask leaves out.
    """
    for direction in ("", "_backward"):
        on_the_cpu = getattr(torch.ops.aten, f"{_FUSED}_for_cpu{direction}")
        counted = flop_registry[getattr(torch.ops.aten, f"{_FUSED}{direction}")]
        flop_registry.setdefault(on_the_cpu, counted)
    return FlopCounterMode(display=False)


@dataclass(frozen=True)
class StepCost:
    """FLOPs of a step with every block open, and what each block saves when it is closed."""

    everything: int
    saved_by: dict[str, int]

    def with_gates(self, gates: Mapping[str, float]) -> int:
        """`gates`: whether each block is open, or the share of the batch that it runs on."""
        saved = sum(self.saved_by[name] * (1 - share) for name, share in gates.items())
        return self.everything - round(saved)


def count_step_cost(model: nn.Module, example: Tensor) -> StepCost:
    """Of a model with gates or without: a copy is counted, once as a whole, then block by block."""
    found = sd.estimate_saving(model, 0.0, example_inputs=example, scale="none")
    return StepCost(found.step_flops, {block.name: block.flops for block in found.blocks})
