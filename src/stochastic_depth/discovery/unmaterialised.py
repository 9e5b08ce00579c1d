"""Models whose weights are not there yet (on the meta device): watched without values.

What needs values is proven on one block at a time: a copy of it, with random weights, called as it
was in the watch, with random numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.discovery.example import Example
from stochastic_depth.discovery.undisturbed import undisturbed
from stochastic_depth.torch_private import fake_mode, tree_map

Arguments = list[tuple[tuple[Any, ...], dict[str, Any]]]  # of each call


def is_unmaterialised(model: nn.Module) -> bool:
    """Whether some of its weights have a shape and no values."""
    return any(parameter.is_meta for parameter in model.parameters())


@contextmanager
def without_values(model: nn.Module, example: Example) -> Iterator[Example]:
    """Has the model compute with shapes alone, as if on the CPU; gives an example to call it with.

    Its weights are as before afterwards.
    """
    mode = fake_mode()
    known: dict[int, Any] = {}

    def fake(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in known:
            empty = torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device="cpu"
            )
            is_weight = isinstance(value, nn.Parameter)
            known[id(value)] = (
                nn.Parameter(empty, requires_grad=value.requires_grad) if is_weight else empty
            )
        return known[id(value)]

    # A module may keep what it has computed: a fake must not stay.
    own = [(m, dict(vars(m)), dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    with mode:
        try:
            for module, attributes, parameters, buffers in own:
                module._parameters.update({k: fake(v) for k, v in parameters.items()})
                module._buffers.update({k: fake(v) for k, v in buffers.items()})
                tensors = {k: fake(v) for k, v in attributes.items() if isinstance(v, Tensor)}
                vars(module).update(tensors)
            yield tree_map(fake, example)
        finally:
            for module, attributes, parameters, buffers in own:
                for added in vars(module).keys() - attributes.keys():
                    del vars(module)[added]
                vars(module).update(attributes)
                module._parameters.update(parameters)
                module._buffers.update(buffers)


def arguments_of(model: nn.Module, names: Sequence[str], example: Example) -> dict[str, Arguments]:
    """What these modules are called with, call by call; random numbers where values are missing."""
    found: dict[str, Arguments] = {name: [] for name in names}
    with ExitStack() as stack:
        for name in names:

            def note(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                found[name].append((args, kwargs))

            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        given = stack.enter_context(without_values(model, example))
        stack.enter_context(undisturbed(model))
        stack.enter_context(torch.no_grad())
        model(*given[0], **given[1])
    return found


class Alone(nn.Module):
    """One block of a model, under its own name, and nothing around it.

    Args:
        model: The model, whose gates the copy keeps, and whose plan it shares.
        name: The name of the block's module.
        calls: What to call it with.
        plan: What the gates share.
    """

    def __init__(self, model: nn.Module, name: str, calls: Arguments, plan: Any) -> None:
        super().__init__()
        block = copy.deepcopy(model.get_submodule(name), {id(plan): plan})
        block.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in (*block.parameters(), *block.buffers()):
                if tensor.is_floating_point():  # positive: a variance may be among them
                    tensor.uniform_(0.01, 0.1, generator=generator)
                else:
                    tensor.zero_()
        for module in block.modules():  # tensors that are neither parameters nor buffers
            plain = {k: v for k, v in vars(module).items() if isinstance(v, Tensor)}
            vars(module).update({k: _some(v.shape, v.dtype) for k, v in plain.items()})
        self.calls, self.name = calls, name
        *around, last = name.split(".")
        holder: nn.Module = self
        for part in around:
            holder.add_module(part, nn.Module())
            holder = holder.get_submodule(part)
        holder.add_module(last, block)

    def forward(self) -> list[Any]:
        """All calls, one after the other."""
        block = self.get_submodule(self.name)
        return [block(*args, **kwargs) for args, kwargs in _with_numbers(self.calls)]


def _with_numbers(arguments: Any) -> Any:
    """Random numbers in the place of all tensors among them."""
    return tree_map(
        lambda value: _some(value.shape, value.dtype) if isinstance(value, Tensor) else value,
        arguments,
    )


def _some(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:  # not below zero: it may come out of a ReLU
        generator = torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=generator, device="cpu").abs().to(dtype)
    # A mask lets everything through; a number may be an index.
    return torch.full(shape, int(dtype is torch.bool), dtype=dtype, device="cpu")
