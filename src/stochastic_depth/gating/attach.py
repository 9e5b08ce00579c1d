"""From found blocks to gates: which modules are gated, in which roles; and out again."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from stochastic_depth.discovery.batch import Batches, rows_of_members
from stochastic_depth.discovery.blocks import Discovery
from stochastic_depth.discovery.branches import member_calls, unread_outputs
from stochastic_depth.discovery.grouping import Group
from stochastic_depth.discovery.recording import Call, Recording
from stochastic_depth.discovery.templates import Template
from stochastic_depth.gating.gate import KEY, gate_of
from stochastic_depth.gating.passage import Gate, Role
from stochastic_depth.gating.scaled import own_weights
from stochastic_depth.gating.swap import swap_in, swap_out
from stochastic_depth.plan import Plan
from stochastic_depth.rows import Dims


def attach(
    model: nn.Module,
    found: Discovery,
    plan: Plan,
    whole: Mapping[str, Template],
    batches: Batches | None = None,
) -> None:
    """Gate the plan's blocks.

    Args:
        model: The model that was watched.
        found: What was found in it.
        plan: The blocks to gate.
        whole: What the blocks come to whose forward need not run when they are dropped, by name.
        batches: For mode "sample": where each value holds the batch.
    """
    gates: dict[str, Gate] = {}
    containers: dict[str, list[int]] = {}
    for number, block in enumerate(plan.blocks):
        if block.explicit:
            for position, branch in enumerate(block.branches):
                (name,) = branch.modules
                own = Gate(plan, name, blocks=(number,), branch=position)
                model.get_submodule(name).__dict__[KEY] = own
            continue
        containers.setdefault(block.container, []).append(number)
    for container, numbers in containers.items():
        gate = gates.setdefault(container, Gate(plan, container))
        gate.blocks = tuple(numbers)
        gate.whole = whole.get(plan.blocks[numbers[0]].name)
        gate.forms = frozenset(call.form for call in found.recording.calls_of[container])
        gate.positional = _positional(model.get_submodule(container))
        if batches is not None:
            template = gate.whole if isinstance(gate.whole, Template) else None
            for call in found.recording.calls_of[container]:
                gate.batch[call.form] = batches.held(call, template)
        groups = [found.groups[plan.blocks[number].name][0] for number in numbers]
        of_block = dict(zip(numbers, groups, strict=True))
        roles = _roles(model, found.recording, plan, of_block, batches)
        gate.one_graph = not _ends_inside(found.recording, groups[0].container, roles)
        gate.expected = sum(map(len, roles.values()))
        for name, found_roles in roles.items():
            gates.setdefault(name, Gate(plan, name)).roles[container] = found_roles
    for name, gate in gates.items():
        if gate.roles:
            _describe_calls(found.recording, gate)
        swap_in(model.get_submodule(name), gate)
    _note_alone(gates)
    _note_ends(gates)


def detach(model: nn.Module, plan: Plan) -> None:
    """Undo `attach`: every gated module gets its class back."""
    for _, module, gate in gated_modules(model):
        if gate.plan is plan:
            swap_out(module)


def gated_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Gate]]:
    """All gated modules with their names and gates."""
    for name, module in model.named_modules():
        gate = gate_of(module)
        if gate is not None:
            yield name, module, gate


def _note_alone(gates: Mapping[str, Gate]) -> None:
    """Tell the containers which of their members are nothing else."""
    for gate in gates.values():
        if len(gate.roles) == 1 and not gate.blocks and not gate.used_elsewhere:
            ((name, roles),) = gate.roles.items()
            container = gates[name]
            container.alone |= {gate}
            if not any(role and role.scaled for role in roles):
                container.within |= {gate}


def _note_ends(gates: Mapping[str, Gate]) -> None:
    """Tell the members which branch they end, in a way that a graph can hold.

    One that is several things in several containers cannot be told.
    """
    taken: Counter[str] = Counter()  # of each container: the numbers that are given
    for gate in gates.values():
        found = {
            tuple(_end(gates[name], role) for role in roles) for name, roles in gate.roles.items()
        }
        whatever = {end for ends in found for end in ends}
        if len(whatever) == 1:
            gate.ends = tuple(whatever)
        elif len(found) == 1:
            (gate.ends,) = found
            gate.number = max(taken[name] for name in gate.roles)
            taken |= Counter(dict.fromkeys(gate.roles, gate.number + 1))
        else:
            for name in gate.roles:
                gates[name].one_graph = False


def _ends_inside(
    recording: Recording, container: Call, roles: Mapping[str, Sequence[Role | None]]
) -> bool:
    """Whether a member that ends a branch is called inside of another member, too.

    There it is plain, and no graph could tell.
    """
    called: Counter[str] = Counter()
    around = [container]
    while around:
        inside = recording.children.get(around.pop().index, [])
        called.update(call.module for call in inside)
        around += inside
    return any(
        called[name] > len(found) and any(role and role.scaled for role in found)
        for name, found in roles.items()
    )


def _end(container: Gate, role: Role | None) -> tuple[int, ...] | None:
    if role is None or not role.scaled:
        return None
    branches = container.plan.blocks
    before = container.blocks[: container.blocks.index(role.block)]
    number = sum(len(branches[block].branches) for block in before) + role.branch
    return (number, *sorted(role.scaled))


def _positional(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(module.forward).parameters)


def _roles(
    model: nn.Module,
    recording: Recording,
    plan: Plan,
    groups: Mapping[int, Group],
    batches: Batches | None,
) -> dict[str, tuple[Role | None, ...]]:
    """For each module to gate in a container: what its first, second, ... call in it is.

    Calls inside of a gated member do not count: where the member is dropped they do not happen.
    """
    wanted: dict[int, Role] = {}
    places = [(n, p) for n, group in groups.items() for p in range(len(group.additions))]
    # A branch may lie inside of another one: the outer first, then the inner takes its modules.
    for number, position in sorted(places, key=lambda place: -_length(groups, *place)):
        group, branch = groups[number], plan.blocks[number].branches[position]
        scaled = dict(branch.scaled)
        calls = member_calls(recording, group.additions[position], group.container)
        rows: Sequence[tuple[Dims, Dims]] = [({}, {})] * len(calls)
        if batches is not None:
            rows = rows_of_members(batches, group.additions[position], calls, scaled)
        for place, call in enumerate(calls):
            unread = unread_outputs(recording, call, calls)
            ends = scaled.get(place, frozenset())
            module = model.get_submodule(call.module)
            # In mode "batch" what is computed is exact to the last bit.
            by_weights = ends and plan.mode == "sample"
            parameters = branch.fold.parameters if by_weights else ()
            weights = own_weights(module, call.module, parameters)
            outer = wanted.get(call.index)
            held: tuple[Dims, Dims] = rows[place]
            within: tuple[tuple[int, int], ...] = ()
            if outer is not None:  # it gives its modules the rows
                held = (outer.takes, outer.gives)
                within = (*outer.within, (outer.block, outer.branch))
            wanted[call.index] = Role(number, position, ends, unread, *held, weights, within)
    names = {recording.calls[index].module for index in wanted}
    roles: dict[str, list[Role | None]] = {}

    def visit(call: Call) -> None:
        for child in recording.children.get(call.index, ()):
            if child.module in names:
                roles.setdefault(child.module, []).append(wanted.get(child.index))
            if child.index not in wanted:
                visit(child)

    visit(next(iter(groups.values())).container)
    return {name: tuple(found) for name, found in roles.items()}


def _length(groups: Mapping[int, Group], number: int, position: int) -> int:
    return len(groups[number].additions[position].path)


def _describe_calls(recording: Recording, gate: Gate) -> None:
    """What is known about the member's calls from the watch: output shapes, other callers."""
    for call in recording.calls_of[gate.name]:
        around = {outer.module for outer in recording.enclosing(call.parent)}
        if around.isdisjoint(gate.roles):
            gate.used_elsewhere = True
        elif call.template is not None:
            gate.templates[call.signature] = call.template
