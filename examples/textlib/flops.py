"""What torch's FLOP counter leaves out, and what a step of a network without gates costs."""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from imagelib.flops import StepCost

_FUSED = "_scaled_dot_product_flash_attention"


def count_attention_on_the_cpu() -> None:
    """Counts torch's fused attention on the CPU as the one on a GPU, which torch does count.

    As there, every pair of tokens counts, also those that a causal mask leaves out.
    """
    for direction in ("", "_backward"):
        on_the_cpu = getattr(torch.ops.aten, f"{_FUSED}_for_cpu{direction}")
        counted = flop_registry[getattr(torch.ops.aten, f"{_FUSED}{direction}")]
        flop_registry.setdefault(on_the_cpu, counted)


count_attention_on_the_cpu()


def plain_step_cost(model: nn.Module, example: Tensor) -> StepCost:
    """Of a network that always runs everything."""
    with FlopCounterMode(display=False) as counter:
        model(example).sum().backward()
    model.zero_grad()
    return StepCost(counter.get_total_flops(), {})
