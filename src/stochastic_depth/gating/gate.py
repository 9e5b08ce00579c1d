"""What a gated module does when it is called.

A *container* is the module whose call decides about a block; a *member* is a module of one of its
branches. A container that drops the whole block returns its skip value. Otherwise it runs, and
its members look up what was decided: they run, run and multiply, or hand out a stand-in. The
decision belongs to the call (a `Passage`), not to the module: threads do not disturb each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth import distributed
from stochastic_depth.discovery.templates import SkipPath, Template, form
from stochastic_depth.errors import ChangedModelError
from stochastic_depth.gating.recomputation import note, recall, remembered
from stochastic_depth.gating.stand_in import stand_in
from stochastic_depth.plan import Batch, Decision, Plan
from stochastic_depth.rows import Dims, Places, Rows, masked, put_back, spread, take
from stochastic_depth.torch_private import (
    backward_is_running,
    tree_flatten,
    tree_leaves,
    tree_unflatten,
)

Original = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Role:
    """What one call of a member is in its container: a part of which branch."""

    block: int
    branch: int
    scaled: frozenset[int]  # the leaves of its output to multiply, the branch's value
    unread: frozenset[int]  # the leaves that only other modules of the branch read
    takes: Dims = field(default_factory=dict)  # the leaves of its arguments to take rows of
    gives: Dims = field(default_factory=dict)  # the leaves of its output to put back
    ends: Dims = field(default_factory=dict)  # the leaves to mask instead


@dataclass(eq=False)
class Gate:
    """What is known about one gated module. It may be a container, a member, or both."""

    plan: Plan
    name: str
    blocks: tuple[int, ...] = ()  # a container's: the blocks that its call decides about
    whole: Template | SkipPath | None = None  # a container's: what it comes to when dropped
    forms: frozenset[object] = frozenset()  # a container's: the calls that `whole` holds for
    batch: dict[tuple[object, ...], tuple[Dims, Places]] = field(default_factory=dict)
    """A container's in mode "sample": where its arguments and output hold the batch, by form."""
    positional: tuple[str, ...] = ()  # a container's: names of its forward's parameters
    expected: int = 0  # a container's: how many calls of its members one call of it makes
    roles: dict[str, tuple[Role | None, ...]] = field(default_factory=dict)
    """A member's: for each container, what its first, second, ... call in it is."""
    templates: dict[tuple[object, ...], Template] = field(default_factory=dict)
    used_elsewhere: bool = False  # a member's: is called outside of its containers, too


@dataclass(slots=True, eq=False)
class Passage:
    """One call of a container."""

    gate: Gate
    decisions: dict[int, Decision]
    training: bool
    path: tuple[int, ...] = ()  # its call number, behind those of the calls around it
    counts: dict[str, int] = field(default_factory=dict)  # calls of each member so far
    calls: dict[str, int] = field(default_factory=dict)  # calls of the containers inside
    wrapper: Any = None  # the DistributedDataParallel around it
    on_rows: bool = False  # its forward is given the kept rows alone
    visits: int = 0
    inside_member: bool = False


class _Stack(threading.local):
    """The passages that are under way in this thread, outermost first."""

    def __init__(self) -> None:
        self.passages: list[Passage] = []
        self.open_all = False  # while the shapes of an output are looked up


_running = _Stack()


def call(gate: Gate, module: nn.Module, original: Original, args: Any, kwargs: Any) -> Any:
    """Call a gated module; `original` is the `__call__` of its own class."""
    if _running.open_all:
        return original(module, *args, **kwargs)
    if gate.roles:
        found = _role(gate)
        if found is not None:
            return _call_member(gate, *found, module, original, args, kwargs)
    return _call_container(gate, module, original, args, kwargs)


def _call_container(
    gate: Gate, module: nn.Module, original: Original, args: Any, kwargs: Any
) -> Any:
    if not gate.blocks:
        return original(module, *args, **kwargs)
    if module.training:
        gate.plan.expect_steps(gate.name, module.parameters())
    passage = _decide(gate, module, args, kwargs)
    decision = passage.decisions[gate.blocks[0]]
    # Called in another way than it was watched (with a mask, say), the forward may do more than
    # hand its input on: then it runs, with its branches closed.
    as_watched = gate.whole is not None and form(args, kwargs) in gate.forms
    if isinstance(gate.whole, SkipPath) and distributed.sharding(module):
        as_watched = False  # the container's own call gathers the skip path's weights
    if as_watched and not any(decision.kept):
        output = _dropped(gate, module, args, kwargs)
        if passage.wrapper is not None:
            output = gate.plan.reduction.skip(output, module.parameters())
    elif as_watched and isinstance(gate.whole, Template) and _same_rows(decision):
        output = _run_on_rows(passage, decision.rows[0], module, original, args, kwargs)
    else:
        output = _run(passage, module, original, args, kwargs)
    if passage.wrapper is not None and not backward_is_running():
        # Where a reentrant checkpoint runs the forward without gradients, only the input has any.
        differ = gate.plan.ranks_differ or gate.plan.forced is not None
        gate.plan.reduction.expect(passage.wrapper, (output, args, kwargs), differ=differ)
    return output


