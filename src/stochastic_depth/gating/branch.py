"""A call of a branch's module: it runs, runs and is multiplied, or a stand-in is handed out.

Where all branches of a block run, its modules run as they are, and those that end one multiply.
Where some are dropped, or run on some rows of the batch, the call of the block is a `Passage`, in
which they look up what was decided.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.errors import ChangedModelError, RecomputationError
from stochastic_depth.gating.gate import Gate, ModuleCall, Role, changed, running
from stochastic_depth.gating.recomputation import note_part, noted, recalled
from stochastic_depth.gating.stand_in import stand_in
from stochastic_depth.plan import Row
from stochastic_depth.rows import change_leaves
from stochastic_depth.torch_private.backward import NOT_REENTRANT, checkpoints
from stochastic_depth.torch_private.trees import tree_leaves

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
MANY_VALUES = 2**17  # of so large an output the weights are multiplied, not the output


@dataclass(slots=True, eq=False)
class Passage:
    """One call of a block of which not all branches run, on all rows."""

    gate: Gate
    decision: Any
    counts: dict[str, int] | None = field(default_factory=dict)
    """Calls of each branch module so far; None where each is the same at every call."""
    inside: bool = False  # whether one of them runs

    def next_role(self, gate: Gate) -> Role | None:
        """What this call of a module is; None where it has nothing to do with a branch."""
        if self.counts is None or self.inside:
            return None if self.inside else gate.role
        roles, position = gate.roles[self.gate.name], self.counts.get(gate.name, 0)
        if position >= len(roles):
            raise changed(self.gate, f'"{gate.name}" is called {position + 1} times in it')
        self.counts[gate.name] = position + 1
        return roles[position]


def call_branch_module(call: ModuleCall) -> Any:
    """Call a module of a branch."""
    gate = call.gate
    if running.open_all:
        return _call(call)
    for owner, factors, passage, _, _ in reversed(running.blocks):
        if owner not in gate.owners:
            continue
        role = gate.role if passage is None else passage.next_role(gate)
        if role is None or (passage is None and factors is None):
            return _call(call)
        note_part(gate, (factors if passage is None else passage.decision, role))
        owner.asleep = None  # a checkpoint may be around it, whose recomputation needs its gate
        if passage is None:
            return _multiplied(call, factors, role)
        return _call_as(call, role, passage)
    recomputes, recorded = recalled(gate)
    if recorded is not None:
        return _call_recomputed(call, *recorded)
    if recomputes:
        _refuse_unlike_forward(gate)
    if recomputes or gate.used_elsewhere:
        return _call(call)
    block = gate.owners[0].name
    raise ChangedModelError(
        f'"{gate.name}" is called outside of a call of "{block}", whose branch it belongs to',
        expected=f'"{block}" to be called as a module: {block}(x), not .forward(x)',
        instead="call the block itself; or, to use its parts, call depth.remove() or depth.fold()",
    )


def _refuse_unlike_forward(gate: Gate) -> None:
    """Refuse the backward of a reversible network, which calls branches without their blocks."""
    for owner in gate.owners:
        for decision in noted(owner):
            if isinstance(decision, Row):
                is_plain = decision.states[owner.index] and decision.factors[owner.index] is None
            else:
                is_plain = all(decision.kept) and not decision.factors and not decision.rows
            if not is_plain:
                raise RecomputationError(
                    f'"{gate.name}" is called in a backward without its block "{owner.name}", '
                    "which was dropped or scaled in the forward",
                    expected="a backward that calls the block, as torch.utils.checkpoint does",
                    instead="leave out with blocks=[...] what a backward of its own recomputes",
                )


def _call(call: ModuleCall) -> Any:
    """The module's own call; it may be that of a block."""
    if not call.gate.units:
        return call()
    from stochastic_depth.gating.block import call_block  # which needs the passage

    return call_block(call)


