"""Pruning: blocks are taken out of a network for good, and what is left is a smaller plain model.

A block that is skipped whole leaves its `Sequential` or `ModuleList`, which is renumbered; where
the model asks for it by name, a `PassThrough` stands in. So it does for a block with a norm behind
its sum: it keeps the norm. The result is compared, bit for bit, with the same blocks dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth import folding
from stochastic_depth.discovery.blocks import ResidualBlock
from stochastic_depth.discovery.templates import Template
from stochastic_depth.discovery.undisturbed import Arguments, is_unmaterialised, undisturbed
from stochastic_depth.errors import OptionError, RefusedBlockError, matching, warn
from stochastic_depth.gating.attach import detach, gated_modules
from stochastic_depth.gating.gate import gate_of
from stochastic_depth.gating.swap import swap_in
from stochastic_depth.plan import Plan
from stochastic_depth.torch_private.trees import tree_leaves

_NUMBERS = ("layer_idx", "layer_id", "layer_index")  # as which a layer knows its place

Keep = int | float | str | Sequence[str]
"""How many blocks, which fraction of them, or their names."""


class PassThrough(nn.Module):
    """Stands where a residual block was: hands its input on, through what was behind the sum.

    Args:
        behind: Modules that the block ran on its input also when it was dropped.
        template: What it returned then, where that is not just its first argument.
        positional: The names of the parameters of its forward.
    """

    def __init__(
        self, behind: Sequence[nn.Module], template: Template | None, positional: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.behind = nn.Sequential(*behind)
        self._template, self._positional = template, positional

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block returned when it was dropped."""
        if self._template is not None:
            return self._template.build(args, kwargs, positional=self._positional)
        return self.behind(args[0] if args else next(iter(kwargs.values())))


def chosen(plan: Plan, keep: Keep, trained: Mapping[str, float] | None) -> list[str]:
    """The names of the blocks to take out.

    Args:
        plan: What the gates share.
        keep: What to keep.
        trained: How often each block ran in training: those that ran most are kept. None: evenly
            spaced ones, the first and the last among them.

    Raises:
        OptionError, SelectionError: `keep` stands for no blocks of this model.
        RefusedBlockError: A block that is not to be kept cannot be taken out.
    """
    if isinstance(keep, int | float) and not isinstance(keep, bool):
        return _all_but(plan, keep, trained)
    every = [block.name for block in plan.blocks]
    names = [keep] if isinstance(keep, str) else list(keep) if isinstance(keep, Sequence) else []
    if not names:
        raise OptionError(
            f"keep is {keep!r}",
            expected="a number of blocks, a fraction of them, or the names of some",
            instead="pass 6, 0.5 or a list of names",
        )
    kept = {name for each in names for name in matching(each, every, argument="keep")}
    for block in plan.blocks:
        if block.name in kept:
            kept |= {plan.blocks[n].name for n, _ in block.branches_around(plan.blocks)}
    for block in plan.blocks:
        if block.name not in kept and _is_stuck(block):
            raise RefusedBlockError(
                f'block "{block.name}" cannot be taken out: its skip path computes something (a '
                "projection, say)",
                expected="blocks that come to their input when they are dropped",
                instead="name it in keep, too",
            )
    return [name for name in every if name not in kept]


def _all_but(plan: Plan, keep: float, trained: Mapping[str, float] | None) -> list[str]:
    """All but so many blocks: a number (int), or a fraction (float)."""
    blocks = [block for block in plan.blocks if not block.branches_around(plan.blocks)]
    stuck = [block.name for block in blocks if _is_stuck(block)]
    free = [block.name for block in blocks if block.name not in stuck]
    count = keep if isinstance(keep, int) else round(keep * len(blocks))
    least = max(1, len(stuck))
    if not least <= count <= len(blocks):
        why = f" ({len(stuck)} cannot be taken out: {', '.join(stuck[:3])} ...)" if stuck else ""
        raise OptionError(
            f"keep is {keep!r}, {count} of {len(blocks)} blocks",
            expected=f"{least} to {len(blocks)} of them{why}",
            instead="pass such a number, such a fraction (0.5), or the names of those to keep",
        )
    wanted = count - len(stuck)
    if trained is None:
        kept = {free[place] for place in _evenly(wanted, len(free))}
    else:
        kept = set(sorted(free, key=lambda name: -trained[name])[:wanted])
    return [name for name in free if name not in kept]