def _run(passage: Passage, module: nn.Module, original: Original, args: Any, kwargs: Any) -> Any:
    """The container's own forward, in which its members look up what was decided."""
    _running.passages.append(passage)
    try:
        output = original(module, *args, **kwargs)
    finally:
        _running.passages.pop()
    if passage.visits != passage.gate.expected:
        made = f"{passage.visits} calls of gated modules were made in its forward"
        fused = not passage.visits and not module.training
        changed = f"{made}, perhaps by a fused inference path" if fused else made
        raise _changed(passage.gate, changed)
    return output


def _dropped(gate: Gate, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """What a container comes to without its branches; its forward does not run."""
    whole = gate.whole
    if isinstance(whole, Template):
        return whole.build(args, kwargs, positional=gate.positional)
    assert whole is not None
    skip = module.get_submodule(whole.module.removeprefix(f"{gate.name}."))
    value = skip(whole.argument.find(args, kwargs, gate.positional))
    return value.relu() if whole.relu else value


def _same_rows(decision: Decision) -> bool:
    """Whether all branches run on the same rows of the batch, and those are not all."""
    first = decision.rows[0]
    return first is not None and not decision.masked and all(r is first for r in decision.rows)


def _run_on_rows(
    passage: Passage,
    rows: Rows | None,
    module: nn.Module,
    original: Original,
    args: Any,
    kwargs: Any,
) -> Any:
    """The forward for the kept rows; dropped ones come to what they are in a dropped block."""
    assert rows is not None
    takes, places = passage.gate.batch[form(args, kwargs)]
    (args, kwargs), rests = take((args, kwargs), takes, rows)
    passage.on_rows = True
    output = _run(passage, module, original, args, kwargs)
    return put_back(output, places, rests, rows)


def _decide(gate: Gate, module: nn.Module, args: Any, kwargs: Any) -> Passage:
    """A new passage: drawn, settled without a draw, or that of the forward recomputed."""
    plan, training = gate.plan, module.training

    def make() -> tuple[dict[int, Decision], tuple[int, ...], Any]:
        alike = plan.mode == "batch" and not plan.ranks_differ
        wrapper = distributed.wrapper_of(module, gate.name, alike=alike) if training else None
        if plan.probe is not None:
            size = _batch(gate, args, kwargs).size
            return {block: plan.probed(block, size) for block in gate.blocks}, (), None
        if not training or plan.disabled or plan.forced is not None:
            forced = None if plan.disabled else plan.forced
            return (
                {
                    block: plan.settled(block, training=training, forced=forced)
                    for block in gate.blocks
                },
                (),
                wrapper,
            )
        around = next((p for p in reversed(_running.passages) if p.gate.plan is plan), None)
        number = plan.next_call(gate.name, around.calls if around and around.path else None)
        path = (*(around.path if around else ()), number)
        batch = _batch(gate, args, kwargs) if plan.mode == "sample" else None
        return {block: plan.drawn(block, path, batch) for block in gate.blocks}, path, wrapper

    decisions, path, wrapper = remembered(gate, make, may_recompute=training)
    return Passage(gate, decisions, training, path, wrapper=wrapper)


def _batch(gate: Gate, args: Any, kwargs: Any) -> Batch:
    """The batch that a container is called with."""
    known = gate.batch.get(form(args, kwargs))
    if known is None:
        raise ChangedModelError(
            f'"{gate.name}" is called with other arguments than in the example, so it cannot be '
            "told which of their dimensions hold the batch",
            expected="the arguments that it was watched with: " + " or ".join(map(str, gate.batch)),
            instead='pass example_inputs as in the training (with the mask, say), or mode="batch"',
        )
    leaves = tree_leaves((args, kwargs))
    size, number = max((leaves[number].shape[dim], number) for number, dim in known[0].items())
    return Batch(size, leaves[number].device)


def _role(gate: Gate) -> tuple[Passage, Role] | None:
    """What this call of a member is; None where it has nothing to do with a gate."""
    for passage in reversed(_running.passages):
        roles = gate.roles.get(passage.gate.name)
        if roles is None or passage.gate.plan is not gate.plan:
            continue
        if passage.inside_member:
            return None
        position = passage.counts.get(gate.name, 0)
        if position >= len(roles):
            raise _changed(passage.gate, f'"{gate.name}" is called {position + 1} times in it')
        passage.counts[gate.name] = position + 1
        passage.visits += 1
        role = roles[position]
        if role is None:
            return None
        noted = (passage.decisions, role, passage.wrapper, passage.on_rows)
        note(gate, noted, may_recompute=passage.training)
        return passage, role
    recalled = recall(gate)
    if recalled is not None:
        decisions, role, wrapper, on_rows = recalled
        return Passage(gate, decisions, training=True, wrapper=wrapper, on_rows=on_rows), role
    if gate.used_elsewhere:
        return None
    container = next(iter(gate.roles))
    raise ChangedModelError(
        f'"{gate.name}" is called outside of a call of "{container}", whose branch it belongs to',
        expected=f'"{container}" to be called as a module: {container}(x), not .forward(x)',
        instead="call the block itself; or, to use its parts, call depth.remove() or depth.fold()",
    )


def _call_member(
    gate: Gate,
    passage: Passage,
    role: Role,
    module: nn.Module,
    original: Original,
    args: Any,
    kwargs: Any,
) -> Any:
    decision = passage.decisions[role.block]
    recomputed = passage not in _running.passages
    if not decision.kept[role.branch]:
        with _all_open():
            out = stand_in(gate, module, args, kwargs, zeros=role.scaled, unread=role.unread)
        if passage.wrapper is not None:
            return gate.plan.reduction.stand_in(out, role.scaled, module)
        if recomputed and torch.is_grad_enabled():
            # A reentrant checkpoint around nothing but the branch insists on a gradient.
            _require_gradients(out, role.scaled)
        return out
    rows = decision.rows[role.branch]
    if rows is not None and not passage.on_rows and not decision.masked:
        (args, kwargs), _ = take((args, kwargs), role.takes, rows)
    was_inside, passage.inside_member = passage.inside_member, True
    if recomputed:
        _running.passages.append(passage)
    try:
        if gate.blocks:  # a member that is a container itself
            output = _call_container(gate, module, original, args, kwargs)
        else:
            output = original(module, *args, **kwargs)
    finally:
        passage.inside_member = was_inside
        if recomputed:
            _running.passages.pop()
    return _finished(passage, role, gate, output)


def _finished(passage: Passage, role: Role, gate: Gate, output: Any) -> Any:
    """A member's output, multiplied and with its rows put back where it ends the branch."""
    decision = passage.decisions[role.block]
    factor, rows = decision.factors[role.branch], decision.rows[role.branch]
    if role.scaled and factor != 1.0:
        output = _multiplied(output, role.scaled, factor)
    if rows is None:
        return output
    if decision.masked:
        output = masked(output, role.ends, rows)
    elif not passage.on_rows:
        output = spread(output, role.gives, rows)
    if gate.plan.probe is not None:
        _note_value(gate, role, spread(output, role.ends, rows) if passage.on_rows else output)
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
    _running.open_all = True
    try:
        yield
    finally:
        _running.open_all = False


def _require_gradients(output: Any, numbers: frozenset[int]) -> None:
    leaves = tree_leaves(output)
    for number in numbers:
        leaves[number].requires_grad_()


def _multiplied(output: Any, numbers: frozenset[int], factor: float) -> Any:
    if isinstance(output, Tensor):
        return output * factor
    leaves, spec = tree_flatten(output)
    for number in numbers:
        leaves[number] = leaves[number] * factor
    return tree_unflatten(leaves, spec)


def _changed(gate: Gate, what: str) -> ChangedModelError:
    return ChangedModelError(
        f'"{gate.name}" does not run as it did when it was watched: {what}',
        expected=f"{gate.expected} calls, as in the watched forward",
        instead="change the model first (convert_sync_batchnorm, quantisation, new heads) and "
        "apply stochastic depth afterwards; or depth.remove(), change, apply again. In inference: "
        "depth.fold(), or torch.backends.mha.set_fastpath_enabled(False)",
    )
