"""Where a branch can be multiplied, and the parameters that can take the factor over.

Two questions about the way from the branch's modules to the sum. *Scalable*: is the branch, as a
function of what its last modules hand out, homogeneous of degree one, so that multiplying there
multiplies the branch? *Foldable*: does every way back from the sum meet an operation that is
affine in its own parameters, so that the plain model can carry the factor in its weights?
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from stochastic_depth.discovery.additions import Addition
from stochastic_depth.discovery.grouping import Site
from stochastic_depth.discovery.operations import (
    HOMOGENEOUS,
    NORMS,
    POSITIVE,
    PRODUCTS,
    SUMS,
    ZERO_AT_ZERO,
    Kind,
)
from stochastic_depth.discovery.recording import Node, Recording
from stochastic_depth.discovery.ways import reached

# What multiplying the ends of a branch by s multiplies a value by: a degree n >= 0 stands for
# s ** n. One value that is not multiplied so is zero where they are, of another that is not known.
_VANISHES, _UNKNOWN = -1, -2


def _degree(node: Node, given: Sequence[int]) -> int:
    """The degree of an operation's result, from those of its inputs."""
    if not any(given):
        return 0
    zeros, product = [degree not in (0, _UNKNOWN) for degree in given], sum(given)
    if node.kind in SUMS:
        if len(set(given)) == 1:
            return given[0]
        return _VANISHES if all(zeros) else _UNKNOWN
    if node.kind in PRODUCTS and len(given) > 2:
        bias = given[0] if node.op in ("addmm", "baddbmm") else given[2]
        return bias if min(given) >= 0 and 2 * bias == product else _UNKNOWN
    if node.kind in PRODUCTS:
        if min(given) >= 0:
            return product
        return _VANISHES if any(zeros) else _UNKNOWN
    if node.kind in HOMOGENEOUS | POSITIVE and not any(given[1:]):
        return given[0]
    if node.kind in HOMOGENEOUS | POSITIVE or node.op in ZERO_AT_ZERO:
        return _VANISHES if zeros[0] else _UNKNOWN
    return _UNKNOWN


class Ends(NamedTuple):
    """Where a branch ends."""

    scaled: tuple[tuple[int, frozenset[int]], ...]  # members, and which leaves of their outputs
    unscalable: str | None  # why multiplying there would not multiply the branch exactly once
    vanishes: bool  # whether the branch is known to be zero where all of its ends are


def ends_of(site: Site, addition: Addition) -> Ends:
    """Where to multiply a branch: the outputs that its sum is made of without a module between."""
    nodes, path = site.recording.nodes, set(addition.path)
    place_of = {
        index: (position, number)
        for position, call in enumerate(addition.members)
        for number, index in enumerate(call.outputs)
        if index in path
    }

    def onwards(value: int) -> list[int]:
        return [i for i in nodes[value].inputs if i in path] if value not in place_of else []

    values = set(reached([addition.branch], onwards))
    ends, in_line = values & place_of.keys(), sorted(values - place_of.keys())
    degrees = _degrees(site.recording, ends, in_line)
    vanishes = degrees.get(addition.branch, 0) not in (0, _UNKNOWN)
    why = _not_once(site, addition, degrees, in_line)
    final = max((place_of[index][0] for index in ends), default=0)
    one = {index for index in ends if place_of[index][0] == final}
    of_one = _degrees(site.recording, one, in_line)
    # A product of two modules' outputs is scaled by scaling one of them.
    if why is not None and _not_once(site, addition, of_one, in_line) is None:
        ends, why = one, None
    places = sorted({place_of[index][0] for index in ends})
    leaves = [{n for p, n in map(place_of.__getitem__, ends) if p == place} for place in places]
    return Ends(tuple(zip(places, map(frozenset, leaves), strict=True)), why, vanishes)


def _degrees(recording: Recording, ends: Iterable[int], in_line: list[int]) -> dict[int, int]:
    """The degrees of the values in line behind the ends, and of these."""
    degrees = dict.fromkeys(ends, 1)
    for index in in_line:
        node = recording.nodes[index]
        degrees[index] = _degree(node, [degrees.get(source, 0) for source in node.inputs])
    return degrees


def _not_once(
    site: Site, addition: Addition, degrees: dict[int, int], in_line: list[int]
) -> str | None:
    """Why a factor on the ends does not come out at the sum exactly once, or None."""
    recording, allowed = site.recording, {*in_line, *site.sums}
    if degrees.get(addition.branch) != 1:
        op = recording.nodes[in_line[-1]].op if in_line else "nothing"
        return f"it ends in {op}, computed in line behind its last module"
    for index in [index for index, degree in degrees.items() if degree]:
        for user in recording.consumers[index]:
            # Another form of a value, with which nobody computes, does not count.
            is_form = recording.nodes[user].kind in (Kind.MOVE, Kind.JOIN)
            if user not in allowed and not (is_form and not recording.consumers[user]):
                return f"{recording.module_at(user)} computes with what it ends in, too"
    return None


@dataclass(frozen=True, slots=True)
class Fold:
    """The parameters that take a branch's factor over, or why there are none."""

    parameters: tuple[str, ...] = ()
    obstacle: str | None = None


class _ObstacleError(Exception):
    """Why a branch cannot be folded."""


