"""FLOPs of a training step, forward and backward, for any draw: counted once, then added up."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import stochastic_depth as sd


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
    """Counts on a copy of a model with gates: once as a whole, then block by block."""
    model = copy.deepcopy(model).train()
    depth = sd.get_stochastic_depth(model)
    blocks = {block.name: model.get_submodule(block.name) for block in depth.blocks}
    calls: dict[str, tuple[Any, Any]] = {}
    hooks = [
        block.register_forward_pre_hook(_Remember(calls, name), with_kwargs=True)
        for name, block in blocks.items()
    ]
    with depth.fixed({}):
        everything = _flops(model, (example,), {})
    for hook in hooks:
        hook.remove()
    saved_by = {}
    for name, block in blocks.items():
        with depth.fixed({}):
            opened = _flops(block, *calls[name])
        with depth.fixed({name: False}):
            closed = _flops(block, *calls[name])
        saved_by[name] = opened - closed
    return StepCost(everything, saved_by)


class _Remember:
    """A hook that keeps the arguments of a block's call, cut off from what computed them."""

    def __init__(self, calls: dict[str, tuple[Any, Any]], name: str) -> None:
        self.calls, self.name = calls, name

    def __call__(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self.calls[self.name] = (
            tuple(_cut_off(argument) for argument in args),
            {name: _cut_off(argument) for name, argument in kwargs.items()},
        )


def _cut_off(argument: Any) -> Any:
    if not isinstance(argument, Tensor):
        return argument
    return argument.detach().requires_grad_(argument.requires_grad)


def _flops(module: nn.Module, args: Any, kwargs: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        output = module(*args, **kwargs)
        if output.requires_grad:  # not so where the images themselves pass a closed block
            output.sum().backward()
    return counter.get_total_flops()
