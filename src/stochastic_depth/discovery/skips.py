"""What a block comes to when its branches are dropped, read off the recording of one open forward.

Each residual sum of the block stands for its skip connection. From every output of the block, the
way back must lead over moves of elements alone to one of its inputs: then a dropped block need not
run, and returns that input. A ReLU may lie on the way where the input is the output of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stochastic_depth.discovery.effects import effects_of, within
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
        self.recording, self.call, self.members = site.recording, site.call, site.members
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
        leaves: list[Given | Constant] = []
        for node, leaf in zip(self.call.outputs, watched.leaves, strict=True):
            # An argument may be handed out that was changed in place.
            found = leaf if node is None else self._argument(node)
            if not isinstance(found, Given | Constant):
                return None
            leaves.append(found)
        skips = any(isinstance(leaf, Given) for leaf in leaves)
        return Template(tuple(leaves), watched.spec) if skips else None

    def _argument(self, output: int) -> Given | None:
        """The argument that an output is when the branches are dropped."""
        nodes, way, relu = self.recording.nodes, [output], False
        node = nodes[output]
        while node.index not in self.call.given:
            if node.index in self.skips:
                source = self.skips[node.index]
            elif node.kind is Kind.MOVE and node.inputs:
                source = node.inputs[0]
            elif node.kind is Kind.RELU:
                source, relu = node.inputs[0], True
            else:
                return None
            node = nodes[source]
            way.append(source)
        way.reverse()
        self.walked.update(way)
        if not _is_same(nodes, way) or (relu and not self._comes_from_relu(way[0])):
            return None
        return self.call.place_of(way[0])

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
        if effects_of(self.recording, self.call, self.members):
            return True
        left = within(self.members)
        return any(
            target < self.call.start and node.index not in self.walked
            for node in self.recording.nodes[self.call.start : self.call.end]
            if node.overwrites and node.call not in left
            for target in node.overwrites
        )

    def _must_copy(self) -> bool:
        """Whether an output is written to later, or the input is the model's own or its output."""
        recording = self.recording
        own = {index for index in self.call.given if index is not None} & self.walked
        if any(set(recording.nodes[index].overwrites) & own for index in self.walked):
            return False  # the block itself hands out its very input
        root = recording.calls[0]
        held = {self._base(index) for index in (*root.given, *root.outputs) if index is not None}
        if any(self._base(index) in held for index in own):
            return True
        outputs = {self._base(index) for index in self.call.outputs if index is not None}
        return any(
            self._base(target) in outputs
            for node in recording.writes
            if node.index >= self.call.end
            for target in node.overwrites
        )

    def _base(self, index: int) -> int:
        """The value whose memory this one is a view of."""
        node = self.recording.nodes[index]
        while node.is_view and node.inputs:
            node = self.recording.nodes[node.inputs[0]]
        return node.index


def _is_same(nodes: Sequence[Node], way: Sequence[int]) -> bool:
    """Whether the values along a way, from an input to an output, are the same in the end."""
    first, last = nodes[way[0]], nodes[way[-1]]
    if (first.shape, first.dtype, first.device) != (last.shape, last.dtype, last.device):
        return False
    if any(torch.promote_types(first.dtype, nodes[i].dtype) != nodes[i].dtype for i in way):
        return False  # rounded in between
    moved = [nodes[index] for index in way[1:] if nodes[index].replay is not None]
    if not moved:
        return True
    numbers = value = torch.arange(first.shape.numel(), device="cpu").view(first.shape)
    for node in moved:
        assert node.replay is not None
        value = node.replay(value)
    return torch.equal(value, numbers)
