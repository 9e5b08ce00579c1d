"""What a block hands out or keeps beside its sum, and what becomes of that when it is dropped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from stochastic_depth.discovery.additions import Addition
from stochastic_depth.discovery.effects import effects_of
from stochastic_depth.discovery.operations import HOMOGENEOUS, MERGES, PRODUCTS, SUMS, Kind
from stochastic_depth.discovery.recording import RECURRENT, Call, Recording
from stochastic_depth.discovery.templates import Made


def is_loss_term(recording: Recording, value: int) -> bool:
    """Whether a value is one number that is only ever added to others: zero, when dropped."""
    waiting, seen = [value], {value}
    while waiting:
        node = recording.nodes[waiting.pop()]
        if node.shape.numel() != 1 and node.kind is not Kind.JOIN:
            return False
        for user in recording.consumers[node.index]:
            later = recording.nodes[user]
            data = [index for index in later.inputs if not recording.nodes[index].fixed]
            adds = later.kind in SUMS or (later.kind in HOMOGENEOUS | PRODUCTS and len(data) == 1)
            if not adds or later.meets_parameter:
                return False
            if user not in seen:
                seen.add(user)
                waiting.append(user)
    return True


def keep_states(
    recording: Recording, call: Call, members: Iterable[Call], additions: Iterable[Addition]
) -> str | None:
    """Have a dropped block hand a state on as it was given.

    A state is computed from an argument of its own form, which takes its place in the template of
    the module. The name of a recurrent module is returned that was given none.
    """
    stream = {index for a in additions for index in (a.root, *a.path)}
    for member in members:
        if member.template is None:
            continue
        leaves, taken = list(member.template.leaves), set(stream)
        for number, node in enumerate(member.outputs):
            if node is None or node not in call.outputs or node in stream:
                continue
            if not isinstance(leaves[number], Made):
                continue
            before = _state_before(recording, member, node, taken)
            if before is not None:
                taken.add(before)  # of several of one form each has its own
                leaves[number] = member.place_of(before) or leaves[number]
            elif _is_recurrent(recording, member, node):
                return member.module
        member.template = replace(member.template, leaves=tuple(leaves))
    return None


def _state_before(recording: Recording, member: Call, node: int, taken: set[int]) -> int | None:
    own = recording.nodes[node]
    for index in member.given:
        if index is None or index in taken:
            continue
        given = recording.nodes[index]
        alike = (given.shape, given.dtype, given.device) == (own.shape, own.dtype, own.device)
        if alike and not given.of_parameters and recording.reaches(index, node):
            return index
    return None


def _is_recurrent(recording: Recording, member: Call, node: int) -> bool:
    inside = [member]
    while inside:
        call = inside.pop()
        if issubclass(call.kind, RECURRENT) and node in call.outputs:
            return True
        inside += recording.children.get(call.index, ())
    return False


def keeps_branch(
    recording: Recording, call: Call, members: Sequence[Call], additions: Sequence[Addition]
) -> str | None:
    """Where a block keeps a value of its branch beside the sum (a running mean), or None."""
    path = {index for addition in additions for index in addition.path}
    sums = {addition.node for addition in additions}
    for text, kept in effects_of(recording, call, members):
        waiting, seen = [kept], {kept}
        while waiting:
            index = waiting.pop()
            if index in path:
                return text
            for source in recording.nodes[index].inputs if index >= 0 else ():
                if source >= call.start and source not in seen and source not in sums:
                    seen.add(source)
                    waiting.append(source)
    return None


def unknown_sum(
    recording: Recording, call: Call, members: Sequence[Call], additions: Sequence[Addition]
) -> str | None:
    """An operation that may add one more branch, in a way that is not understood; or None.

    It joins a value of the stream with what modules outside of the known branches made of it.
    """
    sums = {addition.node for addition in additions}
    own = [i for i in range(call.start, call.end) if recording.nodes[i].op in MERGES]
    for index in recording.not_held(own, members):
        data = [i for i in recording.nodes[index].inputs if not recording.nodes[i].fixed]
        for one in data:
            for other in data:
                if index in sums or not recording.reaches(one, other):
                    continue
                between = recording.not_held(recording.between(one, other), members)
                if any(recording.nodes[i].meets_parameter for i in between):
                    return f"{recording.nodes[index].op} in {recording.module_at(index)}"
    return None
