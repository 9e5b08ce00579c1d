"""Pruning: blocks are taken out of a network for good, and what is left is a smaller plain model.

A block that is skipped whole leaves its `Sequential` or `ModuleList`, which is renumbered; where
the model asks for it by name, a `PassThrough` stands in. So it does for a block with a norm behind
its sum: it keeps the norm. The result is compared, bit for bit, with the same blocks dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth import errors, folding
from stochastic_depth.discovery.templates import Argument, Constant, Opaque, Template
from stochastic_depth.discovery.undisturbed import (
    Arguments,
    Mode,
    fresh,
    is_unmaterialised,
    telling,
    undisturbed,
    with_large_weights,
)
from stochastic_depth.gating.attach import detach, gated_modules
from stochastic_depth.gating.gate import gate_of
from stochastic_depth.gating.swap import swap_in
from stochastic_depth.layer_numbers import configured, own_configs, tell, unlike, way
from stochastic_depth.plan import Plan
from stochastic_depth.torch_private import trees

Outputs = list[tuple[list[Tensor], bool]]
"""Of each part of what a model returns its tensors, and whether it is an object (a cache)."""


class PassThrough(nn.Module):
    """Stands where a residual block was: hands its input on, through what was behind the sum.

    Args:
        behind: Modules that the block ran on its input also when it was dropped.
        template: What it returned then, where that is not one tensor.
        positional: The names of the parameters of its forward.
    """

    def __init__(
        self,
        behind: Sequence[nn.Module] = (),
        template: Template | None = None,
        positional: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.behind = nn.Sequential(*behind)
        self._template, self._positional = template, positional

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block returned when it was dropped."""
        if self._template is not None and not len(self.behind):
            return self._template.build(args, kwargs, positional=self._positional)
        value = self.behind(args[0] if args else next(iter(kwargs.values())))
        return value if self._template is None else self._template.build((value,), {})


class Nothing(PassThrough):
    """Stands where a module was whose result is added to something: adds nothing."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros in the form of its input."""
        return torch.zeros_like(super().forward(*args, **kwargs))


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
    _refuse(model, plan)
    owners = configured(model, out)
    chosen = [block for block in plan.blocks if block.name in out]
    norms_go = any(each.whole is None and each.name == each.block_module for each in chosen)
    norms_go = norms_go and not exact
    with torch.no_grad(), ExitStack() as undo:
        for parameter, value in folding.scaled_parameters(model, plan).items():
            undo.callback(parameter.copy_, parameter.clone())
            parameter.copy_(value)
        undo.callback(plan.scale_by, plan.scale)
        plan.scale_by("none")
        with with_large_weights(model):
            outputs = partial(_outputs, model, telling(_moved(model, example)))
            try:
                standing_in, expected = _standing_in(model, plan, out, outputs, exact=exact)
            except errors.ChangedModelError:  # called otherwise in inference: with a cache
                outputs = partial(outputs, mode="train but BatchNorm")
                standing_in, expected = _standing_in(model, plan, out, outputs, exact=exact)
            for _, module, gate in list(gated_modules(model)):
                if compiled := vars(module).get("_compiled_call_impl"):
                    undo.callback(setattr, module, "_compiled_call_impl", compiled)
                undo.callback(swap_in, module, gate)
            detach(model, plan)
            own_configs(model, undo)
            gone = {model.get_submodule(name): name for name in out}
            _take_out(model, standing_in, outputs, expected, is_exact=not norms_go)
        undo.pop_all()
    still = [(gone[module], name) for name, module in model.named_modules() if module in gone]
    if still:
        errors.warn(
            f'"{still[0][0]}" was taken out, and is still in the model as "{still[0][1]}", with '
            "its weights: delete that, too, if nothing needs it"
        )
    why = next(filter(None, (unlike(owner, also_values=True) for owner in owners)), "")
    if why:
        normed = any(len(module.behind) for module in standing_in.values())
        errors.warn(
            f"what is left of {type(model).__name__} is not what its class makes of its "
            f"configuration ({why}): from_pretrained() would load something else. Save the model "
            "itself" + (", or take out the norms as well with exact=False" if normed else "")
        )


def _refuse(model: nn.Module, plan: Plan) -> None:
    if is_unmaterialised(model):
        raise errors.OptionError(
            f"{type(model).__name__} is on the meta device",
            expected="a model that can be run, to see that what is left computes the same",
            instead="prune it when its weights are there",
        )
    if any(gate.plan is not plan for _, _, gate in gated_modules(model)):
        raise errors.OptionError(
            f"stochastic depth was applied to {type(model).__name__} several times",
            expected="one application, whose blocks may get other numbers",
            instead="fold() or remove() the others first",
        )


