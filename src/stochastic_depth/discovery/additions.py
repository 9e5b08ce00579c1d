"""Which sums of a recording are residual: `y = skip(x) + branch(x)`.

Two rules, both about the flow of data alone. *Identity*: one operand is, but for moves of its
elements, a value that the other operand was computed from by way of parameters. *Projection*:
one operand is affine in such a value (or a norm, or a pooling, of what is), the other is not.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

from stochastic_depth.discovery.operations import AFFINE, NORMS, SUMS, Kind
from stochastic_depth.discovery.recording import Call, Node, Recording
from stochastic_depth.discovery.ways import Ways

_SKIPS = (AFFINE | NORMS | {Kind.MAX_POOL}) - {Kind.PART}


@dataclass(frozen=True, slots=True, eq=False)
class Addition:
    """A residual addition in a recording."""

    node: int  # the sum
    operand: int  # position of the branch among the sum's operands
    skip: int  # the other operand
    branch: int  # the branch's last value
    root: int  # x, the value that skip and branch start from
    path: tuple[int, ...]  # the values of the branch, in order, root left out
    container: Call  # the innermost call that holds all of the branch and the sum
    affine: bool  # the branch as a whole is affine in x

    def contains(self, other: Addition) -> bool:
        """Whether the other sum is a value of this branch."""
        position = bisect_left(self.path, other.node)
        return position < len(self.path) and self.path[position] == other.node


def residual_additions(recording: Recording) -> list[Addition]:
    """All residual additions, in forward order."""
    return Search(recording).additions


class Search:
    """Goes through a recording once, value by value.

    Attributes:
        additions: What was found.
        affine: For each value, through which others it is an affine function of all its data.
    """

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.additions: list[Addition] = []
        self.affine = Ways()
        self._skips = Ways()
        self._through: dict[int, int] = {}  # residual sum -> its skip operand
        for node in recording.nodes:
            found = self._residual(node) if node.kind is Kind.SUM else None
            data = self._data(node)
            self.affine.add(data if node.kind in AFFINE else ())
            if found is not None:
                self.additions.append(found)
                self._through[node.index] = found.skip
                data = [found.skip]
            self._skips.add(data if node.kind in _SKIPS else ())

    def _data(self, node: Node) -> list[int]:
        """What an operation's data is made of; none where it is a product of several."""
        data = [index for index in node.inputs if not self.recording.nodes[index].fixed]
        return data if node.kind in SUMS or len(data) == 1 else []

    def _residual(self, node: Node) -> Addition | None:
        nodes = self.recording.nodes
        if len(node.inputs) != 2 or not node.dtype.is_floating_point:
            return None
        if any(nodes[index].shape != node.shape for index in node.inputs):
            return None
        one, other = node.inputs
        for projection in (False, True):
            for operand, skip, branch in ((1, one, other), (0, other, one)):
                back = self._skips.from_value(skip) if projection else self._moved(skip)
                for root in back:
                    path = self._path(root, branch)
                    if not path:
                        continue
                    found = self._checked(node, operand, skip, root, path, projection=projection)
                    if found is not None:
                        return found
                    break
        return None

    def _moved(self, value: int) -> Iterator[int]:
        """The value, and those that it is but for moves of its elements."""
        node = self.recording.nodes[value]
        yield value
        while node.kind is Kind.MOVE and not self.recording.nodes[node.inputs[0]].fixed:
            node = self.recording.nodes[node.inputs[0]]
            yield node.index

    def _path(self, root: int, branch: int) -> list[int]:
        """The values of a branch; none where no parameter takes part in it."""
        recording = self.recording
        if recording.nodes[branch].fixed or not recording.reaches(root, branch):
            return []
        path = recording.between(root, branch)
        return path if any(recording.nodes[index].meets_parameter for index in path) else []

    def _checked(
        self, node: Node, operand: int, skip: int, root: int, path: list[int], *, projection: bool
    ) -> Addition | None:
        recording, branch = self.recording, path[-1]
        if recording.reaches(branch, skip):
            return None  # the branch has been added already
        if not self._ways(skip, root, projection=projection).isdisjoint(path):
            return None  # skip and branch part only behind the root: a piece of an attention
        container = recording.innermost(path[0], node.index)
        affine = self.affine.leads_through(branch, root)
        if projection:
            if affine or not self._is_own(node, container):
                return None
            if container.parent is None and not self._is_used(node.index):
                return None  # two heads of the model, whose results are added
        return Addition(node.index, operand, skip, branch, root, tuple(path), container, affine)

    def _ways(self, skip: int, root: int, *, projection: bool) -> set[int]:
        """All values on the ways back from the skip connection to the root."""
        found, waiting = {skip, root}, [skip]
        while waiting:
            node = self.recording.nodes[waiting.pop()]
            through = self._through.get(node.index) if projection else None
            for index in self._data(node) if through is None else [through]:
                if index > root and index not in found:
                    found.add(index)
                    waiting.append(index)
        return found

    def _is_own(self, node: Node, container: Call) -> bool:
        """Whether the sum is taken in the container's own forward, or by a module made for it."""
        call = self.recording.calls[node.call]
        if call is container:
            return True
        return call.parent == container.index and not any(
            inside.meets_parameter for inside in self.recording.nodes[call.start : call.end]
        )

    def _is_used(self, value: int) -> bool:
        """Whether something with parameters computes with it."""
        seen, waiting = {value}, [value]
        while waiting:
            for user in self.recording.consumers[waiting.pop()]:
                if self.recording.nodes[user].meets_parameter:
                    return True
                if user not in seen:
                    seen.add(user)
                    waiting.append(user)
        return False
