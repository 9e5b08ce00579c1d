"""The modules of a residual branch: which to gate, and what else their values feed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from stochastic_depth.discovery.additions import Addition
from stochastic_depth.discovery.operations import Kind
from stochastic_depth.discovery.recording import Call, Recording
from stochastic_depth.discovery.states import is_loss_term


def member_calls(recording: Recording, addition: Addition, container: Call) -> list[Call]:
    """The outermost module calls inside the container that belong to the branch, in order.

    A call that holds the sum, or that also made the root, is looked into instead.
    """
    path = set(addition.path)

    def visit(call: Call) -> Iterator[Call]:
        for child in recording.children_within(call, addition.path[0], addition.node):
            if not child.holds_any(addition.path) and path.isdisjoint(child.outputs):
                continue
            if child.holds(addition.node) or child.holds(addition.root):
                yield from visit(child)
            else:
                yield child

    return list(visit(container))


def unread_outputs(recording: Recording, call: Call, members: list[Call]) -> frozenset[int]:
    """The outputs of a member whose values only other members compute with."""
    handed_out = {node for outer in recording.enclosing(call.parent) for node in outer.outputs}

    def unread(node: int) -> bool:
        users = recording.consumers[node]
        return (
            bool(users)
            and node not in handed_out
            and all(
                recording.nodes[user].kind is Kind.MOVE and unread(user)
                for user in recording.not_held(users, members)
            )
        )

    return frozenset(
        number for number, node in enumerate(call.outputs) if node is not None and unread(node)
    )


def side_effects(
    recording: Recording,
    additions: Iterable[Addition],
    members: Iterable[Call],
    container: Call,
) -> str | None:
    """Who else, outside of these branches, computes with a value made in their modules.

    Returns:
        The name of a module that does, or None. Values that only leave as outputs (attention
        weights, caches) count for nothing: nobody computes with them. What the model makes of
        them and hands out does.
    """
    additions, members = list(additions), list(members)
    nodes, consumers = recording.nodes, recording.consumers
    sums = {addition.node for addition in additions}
    made = {
        index
        for call in members
        for index in range(call.start, call.end)
        if nodes[index].op  # not the parameters, buffers and inputs met on the way
    }
    terms = {
        index
        for call in members
        for index in call.outputs
        if index is not None
        if is_loss_term(recording, index)
    }
    own = made | recording.behind([a.branch for a in additions], container.start)
    for index in sorted({index for addition in additions for index in addition.path}):
        if not made.isdisjoint(nodes[index].inputs):  # what is computed in line from that
            made.add(index)
    seen = {
        user
        for index in made
        if index not in terms and not recording.is_state(index)
        for user in consumers[index]
        if user not in own and user not in sums
    }
    waiting = sorted(seen)
    ends = sums | set(recording.calls[0].outputs)
    while waiting:
        index = waiting.pop()
        if index >= container.end or index in ends or nodes[index].op == "":
            return recording.module_at(index)
        for user in consumers[index]:
            if user not in seen:
                seen.add(user)
                waiting.append(user)
    return None