def _moved(model: nn.Module, example: Arguments) -> Arguments:
    """The example where the model's weights are now, in their precision."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(like.device, like.dtype if leaf.is_floating_point() else leaf.dtype)

    args, kwargs = trees.tree_map(move, example)
    return args, kwargs


def _standing_in(
    model: nn.Module, plan: Plan, out: Sequence[str], outputs: Callable[[], Outputs], *, exact: bool
) -> tuple[dict[str, PassThrough], Outputs]:
    """What takes the place of each block, and what the model returns with them dropped."""
    blocks = [block for block in plan.blocks if block.name in out]
    units = [u for n, b in enumerate(plan.blocks) if b.name in out for u in plan.units_of(n)]
    found: dict[str, PassThrough] = {}
    ways: dict[str, _Way] = {}
    with ExitStack() as stack:
        for block in blocks:
            module = model.get_submodule(block.name)
            gate = gate_of(module)
            if block.whole is not None and gate is not None:
                found[block.name] = PassThrough((), gate.whole, gate.known.positional)
            elif block.name != block.block_module:
                found[block.name] = Nothing()  # it is a module of its branch
            elif not exact:  # a list may hold it all the same
                found[block.name] = PassThrough()
            else:
                ways[block.name] = _Way(block.name, module, stack)
        stack.enter_context(plan.force({plan.units[unit]: False for unit in units}))
        try:
            expected = outputs()
        except errors.ChangedModelError:
            raise
        except Exception as error:
            raise errors.ExampleInputsError(
                f"the forward of {type(model).__name__} failed on the example: {error}",
                expected="an example that the model takes, to see that the outcome is right",
                instead="pass example_inputs=..., as to apply",
            ) from error
        with undisturbed(model) as originals, originals.noting():
            found |= {name: way_through.standing_in() for name, way_through in ways.items()}
    return found, expected


class _Way:
    """The modules that a block runs one after the other when its branches are dropped."""

    def __init__(self, name: str, block: nn.Module, stack: ExitStack) -> None:
        self._name, self._block = name, block
        self._calls: list[tuple[Any, Any, Any]] = []
        self._is_inside = False  # other blocks may call the same modules
        self._arguments: Arguments = (), {}
        hook = block.register_forward_pre_hook(self._begin, with_kwargs=True)
        stack.callback(hook.remove)
        for module in block.modules():
            if module is block or not any(module.children()):
                stack.callback(module.register_forward_hook(self._note).remove)

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._arguments, self._is_inside = fresh((args, kwargs), _itself), True

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._is_inside:
            self._calls.append((module, next(iter(args), None), output))
            self._is_inside = module is not self._block

    def standing_in(self) -> PassThrough:
        """What does the same.

        Raises:
            RefusedBlockError: The block does something else besides.
        """
        *calls, (_, _, last) = self._calls or [(None, None, None)]
        args, kwargs = self._arguments
        value = next(iter((*args, *kwargs.values())), None)
        for _, received, output in calls:
            value = output if _same(value, received) else None
        leaves, spec = trees.tree_flatten(last)
        whole = [Argument(0) if _same(value, leaf) else _as_it_is(leaf) for leaf in leaves]
        template = None if isinstance(last, Tensor) else Template(tuple(whole), spec)
        found = PassThrough([module for module, *_ in calls], template)
        place = whole.index(Argument(0)) if Argument(0) in whole else -1
        if place < 0 or not self._holds(found.behind, place):
            raise errors.RefusedBlockError(
                f'block "{self._name}" cannot be taken out: dropped, it does more than call one '
                "module after the other",
                expected="blocks that come to their input, or a norm of it",
                instead="name it in keep, or pass exact=False to take it out all the same",
            )
        return found

    def _holds(self, behind: nn.Module, place: int) -> bool:
        """Whether it does the same with other inputs: small ones, large ones, of both signs."""
        for size in (1.0, 100.0):
            args, kwargs = fresh(self._arguments, _itself)
            values: list[Any] = [*args, *kwargs.values()]
            values[0] = torch.randn_like(values[0]) * size
            named = dict(zip(kwargs, values[len(args) :], strict=True))
            try:
                leaves = trees.tree_leaves(self._block(*values[: len(args)], **named))
            except Exception:  # whatever it does not take outside of its model
                return False
            if not _same(leaves[place], behind(values[0])):
                return False
        return True


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _as_it_is(leaf: Any) -> Constant | Opaque:
    return Constant(leaf) if isinstance(leaf, trees.PLAIN_VALUES) else Opaque(type(leaf).__name__)


def _same(one: Any, other: Any) -> bool:
    """Whether two tensors hold the same; NaN is the same as NaN."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.shape != other.shape:
        return False
    return torch.equal(one, other) or bool(((one == other) | (one != one) & (other != other)).all())


