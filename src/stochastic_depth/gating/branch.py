"""A call of a branch's module: it runs, runs and is multiplied, or a stand-in is handed out.

Where all branches of a block run, its modules run as they are, and those that end one multiply.
Where some are dropped, or run on some rows of the batch, the call of the block is a `Passage` on a
stack of this thread, in which they look up what was decided.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.errors import ChangedModelError
from stochastic_depth.gating.gate import Gate, Original, Role, changed, running
from stochastic_depth.gating.recomputation import note, recalled
from stochastic_depth.gating.stand_in import stand_in
from stochastic_depth.rows import change_leaves, spread, take
from stochastic_depth.torch_private.trees import tree_leaves

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MANY_VALUES = 2**17  # of which it is cheaper to multiply some weights twice


@dataclass(slots=True, eq=False)
class Passage:
    """One call of a block of which not all branches run, on all rows."""

    gate: Gate
    decision: Any
    counts: dict[str, int] = field(default_factory=dict)  # calls of each branch module so far
    inside: bool = False  # whether one of them runs


def call_branch_module(
    gate: Gate, module: nn.Module, original: Original, args: Any, kwargs: Any
) -> Any:
    """Call a module of a branch."""
    if not running.open_all:
        passage = _passage_of(gate)
        if passage is not None:
            role = _next_role(gate, passage)
            if role is not None:
                noted = passage.decision, role
                note(gate, noted)
                return _call_as(gate, *noted, passage, module, original, args, kwargs)
        elif (owner := _runs_whole(gate)) is not None:
            if gate.role is not None:
                note(gate, (owner.factors, gate.role))
                return _multiplied(gate, owner.factors, gate.role, module, original, args, kwargs)
        else:
            recomputes, recorded = recalled(gate)
            if recorded is not None:
                decision, role = recorded
                return _call_recomputed(gate, decision, role, module, original, args, kwargs)
            if not recomputes and not gate.used_elsewhere:
                raise _outside(gate)
    return _call(gate, module, original, args, kwargs)


def _call(gate: Gate, module: nn.Module, original: Original, args: Any, kwargs: Any) -> Any:
    """The module's own call; it may be that of a block."""
    if not gate.units:
        return original(module, *args, **kwargs)
    from stochastic_depth.gating.block import call_block  # which needs the passage

    return call_block(gate, module, original, args, kwargs)


def _passage_of(gate: Gate) -> Passage | None:
    """The innermost passage of a block that this module is a part of."""
    for passage in reversed(running.passages):
        if passage.gate.name in gate.roles and passage.gate.plan is gate.plan:
            return passage
    return None


def _next_role(gate: Gate, passage: Passage) -> Role | None:
    """What this call is in the passage; None where it has nothing to do with a branch."""
    if passage.inside:
        return None
    roles, position = gate.roles[passage.gate.name], passage.counts.get(gate.name, 0)
    if position >= len(roles):
        raise changed(passage.gate, f'"{gate.name}" is called {position + 1} times in it')
    passage.counts[gate.name] = position + 1
    return roles[position]


def _runs_whole(gate: Gate) -> Gate | None:
    """The block of this module all of whose branches run just now, on all that it is given."""
    return next((owner for owner in gate.owners if owner.depth), None)


def _call_as(
    gate: Gate,
    decision: Any,
    role: Role,
    passage: Passage,
    module: nn.Module,
    original: Original,
    args: Any,
    kwargs: Any,
) -> Any:
    """Call the module in this role, as it was decided."""
    if not decision.kept[role.branch]:
        if passage.gate.stands_in:
            out = stand_in(gate, module, args, kwargs, role)
            return decision.setup.stand_in(out, role.ends, module)
        output = _call(gate, module, original, args, kwargs)
        return change_leaves(output, role.ends, lambda leaf, number: torch.zeros_like(leaf))
    rows = None if decision.rows is None else decision.rows[role.branch]
    if rows is not None:
        (args, kwargs), _ = take((args, kwargs), role.takes, rows)
    was_inside, passage.inside = passage.inside, True
    try:
        output = _multiplied(gate, decision.factors, role, module, original, args, kwargs)
    finally:
        passage.inside = was_inside
    return output if rows is None else spread(output, role.gives, rows)


def _call_recomputed(
    gate: Gate,
    decision: Any,
    role: Role,
    module: nn.Module,
    original: Original,
    args: Any,
    kwargs: Any,
) -> Any:
    """The same in a checkpoint that recomputes the branch without its block."""
    if decision is None or isinstance(decision, tuple):  # the factors of branches that all ran
        return _multiplied(gate, decision, role, module, original, args, kwargs)
    (block,) = [owner for owner in gate.owners if owner is decision.gate]
    passage = Passage(block, decision)
    running.passages.append(passage)
    try:
        out = _call_as(gate, decision, role, passage, module, original, args, kwargs)
    finally:
        running.passages.pop()
    if not decision.kept[role.branch] and torch.is_grad_enabled():
        # A reentrant checkpoint around nothing but the branch insists on a gradient.
        leaves = tree_leaves(out)
        for number in role.ends:
            leaves[number].requires_grad_()
    return out


def _multiplied(
    gate: Gate,
    factors: tuple[float, ...] | None,
    role: Role,
    module: nn.Module,
    original: Original,
    args: Any,
    kwargs: Any,
) -> Any:
    """Call the module, and multiply what it ends."""
    if factors is None or not role.ends:
        return _call(gate, module, original, args, kwargs)
    if gate.units:
        return _times(_call(gate, module, original, args, kwargs), role, factors)
    return run_multiplied(module, original, role, factors, args, kwargs)


def run_multiplied(
    module: nn.Module,
    run: Original,
    role: Role,
    factors: tuple[float, ...],
    args: Any,
    kwargs: Any,
) -> Any:
    """Call a module with its output multiplied, or its weights where that is cheaper.

    `c * (w @ x + b)` is `(c * w) @ x + c * b`, up to rounding: a product with some thousand weights
    takes the place of one with every value of the branch, forward and backward.
    """
    if role.weights and module.training and args and args[0].numel() >= _MANY_VALUES:
        twin = _with_weights(module, role.weights, factors[role.branch])
        if twin is not None:
            return run(twin, *args, **kwargs)
    return _times(run(module, *args, **kwargs), role, factors)


def _times(output: Any, role: Role, factors: tuple[float, ...]) -> Any:
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
    own = tuple(parameter.removeprefix(f"{name}.") for parameter in parameters)
    inside = all(f"{name}.{mine}" in parameters and mine in module._parameters for mine in own)
    return own if inside and type(module).__module__.startswith("torch.nn.modules.") else ()


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


def _outside(gate: Gate) -> ChangedModelError:
    block = gate.owners[0].name
    return ChangedModelError(
        f'"{gate.name}" is called outside of a call of "{block}", whose branch it belongs to',
        expected=f'"{block}" to be called as a module: {block}(x), not .forward(x)',
        instead="call the block itself; or, to use its parts, call depth.remove() or depth.fold()",
    )
