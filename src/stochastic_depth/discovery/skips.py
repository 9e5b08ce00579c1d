"""What a block comes to when its branches are dropped, read off the recording of one open forward.

Each residual sum of the block stands for its skip connection. From every output of the block, the
way back must lead over moves of elements alone to one of its inputs: then a dropped block need not
run, and returns that input. A ReLU may lie on the way where the input is the output of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce

import torch

from stochastic_depth.discovery.effects import within
from stochastic_depth.discovery.grouping import Site
from stochastic_depth.discovery.operations import Kind
from stochastic_depth.discovery.recording import Node
from stochastic_depth.discovery.templates import Constant, Given, Template


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
        self.template = None
        if self.recording.mode != "eval":  # which shows too little
            found = self._template()
            is_all = found is not None and not self._leaves_otherwise() and not self._acts()
            self.template = found if is_all else None
        self.copies = self.template is not None and self._must_copy()

    def _template(self) -> Template | None:
        watched = self.call.template
        assert watched is not None
        # An argument may be handed out that was changed in place.
        found = (
            leaf if node is None else self._argument(node)
            for node, leaf in zip(self.call.outputs, watched.leaves, strict=True)
        )
        leaves = tuple(leaf for leaf in found if isinstance(leaf, Given | Constant))
        if len(leaves) < len(watched.leaves) or not any(isinstance(n, Given) for n in leaves):
            return None
        return Template(leaves, watched.spec)

    def _argument(self, output: int) -> Given | None:
        """The argument that an output is when the branches are dropped."""
        nodes, way = self.recording.nodes, [output]
        while way[-1] not in self.call.given:
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
        left = within(self.site.members)
        return bool(self.site.effects) or any(
            target < self.call.start and node.index not in self.walked
            for node in self.recording.nodes[self.call.start : self.call.end]
            if node.overwrites and node.call not in left
            for target in node.overwrites
        )

    def _must_copy(self) -> bool:
        """Whether an output is written to later, or the input is the model's own or its output."""
        recording, own = self.recording, self.walked.intersection(self.call.given)
        if any(not own.isdisjoint(recording.nodes[index].overwrites) for index in self.walked):
            return False  # the block itself hands out its very input
        root, writes = recording.calls[0], recording.writes
        if self._memories(own) & self._memories((*root.given, *root.outputs)):
            return True
        later = [i for node in writes if node.index >= self.call.end for i in node.overwrites]
        return bool(self._memories(self.call.outputs) & self._memories(later))

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
    first, last = nodes[way[0]], nodes[way[-1]]
    if (first.shape, first.dtype, first.device) != (last.shape, last.dtype, last.device):
        return False
    if any(torch.promote_types(first.dtype, nodes[i].dtype) != nodes[i].dtype for i in way):
        return False  # rounded in between
    replays = [replay for index in way[1:] if (replay := nodes[index].replay) is not None]
    if not replays:
        return True
    numbers = torch.arange(first.shape.numel(), device="cpu").view(first.shape)
    return torch.equal(reduce(lambda value, replay: replay(value), replays, numbers), numbers)