def _evenly(count: int, among: int) -> list[int]:
    """So many places, the first and the last among them.

    Example:
        >>> _evenly(4, 12), _evenly(1, 12), _evenly(0, 12)
        ([0, 4, 7, 11], [0], [])
    """
    return [round(place * (among - 1) / max(1, count - 1)) for place in range(count)]


def _is_stuck(block: ResidualBlock) -> bool:
    return block.whole is None and not block.explicit and block.projects


def prune(
    model: nn.Module, plan: Plan, out: Sequence[str], example: Arguments, *, exact: bool
) -> None:
    """Fold the inference scale into the weights; take the gates out, and these blocks.

    Args:
        model: The gated model.
        plan: What its gates share.
        out: The names of the blocks.
        example: What to call it with, to see that the outcome is the right one.
        exact: Whether norms behind a sum stay.

    Raises:
        RefusedBlockError: The model computes something else without them; it is as it was then.
    """
    if is_unmaterialised(model):
        raise OptionError(
            f"{type(model).__name__} is on the meta device",
            expected="a model that can be run, to see that what is left computes the same",
            instead="prune it when its weights are there",
        )
    with torch.no_grad(), ExitStack() as undo:
        for parameter, value in folding.scaled_parameters(model, plan).items():
            undo.callback(parameter.copy_, parameter.clone())
            parameter.copy_(value)
        undo.callback(plan.scale_by, plan.scale)
        plan.scale_by("none")
        standing_in, expected = _standing_in(model, plan, out, example, exact=exact)
        for _, module, gate in list(gated_modules(model)):
            if gate.plan is plan:
                undo.callback(swap_in, module, gate)
        detach(model, plan)
        why = ""
        for from_lists in (True, False):
            with ExitStack() as attempt:
                _replace(model, standing_in, attempt, from_lists=from_lists)
                why = _differs(model, example, expected if exact else None)
                if not why:
                    attempt.pop_all()
                    undo.pop_all()
                    break
        else:
            raise RefusedBlockError(
                f"without {', '.join(out[:3])} {type(model).__name__} {why}",
                expected="a model that runs the blocks of a Sequential or ModuleList one by one, "
                "or calls each by its name",
                instead="keep those with something of their own around them",
            )
    if normed := [name for name, module in standing_in.items() if len(module.behind)]:
        warn(
            f"{len(normed)} blocks leave what runs behind their sums ({normed[0]}.behind), which "
            "the model's class does not know: its from_pretrained() would make such layers anew. "
            "exact=False takes that out, too; or save the model itself"
        )


def _standing_in(
    model: nn.Module, plan: Plan, out: Sequence[str], example: Arguments, *, exact: bool
) -> tuple[dict[str, PassThrough], list[Tensor]]:
    """What takes the place of each block, and what the model computes with them dropped."""
    blocks = [block for block in plan.blocks if block.name in out]
    units = [u for n, b in enumerate(plan.blocks) if b.name in out for u in plan.units_of(n)]
    found: dict[str, PassThrough] = {}
    ways: dict[str, _Way] = {}
    with ExitStack() as stack:
        for block in blocks:
            module = model.get_submodule(block.name)
            gate = gate_of(module)
            if block.whole is not None and gate is not None:
                template = None if gate.returns_first or gate.returns_copy else gate.whole
                found[block.name] = PassThrough((), template, gate.known.positional)
            elif block.name != block.block_module or not exact:  # a list may hold it all the same
                found[block.name] = PassThrough((), None, ())
            else:
                ways[block.name] = _Way(module, stack)
        stack.enter_context(plan.force({plan.units[unit]: False for unit in units}))
        expected = _outputs(model, example)
    for name, way in ways.items():
        found[name] = PassThrough(way.modules(name), None, ())
    return found, expected


