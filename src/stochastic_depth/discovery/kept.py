"""What a model holds, put back as it was: attributes, what these hold, and weights."""

from __future__ import annotations

import copy
import operator
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.discovery.memory import memory_of
from stochastic_depth.discovery.operations import operation_of, tensors_in
from stochastic_depth.torch_private.tracing import TorchDispatchMode

_CONTAINERS = list, deque, dict, set
_OF_MODULES = frozenset(vars(nn.Module()))  # what torch keeps: see `tables_of`
_PACKAGE = __name__.partition(".")[0]


class Kept(TorchDispatchMode):
    """While it is entered, weights and attributes of a model are copied before they are written to.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        found = {memory_of(tensor): tensor for tensor in own_tensors(model)}
        self._tensors = {m: t for m, t in found.items() if m >= 0 and not _is_empty(t)}
        self._before: dict[int, torch.UntypedStorage] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch imports its compiler, which takes seconds, to hide this class from it."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operation = operation_of(func)
        if operation.written:
            for tensor in tensors_in(operation.written_in(args, kwargs)):
                memory = memory_of(tensor)
                if memory in self._tensors and memory not in self._before:
                    self._before[memory] = tensor.untyped_storage().clone()
        return func(*args, **kwargs)

    def put_back(self) -> None:
        """Have them hold what they held before."""
        for memory, before in self._before.items():
            self._tensors[memory].untyped_storage().copy_(before)


def own_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Its parameters, and what else its attributes hold."""
    yield from model.parameters()
    for module in model.modules():
        values = [value for key, value in vars(module).items() if key not in _OF_MODULES]
        for held in (values, *map(_content, _containers(module))):
            yield from (value for value in held if isinstance(value, Tensor))


def _is_empty(tensor: Tensor) -> bool:
    """Whether it has a shape and no values."""
    return tensor.untyped_storage().device.type == "meta"


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Attributes, weights, buffers and hooks are afterwards the same, and no others are there.

    So is what is in the lists and dicts among the attributes, and in objects among them: there a
    module may keep what it has computed.

    A scripted module keeps them where Python does not reach.
    """
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    tables: list[dict[Any, Any]] = [table for m in modules for table in tables_of(m)]
    before = [dict(table) for table in tables]
    containers = {id(value): value for module in modules for value in _containers(module)}
    contents = [(value, _content(value)) for value in containers.values()]
    generators = [state for module in modules for state in _generators(module)]
    try:
        yield
    finally:
        for set_state, state in generators:
            set_state(state)
        for value, content in contents:
            _refill(value, content)
        for table, were in zip(tables, before, strict=True):
            for added in table.keys() - were.keys():
                del table[added]
            table.update(were)


def _generators(module: nn.Module) -> Iterator[tuple[Callable[[Any], Any], Any]]:
    """Of each random generator among its attributes what sets its state, and the state."""
    for value in vars(module).values():
        if isinstance(value, torch.Generator):
            yield value.set_state, value.get_state()
        source: Any = getattr(value, "bit_generator", None)  # NumPy's
        if hasattr(source, "state"):
            yield partial(setattr, source, "state"), copy.deepcopy(source.state)


def _containers(module: nn.Module) -> Iterator[Any]:
    """What its attributes hold values in, and what is directly inside of these."""
    for key, attribute in vars(module).items():
        outer = None if key in _OF_MODULES else _container(attribute)
        if outer is not None:
            yield outer
            inside = outer.values() if isinstance(outer, dict) else outer
            yield from (value for value in inside if isinstance(value, _CONTAINERS))


def _container(value: Any) -> Any:
    """A container, or the attributes of an object; None: neither."""
    if isinstance(value, _CONTAINERS):
        return value
    package = type(value).__module__.partition(".")[0]
    if isinstance(value, Tensor | nn.Module | type | ModuleType) or package == _PACKAGE:
        return None
    attributes = getattr(value, "__dict__", None)
    return attributes if isinstance(attributes, dict) else None


def _content(container: Any) -> list[Any]:
    """Its values; of a dict its keys before them."""
    return [*container, *container.values()] if isinstance(container, dict) else [*container]


def _refill(container: Any, content: list[Any]) -> None:
    """Give a container its content back, where it has another."""
    now = _content(container)
    if len(now) == len(content) and all(map(operator.is_, now, content)):
        return
    container.clear()
    if isinstance(container, dict):
        number = len(content) // 2
        container.update(zip(content[:number], content[number:], strict=True))
    else:
        (container.update if isinstance(container, set) else container.extend)(content)


def tables_of(module: nn.Module) -> tuple[dict[Any, Any], ...]:
    """Where a module keeps what it has."""
    hooks = module._forward_hooks, module._forward_pre_hooks
    flags = module._forward_hooks_with_kwargs, module._forward_pre_hooks_with_kwargs
    return vars(module), module._parameters, module._buffers, *hooks, *flags
