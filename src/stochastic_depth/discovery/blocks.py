"""Residual blocks and their branches, as the user sees them, made from groups of additions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import nn

from stochastic_depth.discovery.additions import Addition, residual_additions
from stochastic_depth.discovery.branches import last_outputs, member_calls, side_effects
from stochastic_depth.discovery.grouping import Group, group
from stochastic_depth.discovery.recording import Call, Recording
from stochastic_depth.discovery.scaling import (
    Fold,
    degree,
    exclusive,
    fold,
    parameter_uses,
    parameters_at,
    sharers_not_called,
)


@dataclass(frozen=True, slots=True)
class ResidualBranch:
    """One residual branch of a block.

    Attributes:
        name: The block's name and the branch's number, `"blocks.3:0"`.
        modules: Names of its outermost modules, in call order.
    """

    name: str
    modules: tuple[str, ...]
    scaled: tuple[tuple[int, frozenset[int]], ...] = field(repr=False)
    """Which of the modules make up the branch's value, and in which leaves of their outputs."""
    unscalable: str | None = field(repr=False)
    in_line_parameters: tuple[str, ...] = field(repr=False)
    fold: Fold = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class ResidualBlock:
    """A residual block `y = post(skip(x) + branch(x))`, of one or more branches.

    Attributes:
        name: The module's name; for a loop written in line, that of the branch's modules.
        branches: Its residual branches, in forward order.
    """

    name: str
    branches: tuple[ResidualBranch, ...]
    kind: str = field(repr=False)  # the name of its module's class
    container: str = field(repr=False)  # the module whose call decides about it
    nesting: int = field(repr=False, compare=False)  # how many blocks it lies inside of
    leaks_to: str | None = field(repr=False, compare=False)  # who else computes with its values
    branches_leak: bool = field(repr=False, compare=False)  # one branch feeds another
    affine: bool = field(repr=False)  # left out unless it is asked for by name
    irregular: bool = field(default=False, repr=False)  # its calls differ in structure
    explicit: bool = field(default=False, repr=False)  # made of `Residual`s
    interlaced: bool = field(default=False, repr=False)
    """One of its branches lies inside of another one of the same module's forward."""

    @property
    def scope(self) -> str:
        """The module whose parts its branches are made of."""
        return self.container.rpartition(".")[0] if self.explicit else self.container


@dataclass(frozen=True, slots=True, eq=False)
class Discovery:
    """A recording and the blocks that were found in it."""

    recording: Recording
    blocks: tuple[ResidualBlock, ...]
    groups: dict[str, list[Group]]  # for each block, one for each call of its container


def discover(
    recording: Recording, model: nn.Module, *, leave_out: frozenset[str] = frozenset()
) -> Discovery:
    """All residual blocks of a recording, in forward order.

    Args:
        recording: The watched forward.
        model: The model that was watched.
        leave_out: Names of modules whose own additions do not count.
    """
    additions = [
        addition
        for addition in residual_additions(recording)
        if recording.calls[recording.nodes[addition.node].call].module not in leave_out
    ]
    groups: dict[str, list[Group]] = {}
    blocks: dict[str, ResidualBlock] = {}
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    for affine in (False, True):
        kept = [addition for addition in additions if addition.affine is affine]
        for found in group(recording, model, kept):
            if affine and found.name in groups and not blocks[found.name].affine:
                continue
            block = _block(recording, kinds, found, _nesting(found, additions))
            known = blocks.setdefault(found.name, block)
            if known != block:
                blocks[found.name] = replace(known, irregular=True)
            groups.setdefault(found.name, []).append(found)
    uses, idle = parameter_uses(recording), sharers_not_called(recording, model)
    for name, block in blocks.items():
        folds = [fold(recording, a) for found in groups[name] for a in found.additions]
        branches = [
            replace(branch, fold=exclusive(recording, branch.fold, folds, uses, idle))
            for branch in block.branches
        ]
        blocks[name] = replace(block, branches=tuple(branches))
    in_call: dict[int, list[Addition]] = {}
    for first, *_ in groups.values():
        in_call.setdefault(first.container.index, []).extend(first.additions)
    for name, block in blocks.items():
        first = groups[name][0]
        interlaced = any(
            own.contains(other) or other.contains(own)
            for own in first.additions
            for other in in_call[first.container.index]
        )
        blocks[name] = replace(block, interlaced=interlaced)
    order = sorted(blocks.values(), key=lambda block: groups[block.name][0].additions[0].node)
    return Discovery(recording, tuple(order), groups)


def _nesting(found: Group, additions: list[Addition]) -> int:
    own = found.additions[0]
    return sum(addition.contains(own) for addition in additions)


def _block(
    recording: Recording, kinds: dict[str, str], found: Group, nesting: int
) -> ResidualBlock:
    members = [member_calls(recording, a, found.container) for a in found.additions]
    everything = [call for calls in members for call in calls]
    leaks_to = side_effects(recording, found.additions, everything, found.container)
    branches_leak = leaks_to is None and any(
        side_effects(recording, [addition], calls, found.container)
        for addition, calls in zip(found.additions, members, strict=True)
    )
    return ResidualBlock(
        name=found.name,
        branches=tuple(
            _branch(recording, f"{found.name}:{number}", addition, calls)
            for number, (addition, calls) in enumerate(zip(found.additions, members, strict=True))
        ),
        kind=kinds.get(found.name, kinds[found.container.module]),
        container=found.container.module,
        nesting=nesting,
        leaks_to=leaks_to,
        branches_leak=branches_leak,
        affine=found.additions[0].affine,
    )


def _branch(
    recording: Recording, name: str, addition: Addition, calls: list[Call]
) -> ResidualBranch:
    last, in_line = last_outputs(recording, addition, calls)
    unscalable = None
    if not _scales(recording, addition, in_line, calls, last):
        final = max(last, default=-1)
        # A product of two modules' outputs is scaled by scaling one of them.
        last = {final: last[final]} if last else {}
        if not _scales(recording, addition, in_line, calls, last):
            op = recording.nodes[in_line[-1]].op if in_line else "nothing"
            unscalable = f"it ends in {op}, computed in line behind its last module"
    inside = [i for i in addition.path if not any(call.holds(i) for call in calls)]
    return ResidualBranch(
        name=name,
        modules=tuple(call.module for call in calls),
        scaled=tuple(
            (position, frozenset(last[call.index]))
            for position, call in enumerate(calls)
            if call.index in last
        ),
        unscalable=unscalable,
        in_line_parameters=tuple(sorted(parameters_at(recording, inside))),
        fold=fold(recording, addition),
    )


def _scales(
    recording: Recording,
    addition: Addition,
    in_line: list[int],
    calls: list[Call],
    last: dict[int, set[int]],
) -> bool:
    ends = {
        index
        for call in calls
        for number, index in enumerate(call.outputs)
        if index is not None and number in last.get(call.index, ())
    }
    return degree(recording, in_line, ends, addition.branch) == 1
