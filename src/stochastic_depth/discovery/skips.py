"""What a block comes to when its branches are dropped, read off the recording of one open forward.

Also what it makes beside its sum: who computes with it, and what becomes of it then.

Each residual sum of the block stands for its skip connection. From every output of the block, the
way back must lead over moves of elements alone to one of its inputs: then a dropped block need not
run, and returns that input. A ReLU may lie on the way where the input is the output of one.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from itertools import permutations, zip_longest

import torch
from torch import nn
from torch.nn.modules.rnn import RNNCellBase

from stochastic_depth.discovery import operations
from stochastic_depth.discovery.effects import within
from stochastic_depth.discovery.grouping import Site
from stochastic_depth.discovery.operations import Kind, is_real_or_complex
from stochastic_depth.discovery.recording import RECURRENT, Call, Node, Recording, reached
from stochastic_depth.discovery.templates import Argument, Constant, Made, Template


class Skip:
    """What a block returns when it is dropped, by one of its calls.

    Attributes:
        template: It is built from the arguments of the call. None: the forward has to run.
        copies: Whether a copy has to be returned, because somebody changes the output in place
            later, or holds the input.
    """

    def __init__(self, site: Site) -> None:
        self.site, self.recording, self.call = site, site.recording, site.call
        self.skips = {addition.node: addition.skip for addition in site.additions}
        self.walked: set[int] = set()
        # What runs as in inference shows too little.
        self.template = self._template() if self.recording.mode != "eval" else None
        if self.template is not None and (self._leaves_otherwise() or self._acts()):
            self.template = None
        self.copies = self.template is not None and self._must_copy()

    def _template(self) -> Template | None:
        watched = self.call.template
        assert watched is not None
        if any(isinstance(one, Constant) and not one.is_fixed for one in watched.leaves):
            return None
        # An argument may be handed out that was changed in place.
        found = (
            leaf if node is None else self._argument(node)
            for node, leaf in zip(self.call.outputs, watched.leaves, strict=True)
        )
        leaves = tuple(leaf for leaf in found if isinstance(leaf, Argument | Constant))
        if len(leaves) < len(watched.leaves) or not any(isinstance(n, Argument) for n in leaves):
            return None
        return Template(leaves, watched.spec)

    def _argument(self, output: int) -> Argument | None:
        """The argument that an output is when the branches are dropped."""
        nodes, way = self.recording.nodes, [output]
        while way[-1] not in self.call.inputs:
            node = nodes[way[-1]]
            passes = node.kind in (Kind.MOVE, Kind.RELU) and node.inputs
            if not passes and node.index not in self.skips:
                return None
            way.append(self.skips.get(node.index, node.inputs[0]))
        self.walked.update(way)
        relu = any(nodes[index].kind is Kind.RELU for index in way[:-1])
        if not _is_same(nodes, way[::-1]) or (relu and not self._comes_from_relu(way[-1])):
            return None
        return self.call.place_of(way[-1])

    def _comes_from_relu(self, value: int) -> bool:
        """Whether a value is the output of a ReLU, or of a max-pool of one."""
        node = self.recording.nodes[value]
        while node.kind in (Kind.MOVE, Kind.MAX_POOL) and node.inputs:
            node = self.recording.nodes[node.inputs[0]]
        return node.kind is Kind.RELU

    def _leaves_otherwise(self) -> bool:
        """Whether a value made in the call is used behind it without being one of its outputs."""
        nodes, consumers = self.recording.nodes, self.recording.consumers
        return any(
            user >= self.call.end
            for index in range(self.call.start, self.call.end)
            if index not in self.call.outputs and nodes[index].op
            if not self.recording.is_state(index)
            for user in consumers[index]
        )

    def _acts(self) -> bool:
        """Whether the call does something besides its output that is no part of a branch."""
        left = within(self.site.branch_calls)
        return bool(self.site.effects) or any(
            target < self.call.start and node.index not in self.walked
            for node in self.recording.nodes[self.call.start : self.call.end]
            if node.overwrites and node.call not in left
            for target in node.overwrites
        )

    def _must_copy(self) -> bool:
        """Whether either is written to later, or the input is the model's own or its output."""
        recording, inputs = self.recording, self.walked.intersection(self.call.inputs)
        if any(not inputs.isdisjoint(recording.nodes[index].overwrites) for index in self.walked):
            return False  # the block itself hands out its very input
        root, writes = recording.calls[0], recording.writes
        if self._memories(inputs) & self._memories((*root.inputs, *root.outputs)):
            return True
        later = [i for node in writes if node.index >= self.call.end for i in node.overwrites]
        return bool(self._memories((*self.call.outputs, *inputs)) & self._memories(later))

    def _memories(self, values: Iterable[int | None]) -> set[int]:
        """The values whose memory these lie in: they are these or views of them."""
        found: set[int] = set()
        for value in [value for value in values if value is not None]:
            node = self.recording.nodes[value]
            while node.is_view and node.inputs:
                node = self.recording.nodes[node.inputs[0]]
            found.add(node.index)
        return found


