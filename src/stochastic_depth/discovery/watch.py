"""What is written down while a model runs once: every operation, and every call of a module."""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from stochastic_depth.discovery import operations
from stochastic_depth.discovery.effects import Before, references
from stochastic_depth.discovery.kept import Originals, own_tensors
from stochastic_depth.discovery.memory import Writes
from stochastic_depth.discovery.operations import Kind, is_real_or_complex
from stochastic_depth.discovery.recording import RECURRENT, Call, Node, Recording
from stochastic_depth.discovery.templates import describe, kind_of_value, placed_leaves, signature
from stochastic_depth.discovery.undisturbed import Mode
from stochastic_depth.torch_private.processes import ranks_that_talk
from stochastic_depth.torch_private.tracing import DispatchMode
from stochastic_depth.torch_private.trees import tree_leaves

# The kinds of operations that are repeated with other values: to see where elements move to, and
# whether zeros stay zeros.
_REPLAYED = frozenset({Kind.MOVE, Kind.OTHER, Kind.SHIFT, Kind.NORM})


class Watcher(DispatchMode):
    """Writes every operation into a `Recording`.

    Tensors are not kept alive: a value is known by its tensor object while that lives. An
    operation in place makes a new value, which from then on stands for every tensor on that
    memory; where it changed a part of one, for that part.
    """

    def __init__(self, model: nn.Module, mode: Mode, originals: Originals) -> None:
        super().__init__()
        self.recording = Recording(mode=mode)
        self._originals = originals
        self._open: list[Before] = []  # the calls that are under way, outermost first
        self._recurrent: Call | None = None  # a recurrent module: one operation for all its steps
        self._attributes = {id(tensor) for tensor in own_tensors(model)}
        self._parameters: dict[int, str | None] = {id(b): None for b in model.buffers()}
        self._parameters |= {id(p): name for name, p in model.named_parameters()}
        self._values: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._writes = Writes()
        self._shown: list[int] = []  # how often what a hook sees was referred to before
        self._reads: list[int] = []  # where a Python number was made of a tensor
        self._stacked: dict[int, int] = {}  # what `stack` made: along which dimension

    def __exit__(self, *error: Any) -> None:
        """Nothing is seen from here on."""
        if self._recurrent is None:  # in which nothing is seen either
            super().__exit__(*error)  # type: ignore[no-untyped-call]

    def value(self, tensor: Tensor) -> int:
        """The node of a tensor as it is now."""
        known = self._values.get(id(tensor))
        if known is None or known[0]() is not tensor:
            node = self._add(tensor, "", Kind.SOURCE, ())
            node.parameter = self._parameters.get(id(tensor))
            node.of_parameters = node.parameter is not None
            node.fixed = id(tensor) in self._parameters
            node.is_attribute = id(tensor) in self._attributes
            return node.index
        last, parts = self._writes.since(tensor, known[1])
        if parts:
            last = self._add(tensor, "slice_scatter", Kind.OTHER, (last, *parts)).index
            self.recording.nodes[last].is_view = True
        elif last > known[1] and self.recording.nodes[last].shape != tensor.shape:
            last = self._seen_otherwise(tensor, last).index
        return last

    def _seen_otherwise(self, tensor: Tensor, written: int) -> Node:
        """A tensor's value, all of which was written by way of another view."""
        like = self.recording.nodes[written]
        is_part = like.shape.numel() > tensor.numel()
        node = self._add(tensor, "view", Kind.PART if is_part else Kind.MOVE, (written,))
        node.is_view, node.replay = True, partial(torch.reshape, shape=tensor.shape)
        return node

    def _add(self, tensor: Tensor, op: str, kind: Kind, inputs: tuple[int, ...]) -> Node:
        """The tensor's value from now on."""
        node = self._node(tensor, op, kind, inputs)
        self._values[id(tensor)] = weakref.ref(tensor), node.index
        return node

    def _node(self, like: Tensor, op: str, kind: Kind, inputs: tuple[int, ...]) -> Node:
        """A value in the form of a tensor."""
        nodes, dtype = self.recording.nodes, like.dtype
        call = self._open[-1].call.index if self._open else 0
        sources = [nodes[index] for index in inputs]
        of_parameters = [source.of_parameters for source in sources]
        weights, data = any(of_parameters), not all(of_parameters)
        if kind in operations.PRODUCTS and op != "mul" and not weights:  # a matrix, no parameter
            weights = any(source.fixed and len(source.shape) > 1 for source in sources)
        if sources and not is_real_or_complex(dtype) and is_real_or_complex(sources[0].dtype):
            kind = Kind.OTHER  # it rounds
        node = Node(len(nodes), op, kind, inputs, call, like.shape, dtype, like.device)
        node.operation, node.fixed = node.index, all(source.fixed for source in sources)
        node.of_parameters, node.meets_parameter = weights and not data, weights and data
        nodes.append(node)
        return node

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operation = operations.operation_of(func)
        name, kind, replay = operation.name, operation.kind, None
        tensors = operations.tensors_in((*args, *kwargs.values()) if kwargs else args)
        inputs = tuple([self.value(tensor) for tensor in tensors])
        written = operations.tensors_in(operation.written_in(args, kwargs))
        overwrites = tuple([self.value(tensor) for tensor in written]) if written else ()
        if written:
            self._originals.note(written)
        if not operation.is_local and (ranks := ranks_that_talk(func, args)) is not None:
            place = len(self.recording.nodes), func.overloadpacket.__name__
            self.recording.collectives.append((*place, ranks))
        if name == "lift_fresh":  # of a new constant
            inputs = ()
        elif name == "_local_scalar_dense":
            self._reads.append(len(self.recording.nodes))
        out = func(*args, **kwargs)
        made = [out] if isinstance(out, Tensor) else operations.tensors_in((out,))
        name = operations.name_of_made(name, inputs, out)
        if operation.depends:
            name, kind, inputs = self._as_called(name, args, kwargs, inputs, made[0])
        if name == "div" or (kind in _REPLAYED and not (kind is Kind.MOVE and operation.stays)):
            replay = operations.replay_of(func, args, kwargs, len(inputs))
        first = len(self.recording.nodes)
        for tensor in {id(t): t for t in (*made, *written)}.values() if written else made:
            node = self._add(tensor, name, kind, inputs)
            node.operation, node.overwrites = first, overwrites
            node.is_view, node.replay = operation.is_view, replay
        for tensor in written:
            self._writes.note(tensor, self._values[id(tensor)][1])
        if self._open and not written:
            self._open[-1].made += [self._values[id(tensor)][0] for tensor in made]
        return out

    def _as_called(
        self, name: str, args: tuple[Any, ...], kwargs: Any, inputs: tuple[int, ...], out: Tensor
    ) -> tuple[str, Kind, tuple[int, ...]]:
        """Name, kind and inputs of an operation that depend on what it is called with."""
        nodes = self.recording.nodes
        if name in operations.FILLED and not all(nodes[index].of_parameters for index in inputs):
            return name, Kind.OTHER, ()  # as large as a weight is: made of weights alone
        if name in ("cat", "stack"):
            along = kwargs.get("dim", (*args, 0)[1]) % out.ndim
            if name == "stack" or all(nodes[index].shape[along:][:1] == (1,) for index in inputs):
                self._stacked[len(nodes)] = along
                return "stack", Kind.JOIN, inputs
        if name in ("sum", "mean") and inputs[0] in self._stacked:
            total = self._unstacked(inputs[0], (*args, ())[1], out)
            if total is not None:
                return name, Kind.MOVE if name == "sum" else Kind.LINEAR, (total,)
        terms = operations.terms_of(name, args, kwargs)
        if terms is not None and self._is_sum(terms, out):
            return "add", Kind.SUM, tuple([self._term(term, out) for term in terms])
        return name, operations.kind_of(name, args, kwargs), inputs

    def _is_sum(self, terms: Sequence[operations.Term], out: Tensor) -> bool:
        """Not a product with a bias."""
        product = terms[1].op in ("mm", "bmm")
        first = terms[0].tensors[0]
        return not product or (first.shape == out.shape and self._parameters.get(id(first)) is None)

    def _term(self, term: operations.Term, out: Tensor) -> int:
        """The node of one term of a sum; a product in it counts as an operation of its own."""
        inputs = tuple([self.value(tensor) for tensor in term.tensors])
        if not term.op:
            return inputs[0]
        node = self._node(out, term.op, operations.kind_of(term.op, term.tensors, {}), inputs)
        if term.op not in ("mm", "bmm"):
            node.shape = torch.broadcast_tensors(*term.tensors)[0].shape
        return node.index

    def _unstacked(self, stack: int, along: Any, out: Tensor) -> int | None:
        """The sum of tensors that were stacked before, as additions of one after the other.

        Returns:
            The node of the sum; None where it goes along another dimension.
        """
        stacked, ndim = self.recording.nodes[stack], out.ndim + 1
        if [d % ndim for d in along or ()] != [self._stacked[stack]] or len(stacked.shape) != ndim:
            return None
        total, *parts = [self._squeezed(part, out) for part in stacked.inputs]
        for part in parts:
            total = self._node(out, "add", Kind.SUM, (total, part)).index
        return total

    def _squeezed(self, part: int, out: Tensor) -> int:
        """A tensor that was joined with others, in the form of their sum."""
        if self.recording.nodes[part].shape == out.shape:
            return part
        node = self._node(out, "squeeze", Kind.MOVE, (part,))
        node.replay = partial(torch.reshape, shape=out.shape)
        return node.index

    def note_functions(self) -> Callable[[], None]:
        """Have every `torch.autograd.Function` show: it may do something else in the backward.

        Returns what ends it.
        """
        kind, thread = torch.autograd.Function, threading.get_ident()
        original = kind.__dict__["apply"]

        def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            # A checkpoint does the same again.
            if threading.get_ident() != thread or cls is CheckpointFunction:
                return original.__get__(None, cls)(*args, **kwargs)
            inputs = tuple(map(self.value, operations.tensors_in(args)))
            start = len(self.recording.nodes)
            out = original.__get__(None, cls)(*args, **kwargs)
            for tensor in operations.tensors_in((out,)):
                self._add_function(tensor, inputs, start)
            return out

        kind.apply = classmethod(apply)
        return lambda: setattr(kind, "apply", original)

    def _add_function(self, out: Tensor, inputs: tuple[int, ...], start: int) -> None:
        """What an `autograd.Function` made; of its arguments, where nobody sees how (a kernel)."""
        nodes, made = self.recording.nodes, self.value(out)
        seen = {i for index in self.recording.behind([made], start) for i in nodes[index].inputs}
        if made < start or not inputs or not seen.isdisjoint(inputs):
            self._add(out, "autograd_function", Kind.LINEAR, (made,))
        else:
            self._add(out, "unseen_kernel", Kind.OTHER, (*inputs, made))

    def _is_constant(self, tensor: Tensor) -> bool:
        return self.recording.nodes[self.value(tensor)].fixed

    def _node_of(self, leaf: Any) -> int | None:
        return self.value(leaf) if isinstance(leaf, Tensor) else None

    def look(self, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        """A module's hooks are about to see its arguments, or its output."""
        self._shown = references((args, kwargs, output))

    def enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A module is called."""
        is_kept = any(map(operator.gt, references((args, kwargs)), self._shown))
        calls = self.recording.calls
        parent = self._open[-1].call.index if self._open else None
        # Now: its arguments count as made outside of it, and a list may be longer when it returns.
        placed = [
            (place, self._node_of(leaf), leaf.shape if isinstance(leaf, Tensor) else None)
            for place, leaf in placed_leaves(args, kwargs)
        ]
        kind = getattr(type(module), "gated_from", type(module))
        call = Call(len(calls), name, kind, parent, len(self.recording.nodes))
        call.places, call.inputs, call.shapes = zip(*placed, strict=True) if placed else ((),) * 3
        call.signature = signature(args, kwargs)
        call.form = tuple([(p, kind_of_value(v)) for p, v in [*enumerate(args), *kwargs.items()]])
        calls.append(call)
        if parent is not None:
            calls[parent].children.append(call)
        self._open.append(Before(call, module, [*args, *kwargs.values()]))
        self._open[-1].is_kept = is_kept
        if self._recurrent is None and isinstance(module, RECURRENT):
            if not kind.__module__.startswith("torch."):  # a class of one's own may write to them
                self._originals.note([*module.parameters()])
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._recurrent = call

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """The call returns."""
        before = self._open[-1]
        before.is_kept |= any(map(operator.gt, references((args, kwargs, output)), self._shown))
        call, results = before.call, operations.tensors_in(tree_leaves(output))
        if self._recurrent is call:
            self._recurrent = None
            self.__enter__()  # type: ignore[no-untyped-call]
            weights = map(self.value, module.parameters())
            inputs = (*(node for node in call.inputs if node is not None), *weights)
            for tensor in results:
                self._add(tensor, "recurrence", Kind.OTHER, inputs)
        is_single = isinstance(output, Tensor) and not module._modules
        if is_single and self.value(output) in call.inputs:
            # Dropout of rate 0, Identity and their like return their very input. A value of its
            # own shows on which side of the addition such a module stands.
            output = torch.ops.aten.alias.default(output)
        call.outputs = tuple(map(self._node_of, tree_leaves(output)))
        call.end = len(self.recording.nodes)
        call.inside = range(call.index, len(self.recording.calls))
        reads_values = any(call.start <= place <= call.end for place in self._reads)
        call.template = describe(output, args, kwargs, reads_values=reads_values)
        call.effects = tuple(
            (f"{effect} (in {call.module or 'the model'})", -1 if v is None else self.value(v))
            for effect, v in before.effects(results, self._is_constant)
        )
        if before.is_kept:
            call.effects += (("what its hooks keep", -1),)
        self._open.pop()
        if self._open:
            self._open[-1].changed |= before.changed
        return output
