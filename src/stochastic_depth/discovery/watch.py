"""Watch one forward: run the model once under a dispatch mode and write down every operation.

The model is left as it was: buffers, random generators, modes, hooks and gradients.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.discovery.example import Example
from stochastic_depth.discovery.operations import ADDITIONS, FILLED
from stochastic_depth.discovery.recording import Call, Node, Recording
from stochastic_depth.discovery.templates import Place, describe, form, order, signature
from stochastic_depth.discovery.undisturbed import undisturbed
from stochastic_depth.discovery.unmaterialised import is_unmaterialised, without_values
from stochastic_depth.torch_private import TorchDispatchMode, tree_leaves


def record(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    keep: frozenset[str] = frozenset(),
) -> Recording:
    """Run `model(*args, **kwargs)` once in eval mode and write down what happened.

    Args:
        model: left as it was.
        args: its positional arguments.
        kwargs: its keyword arguments.
        keep: names of modules whose tensors are kept for a comparison at the end; where there
            are any, the recording also says which operands of additions were all zeros.
    """
    watcher = Watcher(model, keep)
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        for name, module in model.named_modules():
            stack.callback(watcher.hook_into(name, module))
        stack.enter_context(torch.no_grad())
        stack.enter_context(watcher)
        model(*args, **kwargs)
    for call in watcher.recording.calls:
        call.unchanged = [
            {place for place, given in kept[0].items() if _same(given, out)}
            for kept in [watcher.kept.get(call.index, ({}, ()))]
            for out in kept[1]
        ]
    return watcher.recording


def watch_once(model: nn.Module, example: Example) -> Recording:
    """The recording of one forward; without values where the model has none."""
    if not is_unmaterialised(model):
        return record(model, *example)
    with without_values(model, example) as fake:
        return record(model, *fake)


class Watcher(TorchDispatchMode):
    """Writes every operation into a `Recording`.

    Tensors are not kept alive: a value is known by its tensor object while that lives. An
    operation in place makes a new value, which from then on stands for every tensor on that
    memory: a tensor's value is the newer of its own and the last that was written there.
    """

    def __init__(self, model: nn.Module, keep: frozenset[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = Recording()
        self.keep = keep
        self.kept: dict[int, tuple[dict[Place, Tensor], tuple[Any, ...]]] = {}
        self._stack: list[Call] = []
        self._parameters = {id(p): name for name, p in model.named_parameters()}
        self._buffers = {id(buffer) for buffer in model.buffers()}
        self._values: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._writes: dict[int, int] = {}

    def value(self, tensor: Tensor) -> int:
        """The node of a tensor as it is now."""
        known = self._values.get(id(tensor))
        if known is None or known[0]() is not tensor:
            return self._add(tensor, "", ()).index
        return max(known[1], self._writes.get(_memory(tensor), -1))

    def _add(self, tensor: Tensor, op: str, inputs: tuple[int, ...]) -> Node:
        nodes = self.recording.nodes
        parameter = None if op else self._parameters.get(id(tensor))
        fixed = bool(op) or parameter is not None or id(tensor) in self._buffers
        sources = [nodes[index] for index in inputs]
        made_of = [source.of_parameters for source in sources]
        node = Node(
            index=len(nodes),
            op=op,
            inputs=inputs,
            operation=len(nodes),
            call=self._stack[-1].index if self._stack else 0,
            shape=tensor.shape,
            dtype=tensor.dtype,
            parameter=parameter,
            of_parameters=parameter is not None or (bool(made_of) and all(made_of)),
            fixed=fixed and all(source.fixed for source in sources),
            meets_parameter=any(made_of) and not all(made_of),
        )
        for source in sources:
            node.ancestors |= source.ancestors | 1 << source.index
        nodes.append(node)
        self._values[id(tensor)] = (weakref.ref(tensor), node.index)
        return node

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        inputs = tuple(self.value(tensor) for tensor in tensors)
        if name in FILLED and not all(self.recording.nodes[i].of_parameters for i in inputs):
            inputs = ()  # what is as large as a weight still counts as made of weights alone
        written = _written(func, args, kwargs)
        overwrites = tuple(self.value(tensor) for tensor in written)
        zero: frozenset[int] = frozenset()
        if self.keep and name in ADDITIONS:
            zero = frozenset(i for i, tensor in enumerate(tensors) if not bool(tensor.any()))
        out = func(*args, **kwargs)
        first = len(self.recording.nodes)
        made = {id(leaf): leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)}
        for tensor in {**made, **{id(tensor): tensor for tensor in written}}.values():
            node = self._add(tensor, name, inputs)
            node.operation, node.overwrites, node.zero = first, overwrites, zero
        for tensor in written:
            self._writes[_memory(tensor)] = self._values[id(tensor)][1]
        return out

    def _nodes(self, value: Any) -> tuple[int | None, ...]:
        leaves = tree_leaves(value)
        return tuple(self.value(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves)

    def hook_into(self, name: str, module: nn.Module) -> Any:
        """Have the module report its calls; returns what takes the hooks out again."""

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._enter(name, module, args, kwargs)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            return self._leave(module, args, kwargs, output)

        first = module.register_forward_pre_hook(before, with_kwargs=True)
        last = module.register_forward_hook(after, with_kwargs=True)

        def out() -> None:
            first.remove()
            last.remove()

        return out

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        calls = self.recording.calls
        parent = self._stack[-1].index if self._stack else None
        given = dict([*enumerate(args), *kwargs.items()])
        # Before the call opens, so that its arguments count as made outside of it.
        arguments = {p: self.value(a) for p, a in given.items() if isinstance(a, Tensor)}
        leaves = self._nodes((args, kwargs))
        kind = getattr(type(module), "gated_from", type(module))
        call = Call(len(calls), name, kind, parent, len(self.recording.nodes))
        call.arguments, call.given, call.order = arguments, leaves, order(args, kwargs)
        # Now: a list among them may be longer when the call returns.
        call.signature, call.form = signature(args, kwargs), form(args, kwargs)
        calls.append(call)
        if parent is not None:
            self.recording.children.setdefault(parent, []).append(call)
        self._stack.append(call)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        call = self._stack[-1]
        if _hands_through(module, args, kwargs, output) and (
            self.value(output) in call.arguments.values()
        ):
            # Dropout in eval mode, Identity and their like return their very input. A value of
            # its own shows on which side of the addition such a module stands.
            output = torch.ops.aten.alias.default(output)
        leaves = tree_leaves(output)
        call.outputs = self._nodes(output)
        call.end = len(self.recording.nodes)
        call.template = describe(output, args, kwargs)
        if call.module in self.keep:
            given = {p: a for p, a in [*enumerate(args), *kwargs.items()] if isinstance(a, Tensor)}
            self.kept[call.index] = (given, tuple(leaves))
        self._stack.pop()
        return output


def _hands_through(module: nn.Module, args: Any, kwargs: Any, output: Any) -> bool:
    is_leaf = next(module.children(), None) is None
    given = [*args, *kwargs.values()]
    return is_leaf and isinstance(output, Tensor) and any(output is a for a in given)


def _memory(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return -id(tensor)  # sparse tensors and their like share no storage


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that the operation changes in place, by its schema."""
    if not func._schema.is_mutable:
        return []
    written: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[position] if position < len(args) else kwargs.get(argument.name)
        written += [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    return written


def _same(given: Tensor, out: Any) -> bool:
    """Equal by value, on values that prove something: finite and not all the same."""
    if not isinstance(out, Tensor) or out.shape != given.shape or out.dtype != given.dtype:
        return False
    if given.numel() < 2 or not given.dtype.is_floating_point:
        return False
    telling = bool(torch.isfinite(given).all()) and bool((given != given.flatten()[0]).any())
    return telling and torch.equal(given, out)