def _is_same(nodes: Sequence[Node], way: Sequence[int]) -> bool:
    """Whether the values along a way, from an input to an output, are the same in the end."""
    first = nodes[way[0]]
    if not _are_alike(nodes, way[0], way[-1]):
        return False
    if any(torch.promote_types(first.dtype, nodes[i].dtype) != nodes[i].dtype for i in way):
        return False  # rounded in between
    replays = [replay for index in way[1:] if (replay := nodes[index].replay) is not None]
    if not replays:
        return True
    numbers = torch.arange(first.shape.numel(), device="cpu").view(first.shape)
    # A copy in between, which is no move of elements, may have laid them out for a view.
    return torch.equal(reduce(lambda x, move: move(x.contiguous()), replays, numbers), numbers)


def side_effects(site: Site) -> str | None:
    """Who else, outside of the branches, computes with a value made in their modules.

    Returns:
        The name of a module that does, or None. Values that only leave as outputs (attention
        weights, caches) count for nothing: nobody computes with them. What the model makes of
        them and hands out does.
    """
    recording, nodes, block_call = site.recording, site.recording.nodes, site.call
    made = {
        index
        for call in site.branch_calls
        for index in range(call.start, call.end)
        if nodes[index].op  # not the parameters, buffers and inputs met on the way
    }
    outputs = {index for call in site.branch_calls for index in call.outputs if index is not None}
    terms = {index for index in outputs if _is_loss_term(recording, index)}
    inside = made.union(recording.behind([a.branch for a in site.additions], block_call.start))
    for index in sorted(site.path):
        if not made.isdisjoint(nodes[index].inputs):  # what is computed in line from that
            made.add(index)
    users = {
        user
        for index in made
        if index not in terms and not recording.is_state(index)
        for user in recording.consumers[index]
        if user not in inside and user not in site.sums
    }
    ends = site.sums | set(recording.calls[0].outputs)
    for index in reached(sorted(users), recording.consumers.__getitem__):
        if index >= block_call.end or index in ends or nodes[index].op == "":
            return recording.module_at(index)
    return None


def _is_loss_term(recording: Recording, value: int) -> bool:
    """Whether a value is one number that is only ever added to others: zero, when dropped."""
    for index in reached([value], recording.consumers.__getitem__):
        node = recording.nodes[index]
        if any(size != 1 for size in node.shape) and node.kind is not Kind.JOIN:
            return False
        for user in recording.consumers[index]:
            later = recording.nodes[user]
            may_scale = later.kind in operations.HOMOGENEOUS | operations.PRODUCTS
            is_scaled = may_scale and len(recording.data_of(later)) == 1
            if later.meets_parameter or not (later.kind in operations.SUMS or is_scaled):
                return False
    return True


def keep_states(site: Site) -> str | None:
    """Have a dropped block hand a state on as it was given.

    A state is computed from an argument of its own form, which takes its place in the template of
    the module.

    Returns:
        The name of a recurrent module whose state would be lost: it was given none, nobody can tell
        which argument it was, or the state is the branch's value as well. None: no state is lost.
    """
    recording, nodes = site.recording, site.recording.nodes
    stream = site.path | {addition.root for addition in site.additions}
    ends = {addition.branch for addition in site.additions}
    for call in site.branch_calls:
        inside = [recording.calls[index] for index in call.inside]
        steps = [step for step in inside if issubclass(step.kind, RECURRENT)]
        earlier = {state: before for step in steps for state, before in _states(step)}
        # What a branch is computed from may be a state as well.
        handed_out = {
            n for n in site.call.outputs if n is not None and n not in stream - {*earlier}
        }
        if call.template is None or handed_out.isdisjoint(call.outputs):
            continue
        leaves, taken = list(call.template.leaves), set(stream)
        for number, node in enumerate(call.outputs):
            if node is None or node not in handed_out or not isinstance(leaves[number], Made):
                continue
            alike = [
                value
                for value in call.inputs
                if value is not None and value not in taken and _are_alike(nodes, value, node)
                if _is_handed_on(site, value) and recording.reaches(value, node)
            ]
            if node in earlier:
                before = earlier[node]
                alike = [b for b in alike if b == before or recording.reaches(b, before)]
                alike = [before] if before in alike else alike if len(alike) < 2 else []
            if alike and node not in ends:
                taken.add(alike[0])  # of several of one form each has its own
                leaves[number] = call.place_of(alike[0])
                continue
            is_read = any(user >= site.call.end for user in recording.consumers[node])
            if node in earlier and (is_read or node in recording.calls[0].outputs):
                return call.module
        call.template = replace(call.template, leaves=tuple(leaves))
    return None


