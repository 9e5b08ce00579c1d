"""Residual blocks and their branches, as the user sees them, made from groups of additions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from stochastic_depth.discovery.additions import Addition, residual_additions
from stochastic_depth.discovery.branches import member_calls, side_effects
from stochastic_depth.discovery.grouping import Group, Grouping
from stochastic_depth.discovery.recording import Call, Recording
from stochastic_depth.discovery.scaling import (
    Fold,
    ends_of,
    exclusive,
    fold,
    parameter_uses,
    parameters_at,
    sharers_not_called,
)
from stochastic_depth.discovery.skips import skip_of
from stochastic_depth.discovery.states import keep_states, keeps_branch, unknown_sum
from stochastic_depth.discovery.templates import Template


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
    copies_input: bool = field(default=False, repr=False, compare=False)
    """Dropped as a whole, it returns a copy: its input is held by others, or changed later."""
    left_out: tuple[str, ...] = field(default=(), repr=False, compare=False)
    """The modules of branches inside of its own branches: those are not gated."""
    lost_state: str | None = field(default=None, repr=False, compare=False)
    """A recurrent module whose state it hands out, and to which none was given."""
    keeps: str | None = field(default=None, repr=False, compare=False)
    """Where it keeps a value of its branch, which is zero when that is dropped."""

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
    whole: dict[str, Template] = field(default_factory=dict)
    """What a dropped block returns, of those whose forward need not run then."""
    unclear: dict[str, str] = field(default_factory=dict)
    """Blocks that are left out, and an operation that may add one more branch to them."""


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
    sums = {addition.node for addition in additions}
    nesting = Counter(node for a in additions for node in a.path if node in sums)
    groups: dict[str, list[Group]] = {}
    blocks: dict[str, ResidualBlock] = {}
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    for affine in (False, True):
        kept = [addition for addition in additions if addition.affine is affine]
        grouping = Grouping(recording, model, kept)
        for found in grouping.groups():
            if affine and found.name in groups and not blocks[found.name].affine:
                continue
            block = _block(recording, kinds, found, nesting[found.additions[0].node])
            inner = [m for a in found.additions for m in grouping.left_out.get(a.node, ())]
            block = replace(block, left_out=tuple(inner))
            known = blocks.setdefault(found.name, block)
            if known != block:
                blocks[found.name] = replace(known, irregular=True)
            groups.setdefault(found.name, []).append(found)
    uses, idle = parameter_uses(recording), sharers_not_called(recording, model)
    whole: dict[str, Template] = {}
    unclear: dict[str, str] = {}
    for name, block in blocks.items():
        folds = [one for found in groups[name] for one in _folds(recording, found)]
        branches = tuple(
            replace(branch, fold=exclusive(recording, branch.fold, folds, uses, idle))
            for branch in block.branches
        )
        members = [[c for own in _members(recording, g) for c in own] for g in groups[name]]
        skip = skip_of(recording, groups[name], members)
        states, keeps, unknown = (
            _first(check, recording, groups[name], members)
            for check in (keep_states, keeps_branch, unknown_sum)
        )
        if unknown is not None:
            unclear[name] = unknown
        blocks[name] = replace(
            block,
            branches=branches,
            copies_input=bool(skip and skip.copies),
            lost_state=states,
            keeps=keeps,
        )
        if skip is not None:
            whole[name] = skip.template
    order = sorted(blocks.values(), key=lambda block: groups[block.name][0].additions[0].node)
    clear = tuple(block for block in order if block.name not in unclear)
    return Discovery(recording, clear, groups, whole, unclear)


def _first(check: Any, recording: Recording, groups: list[Group], members: Any) -> str | None:
    """What the first call of a block shows where this is looked for."""
    found = [
        check(recording, group.container, own, group.additions)
        for group, own in zip(groups, members, strict=True)
    ]
    return next((text for text in found if text is not None), None)


def _members(recording: Recording, found: Group) -> list[list[Call]]:
    return [member_calls(recording, a, found.container) for a in found.additions]


def _folds(recording: Recording, found: Group) -> list[Fold]:
    sums = {addition.node for addition in found.additions}
    return [fold(recording, addition, sums) for addition in found.additions]


def _block(
    recording: Recording, kinds: dict[str, str], found: Group, nesting: int
) -> ResidualBlock:
    members = _members(recording, found)
    everything = [call for calls in members for call in calls]
    leaks_to = side_effects(recording, found.additions, everything, found.container)
    branches_leak = leaks_to is None and any(
        side_effects(recording, [addition], calls, found.container)
        for addition, calls in zip(found.additions, members, strict=True)
    )
    sums = {addition.node for addition in found.additions}
    return ResidualBlock(
        name=found.name,
        branches=tuple(
            _branch(recording, f"{found.name}:{number}", addition, calls, sums)
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
    recording: Recording, name: str, addition: Addition, calls: Sequence[Call], sums: set[int]
) -> ResidualBranch:
    in_line = recording.not_held(addition.path, calls)
    ends, unscalable = ends_of(recording, addition, calls, sums)
    return ResidualBranch(
        name=name,
        modules=tuple(call.module for call in calls),
        scaled=tuple(sorted(ends.items())),
        unscalable=unscalable,
        in_line_parameters=tuple(sorted(parameters_at(recording, in_line))),
        fold=fold(recording, addition, sums),
    )
