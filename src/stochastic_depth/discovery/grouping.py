"""Which residual additions make up one block, and what the block is called.

Additions of one module's forward make one block, where that module is a layer: a class that the
model uses more than once. In a forward that is written out in line, or loops over its modules,
each addition is a block of its own, named after the modules of its branch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from stochastic_depth.discovery.additions import Addition
from stochastic_depth.discovery.branches import member_calls
from stochastic_depth.discovery.recording import Call, Recording
from stochastic_depth.torch_private.tracing import is_wrapper


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Additions that make one block in one call of its container."""

    name: str
    container: Call
    additions: tuple[Addition, ...]


class Grouping:
    """Puts the additions of a recording together.

    Args:
        recording: The watched forward.
        model: The model that was watched.
        additions: Its residual additions.
    """

    def __init__(self, recording: Recording, model: nn.Module, additions: list[Addition]) -> None:
        self.recording = recording
        self.modules = dict(model.named_modules())
        self.uses = recording.times_used()
        self.members = {a: member_calls(recording, a, a.container) for a in additions}
        known = [
            a for a in additions if any(self._has_parameters(call) for call in self.members[a])
        ]
        self.additions = [
            replace(a, container=self._block_module(a)) for a in self._without_global_skips(known)
        ]
        self.members = {a: member_calls(recording, a, a.container) for a in self.additions}
        self.left_out = self._leave_out_inner()

    def _leave_out_inner(self) -> dict[int, list[str]]:
        """Leave branches inside of branches of the same forward out.

        Returns:
            For each sum around such a branch, the branch's modules.
        """
        sums = {a.node: a for a in self.additions}
        found: dict[int, list[str]] = {}
        inner: set[Addition] = set()
        for outer in self.additions:
            for node in outer.path:
                one = sums.get(node)
                if one is not None and one.container is outer.container:
                    inner.add(one)
                    modules = [call.module for call in self.members[one]]
                    found.setdefault(outer.node, []).extend(modules)
        self.additions = [a for a in self.additions if a not in inner]
        return found

    def groups(self) -> list[Group]:
        """The groups in forward order; a module that is called several times has several."""
        gathered: dict[tuple[int, str], list[Addition]] = {}
        for addition in self.additions:
            name = self._name(addition)
            gathered.setdefault((addition.container.index, name), []).append(addition)
        self._merge_into_layers(gathered)
        return [
            Group(name, self.recording.calls[call], tuple(sorted(found, key=lambda a: a.node)))
            for (call, name), found in sorted(
                gathered.items(), key=lambda item: min(a.node for a in item[1])
            )
        ]

    def _has_parameters(self, call: Call) -> bool:
        return next(self.modules[call.module].parameters(), None) is not None

    def _block_module(self, addition: Addition) -> Call:
        """The call that is gated: the container, or one around it that stands for it.

        A module without parameters that is called with another module (`self.skip(x, self.f)`)
        stands for nothing: what calls it is the block. The outermost wrapper around nothing but
        the container (torch.compile's, a checkpoint's) is the block, too: what is skipped with it
        is not even recomputed; and a compiled one calls what was bound when it was made, so that a
        gate beneath it would never be asked.
        """
        calls = self.recording.calls
        found = addition.container
        names = [call.module for call in self.members[addition]]
        while found.parent is not None and not self._has_parameters(found):
            if all(_is_below(name, found.module) for name in names):
                break
            found = calls[found.parent]
        call = found
        while call.parent is not None and len(self.recording.children[call.parent]) == 1:
            call = calls[call.parent]
            if is_wrapper(self.modules[call.module]):
                found = call
        return found

    def _without_global_skips(self, additions: list[Addition]) -> list[Addition]:
        """Without skips around other blocks, unless what is around them repeats (nested blocks)."""
        sums = {a.node for a in additions}
        outer = [a for a in additions if not sums.isdisjoint(a.path)]
        nodes = {a.node for a in outer}
        around = {a: {node for node in a.path if node in nodes} for a in outer}

        def look_alike(one: Addition, other: Addition) -> bool:
            if one.container.parent is not None:
                same_class = one.container.kind is other.container.kind
                return same_class and one.container.module != other.container.module
            # A loop in the model's own forward, over a list of modules.
            lists = {self._name(a).rpartition(".")[::2] for a in (one, other)}
            in_lists = all(number.isdigit() for _, number in lists)
            return in_lists and len({name for name, _ in lists}) == 1 < len(lists)

        def repeats(addition: Addition) -> bool:
            return any(
                look_alike(addition, other)
                and other.node not in around[addition]
                and addition.node not in around[other]
                for other in outer
                if other is not addition
            )

        return [a for a in additions if a not in around or repeats(a)]

    def _name(self, addition: Addition) -> str:
        """The container's name, or what the names of the branch's modules begin with."""
        container = addition.container
        modules = [call.module for call in self.members[addition]]
        inside = [m.removeprefix(container.module).lstrip(".").split(".") for m in modules]
        common = []
        for parts in zip(*inside, strict=False):
            if len(set(parts)) > 1:
                break
            common.append(parts[0])
        if not all(_is_below(module, container.module) for module in modules):
            common = []  # modules that are shared, and have their names elsewhere
        for position, part in enumerate(common):
            if part.isdigit():  # a loop over a list of modules
                return ".".join(filter(None, [container.module, *common[: position + 1]]))
        in_a_list = container.module.rpartition(".")[2].isdigit()
        repeated = len(self.recording.calls_of[container.module]) > 1  # a shared layer
        if self.uses[container.kind] > 1 or in_a_list or repeated:
            return container.module
        if common:
            return ".".join(filter(None, [container.module, *common]))
        # Modules of several lists, or with names of their own: the largest stands for them all.
        sizes = {m: sum(p.numel() for p in self.modules[m].parameters()) for m in modules}
        return max(modules, key=lambda name: sizes[name])

    def _merge_into_layers(self, gathered: dict[tuple[int, str], list[Addition]]) -> None:
        """Sub-layers that are modules of their own, of different classes, make one layer."""
        calls, calls_of = self.recording.calls, self.recording.calls_of
        parents: dict[int, list[tuple[int, str]]] = {}
        for call, name in gathered:
            whole = calls[call]
            if name == whole.module and whole.parent is not None:
                parents.setdefault(whole.parent, []).append((call, name))
        for parent, keys in parents.items():
            layer = calls[parent]
            own = (parent, layer.module)
            kinds = [calls[child].kind for child, _ in keys]
            repeated = self.uses[layer.kind] > 1 or len(calls_of[layer.module]) > 1
            is_layer = repeated and not issubclass(layer.kind, nn.Sequential)
            if not is_layer or len(set(kinds)) < len(kinds) or len(keys) + (own in gathered) < 2:
                continue
            found = [*gathered.get(own, ()), *(a for key in keys for a in gathered[key])]
            if any(a.contains(b) for a in found for b in found):
                continue  # a block within a branch of the layer is a block of its own
            for key in keys:
                del gathered[key]
            gathered[own] = [replace(a, container=layer) for a in found]


def _is_below(name: str, around: str) -> bool:
    return not around or name.startswith(f"{around}.")
