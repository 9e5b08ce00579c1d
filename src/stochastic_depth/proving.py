"""What is tried on the gated model before it is handed over: is every block exact when dropped?

With all branches closed, each must be zero at its sum. In mode "sample" each must come to the same
on some rows of the batch alone as on all rows with the others masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from stochastic_depth.discovery import Discovery
from stochastic_depth.discovery.batch import Batches, with_more_rows
from stochastic_depth.discovery.example import Example
from stochastic_depth.discovery.proofs import branch_not_closed, skip_value
from stochastic_depth.discovery.templates import Template
from stochastic_depth.discovery.undisturbed import undisturbed
from stochastic_depth.discovery.unmaterialised import Alone, arguments_of, is_unmaterialised
from stochastic_depth.discovery.watch import record
from stochastic_depth.gating.attach import attach, detach
from stochastic_depth.plan import Plan
from stochastic_depth.row_proof import close, differ_on_rows
from stochastic_depth.selection import refusal, refuse
from stochastic_depth.torch_private import tree_leaves


def prove(
    model: nn.Module, found: Discovery, plan: Plan, example: Example, batches: Batches | None
) -> dict[str, Template]:
    """What the blocks come to when dropped whose forward need not run then, by name.

    Args:
        model: The model that was watched.
        found: What was found in it.
        plan: The blocks to gate.
        example: What it was watched with.
        batches: For mode "sample": where each value holds the batch.

    Raises:
        RefusedBlockError: A block cannot be skipped exactly.
    """
    reasons = {
        block.name: why
        for block in plan.blocks
        if not block.explicit and (why := refusal(block, unit=plan.unit, scale=plan.scale))
    }
    whole: dict[str, Template] = {}
    if not reasons:
        attach(model, found, plan, {})
        try:
            whole, reasons = _drop_all(model, found, plan, example)
        finally:
            detach(model, plan)
    if batches is not None and not reasons:
        reasons = _out_of_order(model, found, plan, example, batches)
    if batches is not None and not reasons:
        attach(model, found, plan, whole, batches)
        try:
            reasons = _differ(model, plan, example) | _interlaced(plan)
        finally:
            detach(model, plan)
    if reasons:
        raise refuse(reasons, plan.blocks, found=found)
    return whole


def _drop_all(
    model: nn.Module, found: Discovery, plan: Plan, example: Example
) -> tuple[dict[str, Template], dict[str, str]]:
    """Which blocks return their input when dropped, and which are not exact when dropped."""
    whole: dict[str, Template] = {}
    reasons: dict[str, str] = {}
    containers = {block.container for block in plan.blocks if not block.explicit}
    calls = arguments_of(model, sorted(containers), example) if is_unmaterialised(model) else None
    for level in sorted({block.nesting for block in plan.blocks}):
        level_blocks = [b for b in plan.blocks if b.nesting == level and not b.explicit]
        if not level_blocks:
            continue
        units = [
            unit
            for number, block in enumerate(plan.blocks)
            if block in level_blocks
            for unit in [plan.units[u] for u in plan.units_of(number)]
        ]
        undo = plan.force(dict.fromkeys(units, False), disabled=False)
        try:
            keep = frozenset(block.container for block in level_blocks)
            if calls is None:
                closed = dict.fromkeys(keep, record(model, *example, keep=keep))
            else:
                closed = {
                    name: record(Alone(model, name, calls[name], plan), (), {}, keep=keep)
                    for name in keep
                }
        except Exception as error:
            names = level_blocks[0].name if len(level_blocks) == 1 else "its blocks"
            reasons[level_blocks[0].name] = f"with {names} dropped the forward fails: {error}"
            break
        finally:
            undo()
        for block in level_blocks:
            alone = closed[block.container]
            stuck = branch_not_closed(found, block, alone)
            if stuck is not None:
                reasons[block.name] = f"{stuck} is not zero when its modules are dropped"
            elif value := skip_value(found, block, alone):
                whole[block.name] = value
    return whole, reasons


def _out_of_order(
    model: nn.Module, found: Discovery, plan: Plan, example: Example, batches: Batches
) -> dict[str, str]:
    """Which blocks are given several rows for each example that do not lie side by side.

    Among more examples, the rows of the first ones have to stay where they are.
    """
    calls = {
        block.name: found.recording.calls_of[block.container][0]
        for block in plan.blocks
        if not block.explicit
    }
    held = {name: batches.held(call, None) for name, call in calls.items()}
    folded = [name for name, where in held.items() if any(n > 1 for n in where.each.values())]
    reasons: dict[str, str] = {}
    if is_unmaterialised(model):
        why = 'mode="sample": it has several rows for each example, and no weights to try it with'
        return dict.fromkeys(folded, why)
    if not folded:
        return reasons
    modules = [calls[name].module for name in folded]
    few, many = (_given(model, modules, shown) for shown in (example, with_more_rows(example)[0]))
    for name in folded:
        module = calls[name].module
        for leaf, dim in held[name].takes.items():
            own = few[module][leaf]
            if not close(many[module][leaf].narrow(dim, 0, own.shape[dim]), own):
                reasons[name] = 'mode="sample": the rows of an example do not lie side by side'
    return reasons


def _given(model: nn.Module, names: Sequence[str], example: Example) -> dict[str, list[Any]]:
    """The leaves of the arguments of each module's first call."""
    found: dict[str, list[Any]] = {}
    with ExitStack() as stack:
        for name in names:

            def note(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                found.setdefault(name, tree_leaves((args, kwargs)))

            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        stack.enter_context(undisturbed(model))
        stack.enter_context(torch.no_grad())
        model(*example[0], **example[1])
    return found


def _differ(model: nn.Module, plan: Plan, example: Example) -> dict[str, str]:
    """Which blocks do not come to the same on some rows of the batch alone."""
    (args, kwargs), _ = with_more_rows(example)
    if not is_unmaterialised(model):
        return differ_on_rows(model, plan, args, kwargs)
    reasons: dict[str, str] = {}
    names = sorted({block.container for block in plan.blocks if not block.explicit})
    calls = arguments_of(model, names, (args, kwargs))
    for name in names:
        reasons |= differ_on_rows(Alone(model, name, calls[name], plan), plan, (), {})
    return reasons


def _interlaced(plan: Plan) -> dict[str, str]:
    """Which blocks have branches inside of each other that draw their rows one by one."""
    alone = [block.container for block in plan.blocks]
    return {
        block.name: 'mode="sample": one of its branches lies inside of another one'
        for block in plan.blocks
        if block.interlaced and (plan.unit == "branch" or alone.count(block.container) > 1)
    }
