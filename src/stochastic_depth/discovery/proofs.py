"""What a second watch, with the gates closed, proves about a block.

That every branch is exactly zero at its sum; and whether the block as a whole then returns its
input, so that a dropped block need not run at all.
"""

from __future__ import annotations

from stochastic_depth.discovery.blocks import Discovery, ResidualBlock
from stochastic_depth.discovery.operations import (
    ADDITIONS,
    BATCH_NORMS,
    MAX_POOLS,
    MOVES,
    RELUS,
    VIEWS,
)
from stochastic_depth.discovery.recording import Call, Recording
from stochastic_depth.discovery.templates import Constant, Given, SkipPath, Template

_CONVOLUTIONS = frozenset(["convolution", "_convolution", "mkldnn_convolution"])
"""Like a BatchNorm, they do not need their output for the backward."""


def branch_not_closed(found: Discovery, block: ResidualBlock, closed: Recording) -> str | None:
    """The name of a branch that is not zero at its sum although it was dropped, or None."""
    for group in found.groups[block.name]:
        for branch, addition in zip(block.branches, group.additions, strict=True):
            node = _same_sum(found.recording, addition.node, closed)
            if node is None or addition.operand not in closed.nodes[node].zero:
                return branch.name
    return None


def skip_value(found: Discovery, block: ResidualBlock, closed: Recording) -> Template | None:
    """What the dropped block returns, built from its arguments; None where it has to run."""
    if _holds_others(found, block):
        return None
    templates: list[Template | None] = []
    for group in found.groups[block.name]:
        twin = _same_call(found.recording, group.container, closed)
        if twin is None or _changed_later(found.recording, group.container):
            return None
        templates.append(
            _skip_value(closed, twin, from_relu=_from_relu(found.recording, group.container))
        )
    return templates[0] if all(t == templates[0] for t in templates) else None


def skip_path(found: Discovery, block: ResidualBlock, closed: Recording) -> SkipPath | None:
    """The one module that the dropped block still runs, where that is all it does."""
    if _holds_others(found, block):
        return None
    twins = [_same_call(found.recording, g.container, closed) for g in found.groups[block.name]]
    paths = {None if twin is None else _skip_path(closed, twin) for twin in twins}
    path = paths.pop() if len(paths) == 1 else None
    gated = {m for other in found.blocks for branch in other.branches for m in branch.modules}
    if path is None or any(f"{name}.".startswith(f"{path.module}.") for name in gated):
        return None  # what is gated is called by its own container alone
    return path


def _holds_others(found: Discovery, block: ResidualBlock) -> bool:
    """Whether its module runs other blocks beside its own branches: those are not skipped with it.

    While everything is closed they come to their input, too, so the proof cannot tell.
    """
    own = found.groups[block.name][0]
    return any(
        other is not block
        and own.container.start <= group.container.start
        and group.container.end <= own.container.end
        and not any(a.contains(group.additions[0]) for a in own.additions)
        for other in found.blocks
        if not other.explicit
        for group in found.groups[other.name]
    )


def _skip_path(closed: Recording, call: Call) -> SkipPath | None:
    if len(call.outputs) != 1 or call.outputs[0] is None or _leaves_otherwise(closed, call):
        return None
    made, relu = closed.nodes[call.outputs[0]], False
    ends = {
        child.outputs[0]: child
        for child in closed.children.get(call.index, ())
        if len(child.outputs) == 1 and len(closed.calls_of[child.module]) == 1
    }
    while made.index not in ends or made.op in RELUS:
        if made.op in RELUS:
            source, relu = made.inputs[0], True
        elif made.op in ADDITIONS and len(made.inputs) == 2 and len(made.zero) == 1:
            source = made.inputs[1 - next(iter(made.zero))]
        else:
            return None
        below = closed.nodes[source]
        if (below.shape, below.dtype) != (made.shape, made.dtype):
            return None
        made = below
    child = ends[made.index]
    places = [place for place, node in call.arguments.items() if child.given == (node,)]
    if not places:
        return None
    in_place = made.op in BATCH_NORMS | _CONVOLUTIONS
    return SkipPath(child.module, Given(places[0]), relu, in_place)


def _same_call(recording: Recording, call: Call, other: Recording) -> Call | None:
    """The call of the same module, the n-th in both."""
    theirs = other.calls_of.get(call.module, [])
    position = recording.calls_of[call.module].index(call)
    return theirs[position] if position < len(theirs) else None


def _same_sum(recording: Recording, node: int, other: Recording) -> int | None:
    """The addition at the same place: the n-th in the forward of the same call."""
    call = recording.calls[recording.nodes[node].call]
    twin = _same_call(recording, call, other)
    if twin is None:
        return None
    theirs = _own_additions(other, twin)
    position = _own_additions(recording, call).index(node)
    return theirs[position] if position < len(theirs) else None


def _own_additions(recording: Recording, call: Call) -> list[int]:
    return [
        node.index
        for node in recording.nodes[call.start : call.end]
        if node.call == call.index and node.op in ADDITIONS
    ]


def _skip_value(closed: Recording, call: Call, from_relu: frozenset[object]) -> Template | None:
    """The output of a closed call in terms of its arguments, if nothing else goes into it."""
    if call.template is None or _leaves_otherwise(closed, call):
        return None
    leaves: list[Given | Constant] = []
    for number, leaf in enumerate(call.template.leaves):
        node = call.outputs[number]
        if node is None or isinstance(leaf, Given):
            if not isinstance(leaf, Given | Constant):
                return None
            leaves.append(leaf)
            continue
        sources = [
            place
            for place, given in call.arguments.items()
            if place in call.unchanged[number]
            and _leads_back(closed, node, given, over_relu=place in from_relu)
        ]
        if not sources:
            return None
        leaves.append(Given(sources[0]))
    skips = any(isinstance(leaf, Given) for leaf in leaves)
    return Template(tuple(leaves), call.template.spec) if skips else None


def _leaves_otherwise(closed: Recording, call: Call) -> bool:
    """Whether a value made in the call is used behind it without being one of its outputs."""
    return any(
        user >= call.end
        for index in range(call.start, call.end)
        if index not in call.outputs and closed.nodes[index].op != ""
        for user in closed.consumers[index]
    )


def _leads_back(closed: Recording, node: int, given: int, *, over_relu: bool) -> bool:
    """Whether only moves, additions of zeros and (over a ReLU's output) ReLUs lie between."""
    while node != given:
        made = closed.nodes[node]
        if made.op in ADDITIONS and len(made.inputs) == 2 and len(made.zero) == 1:
            node = made.inputs[1 - next(iter(made.zero))]
        elif (made.op in MOVES or (over_relu and made.op in RELUS)) and made.inputs:
            node = made.inputs[0]
        else:
            return False
    return True


def _from_relu(recording: Recording, call: Call) -> frozenset[object]:
    """The arguments of a call that come out of a ReLU, or out of a max-pool of one."""
    found = set()
    for place, node in call.arguments.items():
        while (made := recording.nodes[node]).op in MOVES | MAX_POOLS and made.inputs:
            node = made.inputs[0]
        if made.op in RELUS:
            found.add(place)
    return frozenset(found)


def _changed_later(recording: Recording, call: Call) -> bool:
    """Whether the output of the call is changed in place after it returned."""
    outputs = set(call.outputs)
    later = (
        target for node in recording.writes if node.index >= call.end for target in node.overwrites
    )
    for base in later:
        while base not in outputs and recording.nodes[base].op in VIEWS:
            base = recording.nodes[base].inputs[0]
        if base in outputs:
            return True
    return False
