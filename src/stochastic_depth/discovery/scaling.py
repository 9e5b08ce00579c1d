"""Where a branch can be multiplied, and the parameters that can take the factor over.

Two questions about the way from the branch's modules to the sum. *Scalable*: is the branch, as a
function of what its last modules hand out, homogeneous of degree one, so that multiplying there
multiplies the branch? *Foldable*: does every way back from the sum meet an operation that is
affine in its own parameters, so that the plain model can carry the factor in its weights?
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from stochastic_depth.discovery.additions import Addition
from stochastic_depth.discovery.operations import (
    HOMOGENEOUS,
    NORMS,
    POSITIVE,
    PRODUCTS,
    SUMS,
    ZERO_AT_ZERO,
    Kind,
)
from stochastic_depth.discovery.recording import Call, Node, Recording


@dataclass(frozen=True, slots=True)
class Fold:
    """The parameters that take a branch's factor over, or why there are none."""

    parameters: tuple[str, ...] = ()
    uses: tuple[int, ...] = ()  # the operations in which they are used
    obstacle: str | None = None


Ends = Mapping[int, frozenset[int]]  # position of a member -> which leaves of its output


def ends_of(
    recording: Recording, addition: Addition, members: Sequence[Call], sums: set[int]
) -> tuple[Ends, str | None]:
    """Where to multiply a branch, and why that would not multiply it exactly once.

    Args:
        recording: The watched forward.
        addition: The branch's sum.
        members: The branch's modules, in order.
        sums: All sums of the block: they may read what the branch ends in.
    """
    last, in_line = _last_outputs(recording, addition, members)
    why = _not_once(recording, addition, members, last, in_line, sums)
    if why is not None and len(last) > 1:
        # A product of two modules' outputs is scaled by scaling one of them.
        final = max(last)
        one = {final: last[final]}
        if _not_once(recording, addition, members, one, in_line, sums) is None:
            return one, None
    return last, why


def _last_outputs(
    recording: Recording, addition: Addition, members: Sequence[Call]
) -> tuple[dict[int, frozenset[int]], list[int]]:
    """The outputs that the sum is made of without another module between, and what is in line.

    The values in line are those from there on to the branch's last, in order.
    """
    path = set(addition.path)
    leaves: dict[int, tuple[int, int]] = {}
    for position, call in enumerate(members):
        for number, index in enumerate(call.outputs):
            if index is not None and index in path:
                leaves[index] = (position, number)
    last: dict[int, frozenset[int]] = {}
    in_line: set[int] = set()
    waiting = [addition.branch]
    while waiting:
        index = waiting.pop()
        if index in leaves:
            position, number = leaves[index]
            last[position] = last.get(position, frozenset()) | {number}
        elif index in path and index not in in_line:
            in_line.add(index)
            waiting += recording.nodes[index].inputs
    return last, sorted(in_line)


def _not_once(
    recording: Recording,
    addition: Addition,
    members: Sequence[Call],
    last: Ends,
    in_line: list[int],
    sums: set[int],
) -> str | None:
    """Why a factor on these outputs does not come out at the sum exactly once, or None."""
    nodes = recording.nodes
    ends = [members[place].outputs[number] for place, own in last.items() for number in own]
    degrees = {end: 1 for end in ends if end is not None}
    for index in in_line:
        degree = _degree(nodes[index], degrees)
        if degree is None:
            op = nodes[in_line[-1]].op
            return f"it ends in {op}, computed in line behind its last module"
        degrees[index] = degree
    if degrees.get(addition.branch) != 1:
        op = nodes[in_line[-1]].op if in_line else "nothing"
        return f"it ends in {op}, computed in line behind its last module"
    allowed = {*in_line, *sums}
    for index, degree in degrees.items():
        for user in recording.consumers[index] if degree else ():
            if user not in allowed and not _leads_nowhere(recording, user):
                return f"{recording.module_at(user)} computes with what it ends in, too"
    return None


def _leads_nowhere(recording: Recording, value: int) -> bool:
    """Whether a value is but another form of one, and nobody computes with it."""
    kind = recording.nodes[value].kind
    return kind in (Kind.MOVE, Kind.JOIN) and not recording.consumers[value]


def _degree(node: Node, degrees: Mapping[int, int]) -> int | None:
    """How often a factor comes out of an operation that it went into; None: not as a factor."""
    given = [degrees.get(index, 0) for index in node.inputs]
    if not any(given):
        return 0
    if node.kind in SUMS:
        return given[0] if len(set(given)) == 1 else None
    if node.kind in PRODUCTS:
        product = sum(given)
        if len(given) < 3:
            return product
        bias = given[0] if node.op in ("addmm", "baddbmm") else given[2]
        return bias if 2 * bias == product else None
    if node.kind in HOMOGENEOUS | POSITIVE:
        return None if any(given[1:]) else given[0]
    return None


