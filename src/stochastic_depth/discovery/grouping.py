"""Which residual additions make up one block, and what the block is called.

Additions of one module's forward make one block, where that module is a layer: a class that the
model uses more than once. In a forward that is written out in line, or loops over its modules,
each addition is a block of its own, named after the modules of its branch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import nn

from stochastic_depth.discovery.additions import Addition
from stochastic_depth.discovery.effects import effects_of
from stochastic_depth.discovery.recording import Call, Recording
from stochastic_depth.torch_private.tracing import is_wrapper


class Site:
    """One call of a block's module.

    Args:
        recording: The watched forward.
        name: The block's name.
        call: The call.
        additions: The additions in it that make the block.

    Attributes:
        branch_calls: The calls of its branches' modules, in order.
        times: How often each of these modules is called.
        sums: The sums of its additions.
        path: The values of its branches.
        effects: What the call does besides its output, outside of these modules, and the value.
    """

    def __init__(
        self, recording: Recording, name: str, call: Call, additions: list[Addition]
    ) -> None:
        self.recording, self.name, self.call = recording, name, call
        self.additions = sorted(additions, key=lambda addition: addition.node)
        self.branch_calls = [call for addition in self.additions for call in addition.branch_calls]
        self.times = Counter(call.module for call in self.branch_calls)
        self.sums = {addition.node for addition in additions}
        self.path = {value for addition in additions for value in addition.path}
        self.effects = effects_of(recording, call, self.branch_calls)


class Grouping:
    """Puts the additions of a recording together.

    Args:
        recording: The watched forward.
        model: The model that was watched.
        additions: Its residual additions.

    Attributes:
        sites: What makes a block, in forward order: one for each call of its module.
    """

    def __init__(self, recording: Recording, model: nn.Module, additions: list[Addition]) -> None:
        self.recording = recording
        self.modules = dict(model.named_modules())
        kinds = {call.module: call.kind for call in recording.calls}
        self.uses = Counter(kinds.values())
        additions = [addition for addition in additions if has_modules(addition, self.modules)]
        additions = self._without_global_skips(additions)
        for addition in additions:
            addition.put_in(self._block_module(addition), recording)
        gathered: dict[tuple[int, str], list[Addition]] = {}
        for addition in _without_inner(additions):
            key = addition.block_call.index, self._name(addition)
            gathered.setdefault(key, []).append(addition)
        _leave_out_namesakes(gathered)
        self._merge_into_layers(gathered)
        found = [Site(recording, n, recording.calls[c], sums) for (c, n), sums in gathered.items()]
        self.sites = sorted(found, key=lambda site: site.additions[0].node)

    def _block_module(self, addition: Addition) -> Call:
        """The call that is gated: the innermost one, or one around it that stands for it.

        A module without parameters that is called with another module (`self.skip(x, self.f)`)
        stands for nothing: what calls it is the block. The outermost wrapper around nothing but
        that call (torch.compile's, a checkpoint's) is the block, too: what is skipped with it
        is not even recomputed; and a compiled one calls what was bound when it was made, so that a
        gate beneath it would never be asked.
        """
        calls, found = self.recording.calls, addition.block_call
        while found.parent is not None and not _has_parameters(found, self.modules):
            if all(_is_below(call.module, found.module) for call in addition.branch_calls):
                break
            found = calls[found.parent]
        call = found
        while call.parent is not None and len(calls[call.parent].children) == 1:
            call = calls[call.parent]
            found = call if is_wrapper(self.modules[call.module]) else found
        return found

    def _without_global_skips(self, additions: list[Addition]) -> list[Addition]:
        """Without skips around other blocks, unless what is around them repeats (nested blocks)."""
        sums = {a.node: a for a in additions}

        def is_around(addition: Addition) -> bool:
            """Whether other blocks are inside: sums of the same layer's forward are its own."""
            inside = (sums[node].block_call for node in addition.path if node in sums)
            block_call = addition.block_call
            return any(call is not block_call or call.parent is None for call in inside)

        outer = list(filter(is_around, additions))

        def place(addition: Addition) -> tuple[object, str]:
            """What may repeat, and at which of its repetitions the addition stands."""
            if addition.block_call.parent is not None:
                return addition.block_call.kind, addition.block_call.module
            # In the model's own forward: a loop over a list of modules.
            around, _, number = self._name(addition).rpartition(".")
            return around if number.isdigit() else addition, number

        places = {addition: place(addition) for addition in outer}

        def repeats(addition: Addition) -> bool:
            what, number = places[addition]
            alike = [a for a, place in places.items() if place[0] == what and place[1] != number]
            return not all(addition.contains(a) or a.contains(addition) for a in alike)

        return [a for a in additions if a not in places or repeats(a)]

    def _name(self, addition: Addition) -> str:
        """The name of the block's module, or what the names of the branch's modules begin with."""
        block_call = addition.block_call
        modules = [call.module for call in addition.branch_calls]
        common: list[str] = []
        if all(_is_below(module, block_call.module) for module in modules):
            # Others are shared, and have their names elsewhere.
            inside = [m.removeprefix(block_call.module).lstrip(".").split(".") for m in modules]
            alike = [len(set(parts)) == 1 for parts in zip(*inside, strict=False)]
            common = inside[0][: [*alike, False].index(False)]
        prefix = [block_call.module] if block_call.module else []
        numbers = [place for place, part in enumerate(common, start=1) if part.isdigit()]
        if numbers:  # a loop over a list of modules
            return ".".join(prefix + common[: numbers[0]])
        in_a_list = block_call.module.rpartition(".")[2].isdigit()
        repeated = len(self.recording.calls_of[block_call.module]) > 1  # a shared layer
        if self.uses[block_call.kind] > 1 or in_a_list or repeated:
            return block_call.module
        if common:
            return ".".join(prefix + common)
        # Modules of several lists, or with names of their own: the largest stands for them all.
        return max(modules, key=lambda m: sum(p.numel() for p in self.modules[m].parameters()))

    def _merge_into_layers(self, gathered: dict[tuple[int, str], list[Addition]]) -> None:
        """Sub-layers that are modules of their own, of different classes, make one layer."""
        calls, calls_of = self.recording.calls, self.recording.calls_of
        parents: dict[int, list[tuple[int, str]]] = {}
        for call, name in gathered:
            parent = calls[call].parent
            if name == calls[call].module and parent is not None:
                parents.setdefault(parent, []).append((call, name))
        for parent, keys in parents.items():
            layer = calls[parent]
            of_layer = (parent, layer.module)
            repeated = self.uses[layer.kind] > 1 or len(calls_of[layer.module]) > 1
            is_layer = repeated and not issubclass(layer.kind, nn.Sequential)
            keys += [of_layer] if of_layer in gathered else []
            kinds = Counter(calls[child].kind for child, _ in keys if child != parent)
            if not is_layer or len(keys) < 2 or max(kinds.values()) > 1:
                continue
            found = [a for key in keys for a in gathered[key]]
            if any(a.contains(b) for a in found for b in found):
                continue  # a block within a branch of the layer is a block of its own
            for key in keys:
                del gathered[key]
            for addition in found:
                addition.put_in(layer, self.recording)
            gathered[of_layer] = found


