"""What a block makes beside its sum, who computes with it, and what becomes of it when dropped."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

from stochastic_depth.discovery.grouping import Site
from stochastic_depth.discovery.operations import HOMOGENEOUS, MERGES, PRODUCTS, SUMS, Kind
from stochastic_depth.discovery.recording import RECURRENT, Call, Node, Recording, reached
from stochastic_depth.discovery.templates import Made


def unread_outputs(recording: Recording, call: Call, members: list[Call]) -> frozenset[int]:
    """The outputs of a member whose values only other members compute with."""
    handed_out = {node for outer in recording.enclosing(call.parent) for node in outer.outputs}

    def in_line(value: int) -> list[int]:
        return recording.not_held(recording.consumers[value], members)

    def is_moved(node: Node) -> bool:
        return node.kind is Kind.MOVE and not node.overwrites

    def is_unread(output: int) -> bool:
        return all(
            recording.consumers[value]
            and value not in handed_out
            and (value == output or is_moved(recording.nodes[value]))
            for value in reached([output], in_line)
        )

    return frozenset(
        n for n, node in enumerate(call.outputs) if node is not None and is_unread(node)
    )


def side_effects(site: Site) -> str | None:
    """Who else, outside of the branches, computes with a value made in their modules.

    Returns:
        The name of a module that does, or None. Values that only leave as outputs (attention
        weights, caches) count for nothing: nobody computes with them. What the model makes of
        them and hands out does.
    """
    recording, nodes, container = site.recording, site.recording.nodes, site.call
    made = {
        index
        for call in site.members
        for index in range(call.start, call.end)
        if nodes[index].op  # not the parameters, buffers and inputs met on the way
    }
    outputs = {index for call in site.members for index in call.outputs if index is not None}
    terms = {index for index in outputs if _is_loss_term(recording, index)}
    own = made | recording.behind([a.branch for a in site.additions], container.start)
    for index in sorted(site.path):
        if not made.isdisjoint(nodes[index].inputs):  # what is computed in line from that
            made.add(index)
    users = {
        user
        for index in made
        if index not in terms and not recording.is_state(index)
        for user in recording.consumers[index]
        if user not in own and user not in site.sums
    }
    ends = site.sums | set(recording.calls[0].outputs)
    for index in reached(sorted(users), recording.consumers.__getitem__):
        if index >= container.end or index in ends or nodes[index].op == "":
            return recording.module_at(index)
    return None


def _is_loss_term(recording: Recording, value: int) -> bool:
    """Whether a value is one number that is only ever added to others: zero, when dropped."""
    for index in reached([value], recording.consumers.__getitem__):
        node = recording.nodes[index]
        if node.shape.numel() != 1 and node.kind is not Kind.JOIN:
            return False
        for user in recording.consumers[index]:
            later = recording.nodes[user]
            is_scaled = later.kind in HOMOGENEOUS | PRODUCTS and len(recording.data_of(later)) == 1
            if later.meets_parameter or not (later.kind in SUMS or is_scaled):
                return False
    return True


def keep_states(site: Site) -> str | None:
    """Have a dropped block hand a state on as it was given.

    A state is computed from an argument of its own form, which takes its place in the template of
    the module. The name of a recurrent module is returned that was given none.
    """
    recording, nodes = site.recording, site.recording.nodes
    stream = site.path | {addition.root for addition in site.additions}
    handed_out = {node for node in site.call.outputs if node is not None} - stream
    for member in site.members:
        if member.template is None or handed_out.isdisjoint(member.outputs):
            continue
        leaves, taken = list(member.template.leaves), set(stream)
        for number, node in enumerate(member.outputs):
            if node is None or node not in handed_out or not isinstance(leaves[number], Made):
                continue
            form = nodes[node].shape, nodes[node].dtype, nodes[node].device
            for before in member.given:
                given = None if before is None or before in taken else nodes[before]
                if given is None or (given.shape, given.dtype, given.device) != form:
                    continue
                if not given.of_parameters and recording.reaches(given.index, node):
                    taken.add(given.index)  # of several of one form each has its own
                    leaves[number] = member.place_of(given.index) or leaves[number]
                    break
            else:
                inside = [recording.calls[index] for index in member.inside]
                if any(issubclass(c.kind, RECURRENT) and node in c.outputs for c in inside):
                    return member.module
        member.template = replace(member.template, leaves=tuple(leaves))
    return None


def keeps_branch(site: Site) -> str | None:
    """Where a block keeps a value of its branch beside the sum (a running mean), or None."""
    nodes = site.recording.nodes

    def onwards(value: int) -> list[int]:
        return [i for i in nodes[value].inputs if i >= site.call.start and i not in site.sums]

    for text, kept in site.effects:
        if kept >= 0 and not site.path.isdisjoint(reached([kept], onwards)):
            return text
    return None


def unknown_sum(site: Site) -> str | None:
    """An operation that may add one more branch, in a way that is not understood; or None.

    It joins a value of the stream with what modules outside of the known branches made of it.
    """
    recording, nodes = site.recording, site.recording.nodes
    merges = [i for i in range(site.call.start, site.call.end) if nodes[i].op in MERGES]
    for index in recording.not_held(merges, site.members):
        data = recording.data_of(nodes[index])
        for one, other in permutations(data, 2) if index not in site.sums else ():
            between = recording.between(one, other) if recording.reaches(one, other) else []
            if any(nodes[i].meets_parameter for i in recording.not_held(between, site.members)):
                return f"{nodes[index].op} in {recording.module_at(index)}"
    return None