class _Way:
    """The modules that a block runs one after the other when its branches are dropped."""

    def __init__(self, block: nn.Module, stack: ExitStack) -> None:
        self._calls: list[tuple[Any, Any, Any]] = []
        for module in block.modules():
            if module is block or not any(module.children()):
                stack.callback(module.register_forward_hook(self._note).remove)

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        self._calls.append((module, next(iter(args), None), output))

    def modules(self, name: str) -> list[nn.Module]:
        """Without the block itself.

        Raises:
            RefusedBlockError: It does something else besides.
        """
        *calls, (_, value, last) = self._calls or [(None, None, None)]
        for _, received, output in calls:
            value = output if _same(value, received) else None
        if not _same(value, last):
            raise RefusedBlockError(
                f'block "{name}" cannot be taken out: dropped, it does more than call one module '
                "after the other",
                expected="blocks that come to their input, or a norm of it",
                instead="name it in keep, or pass exact=False to take it out all the same",
            )
        return [module for module, _, _ in calls]


def _same(one: Any, other: Any) -> bool:
    return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)


def _outputs(model: nn.Module, example: Arguments) -> list[Tensor]:
    with undisturbed(model):
        output = model(*example[0], **example[1])
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _differs(model: nn.Module, example: Arguments, expected: list[Tensor] | None) -> str:
    """What is wrong with the model's outputs; nothing where each is one of the expected ones."""
    try:
        found = _outputs(model, example)
    except Exception as error:
        return f"fails: {type(error).__name__}: {error}"
    # What there was of each layer (hidden states, say) there is now of fewer.
    others = iter(expected or ())
    is_same = all(any(_same(leaf, other) for other in others) for leaf in found)
    return "" if expected is None or is_same else "does not compute what it does with them dropped"


def _replace(
    model: nn.Module, standing_in: Mapping[str, PassThrough], undo: ExitStack, *, from_lists: bool
) -> None:
    """Take blocks out of the lists that they stand in; elsewhere put something in their place."""
    parents: dict[str, dict[str, PassThrough]] = {}
    for name, module in standing_in.items():
        parent, _, key = name.rpartition(".")
        parents.setdefault(parent, {})[key] = module
    for path, (*around, holder) in {path: list(_way(model, path)) for path in parents}.items():
        out, table, before = parents[path], holder._modules, dict(holder._modules)
        undo.callback(table.update, before)
        undo.callback(table.clear)
        is_list = from_lists and isinstance(holder, nn.Sequential | nn.ModuleList)
        gone = {key for key in out if is_list and not len(out[key].behind)}
        left = [key for key in before if key not in gone]
        is_numbered = bool(gone) and all(key.isdecimal() for key in before)
        table.clear()
        for number, key in enumerate(left):
            table[str(number) if is_numbered else key] = out.get(key, before[key])
        if is_numbered:
            _tell_layers(holder, left, undo)
            for config in (vars(module).get("config") for module in around):
                _tell_config(config, path, list(before), left, undo)


def _way(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules around one, outermost first, and that one."""
    names = path.split(".") if path else []
    return (model.get_submodule(".".join(names[:end])) for end in range(len(names) + 1))


def _tell_layers(holder: nn.Module, left: list[str], undo: ExitStack) -> None:
    """Write each layer's new number where it keeps it: transformers' do, for their caches."""
    for number, layer in enumerate(holder.children()):
        for module in layer.modules():
            for name in _NUMBERS:
                if vars(module).get(name) == int(left[number]):
                    _put(module, name, number, undo)


def _tell_config(
    config: Any, path: str, before: list[str], left: list[str], undo: ExitStack
) -> None:
    """Write the new number of layers, and lists with an entry for each, as transformers has it."""
    for name in _counts(config, path):
        value = vars(config)[name]
        if type(value) is int and value == len(before):
            _put(config, name, len(left), undo)
        elif isinstance(value, list) and len(value) == len(before):
            _put(config, name, [value[before.index(key)] for key in left], undo)


def _put(holder: Any, name: str, value: Any, undo: ExitStack) -> None:
    undo.callback(setattr, holder, name, vars(holder)[name])
    setattr(holder, name, value)


def _counts(config: Any, path: str) -> list[str]:
    """The entries of a configuration that may say how many layers there are in a list."""
    names = [name for name in getattr(config, "__dict__", ()) if "layer" in name]
    of_decoder = [name for name in names if "decoder" in name]
    if "decoder" in path and of_decoder:
        return of_decoder
    return [name for name in names if name not in of_decoder]
