"""What a model holds, put back as it was: attributes, what these hold, and values of weights."""

from __future__ import annotations

import copy
import operator
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from itertools import islice
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.discovery.memory import memory_of
from stochastic_depth.discovery.operations import operation_of, tensors_in
from stochastic_depth.torch_private.tracing import DispatchMode

_CONTAINERS = frozenset((list, deque, set, dict, OrderedDict, defaultdict, Counter))
_LOOKED_THROUGH = 1000  # entries of a container: more are numbers, most often
_OF_THREADS = frozenset(("_thread", "threading", "_queue", "queue"))
_OF_MODULES = frozenset(vars(nn.Module()))  # what torch keeps: see `tables_of`
_FEW_BYTES = 2**28  # of weights: to copy them takes less than to look at every operation
_PACKAGE = __name__.partition(".")[0]


class Originals:
    """The values of a model's weights and tensor attributes, copied before they are written to.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        plain = [t for t in own_tensors(model) if type(t) in (Tensor, nn.Parameter)]
        plain = [t for t in plain if not t.is_meta and t.layout is torch.strided]
        self._before = [(tensor, tensor.detach()) for tensor in plain]  # on the same memory
        self._storages = {memory_of(tensor): tensor.untyped_storage() for tensor in plain}
        self._copies: dict[int, torch.UntypedStorage] = {}

    def note(self, written: Sequence[Tensor]) -> None:
        """These are written to now."""
        for tensor in written:
            memory = memory_of(tensor)
            if memory in self._storages and memory not in self._copies:
                self._copies[memory] = self._storages[memory].clone()

    def noting(self) -> AbstractContextManager[object]:
        """A context in which whatever is written to is noted before.

        Small models are copied whole; for a large one every operation is looked at.
        """
        if sum(storage.nbytes() for storage in self._storages.values()) > _FEW_BYTES:
            return _Noting(self)
        self._copies = {m: storage.clone() for m, storage in self._storages.items()} | self._copies
        return nullcontext()

    def restore(self) -> None:
        """Have them hold what they held before."""
        for memory, content in self._copies.items():
            if not torch.equal(_bytes(self._storages[memory]), _bytes(content)):
                self._storages[memory].copy_(content)
        for tensor, before in self._before:
            if memory_of(tensor) != memory_of(before) or tensor.shape != before.shape:
                tensor.data = before  # the forward has set `tensor.data`


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class _Noting(DispatchMode):
    def __init__(self, originals: Originals) -> None:
        super().__init__()
        self._originals = originals

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operation = operation_of(func)
        if operation.written:
            self._originals.note(tensors_in(operation.written_in(args, kwargs)))
        return func(*args, **kwargs)


def own_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Its parameters, and what else its attributes hold."""
    yield from model.parameters()
    for module in model.modules():
        values = [value for key, value in vars(module).items() if key not in _OF_MODULES]
        for held in (values, *map(_content, _containers(module))):
            yield from (v for v in islice(held, _LOOKED_THROUGH) if isinstance(v, Tensor))


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Attributes and hooks are afterwards the same objects, and no others are there.

    So is what is in the lists and dicts among the attributes and directly inside of these, and in
    the attributes of objects among them: there a module may keep what it has computed. Random
    generators among them are set back.

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
        for table, were in zip(tables, before, strict=True):
            for added in table.keys() - were.keys():
                del table[added]
            table.update(were)
        for set_state, state in generators:
            set_state(state)
        for value, content in contents:
            _refill(value, content)


def _generators(module: nn.Module) -> Iterator[tuple[Callable[[Any], Any], Any]]:
    """Of each random generator among its attributes what sets its state, and the state."""
    numpy: Any = sys.modules.get("numpy")
    for value in vars(module).values():
        if isinstance(value, torch.Generator):
            yield value.set_state, value.get_state()
        elif isinstance(value, random.Random):
            yield value.setstate, value.getstate()
        elif numpy and isinstance(value, numpy.random.RandomState):
            yield value.set_state, value.get_state()
        elif numpy and isinstance(value, numpy.random.Generator):
            source = value.bit_generator
            yield partial(setattr, source, "state"), copy.deepcopy(source.state)


def _containers(module: nn.Module) -> list[Any]:
    """What its attributes hold values in, and what is directly inside of these."""
    found = []
    for key, attribute in vars(module).items():
        outer = None if key in _OF_MODULES else _container(attribute)
        if outer is not None:
            inside = islice(outer.values() if isinstance(outer, dict) else outer, _LOOKED_THROUGH)
            found += [outer, *(value for value in inside if type(value) in _CONTAINERS)]
    return found


def _container(value: Any) -> Any:
    """A container, or the attributes of an object; None: neither.

    An object that other threads may work with is left alone, and so are gates.
    """
    kind = type(value)
    if kind in _CONTAINERS:
        return value
    if isinstance(value, Tensor | nn.Module | type | ModuleType):
        return None
    if str(kind.__module__).partition(".")[0] in (_PACKAGE, *_OF_THREADS):
        return None
    with suppress(Exception):  # a `__dict__` of its own
        attributes = value.__dict__
        if type(attributes) is dict:
            kinds = {type(each).__module__ for each in attributes.values()}
            return attributes if kinds.isdisjoint(_OF_THREADS) else None
    return None


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
        for key, value in zip(content[:number], content[number:], strict=True):
            container[key] = value  # what a Counter is updated with it counts
    else:
        (container.update if isinstance(container, set) else container.extend)(content)


def tables_of(module: nn.Module) -> tuple[dict[Any, Any], ...]:
    """Where a module keeps what it has."""
    flags = module._forward_hooks_with_kwargs, module._forward_pre_hooks_with_kwargs
    return vars(module), module._parameters, module._buffers, *hooks_of(module), *flags


def hooks_of(module: nn.Module) -> tuple[dict[Any, Any], ...]:
    """Its hooks on forwards."""
    return module._forward_hooks, module._forward_pre_hooks
