"""Which sums of a recording are residual: `y = skip(x) + branch(x)`.

Two rules, both about the flow of data alone. *Identity*: one operand is, but for moves of its
elements, a value that the other operand was computed from by way of parameters. *Projection*:
one operand is affine in such a value (or a norm, or a pooling, of what is), the other is not.
And where `y2 = x2 + g(y1)` is residual, `y1 = x1 + f(x2)` is, too, if a call takes x1 and x2 and
hands out y1 and y2: a *coupling* of two streams, as in RevNets (Gomez et al. 2017, equation 6).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import permutations, product, takewhile

import torch

from stochastic_depth.discovery import operations
from stochastic_depth.discovery.operations import Kind, is_real_or_complex
from stochastic_depth.discovery.recording import Call, Node, Recording, reached

_SKIPS = (operations.AFFINE | operations.NORMS | {Kind.MAX_POOL}) - {Kind.PART}


@dataclass(slots=True, eq=False)
class Addition:
    """A residual addition in a recording."""

    node: int  # the sum
    skip: int  # the operand that is not the branch
    root: int  # x, the value that skip and branch start from
    path: list[int]  # the values of the branch, in order, root left out
    block_call: Call  # the call that decides about it; first the innermost that holds all of it
    affine: bool = False  # the branch as a whole is affine in x
    branch_calls: list[Call] = field(default_factory=list)
    """The outermost calls inside of the block's that belong to the branch, in order."""
    left_out: list[str] = field(default_factory=list)
    """The modules of branches inside of this one, which are no branches of their own."""

    @property
    def branch(self) -> int:
        """The branch's last value."""
        return self.path[-1]

    def contains(self, other: Addition) -> bool:
        """Whether the other sum is a value of this branch."""
        position = bisect_left(self.path, other.node)
        return position < len(self.path) and self.path[position] == other.node

    def put_in(self, block_call: Call, recording: Recording) -> None:
        """Make it an addition of this call.

        A call inside of it that holds the sum, or that also made the root, is looked into: its
        parts are calls of the branch, not it.
        """
        path = set(self.path)

        def parts(call: Call) -> Iterator[Call]:
            for child in call.children_within(self.path[0], self.node):
                if not child.holds_any(self.path) and path.isdisjoint(child.outputs):
                    continue
                if child.holds(self.node) or child.holds(self.root):
                    yield from parts(child)
                else:
                    yield child

        self.block_call, self.branch_calls = block_call, list(parts(block_call))


class Ways:
    """Which values every way back from a value leads through: dominators, kept as a forest.

    A value's parent is the youngest value that all of its data comes through; a value that is made
    by an operation which the way may not pass has none.
    """

    def __init__(self) -> None:
        self._parent: list[int] = []

    def add(self, sources: Sequence[int]) -> None:
        """Add the next value, whose data comes from these; none: the way ends there."""
        self._parent.append(reduce(self._common, sources) if sources else -1)

    def from_value(self, value: int) -> Iterator[int]:
        """The value itself and all that every way back from it leads through, youngest first."""
        while value >= 0:
            yield value
            value = self._parent[value]

    def _common(self, one: int, other: int) -> int:
        """The youngest value that all ways back from both lead through, or -1."""
        while one != other:
            if min(one, other) < 0:
                return -1
            one, other = min(one, other), self._parent[max(one, other)]
        return one


