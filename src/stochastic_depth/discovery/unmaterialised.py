"""Models whose weights are not there yet (on the meta device): watched without values.

What needs values is proven on one block at a time: a copy of it, with random weights, called as it
was in the watch, with random numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.discovery.example import Example
from stochastic_depth.discovery.undisturbed import held
from stochastic_depth.torch_private.tracing import fake_mode
from stochastic_depth.torch_private.trees import tree_map

Arguments = list[tuple[tuple[Any, ...], dict[str, Any]]]  # of each call


def is_unmaterialised(model: nn.Module) -> bool:
    """Whether some of its weights have a shape and no values."""
    return any(parameter.is_meta for parameter in model.parameters())


@contextmanager
def without_values(model: nn.Module, example: Example) -> Iterator[Example]:
    """Has a model without weights compute with shapes alone; gives an example to call it with.

    It computes as if on the CPU. Its weights are as before afterwards. With weights nothing is
    done.
    """
    if not is_unmaterialised(model):
        yield example
        return
    known: dict[int, Any] = {}

    def fake(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in known:
            made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
            is_weight = isinstance(value, nn.Parameter)
            known[id(value)] = nn.Parameter(made, value.requires_grad) if is_weight else made
        return known[id(value)]

    weights = [(module._parameters, dict(module._parameters)) for module in model.modules()]
    with held(model), fake_mode():  # a module may keep what it has computed: no fake must stay
        try:
            for module in model.modules():
                for table in (module._parameters, module._buffers, vars(module)):
                    table.update({key: fake(value) for key, value in table.items()})
            yield tree_map(fake, example)
        finally:
            for table, before in weights:
                table.update(before)


class Alone(nn.Module):
    """One block of a model and nothing around it, with random weights.

    Args:
        block: The block's module; the copy keeps its gates.
        calls: What to call it with: random numbers take the place of all tensors.
        plan: What the gates share, and the copy shares with them.
    """

    def __init__(self, block: nn.Module, calls: Arguments, plan: Any) -> None:
        super().__init__()
        self.calls, self.block = calls, copy.deepcopy(block, {id(plan): plan})
        for module in self.block.modules():
            for table in (module._parameters, module._buffers, vars(module)):
                table.update({key: _some(value) for key, value in table.items()})
            for buffer in module.buffers(recurse=False):
                if buffer.dtype is torch.bool:
                    buffer.zero_()  # of a constant mask a True hides something

    def forward(self) -> list[Any]:
        """All calls, one after the other."""
        return [self.block(*args, **kwargs) for args, kwargs in tree_map(_some, self.calls)]


def _some(like: Any) -> Any:
    """Random numbers in the form of a tensor; what is no tensor stays."""
    if not isinstance(like, Tensor):
        return like
    if like.is_floating_point():  # above zero: a variance is, and what comes out of a ReLU
        generator = torch.Generator().manual_seed(0)
        numbers = torch.rand(like.shape, generator=generator, device="cpu")
        return numbers.mul(0.1).add(0.01).to(like.dtype)  # so small that they stay so in half
    # A mask lets everything through; a number may be an index.
    return torch.full(like.shape, int(like.dtype is torch.bool), dtype=like.dtype, device="cpu")
