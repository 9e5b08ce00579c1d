"""Watch one forward: run the model once under a dispatch mode and write down every operation.

The model is left as it was: buffers, attributes, random generators, modes, hooks and gradients.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from stochastic_depth.discovery.effects import Before, memory_of
from stochastic_depth.discovery.example import Example
from stochastic_depth.discovery.operations import (
    FILLED,
    Kind,
    Term,
    kind_of,
    name_of,
    terms_of,
)
from stochastic_depth.discovery.recording import RECURRENT, Call, Node, Recording
from stochastic_depth.discovery.templates import describe, form, order, signature
from stochastic_depth.discovery.undisturbed import Mode, undisturbed
from stochastic_depth.discovery.unmaterialised import without_values
from stochastic_depth.torch_private.processes import ranks_that_talk
from stochastic_depth.torch_private.tracing import TorchDispatchMode
from stochastic_depth.torch_private.trees import tree_leaves

_SAME_SHAPE = frozenset("alias clone contiguous _to_copy lift_fresh add sum".split())


def record(model: nn.Module, example: Example, mode: Mode) -> Recording:
    """Call the model once, without gradients, and write down what happened.

    Args:
        model: It is left as it was.
        example: Its positional and keyword arguments.
        mode: As it trains, as it trains but for BatchNorm, or as in inference.
    """
    watcher = Watcher(model)
    watcher.recording.mode = mode
    args, kwargs = example
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model, mode))
        watcher.know(model)
        for name, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):  # its operations show all the same
                stack.callback(watcher.hook_into(name, module))
        stack.enter_context(without_collecting())
        stack.enter_context(torch.no_grad())
        stack.enter_context(watcher.noting_functions())
        stack.enter_context(watcher)
        model(*args, **kwargs)
    return watcher.recording


def watch_once(model: nn.Module, example: Example) -> Recording:
    """The recording of one forward; without values where the model has none.

    As the model trains, where it can run so: BatchNorm, which needs several values, and then
    everything else, are put into inference where it fails.
    """
    with without_values(model, example) as given:
        with suppress(Exception):  # what fails in inference, too, is raised there
            return record(model, given, "train")
        with suppress(Exception):
            return record(model, given, "train but BatchNorm")
        return record(model, given, "eval")


@dataclass(frozen=True, slots=True)
class _Schema:
    """What an operation's schema says, looked up once."""

    name: str
    written: tuple[tuple[int, str], ...]  # position and name of what it changes in place
    is_view: bool


