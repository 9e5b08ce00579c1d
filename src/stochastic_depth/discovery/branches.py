"""The modules of a residual branch: which to gate, where it ends, what else its values feed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from stochastic_depth.discovery.additions import Addition
from stochastic_depth.discovery.operations import MOVES
from stochastic_depth.discovery.recording import Call, Recording


def member_calls(recording: Recording, addition: Addition, container: Call) -> list[Call]:
    """The outermost module calls inside the container that belong to the branch, in order.

    A call that holds the sum, or that also made the root, is looked into instead.
    """
    path = set(addition.path)
    kept_out = {addition.node, addition.root}
    before = recording.nodes[addition.root].ancestors

    def belongs(call: Call) -> bool:
        inside = any(call.holds(index) for index in path)
        return inside or any(index in path for index in call.outputs)

    def makes_root(call: Call) -> bool:
        return any(
            before >> index & 1 and not recording.nodes[index].fixed
            for index in range(call.start, call.end)
        )

    def visit(call: Call) -> Iterator[Call]:
        for child in recording.children.get(call.index, ()):
            if not belongs(child):
                continue
            if any(child.holds(index) for index in kept_out) or makes_root(child):
                yield from visit(child)
            else:
                yield child

    return list(visit(container))


def last_outputs(
    recording: Recording, addition: Addition, members: Iterable[Call]
) -> tuple[dict[int, set[int]], list[int]]:
    """Where the members' part of the branch ends, and what is computed in line behind it.

    Returns:
        For each last member (by the index of its call) the numbers of its output's leaves that
        the sum is made of without another module between; and the in-line values from there on
        to the branch's last, in order.
    """
    path = set(addition.path)
    leaves: dict[int, tuple[int, int]] = {}
    for call in members:
        for number, index in enumerate(call.outputs):
            if index is not None and index in path:
                leaves[index] = (call.index, number)
    last: dict[int, set[int]] = {}
    in_line: list[int] = []
    waiting = [addition.branch]
    seen: set[int] = set()
    while waiting:
        index = waiting.pop()
        if index in seen or index not in path:
            continue
        seen.add(index)
        if index in leaves:
            call_index, number = leaves[index]
            last.setdefault(call_index, set()).add(number)
        else:
            in_line.append(index)
            waiting += recording.nodes[index].inputs
    return last, sorted(in_line)


def unread_outputs(recording: Recording, call: Call, members: list[Call]) -> frozenset[int]:
    """The outputs of a member whose values only other members compute with."""
    handed_out = {node for outer in recording.enclosing(call.parent) for node in outer.outputs}

    def unread(node: int) -> bool:
        users = recording.consumers[node]
        return (
            bool(users)
            and node not in handed_out
            and all(
                any(member.holds(user) for member in members)
                or (recording.nodes[user].op in MOVES and unread(user))
                for user in users
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
    sums = {addition.node for addition in additions}
    members = list(members)
    needed = 0
    for addition in additions:
        needed |= recording.nodes[addition.branch].ancestors | 1 << addition.branch

    def is_own(index: int) -> bool:
        return bool(needed >> index & 1) or any(call.holds(index) for call in members)

    made = [
        index
        for call in members
        for index in range(call.start, call.end)
        if recording.nodes[index].op  # not the parameters, buffers and inputs met on the way
    ]
    by_members = sum(1 << index for index in made)
    made += [  # and what is computed in line from that
        index
        for addition in additions
        for index in addition.path
        if recording.nodes[index].ancestors & by_members
    ]
    waiting = [
        user
        for index in dict.fromkeys(made)
        for user in recording.consumers[index]
        if not is_own(user) and user not in sums
    ]
    seen = set(waiting)
    ends = sums | set(recording.calls[0].outputs)
    while waiting:
        index = waiting.pop()
        if index >= container.end or index in ends or recording.nodes[index].op == "":
            return recording.calls[recording.nodes[index].call].module or "the model"
        for user in recording.consumers[index]:
            if user not in seen:
                seen.add(user)
                waiting.append(user)
    return None