def stays_zero(recording: Recording, addition: Addition, members: Sequence[Call]) -> bool:
    """Whether a branch is known to be zero where all of its modules hand out zeros."""
    last, in_line = _last_outputs(recording, addition, members)
    zero = {members[place].outputs[number] for place, own in last.items() for number in own}
    for index in in_line:
        node = recording.nodes[index]
        given = [source in zero for source in node.inputs]
        if node.kind in SUMS:
            holds = all(given)
        elif node.kind in PRODUCTS:
            holds = any(given) and len(given) < 3
        else:
            holds = given[:1] == [True] and (
                node.kind in HOMOGENEOUS | POSITIVE or node.op in ZERO_AT_ZERO
            )
        if holds:
            zero.add(index)
    return addition.branch in zero


def fold(recording: Recording, addition: Addition, sums: set[int]) -> Fold:
    """The parameters that the branch's factor can go into.

    Args:
        recording: The watched forward.
        addition: The branch's sum.
        sums: All sums of the block, whose branches have one factor.
    """
    path = set(addition.path)
    parameters: dict[str, int] = {}
    waiting, seen = [addition.branch], set()
    while waiting:
        index = waiting.pop()
        if index in seen:
            continue
        seen.add(index)
        node = recording.nodes[index]
        if index not in path:
            return Fold(obstacle="a value that bypasses its parameters reaches the sum")
        taken, onwards, obstacle = _step(recording, node, path)
        if obstacle is not None:
            return Fold(obstacle=obstacle)
        for parameter in taken:
            if parameter in parameters:
                return Fold(obstacle=f"{parameter} is used in it twice")
            parameters[parameter] = node.operation
        waiting += onwards
    walked = {recording.nodes[index].operation for index in (*seen, *sums)}
    made = {made for index in seen for made in recording.made_with(index)}
    users = {user for index in made for user in recording.consumers[index]}
    if any(recording.nodes[user].operation not in walked for user in users):
        return Fold(obstacle="its last operations feed more than the sum")
    return Fold(tuple(parameters), tuple(parameters.values()))


def _step(
    recording: Recording, node: Node, path: set[int]
) -> tuple[list[str], list[int], str | None]:
    """One operation on the way back: the parameters that scale it, or where the way goes on."""
    data = [index for index in node.inputs if index in path]
    own = [index for index in node.inputs if recording.nodes[index].of_parameters]
    names = [_name(recording, index) for index in own]
    where = recording.module_at(node.index)
    unknown = f"its last operation, {node.op} in {where}, is not affine in parameters of its own"
    if None in names:
        return [], [], f"a weight of {where} is itself computed (weight norm?)"
    found = [name for name in names if name is not None]
    if node.kind in SUMS:
        others = len(node.inputs) - len(data) - len(own)
        return (found, data, None) if not others else ([], [], unknown)
    if node.kind in NORMS:
        enough = len(found) == 2 if node.kind is Kind.BATCH_NORM else len(found) > 0
        return (found, [], None) if enough else ([], [], f"the norm {where} has no weight")
    if node.kind in PRODUCTS and own:
        # The bias, where there is one, is an operand of its own and has to be a parameter too.
        return (found, [], None) if len(own) + 1 == len(node.inputs) else ([], [], unknown)
    if node.op == "mul" and len(data) == 1:
        # By a value that does not depend on the branch.
        return [], data, None
    if node.kind in HOMOGENEOUS | POSITIVE and node.inputs[0] in path and len(data) == 1:
        return [], data, None
    return [], [], unknown


def _name(recording: Recording, index: int) -> str | None:
    """The parameter that a value is, but for moves of its elements."""
    node = recording.nodes[index]
    while node.parameter is None:
        if node.kind is not Kind.MOVE or len(node.inputs) != 1:
            return None
        node = recording.nodes[node.inputs[0]]
    return node.parameter


def parameters_at(recording: Recording, nodes: Iterable[int]) -> set[str]:
    """The parameters that these operations meet, at first hand or made into something else."""
    found: set[str] = set()
    for index in nodes:
        if not recording.nodes[index].meets_parameter:
            continue
        for given in recording.nodes[index].inputs:
            if recording.nodes[given].of_parameters:
                made_of = recording.behind([given], 0)
                found |= {p for i in made_of if (p := recording.nodes[i].parameter) is not None}
    return found


def parameter_uses(recording: Recording) -> dict[str, set[int]]:
    """For each parameter, the operations in which it meets data."""
    uses: dict[str, set[int]] = {}
    for node in recording.nodes:
        for name in parameters_at(recording, [node.index]):
            uses.setdefault(name, set()).add(node.operation)
    return uses


def sharers_not_called(recording: Recording, model: nn.Module) -> dict[str, str]:
    """For parameters that several modules hold, one of them that the watched forward left out."""
    holders: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(parameter, []).append(name)
    return {
        name: idle
        for name, parameter in model.named_parameters()
        if len(holders[parameter]) > 1
        for idle in holders[parameter]
        if idle not in recording.calls_of
    }


def exclusive(
    recording: Recording,
    own: Fold,
    same_block: list[Fold],
    uses: dict[str, set[int]],
    idle: dict[str, str],
) -> Fold:
    """The fold, or the obstacle that one of its parameters is used outside of the block's folds."""
    inside = {index for other in same_block for index in other.uses}
    for name in own.parameters:
        if name in idle:
            return Fold(obstacle=f"{name} is shared with {idle[name]}, which was not called")
        for index in sorted(uses[name] - inside):
            return Fold(obstacle=f"{name} is shared with {recording.module_at(index)}")
    return own
