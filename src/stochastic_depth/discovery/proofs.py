"""What one more forward, with the gates closed, shows about a block: its branches are zero."""

from __future__ import annotations

from stochastic_depth.discovery.blocks import Discovery, ResidualBlock
from stochastic_depth.discovery.recording import Recording


def branch_not_closed(found: Discovery, block: ResidualBlock, closed: Recording) -> str | None:
    """The name of a branch that is not zero at its sum although it was dropped, or None."""
    for site in found.sites[block.name]:
        for branch, addition in zip(block.branches, site.additions, strict=True):
            node = _same_sum(found.recording, addition.node, closed)
            inputs = found.recording.nodes[addition.node].inputs
            if node is None or inputs.index(addition.branch) not in closed.nodes[node].zero:
                return branch.name
    return None


def branch_not_known(block: ResidualBlock) -> str | None:
    """The name of a branch that is not known to be zero when it is dropped, without any values."""
    return next((branch.name for branch in block.branches if not branch.vanishes), None)


def _same_sum(recording: Recording, node: int, other: Recording) -> int | None:
    """The sum at the same place: the n-th in the forward of the n-th call of the same module."""
    call = recording.calls[recording.nodes[node].call]
    theirs = other.calls_of.get(call.module, [])
    number = recording.number_of[call.index]
    if number >= len(theirs):
        return None
    sums = other.sums_of.get(theirs[number].index, [])
    position = recording.sums_of[call.index].index(node)
    return sums[position] if position < len(sums) else None
