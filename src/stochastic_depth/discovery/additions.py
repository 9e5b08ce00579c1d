"""Which additions of a recording are residual: `y = skip(x) + branch(x)`.

Two rules, both about the flow of data alone. *Identity*: one operand is, but for moves of its
elements, a value that the other operand was computed from by way of parameters. *Projection*:
one operand is affine in such a value (or a norm, or a pooling, of what is), the other is not.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from stochastic_depth.discovery.operations import (
    ADDITIONS,
    AFFINE,
    MAX_POOLS,
    MOVES,
    NORMS,
    PRODUCTS,
    SPLITS,
    SUMS,
)
from stochastic_depth.discovery.recording import Call, Recording


@dataclass(frozen=True, slots=True)
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
    found: list[Addition] = []
    skips: dict[int, int] = {}  # sum -> its skip operand, for those found so far
    for node in recording.nodes:
        if node.op not in ADDITIONS or len(node.inputs) != 2 or not node.dtype.is_floating_point:
            continue
        first, second = (recording.nodes[index] for index in node.inputs)
        if first.shape != node.shape or second.shape != node.shape:
            continue
        addition = _residual(recording, node.index, skips)
        if addition is not None:
            found.append(addition)
            skips[node.index] = addition.skip
    return found


def _residual(recording: Recording, node: int, skips: dict[int, int]) -> Addition | None:
    inputs = recording.nodes[node].inputs
    orders = ((1, inputs[0], inputs[1]), (0, inputs[1], inputs[0]))
    for projection in (False, True):
        for operand, skip, branch in orders:
            way = _way_back(recording, skip, branch, skips, projection=projection)
            if way is None:
                continue
            root, path = way[-1], tuple(recording.between(way[-1], branch))
            if not set(way).isdisjoint(path):
                continue  # skip and branch part only behind the root: a piece of an attention
            container = recording.innermost(path[0], node)
            affine = is_affine(recording, root, path)
            if projection and (affine or recording.nodes[node].call != container.index):
                continue
            if projection and container.parent is None and not _is_used(recording, node):
                continue  # two heads of the model, whose results are added
            return Addition(node, operand, skip, branch, root, path, container, affine)
    return None


def _way_back(
    recording: Recording, skip: int, branch: int, skips: dict[int, int], *, projection: bool
) -> list[int] | None:
    """The values from `skip` back to the first one that the branch was computed from.

    At each step the youngest of the values still to be explained is replaced by its inputs;
    where a single one is left, every way leads through it.
    """
    passable = AFFINE | NORMS | MAX_POOLS if projection else MOVES
    open_ends = {skip}
    way: list[int] = []
    while True:
        youngest = max(open_ends)
        way.append(youngest)
        if len(open_ends) == 1 and _computed_with_parameters(recording, youngest, branch):
            return way
        node = recording.nodes[youngest]
        data = {i for i in node.inputs if not recording.nodes[i].fixed}
        if projection and youngest in skips:
            data = {skips[youngest]}
        elif (
            node.op not in passable
            or node.op in SPLITS
            or not data
            or (node.op in PRODUCTS and len(data) > 1)
        ):
            return None
        open_ends = open_ends - {youngest} | data


def _computed_with_parameters(recording: Recording, root: int, branch: int) -> bool:
    if not recording.is_ancestor(root, branch):
        return False
    nodes = recording.nodes
    return any(nodes[index].meets_parameter for index in recording.between(root, branch))


def _is_used(recording: Recording, value: int) -> bool:
    """Whether something with parameters computes with it."""
    later = recording.nodes[value + 1 :]
    return any(node.meets_parameter and node.ancestors >> value & 1 for node in later)


def is_affine(recording: Recording, root: int, path: tuple[int, ...]) -> bool:
    """Whether the last of these values, all of them made from the root, is affine in it."""
    inside = {root, *path}
    for index in path:
        node = recording.nodes[index]
        dependent = [i for i in node.inputs if i in inside]
        if node.op not in AFFINE or (node.op not in SUMS and len(dependent) > 1):
            return False
    return True
