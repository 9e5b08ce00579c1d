"""From found blocks to gates: which modules are gated, in which roles; and out again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from stochastic_depth.discovery.blocks import Discovery
from stochastic_depth.discovery.operations import Kind
from stochastic_depth.discovery.recording import Call, Recording, reached
from stochastic_depth.discovery.templates import Argument
from stochastic_depth.gating.batch import BatchDims, Batches, of_block, of_branch_calls
from stochastic_depth.gating.block import Decision
from stochastic_depth.gating.branch import Passage, weights_of
from stochastic_depth.gating.gate import Gate, KnownCalls, Role, gate_of
from stochastic_depth.gating.ranks import LOCAL
from stochastic_depth.gating.swap import swap_in, swap_out
from stochastic_depth.plan import Plan
from stochastic_depth.torch_private.backward import HOOKS_CAN_BE_READ
from stochastic_depth.torch_private.tracing import is_wrapper


def attach(model: nn.Module, found: Discovery, plan: Plan, batches: Batches | None = None) -> None:
    """Gate the plan's blocks.

    Args:
        model: The model that was watched.
        found: What was found in it.
        plan: The blocks to gate.
        batches: For mode "sample": where each value holds the batch.
    """
    gates = _gates_of_blocks(plan)
    plan.gates = list(gates.values())
    plan.forget()
    plan.one_to_one = [gate.units for gate in plan.gates] == [(n,) for n in range(len(plan.units))]
    watched = [gate for gate in gates.values() if not plan.blocks[gate.blocks[0]].explicit]
    for gate in watched:
        blocks = [plan.blocks[number] for number in gate.blocks]
        calls = found.recording.calls_of[gate.name]
        gate.whole = blocks[0].whole
        gate.known = KnownCalls(gate, model.get_submodule(gate.name), calls)
        gate.returns_copy = any(block.copies_input for block in blocks)
        if batches is not None:
            gate.batch = of_block(batches, gate.name, gate.known.positional, calls, gate.whole)
        for name, roles in _roles(model, found, gate, batches).items():
            part = gates.setdefault(name, Gate(name, plan=plan))
            part.roles[gate.name] = roles
            part.owners += (gate,)
    for name, gate in gates.items():
        if gate.roles:
            _describe_calls(found.recording, gate)
        swap_in(model.get_submodule(name), gate)
    for gate in watched:
        _settle(model, gate, [part for part in gates.values() if gate in part.owners])


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


def _gates_of_blocks(plan: Plan) -> dict[str, Gate]:
    """A gate for each module whose call decides about a block, or is an `sd.Residual`."""
    gates: dict[str, Gate] = {}
    for number, block in enumerate(plan.blocks):
        for unit, branch in zip(plan.units_of(number), block.branches, strict=True):
            name = branch.modules[0] if block.explicit else block.block_module
            gate = gates.setdefault(name, Gate(name, plan=plan, index=len(gates)))
            gate.units += (unit,)
            gate.blocks = tuple(dict.fromkeys((*gate.blocks, number)))
    return gates


def _settle(model: nn.Module, gate: Gate, parts: Sequence[Gate]) -> None:
    """Decide which calls of a block and its branch modules may go the fast way."""
    plan = gate.plan
    prefix = f"{gate.name}." if gate.name else ""
    inside = [part.name for part in parts if part.name.startswith(prefix)]
    gate.parts = tuple(tuple(name.removeprefix(prefix).split(".")) for name in inside)
    roles = [(part, role) for part in parts for role in part.roles[gate.name]]
    gate.simple_ends = all(m.role is not None for m, role in roles if role and role.ends)
    is_simple = all(m.owner is gate and r and r.scratch == m.role.scratch for m, r in roles)
    if is_simple and gate.stands_in and gate.simple_ends and gate.whole is None:
        everything = Decision(gate, (False,) * len(gate.units), None, None, LOCAL)
        gate.closed = Passage(gate, everything, counts=None)
    hands_on = gate.whole is not None and gate.whole.is_leaf and gate.whole.leaves == (Argument(0),)
    gate.returns_first = hands_on and not gate.returns_copy
    gate.is_fast = (
        HOOKS_CAN_BE_READ
        and plan.mode == "batch"
        and plan.draw.redraw == "forward"
        and gate.simple_ends
        and not gate.roles
        and not is_wrapper(model.get_submodule(gate.name))
        and not gate.known.tensors.isdisjoint(gate.known.positional[:1])
    )
    only_scales = gate.is_fast and gate.whole is not None and not gate.stands_in
    if only_scales and all(p.owner is gate and p.name in inside for p in parts):
        gate.asleep = False


def _roles(
    model: nn.Module, found: Discovery, gate: Gate, batches: Batches | None
) -> dict[str, tuple[Role | None, ...]]:
    """For each module to gate in a block: what its first, second, ... call in it is.

    Calls inside of a gated module do not count: where it is dropped they do not happen.
    """
    recording, blocks = found.recording, [gate.plan.blocks[number] for number in gate.blocks]
    sites = [found.sites[block.name][0] for block in blocks]
    additions = [addition for site in sites for addition in site.additions]
    branches = [branch for block in blocks for branch in block.branches]
    as_one = len(set(gate.units)) == 1 and gate.whole is not None
    gate.stands_in = not as_one or any(branch.unscalable for branch in branches)
    wanted: dict[int, Role] = {}
    for number, (addition, branch) in enumerate(zip(additions, branches, strict=True)):
        calls = addition.branch_calls
        rows = [BatchDims()] * len(calls)
        if batches is not None and not as_one:
            rows = of_branch_calls(batches, addition, branch.branch_outputs)
        last = max((position for position, _ in branch.branch_outputs), default=len(calls))
        for place, call in enumerate(calls[: last + 1]):  # behind its ends it runs on zeros
            ends = [leaf for position, leaf in branch.branch_outputs if position == place]
            if not gate.stands_in and not ends:
                continue
            module = model.get_submodule(call.module)
            weights = weights_of(module, call.module, branch.fold.parameters if ends else ())
            scratch = _scratch_outputs(recording, call, calls).difference(ends)
            role = Role(number, dict.fromkeys(ends, number), scratch, rows[place], weights)
            wanted[call.index] = _both(wanted.get(call.index), role)
    names = {recording.calls[index].module for index in wanted}
    roles: dict[str, list[Role | None]] = {}

    def visit(call: Call) -> None:
        for child in call.children:
            if child.module in names:
                roles.setdefault(child.module, []).append(wanted.get(child.index))
            if child.index not in wanted:
                visit(child)

    visit(sites[0].call)
    return {name: tuple(of_calls) for name, of_calls in roles.items()}


def _scratch_outputs(recording: Recording, call: Call, branch_calls: list[Call]) -> frozenset[int]:
    """The outputs of a branch module that only other modules of the branch compute with."""
    handed_out = {node for outer in recording.enclosing(call.parent) for node in outer.outputs}

    def in_line(value: int) -> list[int]:
        return recording.outside(recording.consumers[value], branch_calls)

    def is_scratch(output: int) -> bool:
        return all(
            recording.consumers[node.index]
            and node.index not in handed_out
            and (node.index == output or (node.kind is Kind.MOVE and not node.overwrites))
            for node in map(recording.nodes.__getitem__, reached([output], in_line))
        )

    return frozenset(
        n for n, node in enumerate(call.outputs) if node is not None and is_scratch(node)
    )


def _both(first: Role | None, second: Role) -> Role:
    """What a call is that is a part of two branches, which are drawn together."""
    if first is None:
        return second
    ends = {**first.ends, **second.ends}
    branch = first.branch if first.ends else second.branch
    scratch = (first.scratch & second.scratch) - ends.keys()
    return Role(branch, ends, scratch, first.batch | second.batch)


def _describe_calls(recording: Recording, gate: Gate) -> None:
    """What is known about a branch module's calls: output shapes, other callers, its one role."""
    inside = 0
    for call in recording.calls_of[gate.name]:
        around = {outer.module for outer in recording.enclosing(call.parent)}
        if around.isdisjoint(gate.roles):
            gate.used_elsewhere = True
            continue
        inside += 1
        if call.template is not None:
            gate.templates[call.signature] = call.template
    if len(gate.owners) > 1:
        return
    ((block, roles),) = gate.roles.items()
    ends_nothing = not any(role and role.ends for role in roles)
    once = len(roles) == 1 and inside == len(recording.calls_of[block])
    if ends_nothing or once:
        gate.role = next(role for role in roles if role is not None)
        gate.owner = None if gate.units else gate.owners[0]
