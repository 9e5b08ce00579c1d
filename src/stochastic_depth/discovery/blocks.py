"""Residual blocks and their branches, as the user sees them, made from a watched forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from stochastic_depth.discovery import skips
from stochastic_depth.discovery.additions import Addition, Search
from stochastic_depth.discovery.grouping import Grouping, Site, has_modules
from stochastic_depth.discovery.operations import Kind
from stochastic_depth.discovery.recording import Call, Recording
from stochastic_depth.discovery.scaling import Fold, Folding, ends_of, parameters_at
from stochastic_depth.discovery.templates import Template
from stochastic_depth.errors import warn


@dataclass(frozen=True, slots=True)
class ResidualBranch:
    """One residual branch of a block.

    Attributes:
        name: The block's name and the branch's number, `"blocks.3:0"`.
        modules: Names of its outermost modules, in call order.
    """

    name: str
    modules: tuple[str, ...]
    branch_outputs: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    """What makes up the branch's value: positions of modules, and leaves of their outputs."""
    unscalable: str | None = field(default=None, repr=False)
    vanishes: bool = field(default=True, repr=False)  # is zero where its modules are
    in_line_parameters: frozenset[str] = field(default=frozenset(), repr=False)
    fold: Fold = field(default=Fold(), repr=False, compare=False)


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
    block_module: str = field(repr=False)  # the module whose call decides about it
    nesting: int = field(default=0, repr=False, compare=False)  # how many blocks it lies inside of
    refusal: str | None = field(default=None, repr=False, compare=False)
    """Why it cannot be skipped exactly, with any options."""
    branches_leak: bool = field(default=False, repr=False, compare=False)
    """One branch feeds another."""
    affine: bool = field(default=False, repr=False)  # left out unless it is asked for by name
    explicit: bool = field(default=False, repr=False)  # made of `Residual`s
    whole: Template | None = field(default=None, repr=False, compare=False)
    """What it returns where all of it is dropped and its forward need not run then."""
    copies_input: bool = field(default=False, repr=False, compare=False)
    """Whether it then returns a copy: others refer to its input, or change it later."""
    left_out: tuple[str, ...] = field(default=(), repr=False, compare=False)
    """The modules of branches inside of its own branches: those are not gated."""
    affine_too: tuple[str, ...] = field(default=(), repr=False, compare=False)
    """The modules of affine branches beside its own: those are not gated either."""
    projects: bool = field(default=False, repr=False, compare=False)
    """Whether its skip path does more than hand its input to the sum."""
    keeps: str | None = field(default=None, repr=False, compare=False)
    """Where it keeps a value of its branch, which is zero when that is dropped."""
    left_behind: str | None = field(default=None, repr=False, compare=False)
    """An attribute of a module of its branch, which stays as it was when that is dropped."""

    def branches_around(self, blocks: Sequence[ResidualBlock]) -> list[tuple[int, int]]:
        """The branches that it is a part of: for each the number of its block, and its own."""
        mine = f"{self.block_module}."

        def holds(other: ResidualBlock, place: int) -> bool:
            modules = other.branches[place].modules
            if other.explicit:  # what its branch is made of is known to it alone: of its layer
                return other.name not in modules and mine.startswith(f"{other.name}.")
            return any(mine.startswith(f"{part}.") for part in modules)

        return [
            (number, place)
            for number, other in enumerate(blocks)
            for place in range(1 if other.explicit else len(other.branches))
            if other is not self and holds(other, place)
        ]

    @property
    def scope(self) -> str:
        """The module whose parts its branches are made of."""
        return self.block_module.rpartition(".")[0] if self.explicit else self.block_module


@dataclass(frozen=True, slots=True, eq=False)
class Discovery:
    """A recording and the blocks that were found in it."""

    recording: Recording
    blocks: tuple[ResidualBlock, ...]
    sites: dict[str, list[Site]]  # for each watched block, the calls of its module


