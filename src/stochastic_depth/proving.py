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

from stochastic_depth.discovery import Discovery, ResidualBlock
from stochastic_depth.discovery.batch import Batches, with_more_rows
from stochastic_depth.discovery.example import Example, telling
from stochastic_depth.discovery.proofs import branch_not_closed, branch_not_known
from stochastic_depth.discovery.templates import Template
from stochastic_depth.discovery.undisturbed import undisturbed
from stochastic_depth.discovery.unmaterialised import Alone, arguments_of, is_unmaterialised
from stochastic_depth.discovery.watch import record_closed
from stochastic_depth.errors import warn
from stochastic_depth.gating.attach import attach, detach
from stochastic_depth.plan import Plan
from stochastic_depth.row_proof import close, differ_on_rows
from stochastic_depth.selection import refusal, refuse
from stochastic_depth.torch_private.trees import tree_leaves


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
    watched = [block for block in plan.blocks if not block.explicit]
    reasons = {
        block.name: why
        for block in watched
        if (why := refusal(block, unit=plan.unit, scale=plan.scale))
    }
    whole: dict[str, Template] = {
        block.name: block.whole for block in watched if block.whole is not None
    }
    # Where scale="none" is the advice, it has to work.
    unscaled = [block for block in watched if not refusal(block, unit=plan.unit, scale="none")]
    tried = [block for block in unscaled if block.name in reasons] if reasons else watched
    reasons |= _not_exact(model, found, plan, example, tried)
    if batches is not None and not reasons:
        example = telling(example)
        reasons = _out_of_order(model, found, plan, example, batches)
    if batches is not None and not reasons:
        attach(model, found, plan, whole, batches)
        try:
            reasons = _differ(model, plan, example)
        finally:
            detach(model, plan)
    keeping = [block for block in watched if block.keeps is not None]
    if keeping:
        others = f", as do {len(keeping) - 1} others" if len(keeping) > 1 else ""
        warn(
            f'block "{keeping[0].name}" keeps a value of its branch: {keeping[0].keeps}{others}. '
            "Where the branch is dropped that is zero"
        )
    if reasons:
        raise refuse(reasons, plan.blocks, found=found)
    return whole


def _not_exact(
    model: nn.Module,
    found: Discovery,
    plan: Plan,
    example: Example,
    blocks: Sequence[ResidualBlock],
) -> dict[str, str]:
    """Which blocks have a branch that is not zero when it is dropped; one level after the other."""
    reasons: dict[str, str] = {}
    attach(model, found, plan, {})
    try:
        for level in sorted({block.nesting for block in blocks}):
            own = [block for block in blocks if block.nesting == level]
            reasons |= _not_zero(model, found, plan, example, own)
    finally:
        detach(model, plan)
    return reasons


def _not_zero(
    model: nn.Module,
    found: Discovery,
    plan: Plan,
    example: Example,
    blocks: Sequence[ResidualBlock],
) -> dict[str, str]:
    """Which blocks have a branch that is not zero at its sum with all of these blocks dropped.

    Where the forward fails they are dropped one at a time, so that the right one is named.
    """
    numbers = [number for number, block in enumerate(plan.blocks) if block in blocks]
    own = {block.container for block in plan.blocks}
    closed_units = {plan.units[u]: False for n in numbers for u in plan.units_of(n)}
    undo = plan.force(closed_units, disabled=False)
    try:
        closed = record_closed(model, example, found.recording.mode, drawing=own)
    except Exception as error:
        if len(blocks) == 1:
            return {blocks[0].name: f"with it dropped the forward fails: {error}"}
        reasons: dict[str, str] = {}
        for block in blocks:
            reasons |= _not_zero(model, found, plan, example, [block])
        return reasons or {blocks[0].name: f"with all blocks dropped the forward fails: {error}"}
    finally:
        undo()
    stuck = {
        block.name: branch_not_known(block)
        if is_unmaterialised(model)
        else branch_not_closed(found, block, closed)
        for block in blocks
    }
    return {
        name: f"{branch} is not zero when its modules are dropped"
        for name, branch in stuck.items()
        if branch is not None
    }


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
        alone = Alone(model.get_submodule(name), calls[name], plan)
        reasons |= differ_on_rows(alone, plan, (), {})
    return reasons
