"""The modules that end a branch, and hooks that change what comes out there."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

import stochastic_depth as sd
from stochastic_depth.discovery.blocks import Discovery


@dataclass(frozen=True)
class End:
    """Where a branch ends: which call of a module in its block, which leaves of its output."""

    block_module: str
    module: str
    position: int
    leaves: frozenset[int]


def ends_of(found: Discovery, block: sd.ResidualBlock) -> Iterator[End]:
    """Where the branches of a block end, as they were found."""
    recording, site = found.recording, found.sites[block.name][0]
    inside = [
        call
        for call in recording.calls
        if site.call.start <= call.start and call.end <= site.call.end
    ]
    for addition, branch in zip(site.additions, block.branches, strict=True):
        calls = addition.branch_calls
        for place, leaf in branch.branch_outputs:
            alike = [call for call in inside if call.module == calls[place].module]
            position = alike.index(calls[place])
            yield End(block.block_module, calls[place].module, position, frozenset([leaf]))


@contextmanager
def changed_at(model: nn.Module, ends: Collection[End], change: Any) -> Iterator[None]:
    """While hooks change what comes out at these ends: `change(end, value)` takes its place."""
    counts = {(end.block_module, end.module): 0 for end in ends}

    def entered(block_module: str) -> Any:
        def hook(*_: object) -> None:
            counts.update({key: 0 for key in counts if key[0] == block_module})

        return hook

    def left(key: tuple[str, str]) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            here = End(*key, counts[key], frozenset())
            counts[key] += 1
            leaves, spec = tree_flatten(output)
            for end in ends:
                if here == replace(end, leaves=frozenset()):
                    for number in end.leaves:
                        leaves[number] = change(end, leaves[number])
            return tree_unflatten(leaves, spec)

        return hook

    with ExitStack() as stack:
        for name in {end.block_module for end in ends}:
            hook = model.get_submodule(name).register_forward_pre_hook(entered(name))
            stack.callback(hook.remove)
        for key in counts:
            stack.callback(model.get_submodule(key[1]).register_forward_hook(left(key)).remove)
        yield