class Folding:
    """Finds the parameters that the factors of branches can go into.

    Args:
        recording: The watched forward.
        model: The model that was watched.
    """

    def __init__(self, recording: Recording, model: nn.Module) -> None:
        self.recording = recording
        self._uses: dict[str, set[int]] = {}  # of each parameter, the operations with data
        for node in recording.nodes:
            for name in parameters_at(recording, [node.index]) if node.meets_parameter else ():
                self._uses.setdefault(name, set()).add(node.operation)
        holders: dict[nn.Parameter, list[str]] = {}
        for holder, module in model.named_modules():
            for parameter in module.parameters(recurse=False):
                holders.setdefault(parameter, []).append(holder)
        self._idle = {  # parameters of several modules, one of which was not called
            name: holder
            for name, parameter in model.named_parameters()
            for holder in holders[parameter]
            if len(holders[parameter]) > 1 and holder not in recording.calls_of
        }

    def folds(self, branches: Sequence[Sequence[tuple[Addition, set[int]]]]) -> list[Fold]:
        """What the factors of a block's branches can go into.

        Args:
            branches: For each branch, its addition in each call of the block, and the sums of all
                branches in that call, which have one factor.
        """
        found = [[self._taken(*addition) for addition in calls] for calls in branches]
        uses = [own for calls in found for own in calls if isinstance(own, dict)]
        inside = {use for own in uses for use in own.values()}
        return [self._together(calls, inside) for calls in found]

    def _together(self, calls: Sequence[dict[str, int] | str], inside: set[int]) -> Fold:
        """The fold of a branch, whose parameters must not be used outside of the block's folds."""
        names: dict[str, int] = {}
        for own in calls:
            if isinstance(own, str):
                return Fold(obstacle=own)
            for name in own:
                if name in self._idle:
                    holder = self._idle[name]
                    return Fold(obstacle=f"{name} is shared with {holder}, which was not called")
                for use in sorted(self._uses[name] - inside):
                    where = self.recording.module_at(use)
                    return Fold(obstacle=f"{name} is shared with {where}")
            names |= own
        if not calls:
            return Fold(obstacle="its branch was not watched: pass example_inputs to apply")
        return Fold(tuple(names))

    def _taken(self, addition: Addition, sums: set[int]) -> dict[str, int] | str:
        """The parameters that scale a branch in one call, and where they do; or an obstacle."""
        recording, nodes, path = self.recording, self.recording.nodes, set(addition.path)
        taken: dict[str, int] = {}

        def onwards(value: int) -> list[int]:
            if value not in path:
                raise _ObstacleError("a value that bypasses its parameters reaches the sum")
            names, data = self._step(nodes[value], path)
            for name in names:
                if name in taken:
                    raise _ObstacleError(f"{name} is used in it twice")
                taken[name] = nodes[value].operation
            return data

        try:
            seen = list(reached([addition.branch], onwards))
        except _ObstacleError as obstacle:
            return str(obstacle)
        walked = {nodes[index].operation for index in (*seen, *sums)}
        made = {made for index in seen for made in recording.made_with(index)}
        users = {user for index in made for user in recording.consumers[index]}
        if any(nodes[user].operation not in walked for user in users):
            return "its last operations feed more than the sum"
        return taken

    def _step(self, node: Node, path: set[int]) -> tuple[list[str], list[int]]:
        """One operation on the way back: the parameters that scale it, and where the way goes on.

        A bias of a product, where it has one, has to be a parameter, too.
        """
        recording, where = self.recording, self.recording.module_at(node.index)
        data = [index for index in node.inputs if index in path]
        own = [index for index in node.inputs if recording.nodes[index].of_parameters]
        names = [name for index in own if (name := self._name(index)) is not None]
        if len(names) < len(own):
            raise _ObstacleError(f"a weight of {where} is itself computed (weight norm?)")
        if node.kind in NORMS:
            if len(names) < (2 if node.kind is Kind.BATCH_NORM else 1):
                raise _ObstacleError(f"the norm {where} has no weight")
            return names, []
        if node.kind in PRODUCTS and own and len(own) + 1 == len(node.inputs):
            return names, []
        added = own if node.kind in SUMS else []  # are scaled with what they are added to
        if _degree(node, [int(index in (*data, *added)) for index in node.inputs]) == 1:
            return names if added else [], data
        raise _ObstacleError(
            f"its last operation, {node.op} in {where}, is not affine in parameters of its own"
        )

    def _name(self, index: int) -> str | None:
        """The parameter that a value is, but for moves of its elements."""
        node = self.recording.nodes[index]
        while node.parameter is None:
            if node.kind is not Kind.MOVE or len(node.inputs) != 1:
                return None
            node = self.recording.nodes[node.inputs[0]]
        return node.parameter


def parameters_at(recording: Recording, nodes: Iterable[int]) -> set[str]:
    """The parameters that these operations meet, at first hand or made into something else."""
    made_of = [
        source
        for index in nodes
        if recording.nodes[index].meets_parameter
        for source in recording.nodes[index].inputs
        if recording.nodes[source].of_parameters
    ]
    found = (recording.nodes[index].parameter for index in recording.behind(made_of, 0))
    return {name for name in found if name is not None}
