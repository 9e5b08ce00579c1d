"""What one watched forward was: values (nodes), module calls, and questions about their order.

A `Node` is one value that an operation made; nodes are numbered in the order in which they came
into being, so a branch lies in a window of numbers. A `Call` is one call of one module and holds
the nodes from `start` to `end`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from stochastic_depth.discovery.operations import Kind
from stochastic_depth.discovery.templates import Argument, Place, Template
from stochastic_depth.discovery.undisturbed import Mode

RECURRENT = (nn.RNNBase, nn.modules.rnn.RNNCellBase)
"""Modules whose steps count as one operation."""


@dataclass(slots=True, eq=False)
class Node:
    """One value: the operation that made it ("" for what came from outside) and its inputs."""

    index: int
    op: str
    kind: Kind
    inputs: tuple[int, ...]  # in the order of the operation's tensor arguments
    call: int  # the innermost module call that it was made in
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    operation: int = -1  # the first value that the same operation made
    parameter: str | None = None  # name, where the value is a parameter itself
    of_parameters: bool = False  # a parameter, or computed from nothing but parameters
    is_attribute: bool = False  # a tensor that a module holds, and no parameter or buffer
    fixed: bool = False  # computed from parameters, buffers and constants made on the spot
    meets_parameter: bool = False  # computed from parameters and from something else
    is_view: bool = False  # shares memory with its first input
    overwrites: tuple[int, ...] = ()  # values whose memory the operation changed in place
    replay: Callable[..., Any] | None = None  # the same with other tensors; of a move, with one


@dataclass(slots=True, eq=False)
class Call:
    """One call of one module."""

    index: int
    module: str
    kind: type
    parent: int | None
    start: int
    end: int = -1
    children: list[Call] = field(default_factory=list)  # the calls made directly in it
    inside: range = range(0)  # the numbers of it and of all calls in it
    inputs: tuple[int | None, ...] = ()  # nodes of its arguments' leaves; None: no tensor
    places: tuple[Argument, ...] = ()  # where these leaves stand
    shapes: tuple[torch.Size | None, ...] = ()  # and their own, where they are views of a value
    outputs: tuple[int | None, ...] = ()  # nodes of its output's leaves; None: no tensor
    template: Template | None = None
    signature: tuple[object, ...] = ()  # of its arguments, with their shapes
    form: tuple[tuple[Place, object], ...] = ()  # the kinds of its arguments
    effects: tuple[tuple[str, int], ...] = ()  # what it changed besides, and to which value

    def place_of(self, node: int) -> Argument:
        """Where a value stands among the arguments, of which it is one."""
        return self.places[self.inputs.index(node)]

    def children_within(self, first: int, last: int) -> list[Call]:
        """The calls made directly in it that ran between two nodes."""
        start = bisect_right(self.children, first, key=lambda child: child.end)
        stop = bisect_right(self.children, last, key=lambda child: child.start)
        return self.children[start:stop]

    def holds(self, node: int) -> bool:
        return self.start <= node < self.end

    def holds_any(self, nodes: Sequence[int]) -> bool:
        """Whether it made one of these nodes, which are in order."""
        first = bisect_left(nodes, self.start)
        return first < len(nodes) and nodes[first] < self.end


@dataclass(eq=False)
class Recording:
    """All nodes and calls of one forward, in order."""

    nodes: list[Node] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    mode: Mode = "eval"  # how the model was watched
    collectives: list[tuple[int, str, tuple[int, ...]]] = field(default_factory=list)
    """Where ranks talked to each other: behind which node, by which operation, and who."""

    def talk_in(self, call: Call, ranks: frozenset[int]) -> str | None:
        """The operation by which several of these ranks talk in a call; None: by none."""
        for node, name, group in self.collectives:
            if call.start <= node <= call.end and len(ranks.intersection(group)) > 1:
                return f"{name}, a collective"
        return None

    def reaches(self, earlier: int, later: int) -> bool:
        """Whether the later value was computed from the earlier one."""
        return later > earlier and earlier in self.behind([later], earlier)

    def behind(self, ends: Sequence[int], first: int) -> Iterator[int]:
        """The values that these ends were computed from, and the ends, from number `first` on."""
        nodes = self.nodes
        return reached(ends, lambda value: [i for i in nodes[value].inputs if i >= first])

    def data_of(self, node: Node) -> list[int]:
        """The inputs of an operation that are not made of weights and constants alone."""
        return [index for index in node.inputs if not self.nodes[index].fixed]

    def between(self, root: int, end: int) -> list[int]:
        """The nodes on the ways from `root` (left out) to `end` (included)."""
        inside = {root}
        for index in sorted(self.behind([end], root + 1)):
            if not inside.isdisjoint(self.nodes[index].inputs):
                inside.add(index)
        return sorted(inside - {root} | {end})

    def outside(self, nodes: Sequence[int], calls: Sequence[Call]) -> list[int]:
        """The nodes that none of these calls made. The calls ran one after the other."""
        starts = [call.start for call in calls]
        places = [(index, bisect_right(starts, index) - 1) for index in nodes]
        return [index for index, place in places if place < 0 or index >= calls[place].end]

    def enclosing(self, call: int | None) -> Iterator[Call]:
        """The call itself, then the calls around it, innermost first."""
        while call is not None:
            yield self.calls[call]
            call = self.calls[call].parent

    def innermost(self, first: int, last: int) -> Call:
        """The innermost call that holds the nodes `first` to `last`."""
        around = self.enclosing(self.nodes[last].call)
        return next((call for call in around if call.start <= first), self.calls[0])

    def is_state(self, node: int) -> bool:
        """Whether a value was written where the next call finds it: a buffer, or an attribute."""
        while overwritten := self.nodes[node].overwrites:
            node = overwritten[0]
        source = self.nodes[node]
        return source.op == "" and (source.fixed or source.is_attribute)

    def made_with(self, node: int) -> Iterator[int]:
        """The value itself and all others that the same operation made."""
        index = operation = self.nodes[node].operation
        while index < len(self.nodes) and self.nodes[index].operation == operation:
            yield index
            index += 1

    def module_at(self, node: int) -> str:
        """The module in whose forward a value was made."""
        return self.calls[self.nodes[node].call].module or "the model"

    @cached_property
    def consumers(self) -> list[list[int]]:
        """For each node, the nodes computed from it directly."""
        table: list[list[int]] = [[] for _ in self.nodes]
        for node in self.nodes:
            for source in node.inputs:
                if table[source][-1:] != [node.index]:
                    table[source].append(node.index)
        return table

    @cached_property
    def calls_of(self) -> dict[str, list[Call]]:
        """For each module, its calls in order."""
        table: dict[str, list[Call]] = {}
        for call in self.calls:
            table.setdefault(call.module, []).append(call)
        return table

    @cached_property
    def writes(self) -> list[Node]:
        """The nodes that were made by changing others in place."""
        return [node for node in self.nodes if node.overwrites]


def reached(starts: Iterable[int], onwards: Callable[[int], Iterable[int]]) -> Iterator[int]:
    """These values, and those that the ways from them lead to, each once.

    Args:
        starts: Where the ways begin.
        onwards: Where they lead to from a value.
    """
    waiting = list(starts)
    seen = set(waiting)
    while waiting:
        yield (value := waiting.pop())
        for other in onwards(value):
            if other not in seen:
                seen.add(other)
                waiting.append(other)
