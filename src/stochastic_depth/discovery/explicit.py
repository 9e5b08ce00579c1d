"""Residual connections that say so themselves (`sd.Residual`): found by name, without a watch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from stochastic_depth.discovery.additions import Addition
from stochastic_depth.discovery.blocks import Discovery, ResidualBlock, ResidualBranch
from stochastic_depth.discovery.recording import Call, Recording
from stochastic_depth.discovery.scaling import (
    Fold,
    exclusive,
    fold,
    parameter_uses,
    sharers_not_called,
)

_NOT_WATCHED = Fold(obstacle="its branch was not watched: pass example_inputs to apply")


def explicit_residuals(model: nn.Module) -> tuple[str, ...]:
    """The names of all modules that are a residual connection, and nothing else."""
    return tuple(name for name, module in model.named_modules() if _is_residual(type(module)))


def _is_residual(kind: type) -> bool:
    return bool(getattr(kind, "_is_stochastic_depth_residual", False))


def explicit_blocks(model: nn.Module, folds: Mapping[str, Fold]) -> list[ResidualBlock]:
    """The blocks that they make, in the order in which the model holds them.

    Those of one layer are its branches: a layer is a class that the model uses more than once.

    Args:
        model: The model.
        folds: What a watch found out about the end of each one's branch.
    """
    uses = Counter(type(module) for module in model.modules())
    layers: dict[str, list[str]] = {}
    for name in explicit_residuals(model):
        around = name.rpartition(".")[0]
        holder = type(model.get_submodule(around))
        is_list = issubclass(holder, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        is_layer = uses[holder] > 1 and not is_list and not _is_residual(holder)
        layers.setdefault(around if is_layer else name, []).append(name)
    return [_block(model, layer, names, folds) for layer, names in layers.items()]


def with_explicit_blocks(found: Discovery, model: nn.Module, inside: frozenset[str]) -> Discovery:
    """What was found, and the blocks that say so themselves, in forward order.

    Args:
        found: The other blocks.
        model: The model that was watched.
        inside: The names of the residual connections.
    """
    recording = found.recording
    folds: dict[str, Fold] = {}
    position: dict[str, int] = {}
    uses, idle = parameter_uses(recording), sharers_not_called(recording, model)
    for name in inside & recording.calls_of.keys():
        calls = recording.calls_of[name]
        own = [fold(recording, a, {a.node}) for call in calls if (a := _sum(recording, call))]
        checked = [exclusive(recording, one, own, uses, idle) for one in own]
        obstacles = [one.obstacle for one in checked if one.obstacle]
        folds[name] = Fold(
            tuple(dict.fromkeys(p for one in checked for p in one.parameters)),
            tuple(use for one in checked for use in one.uses),
            obstacles[0] if obstacles else None,
        )
        position[name] = calls[0].start
    blocks = explicit_blocks(model, folds)
    for block in found.blocks:
        position[block.name] = found.groups[block.name][0].additions[0].node
    late = len(recording.nodes)
    place = {b.name: min(position.get(m, late) for m in b.branches[0].modules) for b in blocks}
    place |= {b.name: position[b.name] for b in found.blocks}
    ordered = sorted((*found.blocks, *blocks), key=lambda block: place[block.name])
    return replace(found, blocks=tuple(ordered))


def _sum(recording: Recording, call: Call) -> Addition | None:
    """The addition of a residual connection's own forward: the branch is its second operand."""
    own = recording.sums_of.get(call.index)
    if not own or not call.arguments:
        return None
    (skip, branch), root = recording.nodes[own[-1]].inputs, next(iter(call.arguments.values()))
    path = tuple(recording.between(root, branch))
    return Addition(own[-1], 1, skip, branch, root, path, call, affine=False)


def _block(
    model: nn.Module, layer: str, names: list[str], folds: Mapping[str, Fold]
) -> ResidualBlock:
    branches = tuple(
        ResidualBranch(
            name=f"{layer}:{number}",
            modules=(name,),
            scaled=(),
            unscalable=None,
            in_line_parameters=(),
            fold=folds.get(name, _NOT_WATCHED),
        )
        for number, name in enumerate(names)
    )
    return ResidualBlock(
        name=layer,
        branches=branches,
        kind=type(model.get_submodule(layer)).__name__,
        container=names[0],
        nesting=0,
        leaks_to=None,
        branches_leak=False,
        affine=False,
        explicit=True,
    )