def _all_same(ones: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(ones) == len(others) and all(map(_same, ones, others))


def _outputs(model: nn.Module, example: Arguments, mode: Mode = "eval") -> Outputs:
    args, kwargs = fresh(example)
    with undisturbed(model, mode) as originals, originals.noting():
        output = model(*args, **kwargs)
    if is_dataclass(output) and not isinstance(output, Mapping):
        output = [getattr(output, field.name) for field in fields(output)]
    elif isinstance(output, Mapping):
        output = list(output.values())
    parts = output if isinstance(output, list | tuple) else [output]
    plain = (Tensor, list, tuple, dict)
    return [(trees.tensors_in(part), not isinstance(part, plain)) for part in parts]


def _take_out(
    model: nn.Module,
    standing_in: Mapping[str, PassThrough],
    outputs: Callable[[], Outputs],
    expected: Outputs,
    *,
    is_exact: bool,
) -> None:
    """Take the blocks out of their lists; where that comes to something else, have them stood in.

    Args:
        model: The model without gates.
        standing_in: What stands in for each of them.
        outputs: Calls it.
        expected: What it returns with them dropped.
        is_exact: Whether it has to return that. Else tensors of these shapes, and what it does
            where they are stood in, if it runs then.
    """
    shapes = _shapes(expected)

    def attempt(
        lists: Set[str], wanted: Outputs | None, *, keep: bool = True, each_is_tried: bool = False
    ) -> tuple[Outputs | None, str]:
        """What it returns with the blocks of these lists taken out, and what is wrong with that."""
        with ExitStack() as undo:
            sizes = _replace(model, standing_in, undo, lists)
            try:
                found = outputs()
            except Exception as error:
                arrived = getattr(error, "arrived", error)  # of an error of ours, no advice
                return None, f"fails: {type(error).__name__}: {arrived}"
            if not _shapes(found) <= shapes:
                return None, "returns something of another shape"
            # Which of several lists makes fewer of something shows where each is tried alone.
            shown = sizes if each_is_tried or len(sizes) == 1 else []
            why = "" if wanted is None else _differs(found, wanted, shown)
            if keep and not why:
                undo.pop_all()
        return found, why

    lists = {name.rpartition(".")[0] for name in standing_in}
    wanted = expected if is_exact else attempt(set(), None, keep=False)[0]
    _, why = attempt(lists, wanted)
    if not why:
        return
    lists = {one for one in lists if not attempt({one}, wanted, keep=False)[1]}
    for chosen in (lists, set[str]()):
        _, why = attempt(chosen, wanted, each_is_tried=True)
        if not why:
            return
    places = model.named_modules(remove_duplicate=False)
    of = {model.get_submodule(name): name for name in standing_in}
    again = [f'"{of[m]}" is also "{name}"' for name, m in places if of.get(m, name) != name]
    raise errors.RefusedBlockError(
        f"without {', '.join(list(standing_in)[:3])} {type(model).__name__} {why}"
        + (f" ({again[0]})" if again else ""),
        expected="a model that runs the blocks of a Sequential or ModuleList one by one, or calls "
        "each by its name",
        instead="keep those with something of their own around them",
    )


def _shapes(outputs: Outputs) -> set[torch.Size]:
    return {tensor.shape for tensors, _ in outputs for tensor in tensors}


def _differs(found: Outputs, expected: Outputs, sizes: list[tuple[int, int]]) -> str:
    """What is wrong with a model's outputs.

    Args:
        found: The outputs.
        expected: What they should be. What there was of each layer (hidden states, a cache) there
            is of fewer now.
        sizes: Of each list that blocks were taken out of, how many it had, and lost.
    """
    if not any(tensors for tensors, _ in expected):
        return "returns no tensor that could be compared"
    if len(found) != len(expected):
        return "returns less"
    for (mine, _), (its, is_object) in zip(found, expected, strict=True):
        less, others = len(its) - len(mine), iter(its)
        by_layer = any(len(its) >= size and less % gone == 0 for size, gone in sizes)
        is_part = less > 0 and bool(mine) and (is_object or by_layer)
        is_part = is_part and all(any(_same(leaf, other) for other in others) for leaf in mine)
        if not _all_same(mine, its) and not is_part:
            return "does not compute what it does with them dropped"
    return ""


def _replace(
    model: nn.Module, standing_in: Mapping[str, PassThrough], undo: ExitStack, lists: Set[str]
) -> list[tuple[int, int]]:
    """Take blocks out of these lists; elsewhere put something in their place.

    Returns:
        Of each list that has fewer now, how many it had, and lost.
    """
    parents: dict[str, dict[str, PassThrough]] = {}
    for name, module in standing_in.items():
        parent, _, key = name.rpartition(".")
        parents.setdefault(parent, {})[key] = module
    sizes = []
    for path, around in {path: list(way(model, path)) for path in parents}.items():
        out, table, before = parents[path], around[-1]._modules, dict(around[-1]._modules)
        undo.callback(table.update, before)
        undo.callback(table.clear)
        is_list = path in lists and isinstance(around[-1], nn.Sequential | nn.ModuleList)
        gone = {key for key in out if is_list and not len(out[key].behind)}
        left = [key for key in before if key not in gone]
        is_numbered = bool(gone) and all(key.isdecimal() for key in before)
        table.clear()
        for number, key in enumerate(left):
            table[str(number) if is_numbered else key] = out.get(key, before[key])
        if gone:
            sizes.append((len(before), len(gone)))
        if is_numbered:
            tell(model, path, around, list(map(int, left)), len(before), undo)
    return sizes