def explicit_residuals(model: nn.Module) -> tuple[str, ...]:
    """The names of all modules that are a residual connection (`sd.Residual`), and nothing else."""
    return tuple(
        name
        for name, module in model.named_modules()
        if getattr(type(module), "_is_stochastic_depth_residual", False)
    )


def discover(recording: Recording, model: nn.Module) -> Discovery:
    """All residual blocks of a model, in forward order.

    Args:
        recording: The watched forward; an empty one shows the explicit residual connections.
        model: The model that was watched.
    """
    explicit = explicit_residuals(model)
    search = Search(recording)
    _warn_of_gated_skips(list(dict.fromkeys(search.gated_skips())))
    additions = [
        addition
        for addition in search.additions
        if recording.calls[recording.nodes[addition.node].call].module not in explicit
    ]
    sums = {addition.node for addition in additions}
    nesting = Counter(node for a in additions for node in a.path if node in sums)
    modules = dict(model.named_modules())
    sites: dict[str, list[Site]] = {}
    affine_too: dict[str, list[str]] = {}
    for affine in (False, True):
        kept = [addition for addition in additions if addition.affine is affine]
        for site in Grouping(recording, model, kept).sites:
            calls = sites.setdefault(site.name, [])
            if not calls or calls[0].additions[0].affine is affine:
                calls.append(site)
            else:
                affine_too.setdefault(site.name, []).extend(site.times)
    placed = {a.node for calls in sites.values() for site in calls for a in site.additions}
    followed = {
        addition.node
        for addition in additions
        if has_modules(addition, modules)
        # A skip around other blocks makes none; it may end in the forward of one all the same.
        if addition.node in placed
        or recording.nodes[addition.node].call == addition.block_call.index
    }
    folding = Folding(recording, model)
    left_out: dict[str, str] = {}
    found: list[tuple[int, ResidualBlock]] = []  # with the place in the forward
    for name, calls in sites.items():
        unknown = next(filter(None, (skips.unknown_sum(site, followed) for site in calls)), None)
        is_whole = name == calls[0].call.module  # not one of several in the same forward
        if unknown is None or not is_whole:
            first = calls[0].additions[0].node
            block = _block(modules, calls, nesting[first], folding)
            beside = tuple(dict.fromkeys(affine_too.get(name, ())))
            found.append((first, replace(block, affine_too=beside)))
        if unknown is not None:
            left_out.setdefault(unknown, f'block "{name}" is' if is_whole else "a branch may be")
    for unknown, what in left_out.items():
        warn(
            f"{what} left out: {unknown} may add a branch that cannot be followed; "
            "write it as a sum, x + branch, or with sd.Residual"
        )
    found += _explicit_blocks(recording, model, explicit, folding)
    found.sort(key=lambda placed: placed[0])
    return Discovery(recording, tuple(block for _, block in found), sites)


def _warn_of_gated_skips(names: Sequence[str]) -> None:
    if names:
        others = f" (and {len(names) - 1} others)" if len(names) > 1 else ""
        warn(
            f'"{names[0]}"{others} is left out: its skip connection is multiplied by what it '
            "computes from its input, as in a highway"
        )


def _block(
    modules: Mapping[str, nn.Module], calls: list[Site], nesting: int, folding: Folding
) -> ResidualBlock:
    first, count = calls[0], max(len(site.additions) for site in calls)
    folds = folding.folds(
        [[a for s in calls for a in s.additions[n : n + 1]] for n in range(count)]
    )
    dropped = [skips.Skip(site) for site in calls]
    whole = dropped[0].template if all(d.template == dropped[0].template for d in dropped) else None
    shown = [_branches(site, folds) for site in calls]
    refusal = next(_refusals(calls, shown), None)
    several = [(site, a) for site in calls for a in site.additions if len(site.additions) > 1]
    single_sums = (Site(site.recording, site.name, site.call, [a]) for site, a in several)
    return ResidualBlock(
        name=first.name,
        branches=shown[0],
        kind=type(modules[first.name]).__name__,
        block_module=first.call.module,
        nesting=nesting,
        refusal=refusal,
        branches_leak=refusal is None and any(map(skips.side_effects, single_sums)),
        affine=first.additions[0].affine,
        whole=whole,
        copies_input=whole is not None and any(one.copies for one in dropped),
        projects=any(not _is_handed_on(first.recording, a) for a in first.additions),
        left_out=tuple(module for a in first.additions for module in a.left_out),
        keeps=next(filter(None, map(skips.keeps_branch, calls)), None),
        left_behind=skips.left_behind(first, modules),
    )