class Search:
    """Goes through a recording once, value by value.

    Attributes:
        additions: The residual additions, in forward order.
    """

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.additions: list[Addition] = []
        self._skips = Ways()
        self._through: dict[int, int] = {}  # residual sum -> its skip operand
        for node in recording.nodes:
            found = self._residual(node) if node.kind is Kind.SUM else None
            data = self._data(node) if node.kind in _SKIPS else []
            if found is not None:
                for addition in filter(None, (self._coupled(found), found)):
                    addition.put_in(addition.block_call, recording)
                    self.additions.append(addition)
                self._through[node.index] = found.skip
                data = [found.skip]
            self._skips.add(data)

    def gated_skips(self) -> Iterator[str]:
        """The modules whose skip connection is multiplied by what they compute from their input.

        So does a highway, or a GRU's gate: without its branch nobody knows what is left.
        """
        calls, residual = self.recording.calls, {addition.node for addition in self.additions}
        for node in self.recording.nodes:
            call = calls[node.call]
            if node.kind is Kind.SUM and node.index in call.outputs and node.index not in residual:
                inputs = [index for index in call.inputs if index is not None]
                pairs = product(inputs, permutations(node.inputs, 2))
                if any(self._gates(call, root, *operands) for root, operands in pairs):
                    yield call.module

    def _gates(self, call: Call, root: int, skip: int, branch: int) -> bool:
        """Whether a sum is `gate(x) * x + branch(x)`, both computed in this call."""
        gated = self.recording.nodes[skip]

        def makes(value: int) -> bool:
            path = self._path(root, value)
            return bool(path) and path[0] >= call.start

        if gated.op != "mul" or not makes(branch):
            return False
        pairs = permutations(self.recording.data_of(gated), 2)
        return any(root in self._moved(one) and makes(other) for one, other in pairs)

    def is_affine(self, root: int, path: Sequence[int]) -> bool:
        """Whether the values on the ways from the root are affine in it, and made of no others."""
        nodes, inside = self.recording.nodes, {root, *path}
        return all(
            node.kind in operations.AFFINE and (data := self._data(node)) and inside >= {*data}
            for node in map(nodes.__getitem__, path)
        )

    def _data(self, node: Node) -> list[int]:
        """What an operation's data is made of; none where it is a product of several."""
        data = self.recording.data_of(node)
        return data if node.kind in operations.SUMS or len(data) == 1 else []

    def _residual(self, node: Node) -> Addition | None:
        nodes = self.recording.nodes
        if len(node.inputs) != 2 or not is_real_or_complex(node.dtype):
            return None
        if any(nodes[index].shape != node.shape for index in node.inputs):
            return None
        for projection, (skip, branch) in product((False, True), (node.inputs, node.inputs[::-1])):
            back = self._skips.from_value(skip) if projection else self._moved(skip)
            paths = ((root, self._path(root, branch)) for root in back)
            root, path = next((pair for pair in paths if pair[1]), (-1, []))
            found = self._checked(node, skip, root, path, projection=projection) if path else None
            if found is not None:
                return found
        return None

    def _moved(self, value: int) -> Iterator[int]:
        """The value, and those that it is but for moves of its elements."""
        nodes = self.recording.nodes
        node = nodes[value]
        yield value
        while node.kind is Kind.MOVE and node.inputs and not nodes[node.inputs[0]].fixed:
            node = nodes[node.inputs[0]]
            yield node.index

    def _path(self, root: int, branch: int) -> list[int]:
        """The values of a branch; none where no parameter takes part in it."""
        recording = self.recording
        if recording.nodes[branch].fixed or not recording.reaches(root, branch):
            return []
        path = recording.between(root, branch)
        meets = {index for index in path if recording.nodes[index].meets_parameter}
        if meets and any(recording.nodes[index].dtype is torch.int64 for index in path):
            meets &= self._by_value(root, path)
        return path if meets else []

    def _by_value(self, root: int, path: Sequence[int]) -> set[int]:
        """Those of a branch's values that are more than looked up by what the root comes to.

        An index says which, not what: an entry of a code book is not made of the value.
        """
        nodes, made = self.recording.nodes, {root}

        def onwards(value: int) -> list[int]:
            looks_up = nodes[value].op in operations.LOOK_UPS
            inputs = made.intersection(nodes[value].inputs)
            return [i for i in inputs if not (looks_up and nodes[i].dtype is torch.int64)]

        for index in path:
            if onwards(index):
                made.add(index)
        return made.intersection(reached(made.intersection(path[-1:]), onwards)) - {root}

    def _checked(
        self, node: Node, skip: int, root: int, path: list[int], *, projection: bool
    ) -> Addition | None:
        recording, branch = self.recording, path[-1]
        if recording.reaches(branch, skip):
            return None  # the branch has been added already
        if recording.nodes[branch].call == node.call and root in self._stream_of(branch):
            return None  # no branch, but the stream itself
        root, path = self._without_other_streams(node, root, path)
        if not any(recording.nodes[index].meets_parameter for index in path):
            return None

        def onwards(value: int) -> list[int]:
            through = self._through.get(value) if projection else None
            data = self._data(recording.nodes[value]) if through is None else [through]
            return [index for index in data if index > root]

        if not {root, *reached([skip], onwards)}.isdisjoint(path):
            return None  # skip and branch part only behind the root: a piece of an attention
        block_call = recording.innermost(path[0], node.index)
        affine = self.is_affine(root, path)
        if projection:
            if (
                affine
                or not self._is_own(node, block_call, path)
                or self._are_alike(root, skip, branch)
                or self._hands_out(block_call, path)
                or self._is_product(path)
            ):
                return None
            if block_call.parent is None and not any(
                recording.nodes[user].meets_parameter
                for user in reached(
                    recording.consumers[node.index], recording.consumers.__getitem__
                )
            ):
                return None  # two heads of the model, whose results are added
        return Addition(node.index, skip, root, path, block_call, affine)

    def _without_other_streams(
        self, node: Node, root: int, path: list[int]
    ) -> tuple[int, list[int]]:
        """Cut a branch off where it reads the sum of another stream.

        That is a residual sum whose skip connection does not start from the root, and which is
        used outside of the branch as well. A condition that a branch adds is none.

        Returns:
            The root and the values of what is left of the branch. Where that does not start from
            the root, it starts from the last such sum; and there are no values if another call
            made that: then the root is a bias that is added to attention's scores, say.
        """
        nodes, made, streams = self.recording.nodes, {root}, {root}
        inside = {*path, node.index}
        for index in path:
            if self._through.get(index, root) not in made and self._leaves(node, index, inside):
                streams.add(index)
            elif not made.isdisjoint(nodes[index].inputs):
                made.add(index)
        if len(streams) == 1:
            return root, path
        behind = set(streams)
        ends = {path[-1]} - streams
        for index in sorted(reached(ends, lambda value: {*nodes[value].inputs} - streams)):
            if not behind.isdisjoint(nodes[index].inputs):
                behind.add(index)
        rest = sorted(behind - streams)
        if any(root in nodes[index].inputs for index in rest):
            return root, rest
        last = max(streams)
        return last, rest if self.recording.calls[node.call].holds(last) else []

    def _stream_of(self, value: int) -> Iterator[int]:
        """The values that a residual sum's skip connections lead back to, one after the other."""
        while value in self._through:
            for before in self._moved(self._through[value]):
                yield (value := before)

    def _leaves(self, node: Node, value: int, inside: set[int]) -> bool:
        """Whether a sum in a branch is an output of a call, or read outside of the branch."""
        recording = self.recording
        around = recording.enclosing(recording.nodes[value].call)
        if any(value in call.outputs for call in around):
            return True
        users = reached(recording.consumers[value], recording.consumers.__getitem__)
        return any(user < node.index and user not in inside for user in users)

    def _coupled(self, found: Addition) -> Addition | None:
        """The other sum of a coupling, which then is what the branch of this one starts from."""
        recording, nodes = self.recording, self.recording.nodes
        call, path = recording.calls[nodes[found.node].call], set(found.path)
        for index in found.path:
            node, users = nodes[index], recording.consumers[index]
            stream = {index, *(user for user in users if nodes[user].kind is Kind.JOIN)}
            others = [value for value in node.inputs if value not in path]
            is_new = node.kind is Kind.SUM and index not in self._through
            if not is_new or node.call != call.index or len(others) != 1:
                continue
            if stream.isdisjoint(call.outputs) or not self._comes_from_outside(others[0], call):
                continue
            before = recording.between(found.root, index)[:-1]
            behind = recording.between(index, found.branch)
            if path == {*before, index, *behind}:
                coupled = Addition(index, others[0], found.root, before, found.block_call)
                found.root, found.path = index, behind
                return coupled
        return None

    def _comes_from_outside(self, value: int, call: Call) -> bool:
        """Whether it is an input of the call, or a part of one."""
        node = self.recording.nodes[value]
        while node.index >= call.start and node.kind in (Kind.MOVE, Kind.PART):
            node = self.recording.nodes[node.inputs[0]]
        return node.index < call.start and not node.fixed

    def _are_alike(self, root: int, skip: int, branch: int) -> bool:
        """Whether both operands are streams of their own, which branch off the root."""
        behind_root = takewhile(lambda value: value != root, self._skips.from_value(skip))
        return root in self._skips.from_value(branch) and any(
            value in self._through for value in behind_root
        )

    def _is_product(self, path: Sequence[int]) -> bool:
        """Whether a branch is a product of affine functions of its input: attention's scores."""
        nodes = [self.recording.nodes[index] for index in path]
        products = [node for node in nodes if node.kind in operations.PRODUCTS]
        several = any(len(self.recording.data_of(product)) > 1 for product in products)
        return several and all(node.kind in operations.AFFINE | operations.NORMS for node in nodes)

    def _hands_out(self, call: Call, path: Sequence[int]) -> bool:
        """Whether a residual sum of a branch is an output of the call: a stream beside this one."""
        return any(value in self._through and value in call.outputs for value in path)

    def _is_own(self, node: Node, block_call: Call, path: Sequence[int]) -> bool:
        """Whether the block's own forward takes the sum, or a module made for that.

        Such a module may have weights for the skip connection, none for the branch.
        """
        call = self.recording.calls[node.call]
        if call is block_call:
            return True
        has_branch = any(map(call.holds, self._through)) or any(
            call.holds(index) and self.recording.nodes[index].meets_parameter for index in path
        )
        return call.parent == block_call.index and not has_branch
