"""What one watched forward was: values (nodes), module calls, and questions about their order.

A `Node` is one value that an operation made; nodes are numbered in the order in which they came
into being, so a branch is a window of numbers. A `Call` is one call of one module and holds the
nodes from `start` to `end`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch

from stochastic_depth.discovery.templates import Form, Place, Template


@dataclass(slots=True, eq=False)
class Node:
    """One value: the operation that made it ("" for what came from outside) and its inputs."""

    index: int
    op: str
    inputs: tuple[int, ...]  # in the order of the operation's tensor arguments
    operation: int  # the first value that the same operation made
    call: int  # the innermost module call that it was made in
    shape: torch.Size
    dtype: torch.dtype
    parameter: str | None = None  # name, where the value is a parameter itself
    of_parameters: bool = False  # a parameter, or computed from nothing but parameters
    fixed: bool = False  # computed from parameters, buffers and constants made on the spot
    meets_parameter: bool = False  # computed from parameters and from something else
    overwrites: tuple[int, ...] = ()  # values whose memory the operation changed in place
    ancestors: int = 0  # bit mask over node indices
    zero: frozenset[int] = frozenset()  # closed watch: positions of inputs that are all zeros


@dataclass(slots=True, eq=False)
class Call:
    """One call of one module."""

    index: int
    module: str
    kind: type
    parent: int | None
    start: int
    end: int = -1
    arguments: dict[Place, int] = field(default_factory=dict)  # tensors among its arguments
    given: tuple[int | None, ...] = ()  # nodes of its arguments' leaves; None: no tensor
    order: tuple[tuple[Place, int], ...] = ()  # how many leaves each argument has
    outputs: tuple[int | None, ...] = ()  # nodes of its output's leaves; None: no tensor
    template: Template | None = None
    signature: tuple[object, ...] = ()  # of its arguments, with their shapes
    form: Form = ()  # of its arguments, without
    unchanged: list[set[Place]] = field(default_factory=list)
    """For each leaf of the output, the arguments whose value it has (where tensors were kept)."""

    def holds(self, node: int) -> bool:
        return self.start <= node < self.end


@dataclass(eq=False)
class Recording:
    """All nodes and calls of one forward, in order."""

    nodes: list[Node] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    children: dict[int, list[Call]] = field(default_factory=dict)

    def is_ancestor(self, earlier: int, later: int) -> bool:
        return bool(self.nodes[later].ancestors >> earlier & 1)

    def between(self, root: int, end: int) -> list[int]:
        """The nodes on the ways from `root` (left out) to `end` (included)."""
        mask = self.nodes[end].ancestors
        found = [
            index
            for index in range(root + 1, end)
            if mask >> index & 1 and self.nodes[index].ancestors >> root & 1
        ]
        return [*found, end]

    def enclosing(self, call: int | None) -> Iterator[Call]:
        """The call itself, then the calls around it, innermost first."""
        while call is not None:
            yield self.calls[call]
            call = self.calls[call].parent

    def innermost(self, first: int, last: int) -> Call:
        """The innermost call that holds the nodes `first` to `last`."""
        for call in self.enclosing(self.nodes[last].call):
            if call.start <= first:
                return call
        return self.calls[0]

    @cached_property
    def consumers(self) -> list[list[int]]:
        """For each node, the nodes computed from it directly."""
        table: list[list[int]] = [[] for _ in self.nodes]
        for node in self.nodes:
            for source in set(node.inputs):
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

    def times_used(self) -> Counter[type]:
        """How many modules of each class were called."""
        return Counter({call.module: call.kind for call in self.calls}.values())