class Watcher(TorchDispatchMode):
    """Writes every operation into a `Recording`.

    Tensors are not kept alive: a value is known by its tensor object while that lives. An
    operation in place makes a new value, which from then on stands for every tensor on that
    memory: a tensor's value is the newer of its own and the last that was written there.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = Recording()
        self._thread = threading.get_ident()
        self._open: list[tuple[Call, Before]] = []
        self._call = 0  # the number of the innermost one
        self._recurrent: Call | None = None  # a recurrent module: one operation for all its steps
        self._parameters = {id(p): name for name, p in model.named_parameters()}
        self._buffers: dict[int, str] = {}
        self._values: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._writes: dict[int, int] = {}
        self._schemas: dict[Any, _Schema] = {}
        self._stacked: dict[int, int] = {}  # what `stack` made: along which dimension

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch imports its compiler, which takes seconds, to hide this class from it."""
        return False

    def know(self, model: nn.Module) -> None:
        """Tell the watcher the model's buffers, as they are while it is watched."""
        self._buffers = {id(buffer): name for name, buffer in model.named_buffers()}

    def value(self, tensor: Tensor) -> int:
        """The node of a tensor as it is now."""
        known = self._values.get(id(tensor))
        if known is None or known[0]() is not tensor:
            return self._add(tensor, "", Kind.SOURCE, ()).index
        if not self._writes:
            return known[1]
        return max(known[1], self._writes.get(memory_of(tensor), -1))

    def _node(
        self, like: Tensor, op: str, kind: Kind, inputs: tuple[int, ...], parameter: str | None
    ) -> Node:
        nodes = self.recording.nodes
        fixed = bool(op) or parameter is not None or id(like) in self._buffers
        weights, data = parameter is not None, False
        for index in inputs:
            source = nodes[index]
            fixed = fixed and source.fixed
            if source.of_parameters:
                weights = True
            else:
                data = True
        node = Node(
            len(nodes),
            op,
            kind,
            inputs,
            len(nodes),
            self._call,
            like.shape,
            like.dtype,
            like.device,
        )
        node.parameter, node.fixed = parameter, fixed
        node.of_parameters, node.meets_parameter = weights and not data, weights and data
        nodes.append(node)
        return node

    def _add(self, tensor: Tensor, op: str, kind: Kind, inputs: tuple[int, ...]) -> Node:
        parameter = None if op else self._parameters.get(id(tensor))
        node = self._node(tensor, op, kind, inputs, parameter)
        reference = weakref.ref(tensor)
        self._values[id(tensor)] = (reference, node.index)
        return node

    def _note_collective(self, func: Any, args: tuple[Any, ...]) -> None:
        """Write down that ranks talk to each other, where they do."""
        ranks = ranks_that_talk(func, args)
        if ranks is not None:
            place = len(self.recording.nodes), func.overloadpacket.__name__
            self.recording.collectives.append((*place, ranks))

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        schema = self._schemas.get(func) or self._schemas.setdefault(func, _read(func))
        name, nodes = schema.name, self.recording.nodes
        if self._recurrent is not None:
            return func(*args, **kwargs)
        tensors = _tensors([*args, *kwargs.values()])
        inputs = tuple([self.value(tensor) for tensor in tensors])
        if name in FILLED and not all(nodes[i].of_parameters for i in inputs):
            inputs = ()  # what is as large as a weight still counts as made of weights alone
        written = _written(schema, args, kwargs) if schema.written else []
        overwrites = tuple([self.value(tensor) for tensor in written]) if written else ()
        terms = terms_of(name, args, kwargs)
        self._note_collective(func, args)
        out = func(*args, **kwargs)
        made = _tensors([out])
        kind = kind_of(name, args, kwargs, out)
        if terms is not None and made and self._is_sum(terms, made[0]):
            name, kind = "add", Kind.SUM
            inputs = tuple([self._term(term, made[0]) for term in terms])
        elif name in ("sum", "mean") and inputs and inputs[0] in self._stacked:
            total = self._unstacked(inputs[0], args, made[0])
            if total is not None:
                inputs, kind = (total,), Kind.MOVE if name == "sum" else kind
        first = len(nodes)
        replay = _replay(name, func, args, kwargs) if kind is Kind.MOVE else None
        results = {id(tensor): tensor for tensor in (*made, *written)} if written else {}
        for tensor in results.values() or made:
            node = self._add(tensor, name, kind, inputs)
            node.operation, node.overwrites = first, overwrites
            node.is_view, node.replay = schema.is_view, replay
        for tensor in written:
            self._writes[memory_of(tensor)] = self._values[id(tensor)][1]
        if not written:
            self._note_made(made)
        if name == "stack":
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            self._stacked[first] = dim % made[0].ndim
        return out

    def _note_made(self, made: Sequence[Tensor]) -> None:
        if self._open:
            self._open[-1][1].made += [self._values[id(tensor)][0] for tensor in made]

    def _is_sum(self, terms: Sequence[Term], out: Tensor) -> bool:
        """Not a product with a bias."""
        product = terms[1].op in ("mm", "bmm")
        first = terms[0].tensors[0]
        return not product or (first.shape == out.shape and id(first) not in self._parameters)

    def _term(self, term: Term, out: Tensor) -> int:
        """The node of one term of a sum; a product in it counts as an operation of its own."""
        inputs = tuple([self.value(tensor) for tensor in term.tensors])
        if not term.op:
            return inputs[0]
        node = self._node(out, term.op, kind_of(term.op, term.tensors, {}, out), inputs, None)
        if term.op not in ("mm", "bmm"):
            node.shape = _broadcast(term.tensors)
        return node.index

    def _unstacked(self, stack: int, args: tuple[Any, ...], out: Tensor) -> int | None:
        """The sum of tensors that were stacked before, as additions of one after the other.

        Returns:
            The node of the sum; None where it goes along another dimension.
        """
        stacked, dim = self.recording.nodes[stack], self._stacked[stack]
        along = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
        if [d % (out.ndim + 1) for d in along] != [dim] or out.ndim + 1 != len(stacked.shape):
            return None
        total, *parts = stacked.inputs
        for part in parts:
            total = self._node(out, "add", Kind.SUM, (total, part), None).index
        return total

    @contextmanager
    def noting_functions(self) -> Iterator[None]:
        """While every `torch.autograd.Function` shows: it may do something else in the backward."""
        kind = torch.autograd.Function
        original = kind.__dict__["apply"]

        def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            out = original.__get__(None, cls)(*args, **kwargs)
            if threading.get_ident() == self._thread:
                self._note_function(cls, out)
            return out

        kind.apply = classmethod(apply)
        try:
            yield
        finally:
            kind.apply = original

    def _note_function(self, kind: Any, out: Any) -> None:
        if kind is CheckpointFunction:  # it does the same again
            return
        for tensor in _tensors([out]):
            self._add(tensor, "autograd_function", Kind.LINEAR, (self.value(tensor),))

    def _is_constant(self, tensor: Tensor) -> bool:
        return self.recording.nodes[self.value(tensor)].fixed

    def _nodes(self, value: Any) -> tuple[int | None, ...]:
        if isinstance(value, Tensor):
            return (self.value(value),)
        leaves = tree_leaves(value)
        return tuple([self.value(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves])

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
        parent = self._open[-1][0].index if self._open else None
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
        del given  # it refers to the arguments, and references are counted
        self._open.append((call, Before(module, args, kwargs)))
        self._call = call.index
        if self._recurrent is None and isinstance(module, RECURRENT):
            self._recurrent = call

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        call, before = self._open[-1]
        results = _tensors(tree_leaves(output))
        if self._recurrent is call:
            self._recurrent = None
            inputs = tuple(i for i in self._nodes([args, kwargs, *module.parameters()]) if i)
            for tensor in results:
                self._add(tensor, "recurrence", Kind.OTHER, inputs)
        if _hands_through(module, args, kwargs, output) and (
            self.value(output) in call.arguments.values()
        ):
            # Dropout of rate 0, Identity and their like return their very input. A value of
            # its own shows on which side of the addition such a module stands.
            output = torch.ops.aten.alias.default(output)
        call.outputs = self._nodes(output)
        call.end = len(self.recording.nodes)
        call.template = describe(output, args, kwargs)
        call.effects = tuple(
            (f"{effect} (in {call.module or 'the model'})", -1 if v is None else self.value(v))
            for effect, v in before.effects(
                module, args, kwargs, results, is_constant=self._is_constant
            )
        )
        self._open.pop()
        self._call = call.parent or 0
        return output


@contextmanager
def without_collecting() -> Iterator[None]:
    """While Python looks for no garbage: a recording is many objects, and none of them is any."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _read(func: Any) -> _Schema:
    schema = func._schema
    written = tuple(
        (place, argument.name)
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    shares = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return _Schema(name_of(func), written, shares)


def _tensors(values: Any) -> list[Tensor]:
    """The tensors among an operation's arguments or results, in order."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [part for part in value if isinstance(part, Tensor)]
    return found


def _broadcast(tensors: Sequence[Tensor]) -> torch.Size:
    """The shape of their product; torch's own function imports its compiler."""
    sizes = zip_longest(*(tensor.shape[::-1] for tensor in tensors), fillvalue=1)
    return torch.Size([max(own) if min(own) else 0 for own in sizes][::-1])


def _written(schema: _Schema, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an operation changes in place."""
    given = [args[n] if n < len(args) else kwargs.get(key) for n, key in schema.written]
    return _tensors(given)


def _replay(name: str, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What moves the elements of another tensor alike; None where all stay where they are."""
    if name in _SAME_SHAPE:
        return None
    rest = args[1:]
    return lambda tensor: func(tensor, *rest, **kwargs)


def _hands_through(module: nn.Module, args: Any, kwargs: Any, output: Any) -> bool:
    if not isinstance(output, Tensor) or module._modules:
        return False
    return any(output is given for given in [*args, *kwargs.values()])
