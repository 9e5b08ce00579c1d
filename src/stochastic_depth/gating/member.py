"""A member's call: it runs, runs and is multiplied, or a stand-in is handed out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from stochastic_depth.errors import ChangedModelError
from stochastic_depth.gating import hooks
from stochastic_depth.gating.container import call_container
from stochastic_depth.gating.passage import Gate, Original, Passage, Role, changed, running
from stochastic_depth.gating.recomputation import note, recall
from stochastic_depth.gating.scaled import multiplied, with_scaled_weights
from stochastic_depth.gating.stand_in import stand_in
from stochastic_depth.rows import masked, spread, take
from stochastic_depth.torch_private import tree_leaves


def role_in(gate: Gate) -> tuple[Passage, Role] | None:
    """What this call of a member is; None where it has nothing to do with a gate."""
    for passage in reversed(running.passages):
        roles = gate.roles.get(passage.gate.name)
        if roles is None or passage.gate.plan is not gate.plan:
            continue
        if passage.inside_member:
            return None
        position = passage.counts.get(gate.name, 0)
        if position >= len(roles):
            raise changed(passage.gate, f'"{gate.name}" is called {position + 1} times in it')
        passage.counts[gate.name] = position + 1
        passage.visits += 1
        role = roles[position]
        if role is None:
            return None
        noted = (passage.decisions, role, passage.hung, passage.given)
        note(gate, noted, passage.decisions, may_recompute=passage.training)
        return passage, role
    recomputed, recalled = recall(gate)
    if recalled is not None:
        decisions, role, hung, given = recalled
        return Passage(gate, decisions, training=True, hung=hung, given=given), role
    if recomputed or gate.used_elsewhere:
        return None  # what runs plain leaves nothing to recall
    container = next(iter(gate.roles))
    raise ChangedModelError(
        f'"{gate.name}" is called outside of a call of "{container}", whose branch it belongs to',
        expected=f'"{container}" to be called as a module: {container}(x), not .forward(x)',
        instead="call the block itself; or, to use its parts, call depth.remove() or depth.fold()",
    )


def call_member(
    gate: Gate,
    passage: Passage,
    role: Role,
    module: nn.Module,
    original: Original,
    args: Any,
    kwargs: Any,
) -> Any:
    """Call a module as a member of a branch, in this role."""
    decision = passage.decisions[role.block]
    recomputed = passage not in running.passages
    if not _is_kept(passage, role):
        with _all_open():
            unread = frozenset() if hooks.collects(module) else role.unread
            out = stand_in(gate, module, args, kwargs, zeros=role.scaled, unread=unread)
        hooks.show(module, args, kwargs, out)
        if passage.hung is not None:
            return passage.hung.stand_in(out, role.scaled, module)
        if recomputed and torch.is_grad_enabled():
            # A reentrant checkpoint around nothing but the branch insists on a gradient.
            _require_gradients(out, role.scaled)
        return out
    rows = decision.rows[role.branch]
    if rows is not None and passage.given is None and not decision.masked:
        (args, kwargs), _ = take((args, kwargs), role.takes, rows)
    factor = decision.factors[role.branch] if role.scaled else 1.0
    if factor != 1.0 and role.weights and passage.training:
        twin = with_scaled_weights(module, role.weights, factor)
        module, factor = (module, factor) if twin is None else (twin, 1.0)
    was_inside, passage.inside_member = passage.inside_member, True
    if recomputed:
        running.passages.append(passage)
    try:
        if gate.blocks:  # a member that is a container itself
            output = call_container(gate, module, original, args, kwargs)
        else:
            output = original(module, *args, **kwargs)
    finally:
        passage.inside_member = was_inside
        if recomputed:
            running.passages.pop()
    if factor != 1.0:
        output = multiplied(output, role.scaled, factor)
    return _with_rows_back(passage, role, gate, output)


def _is_kept(passage: Passage, role: Role) -> bool:
    """Whether its branch runs, and those around it do."""
    places = ((role.block, role.branch), *role.within)
    return all(passage.decisions[block].kept[branch] for block, branch in places)


def _with_rows_back(passage: Passage, role: Role, gate: Gate, output: Any) -> Any:
    """A member's output, with its rows put back where it ends the branch."""
    decision = passage.decisions[role.block]
    rows = decision.rows[role.branch]
    if rows is None:
        return output
    if decision.masked:
        output = masked(output, role.gives, rows)
    elif passage.given is None:
        output = spread(output, role.gives, rows)
    if gate.plan.probe is not None and not role.within:
        whole = passage.given is None
        _note_value(gate, role, output if whole else spread(output, role.ends, rows))
    return output


def _note_value(gate: Gate, role: Role, output: Any) -> None:
    """Keep what a branch ends in while it is probed."""
    assert gate.plan.probe is not None
    if role.scaled != role.ends.keys():
        raise ChangedModelError(
            f'the output of "{gate.name}" does not hold the batch in one dimension',
            expected="a row, or several, for each example",
            instead='leave the block out with blocks=, or use mode="batch"',
        )
    leaves = tree_leaves(output)
    # In-line code may change them in place.
    gate.plan.probe.values.extend(leaves[number].clone() for number in role.ends)


@contextmanager
def _all_open() -> Iterator[None]:
    """Gated modules run as plain ones: nothing is drawn or counted."""
    running.open_all = True
    try:
        yield
    finally:
        running.open_all = False


def _require_gradients(output: Any, numbers: frozenset[int]) -> None:
    leaves = tree_leaves(output)
    for number in numbers:
        leaves[number].requires_grad_()
