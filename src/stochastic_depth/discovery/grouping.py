"""Which residual additions make up one block, and what the block is called.

Additions of one module's forward make one block, where that module is a layer: a class that the
model uses more than once. In a forward that is written out in line, or loops over its modules,
each addition is a block of its own, named after the modules of its branch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from torch import nn

from stochastic_depth.discovery.additions import Addition
from stochastic_depth.discovery.branches import member_calls
from stochastic_depth.discovery.recording import Call, Recording
from stochastic_depth.torch_private import is_wrapper


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Additions that make one block in one call of its container."""

    name: str
    container: Call
    additions: tuple[Addition, ...]


def group(recording: Recording, model: nn.Module, additions: list[Addition]) -> list[Group]:
    """The groups in forward order; a module that is called several times has several."""
    kept = [
        replace(a, container=_outermost(recording, model, a.container))
        for a in _without_global_skips(additions)
        if _has_parameters(recording, model, a)
    ]
    uses = recording.times_used()
    gathered: dict[tuple[int, str], list[Addition]] = {}
    for addition in kept:
        name = _name(recording, model, addition, uses)
        gathered.setdefault((addition.container.index, name), []).append(addition)
    _merge_into_layers(recording, gathered, uses)
    return [
        Group(name, recording.calls[call], tuple(sorted(found, key=lambda a: a.node)))
        for (call, name), found in sorted(
            gathered.items(), key=lambda item: min(a.node for a in item[1])
        )
    ]


def _outermost(recording: Recording, model: nn.Module, container: Call) -> Call:
    """The outermost wrapper around nothing but the container: torch.compile's, a checkpoint's.

    What is skipped with it is not even recomputed; and a compiled one calls what was bound when it
    was made, so that a gate beneath it would never be asked.
    """
    found = call = container
    while call.parent is not None and len(recording.children[call.parent]) == 1:
        call = recording.calls[call.parent]
        if is_wrapper(model.get_submodule(call.module)):
            found = call
    return found


def _without_global_skips(additions: list[Addition]) -> list[Addition]:
    """Without skips around other blocks, unless the class around them repeats (nested blocks)."""
    outer = [a for a in additions if any(a.contains(b) for b in additions)]

    def repeats(addition: Addition) -> bool:
        return any(
            other.container.kind is addition.container.kind
            and other.container.module != addition.container.module
            and not other.contains(addition)
            and not addition.contains(other)
            for other in outer
        )

    return [
        a for a in additions if a not in outer or (a.container.parent is not None and repeats(a))
    ]


def _has_parameters(recording: Recording, model: nn.Module, addition: Addition) -> bool:
    return any(
        next(model.get_submodule(call.module).parameters(), None) is not None
        for call in member_calls(recording, addition, addition.container)
    )


def _name(recording: Recording, model: nn.Module, addition: Addition, uses: Counter[type]) -> str:
    """The container's name, or what the names of the branch's modules begin with."""
    container = addition.container
    modules = [call.module for call in member_calls(recording, addition, container)]
    inside = [module.removeprefix(container.module).lstrip(".").split(".") for module in modules]
    common = []
    for parts in zip(*inside, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    for position, part in enumerate(common):
        if part.isdigit():  # a loop over a list of modules
            return ".".join(filter(None, [container.module, *common[: position + 1]]))
    in_a_list = container.module.rpartition(".")[2].isdigit()
    repeated = len(recording.calls_of[container.module]) > 1  # a shared layer
    if uses[container.kind] > 1 or in_a_list or repeated:
        return container.module
    if common:
        return ".".join(filter(None, [container.module, *common]))
    # Modules of several lists, or with names of their own: the largest one stands for them all.
    sizes = {m: sum(p.numel() for p in model.get_submodule(m).parameters()) for m in modules}
    return max(modules, key=lambda name: sizes[name])


def _merge_into_layers(
    recording: Recording, gathered: dict[tuple[int, str], list[Addition]], uses: Counter[type]
) -> None:
    """Sub-layers that are modules of their own, of different classes, make one layer."""
    parents: dict[int, list[tuple[int, str]]] = {}
    for call, name in gathered:
        whole = recording.calls[call]
        if name == whole.module and whole.parent is not None:
            parents.setdefault(whole.parent, []).append((call, name))
    for parent, keys in parents.items():
        layer = recording.calls[parent]
        own = (parent, layer.module)
        kinds = [recording.calls[child].kind for child, _ in keys]
        repeated = uses[layer.kind] > 1 or len(recording.calls_of[layer.module]) > 1
        is_layer = repeated and not issubclass(layer.kind, nn.Sequential)
        if not is_layer or len(set(kinds)) < len(kinds) or len(keys) + (own in gathered) < 2:
            continue
        found = [*gathered.get(own, ()), *(a for key in keys for a in gathered[key])]
        if any(a.contains(b) for a in found for b in found):
            continue  # a block within a branch of the layer is a block of its own
        for key in keys:
            del gathered[key]
        gathered[own] = [replace(a, container=layer) for a in found]
