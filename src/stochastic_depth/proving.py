"""What is tried on the gated model before it is handed over: does every block run when dropped?

In mode "batch" one forward is made with all blocks closed. In mode "sample" each call of a block in
one forward is repeated closed, open and on several windows of rows: a kept row has to come to what
it is in the open call, a dropped one to what it is in the closed call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import permutations
from typing import Any

import torch
from torch import nn

from stochastic_depth.discovery.blocks import Discovery
from stochastic_depth.discovery.undisturbed import (
    Arguments,
    Mode,
    SingleBlock,
    fresh,
    is_unmaterialised,
    telling,
    undisturbed,
    without_values,
)
from stochastic_depth.gating.attach import gated_modules
from stochastic_depth.gating.batch import cannot_tell, with_more_rows
from stochastic_depth.gating.gate import ModuleCall, running
from stochastic_depth.plan import Plan
from stochastic_depth.selection import refuse
from stochastic_depth.trial import Trial, acts_around, under

Called = tuple[nn.Module, Arguments]
"""A module, and what to call it with."""


def prove(model: nn.Module, found: Discovery, plan: Plan, example: Arguments) -> None:
    """Try the blocks of a gated model.

    Args:
        model: The model.
        found: What was found in it.
        plan: What its gates share.
        example: What it was watched with.

    Raises:
        RefusedBlockError: A block cannot be skipped exactly.
    """
    name_of = [plan.blocks[number].name for number in plan.block_of]
    reasons = {
        name_of[outer.units[0]]: f'"{part}" ends a branch of it, and one of "{inner.name}" in it'
        for part, _, gate in gated_modules(model)
        for outer, inner in permutations(gate.owners, 2)
        if inner.name.startswith(f"{outer.name}." if outer.name else "")
    }
    mode: Mode = found.recording.mode
    if plan.mode == "sample":
        example, mode = with_more_rows(telling(example))[0], "eval"
    elif is_unmaterialised(model) and not reasons:
        return
    is_nested = any(block.nesting for block in plan.blocks)

    def look(call: ModuleCall) -> Any:
        """Try a block; returns what the model goes on with, where not with the open block."""
        units, why = list(dict.fromkeys(call.gate.units)), ""
        if plan.mode == "batch":
            closed, why = _dropped(call, units)
            if not why:
                return None if is_nested else closed
        together = {name_of[units[0]]: why} if why else {}
        found = {name_of[unit]: no for unit in units if (no := Trial(call, [unit]).why_not())}
        reasons.update({**(found or together), **reasons})
        return None

    is_meta = is_unmaterialised(model)
    try:
        for tried, inputs in _blocks(model, plan, example) if is_meta else [(model, example)]:
            _at_each_call(tried, plan, inputs, mode, look)
    except Exception as error:
        if plan.mode == "sample":
            raise cannot_tell(model, f"fails on more rows: {error}") from error
        reasons[name_of[0]] = f"with all blocks dropped the forward fails: {error}"
    reasons = {**_out_of_reach(model, plan, example), **reasons}
    if reasons:
        raise refuse(reasons, plan.blocks, found=found)


def _dropped(call: ModuleCall, units: Sequence[int]) -> tuple[Any, str]:
    """What a block comes to when it is dropped; or why it cannot be."""
    try:
        return under(call, units, runs=False), acts_around(call)
    except Exception as error:
        return None, f"with it dropped the forward fails: {error}"


def _out_of_reach(model: nn.Module, plan: Plan, example: Arguments) -> dict[str, str]:
    """The blocks that in inference run without the ends of their branches, which are scaled."""
    if plan.scale != "eval" or is_unmaterialised(model):
        return {}
    gates = [(n, module, gate) for n, module, gate in gated_modules(model) if gate.plan is plan]
    called: set[str] = set()
    with ExitStack() as stack:
        stack.enter_context(suppress(Exception))  # it may want other arguments there
        for name, module, _ in gates:
            note = partial(lambda name, *_: called.add(name), name)
            stack.callback(module.register_forward_hook(note).remove)
        _at_each_call(model, plan, example, "eval", lambda call: None)
    return {
        owner.name: f'in inference it runs without "{name}", which scale="eval" multiplies there '
        '(scale="train" needs nothing in inference)'
        for name, _, gate in gates
        for owner in gate.owners
        if owner.name in called and name not in called
        if any(role is not None and role.ends for role in gate.roles[owner.name])
    }


def _blocks(model: nn.Module, plan: Plan, example: Arguments) -> Iterator[Called]:
    """Each block of a model without weights on its own, and what to call it with.

    A block that is a part of another one's branch is tried in that.
    """
    calls: dict[str, list[Any]] = {}

    def note(call: ModuleCall) -> None:
        if not call.gate.owners:
            calls.setdefault(call.gate.name, []).append((call.args, call.kwargs))

    with without_values(model, example) as fake:
        _at_each_call(model, plan, fake, "eval", note)
    for name in sorted(calls):
        yield SingleBlock(model.get_submodule(name), calls[name], plan), ((), {})


def _at_each_call(
    model: nn.Module, plan: Plan, example: Arguments, mode: Mode, look: Callable[[ModuleCall], Any]
) -> None:
    """Call the model once and look at each call of a block, which is open unless that says else."""

    def trial(call: ModuleCall) -> Any:
        running.trial = None
        instead = look(call) if call.gate.plan is plan else None
        running.trial = trial
        return under(call, (), runs=True) if instead is None else instead

    running.trial = trial
    try:
        # Forced, so that no call goes the fast way.
        with plan.force({}), undisturbed(model, mode) as originals, torch.no_grad():
            args, kwargs = fresh(example)
            with originals.noting():
                model(*args, **kwargs)
    finally:
        running.trial = None