def _without_inner(additions: list[Addition]) -> list[Addition]:
    """Without branches inside of branches of the same forward, which these note."""
    sums = {a.node: a for a in additions}
    inner: set[Addition] = set()
    for outer in additions:
        for one in filter(None, map(sums.get, outer.path)):
            if one.block_call is outer.block_call:
                inner.add(one)
                outer.left_out += [call.module for call in one.branch_calls]
    return [a for a in additions if a not in inner]


def _leave_out_namesakes(gathered: dict[tuple[int, str], list[Addition]]) -> None:
    """Leave out sums inside of another block's branch where both blocks would have one name.

    So it is where a branch in the model's own forward is a layer with a residual sum of its own.
    """
    for (call, name), inner in [*gathered.items()]:
        alike = [found for (c, n), found in gathered.items() if n == name and c != call]
        around = [a for found in alike for a in found if all(map(a.contains, inner))]
        for outer in around:
            outer.left_out += [call.module for one in inner for call in one.branch_calls]
        if around:
            del gathered[call, name]


def _is_below(name: str, around: str) -> bool:
    return not around or name.startswith(f"{around}.")


def has_modules(addition: Addition, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a branch has modules with weights, which can be left out."""
    return any(_has_parameters(call, modules) for call in addition.branch_calls)


def _has_parameters(call: Call, modules: Mapping[str, nn.Module]) -> bool:
    return next(modules[call.module].parameters(), None) is not None
