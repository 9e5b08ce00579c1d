"""Where a branch can be multiplied, and the parameters that can take the factor over.

Two questions about the way from the branch's modules to the sum. *Scalable*: is the branch, as a
function of what its last modules hand out, homogeneous of degree one, so that multiplying there
multiplies the branch? *Foldable*: does every way back from the sum meet an operation that is
affine in its own parameters, so that the plain model can carry the factor in its weights?
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from stochastic_depth.discovery.additions import Addition
from stochastic_depth.discovery.operations import (
    BATCH_NORMS,
    HOMOGENEOUS,
    MOVES,
    NORMS,
    POSITIVE,
    SUMS,
)
from stochastic_depth.discovery.recording import Node, Recording

_BIASED = frozenset("addmm baddbmm convolution _convolution mkldnn_convolution linear".split())
_LINEAR_MAPS = _BIASED | frozenset("mm bmm matmul mul mul_".split())


@dataclass(frozen=True, slots=True)
class Fold:
    """The parameters that take a branch's factor over, or why there are none."""

    parameters: tuple[str, ...] = ()
    uses: tuple[int, ...] = ()  # the operations in which they are used
    obstacle: str | None = None


def degree(recording: Recording, in_line: list[int], ends: set[int], branch: int) -> int | None:
    """How often a factor on the values `ends` comes out at `branch`; None: not as a factor."""
    degrees = dict.fromkeys(ends, 1)
    for index in in_line:
        found = _degree(recording.nodes[index], degrees)
        if found is None:
            return None
        degrees[index] = found
    inside, needed = {*in_line, *ends}, recording.nodes[branch].ancestors
    for index, found in degrees.items():
        for user in recording.consumers[index] if found else ():
            if needed >> user & 1 and user not in inside:
                return None  # a module computes with the multiplied value, too
    return degrees.get(branch, 0)


def _degree(node: Node, degrees: dict[int, int]) -> int | None:
    given = [degrees.get(index, 0) for index in node.inputs]
    if not any(given):
        return 0
    if node.op in SUMS:
        return given[0] if len(set(given)) == 1 else None
    if node.op in ("addmm", "baddbmm"):
        return given[0] if given[0] == given[1] + given[2] else None
    if node.op in _BIASED:
        return given[0] + given[1] if len(given) == 2 else None
    if node.op in _LINEAR_MAPS:
        return sum(given) if len(set(node.inputs)) == len(node.inputs) or not any(given) else None
    if node.op in HOMOGENEOUS | POSITIVE:
        return None if any(given[1:]) else given[0]
    return None


def fold(recording: Recording, addition: Addition) -> Fold:
    """The parameters that the branch's factor can go into."""
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
    walked = {recording.nodes[index].operation for index in (*seen, addition.node)}
    users = {user for index in seen for user in recording.consumers[index]}
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
    where = recording.calls[node.call].module or "the model"
    unknown = f"its last operation, {node.op} in {where}, is not affine in parameters of its own"
    if None in names:
        return [], [], f"a weight of {where} is itself computed (weight norm?)"
    found = [name for name in names if name is not None]
    if node.op in SUMS:
        others = len(node.inputs) - len(data) - len(own)
        return (found, data, None) if not others else ([], [], unknown)
    if node.op in NORMS:
        enough = len(found) == 2 if node.op in BATCH_NORMS else len(found) > 0
        return (found, [], None) if enough else ([], [], f"the norm {where} has no weight")
    if node.op in _LINEAR_MAPS and own:
        # The bias, where there is one, is an operand of its own and has to be a parameter too.
        return (found, [], None) if len(own) + 1 == len(node.inputs) else ([], [], unknown)
    if node.op in ("mul", "mul_") and len(data) == 1:
        # By a value that does not depend on the branch.
        return [], data, None
    if node.op in HOMOGENEOUS | POSITIVE and node.inputs[0] in path and len(data) == 1:
        return [], data, None
    return [], [], unknown


def _name(recording: Recording, index: int) -> str | None:
    """The parameter that a value is, but for moves of its elements."""
    node = recording.nodes[index]
    while node.parameter is None:
        if node.op not in MOVES or len(node.inputs) != 1:
            return None
        node = recording.nodes[node.inputs[0]]
    return node.parameter


def parameters_at(recording: Recording, nodes: Iterable[int]) -> set[str]:
    """The parameters that these operations meet, at first hand or made into something else."""
    found: set[str] = set()
    for index in nodes:
        for given in recording.nodes[index].inputs:
            if recording.nodes[given].of_parameters and recording.nodes[index].meets_parameter:
                name = _name(recording, given)
                found |= {name} if name is not None else _sources(recording, given)
    return found


def _sources(recording: Recording, index: int) -> set[str]:
    names = {recording.nodes[index].parameter}
    for given in recording.nodes[index].inputs:
        names |= _sources(recording, given)
    return {name for name in names if name is not None}


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
            where = recording.calls[recording.nodes[index].call].module or "the model"
            return Fold(obstacle=f"{name} is shared with {where}")
    return own