def _call_as(call: ModuleCall, role: Role, passage: Passage) -> Any:
    """Call the module in this role, as it was decided."""
    decision = passage.decision
    if not decision.kept[role.branch]:
        # torch's encoder makes its input a nested tensor in inference, which has no shape.
        values = (*call.args, *call.kwargs.values())
        is_nested = any(isinstance(value, Tensor) and value.is_nested for value in values)
        if passage.gate.stands_in and not is_nested:
            decision.setup.skip(call.module)
            return stand_in(call.gate, call.module, call.args, call.kwargs, role)
        return change_leaves(_call(call), role.ends, lambda leaf, number: torch.zeros_like(leaf))
    rows = None if decision.rows is None else decision.rows[role.branch]
    if rows is not None:
        args, kwargs, _ = role.batch.take(rows, call.args, call.kwargs)
        call = call._replace(args=args, kwargs=kwargs)
    was_inside, passage.inside = passage.inside, True
    try:
        output = _multiplied(call, decision.factors, role)
    finally:
        passage.inside = was_inside
    return output if rows is None else role.batch.spread(rows, output)


def _call_recomputed(call: ModuleCall, decision: Any, role: Role) -> Any:
    """The same in a checkpoint that recomputes the branch without its block."""
    if not hasattr(decision, "kept"):  # the factors of branches that all ran
        return _multiplied(call, decision, role)
    passage = Passage(decision.gate, decision)
    running.blocks.append((decision.gate, None, passage, torch.is_grad_enabled(), None))
    try:
        out = _call_as(call, role, passage)
    finally:
        running.blocks.pop()
    _, recomputed = checkpoints()
    is_reentrant = recomputed is not None and NOT_REENTRANT not in recomputed[1]
    if is_reentrant and not decision.kept[role.branch] and torch.is_grad_enabled():
        # Around nothing but the branch it insists on a gradient.
        leaves = tree_leaves(out)
        for number in role.ends:
            leaves[number].requires_grad_()
    return out


def _multiplied(call: ModuleCall, factors: tuple[float, ...] | None, role: Role) -> Any:
    """Call the module, and multiply what it ends."""
    if factors is None or not role.ends:
        return _call(call)
    if call.gate.units:
        return times(_call(call), role, factors)
    return run_multiplied(call, role, factors)


def run_multiplied(call: ModuleCall, role: Role, factors: tuple[float, ...]) -> Any:
    """Call a module with its output multiplied, or its weights where that is cheaper.

    `c * (w @ x + b)` is `(c * w) @ x + c * b`, up to rounding: a product with some thousand weights
    takes the place of one with every value of the branch, forward and backward.
    """
    _, module, run, args, kwargs = call
    if role.weights and module.training and args and args[0].numel() >= MANY_VALUES:
        twin = _with_weights(module, role.weights, factors[role.branch])
        if twin is not None:
            return run(twin, *args, **kwargs)
    return times(call(), role, factors)


def times(output: Any, role: Role, factors: tuple[float, ...]) -> Any:
    if isinstance(output, Tensor):
        return output * factors[role.branch]
    return change_leaves(output, role.ends, lambda leaf, n: leaf * factors[role.ends[n]])


def weights_of(module: nn.Module, name: str, parameters: tuple[str, ...]) -> tuple[str, ...]:
    """Which of its own parameters a module takes a factor in, or none.

    Args:
        module: The module that ends a branch.
        name: Its name.
        parameters: All that take the branch's factor over, by name in the model. They have to be
            this module's, and it one of torch's, which are known to read them at every call.
    """
    names = tuple(parameter.removeprefix(f"{name}.") for parameter in parameters)
    inside = all(f"{name}.{mine}" in parameters and mine in module._parameters for mine in names)
    return names if inside and type(module).__module__.startswith("torch.nn.modules.") else ()


def _with_weights(module: nn.Module, weights: tuple[str, ...], factor: float) -> Any:
    """Another module of the same class and parts, but for these weights times the factor.

    None where somebody else looks at the module's call, or has replaced it. The module itself is
    left as it is: another thread may just call it.
    """
    content = vars(module)
    watched = any(content[hooks] for hooks in _HOOKS)
    if watched or "forward" in content or content.get("_compiled_call_impl") is not None:
        return None
    kept = content["_parameters"]
    if any(kept.get(name) is None for name in weights):
        return None
    twin = object.__new__(type(module))
    scaled = {name: kept[name] * factor for name in weights}
    vars(twin).update({**content, "_parameters": {**kept, **scaled}})
    return twin