def _states(step: Call) -> Iterator[tuple[int, int]]:
    """Each state that a recurrent module returns, with the state it was given for it, or -1."""
    before = [node for node in step.inputs[1:] if node is not None]
    count = len(before) or len(step.outputs) - (not issubclass(step.kind, RNNCellBase))
    for state, node in zip_longest(step.outputs[-count:], before, fillvalue=-1):
        if state is not None:
            yield state, node


def _is_handed_on(site: Site, value: int) -> bool:
    """Whether a value is an input of the block, or a view of one (detached, say)."""
    node = site.recording.nodes[value]
    while node.kind is Kind.MOVE and node.inputs and node.index not in site.call.inputs:
        node = site.recording.nodes[node.inputs[0]]
    return node.index in site.call.inputs and not node.of_parameters


def _are_alike(nodes: Sequence[Node], one: int, other: int) -> bool:
    """Whether two values have one form."""
    first, second = nodes[one], nodes[other]
    return (first.shape, first.dtype, first.device) == (second.shape, second.dtype, second.device)


def keeps_branch(site: Site) -> str | None:
    """Where a block keeps a value of its branch beside the sum (a running mean), or None."""
    nodes = site.recording.nodes

    def onwards(value: int) -> list[int]:
        return [i for i in nodes[value].inputs if i >= site.call.start and i not in site.sums]

    for text, kept in site.effects:
        starts = {kept} - site.sums  # the sum itself is what is left of it without its branch
        if kept >= 0 and not site.path.isdisjoint(reached(starts, onwards)):
            return text
    return None


def left_behind(site: Site, modules: Mapping[str, nn.Module]) -> str | None:
    """An attribute of a module of a branch that holds a value of its last call, or None."""
    for number in sorted(within(site.branch_calls)):
        call = site.recording.calls[number]
        for text, value in call.effects:
            key = text.partition(" (in ")[0]
            if value >= 0 and key.isidentifier() and key not in modules[call.module]._buffers:
                return f"{call.module}.{key}"
    return None


def unknown_sum(site: Site, followed: Container[int]) -> str | None:
    """An operation that may add one more branch, in a way that is not understood; or None.

    It joins a value of the stream, or a part or a multiple of one, with what weights outside of the
    known branches made of it.

    Args:
        site: A call of the block.
        followed: The residual sums whose branches have modules.
    """
    recording, nodes = site.recording, site.recording.nodes
    merges = [
        node.index
        for node in nodes[site.call.start : site.call.end]
        if node.op in operations.MERGES or (node.kind is Kind.SUM and node.call == site.call.index)
        if node.index not in followed and node.index not in site.path
        if node.op != "stack" or recording.consumers[node.index]  # one that is summed is a sum
    ]
    for index in recording.outside(merges, site.branch_calls):
        for one, other in permutations(recording.data_of(nodes[index]), 2):
            if not is_real_or_complex(nodes[one].dtype):
                continue  # a mask, or an index
            for source in _in_parts(recording, one):
                if recording.reaches(source, other) and _adds(site, index, source, other):
                    return f"{nodes[index].op} in {recording.module_at(index)}"
    return None


def _adds(site: Site, merge: int, source: int, other: int) -> bool:
    """Whether what is merged comes from modules that are in no known branch, or a matrix."""
    recording, nodes = site.recording, site.recording.nodes
    inside = [index for index in recording.between(source, other) if site.call.holds(index)]
    between = recording.outside(inside, site.branch_calls)
    return any(
        nodes[merge].op in operations.MERGES
        or nodes[index].call != site.call.index
        or (nodes[index].kind in operations.PRODUCTS and nodes[index].op != "mul")
        for index in between
        if nodes[index].meets_parameter
    )


def _in_parts(recording: Recording, value: int) -> Iterator[int]:
    """The value, and those that it is a part or a multiple of."""
    nodes, kinds = recording.nodes, (Kind.MOVE, Kind.PART)
    return reached(
        [value],
        lambda index: (
            recording.data_of(nodes[index])
            if nodes[index].kind in kinds or nodes[index].op == "mul"
            else ()
        ),
    )