def _is_handed_on(recording: Recording, addition: Addition) -> bool:
    """Whether what a branch is added to is what it starts from, but for moves of its elements."""
    node = recording.nodes[addition.skip]
    while node.index != addition.root and node.kind is Kind.MOVE:
        node = recording.nodes[node.inputs[0]]
    return node.index == addition.root


def _refusals(calls: Sequence[Site], shown: Sequence[tuple[ResidualBranch, ...]]) -> Iterator[str]:
    """Why a block cannot be skipped exactly, with any options."""
    for user in filter(None, map(skips.side_effects, calls)):
        yield (
            f'"{user}" computes with a value made inside of it (a loss that a module of the branch '
            "returns as one number works)"
        )
    if len({site.call.module for site in calls}) > 1 or len(set(shown)) > 1:
        yield "its module is called several times with different structure"
    for state in filter(None, map(skips.keep_states, calls)):
        yield (
            f'it hands out a state of "{state}", which would be lost: pass example inputs with the '
            "states, so that it is given one of the same form"
        )
    for branch in shown[0]:
        if not branch.vanishes:
            yield f"{branch.name} is not zero when its modules are dropped"


def _branches(site: Site, folds: Sequence[Fold]) -> tuple[ResidualBranch, ...]:
    recording = site.recording
    return tuple(
        ResidualBranch(
            f"{site.name}:{number}",
            tuple(call.module for call in addition.branch_calls),
            *ends_of(site, addition),
            parameters_at(recording, recording.outside(addition.path, addition.branch_calls)),
            fold,
        )
        for number, (addition, fold) in enumerate(zip(site.additions, folds, strict=False))
    )


def _explicit_blocks(
    recording: Recording, model: nn.Module, names: Sequence[str], folding: Folding
) -> Iterator[tuple[int, ResidualBlock]]:
    """The blocks that say so themselves, and where they were called first.

    Residual connections of one layer are its branches: a class that the model uses more than once.
    """
    uses = Counter(type(module) for module in model.modules())
    layers: dict[str, list[str]] = {}
    for name in names:
        around = name.rpartition(".")[0]
        holder = type(model.get_submodule(around))
        is_list = issubclass(holder, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        is_layer = uses[holder] > 1 and not is_list and around not in names
        layers.setdefault(around if is_layer else name, []).append(name)
    for layer, residuals in layers.items():
        calls = [recording.calls_of.get(name, []) for name in residuals]
        sums = [[a for call in each if (a := _sum(recording, call))] for each in calls]
        branches = tuple(
            ResidualBranch(f"{layer}:{number}", (name,), fold=fold)
            for number, (name, fold) in enumerate(zip(residuals, folding.folds(sums), strict=True))
        )
        kind = type(model.get_submodule(layer)).__name__
        place = next((call.start for call in calls[0]), len(recording.nodes))
        yield place, ResidualBlock(layer, branches, kind, block_module=residuals[0], explicit=True)


def _sum(recording: Recording, call: Call) -> Addition | None:
    """The addition of a residual connection's own forward: the branch is its second operand."""
    nodes = recording.nodes[call.start : call.end]
    sums = [node for node in nodes if node.kind is Kind.SUM and node.call == call.index]
    inputs = [node for node in call.inputs if node is not None]
    if not sums or not inputs:
        return None
    (skip, branch), root = sums[-1].inputs, inputs[0]
    return Addition(sums[-1].index, skip, root, recording.between(root, branch), call)
