"""A container's call: what is decided about its blocks, and what it comes to.

Where the whole block is dropped its forward does not run. Otherwise it runs, on all rows of the
batch or on some, and its members look up what was decided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.collectives import Refusal, may_part
from stochastic_depth.deciding import Batch, Decision, drawn, probed, settled
from stochastic_depth.discovery.templates import (
    Form,
    Place,
    SkipPath,
    Template,
    form,
    order,
    same_tensors,
)
from stochastic_depth.discovery.undisturbed import eagerly
from stochastic_depth.distributed.layout import WHOLE, Layout, wrapper_of
from stochastic_depth.distributed.sharded import as_unit_would
from stochastic_depth.errors import ChangedModelError
from stochastic_depth.gating import hooks
from stochastic_depth.gating.compiled import build
from stochastic_depth.gating.groups import run_in_groups
from stochastic_depth.gating.parts import hung_on, layout_for, make_sure_ranks_agree
from stochastic_depth.gating.passage import Gate, Original, Passage, changed, running
from stochastic_depth.gating.recomputation import remembered
from stochastic_depth.gating.traced import outside_of_graphs, tell_to_compile
from stochastic_depth.plan import Plan
from stochastic_depth.rows import Held, Rows, put_back, take
from stochastic_depth.torch_private import backward_is_running, is_compiled, tree_leaves, tree_map


def call_container(
    gate: Gate, module: nn.Module, original: Original, args: Any, kwargs: Any
) -> Any:
    """Call a module as a container, where it is one."""
    if not gate.blocks:
        return original(module, *args, **kwargs)
    if module.training:
        gate.plan.expect_steps(gate.name, module)
    # Only in mode "sample" is it asked for before anything is decided.
    called = form(args, kwargs) if gate.batch else None
    passage = decide(gate, module, lambda: _batch(gate, called, args, kwargs))
    if gate.batch and gate.plan.probe is None and hooks.collects(module):
        # On some rows alone it would show its library those rows alone.
        for block, decision in passage.decisions.items():
            passage.decisions[block] = replace(decision, masked=True)
    if passage.training and gate.plan.compiler is not None and gate.beneath is not None:
        _build(passage, module, called, args, kwargs)
    if passage.plain:
        output = _run(passage, module, original, args, kwargs)
    else:
        output = _run_in_part(passage, module, original, called or form(args, kwargs), args, kwargs)
    if passage.wrapper is not None and not backward_is_running():
        # Where a reentrant checkpoint runs the forward without gradients, only the input has any.
        differ = gate.plan.ranks_differ or gate.plan.forced is not None
        gate.plan.reduction.expect(passage.wrapper, (output, args, kwargs), differ=differ)
    return output


def _build(
    passage: Passage, module: nn.Module, called: Form | None, args: Any, kwargs: Any
) -> None:
    """Have the graphs ready that this call of a compiled block may need."""
    if called is None:
        build(passage, module, {}, 0, args, kwargs)
    else:
        size = _batch(passage.gate, called, args, kwargs).size
        build(passage, module, passage.gate.batch[called].takes, size, args, kwargs)


def _run_in_part(
    passage: Passage, module: nn.Module, original: Original, called: Form, args: Any, kwargs: Any
) -> Any:
    """The container without what is dropped: its forward does not run, or on some rows."""
    gate = passage.gate
    decision = passage.decisions[gate.blocks[0]]
    # Called in another way than it was watched (with a mask, say), the forward may do more than
    # hand its input on: then it runs, with its branches closed.
    whole = gate.whole if called in gate.forms else None
    skips = whole is not None and not any(decision.kept)
    if skips and not _has_to_run(passage, whole, module):
        assert whole is not None
        output = _dropped(gate, passage.layout, whole, module, args, kwargs)
        if gate.plan.compiler is not None and torch.is_grad_enabled():
            output = tree_map(_trained, output)
        if passage.hung is not None:
            output = passage.hung.skip(output, module.parameters())
        return output
    rows = _shared_rows(decision) if isinstance(whole, Template) else None
    if rows is None:
        if gate.name in gate.plan.in_groups and not decision.masked and any(decision.rows):
            return run_in_groups(
                gate.batch[called],
                decision.rows,
                decision.kept,
                lambda kept, some, named: _run(
                    _of_group(passage, decision, kept), module, original, some, named
                ),
                (args, kwargs),
            )
        return _run(passage, module, original, args, kwargs)
    (some, named), rests = take((args, kwargs), gate.batch[called].takes, rows)
    passage.on_rows, passage.unchanged = True, gate.within
    output = _run(passage, module, original, some, named)
    # A dropped row comes to what it is in a dropped block.
    return put_back(output, gate.batch[called].gives, rests, rows)


def _of_group(passage: Passage, decision: Decision, kept: tuple[bool, ...]) -> Passage:
    """The same call for those rows of the batch on which just these branches run."""
    decided = Decision(kept, decision.factors, (None,) * len(kept))
    decisions = {passage.gate.blocks[0]: decided}
    return replace(passage, decisions=decisions, counts={}, visits=0, unchanged=frozenset())


def _run(passage: Passage, module: nn.Module, original: Original, args: Any, kwargs: Any) -> Any:
    """The container's own forward, in which its members look up what was decided."""
    passage.compiled = passage.plain and is_compiled(module)
    running.passages.append(passage)
    try:
        with without_collectives(passage) if passage.may_part else nullcontext():
            if passage.compiled:
                return original(module, *args, **kwargs)
            if is_compiled(module):
                output = _run_uncompiled(passage, module, original, args, kwargs)
            else:
                output = outside_of_graphs(original, module, args, kwargs)
    finally:
        running.passages.pop()
    if passage.visits != passage.gate.expected:
        made = f"{passage.visits} calls of gated modules were made in its forward"
        fused = not passage.visits and not module.training
        why = f"{made}, perhaps by a fused inference path" if fused else made
        raise changed(passage.gate, why)
    return output


def _run_uncompiled(
    passage: Passage, module: nn.Module, original: Original, args: Any, kwargs: Any
) -> Any:
    """The same where its user compiled it: the graph knows neither factors nor closed branches."""
    if all(all(decision.kept) for decision in passage.decisions.values()):
        tell_to_compile(passage.gate.plan)
    with eagerly():
        return original(module, *args, **kwargs)


@contextmanager
def without_collectives(passage: Passage) -> Iterator[None]:
    """Raises where a collective begins in a block that other ranks may drop."""
    plan, name = passage.gate.plan, passage.gate.name
    with eagerly(), Refusal(plan, name):  # which sees the operations of no graph
        yield
    if all(all(decision.kept) for decision in passage.decisions.values()):
        plan.silent.add(name)


def _has_to_run(passage: Passage, whole: Template | SkipPath | None, module: nn.Module) -> bool:
    """Whether the forward of a block without branches has to run all the same.

    For somebody who looks on; for the weights of its skip path to be gathered, or because others
    may run the block and wait for this rank's part of its weights.
    """
    gathers = passage.layout.unit and (isinstance(whole, SkipPath) or passage.hung is not None)
    return gathers or hooks.collects(module)


def _dropped(
    gate: Gate,
    layout: Layout,
    whole: Template | SkipPath,
    module: nn.Module,
    args: Any,
    kwargs: Any,
) -> Any:
    """What a container comes to without its branches; its forward does not run."""
    if isinstance(whole, Template):
        value = whole.build(args, kwargs, positional=gate.positional)
        return as_unit_would(module, value) if layout.sharded else value
    skip = module.get_submodule(whole.module.removeprefix(f"{gate.name}."))
    value = skip(whole.argument.find(args, kwargs, gate.positional))
    if not whole.relu:
        return value
    return value.relu_() if whole.in_place else value.relu()


def _trained(leaf: Any) -> Any:
    """What a dropped block hands on, needing a gradient as what it makes: else graphs differ.

    Only in front of all parameters does it need none.
    """
    if not isinstance(leaf, Tensor) or leaf.requires_grad or not leaf.is_floating_point():
        return leaf
    return leaf.detach().requires_grad_().clone()


def _shared_rows(decision: Decision) -> Rows | None:
    """The rows of the batch that all branches run on, where those are not all."""
    first = decision.rows[0]
    return first if not decision.masked and all(r is first for r in decision.rows) else None


def decide(
    gate: Gate, module: nn.Module, batch: Callable[[], Batch], *, holder: nn.Module | None = None
) -> Passage:
    """A new passage: drawn, settled without a draw, or that of the forward recomputed.

    Args:
        gate: Whose call it is.
        module: Its module.
        batch: Tells, for mode "sample", what it is called with.
        holder: Who holds the branch's parameters; None: the module.
    """
    plan, training = gate.plan, module.training
    alike = plan.mode == "batch" and not plan.ranks_differ

    def make() -> tuple[dict[int, Decision], tuple[int, ...], Any, Any, Any, bool]:
        if plan.probe is not None:
            size = batch().size
            return {n: probed(plan, n, size) for n in gate.blocks}, (), None, None, WHOLE, False
        layout = layout_for(gate, module if holder is None else holder)
        wrapper = wrapper_of(gate.name) if training else None
        if layout.in_parts:
            make_sure_ranks_agree(gate, module, layout)
        hung = hung_on(plan, layout, wrapper)
        if not training or plan.disabled or plan.forced is not None:
            forced = None if plan.disabled else plan.forced
            return (
                {n: settled(plan, n, training=training, forced=forced) for n in gate.blocks},
                (),
                wrapper,
                hung,
                layout,
                False,
            )
        path = _path(gate)
        given = batch() if plan.mode == "sample" else None
        decided = {n: drawn(plan, n, path, given) for n in gate.blocks}
        apart = not alike and may_part(plan, gate.name, gate.blocks)
        return decided, path, wrapper, hung, layout, apart

    decisions, path, wrapper, hung, layout, apart = remembered(gate, make, may_recompute=training)
    plain = all(decision.changes_nothing for decision in decisions.values())
    unchanged = gate.alone if plain else frozenset()
    if not plain and all(decision.all_on_all_rows for decision in decisions.values()):
        unchanged = gate.within
    return Passage(
        gate,
        decisions,
        training,
        path,
        wrapper=wrapper,
        hung=hung,
        layout=layout,
        plain=plain,
        unchanged=unchanged,
        may_part=apart,
    )


def _path(gate: Gate) -> tuple[int, ...]:
    """The number of this call, behind those of the calls around it."""
    around = _passage_around(gate.plan) if running.passages else None
    calls = around.calls if around and around.path else None
    if gate.branch is None:
        number = gate.plan.next_call(gate.name, calls)
    elif around is not None and around.gate.blocks == gate.blocks:
        return around.path  # a branch inside of a branch of the same layer
    else:
        number = gate.plan.next_round(gate.blocks[0], gate.branch, calls)
    return (*(around.path if around else ()), number)


def _passage_around(plan: Plan) -> Passage | None:
    """The innermost passage of this plan that is under way."""
    return next((p for p in reversed(running.passages) if p.gate.plan is plan), None)


def _batch(gate: Gate, called: Form | None, args: Any, kwargs: Any) -> Batch:
    """The batch that a container is called with."""
    assert called is not None
    leaves = tree_leaves((args, kwargs))
    known = gate.batch.get(called) or _known_otherwise(gate, called, order(args, kwargs))
    if known is None:
        raise ChangedModelError(
            f'"{gate.name}" is called with other arguments than in the example, so it cannot be '
            "told which of their dimensions hold the batch",
            expected="the arguments that it was watched with: " + " or ".join(map(str, gate.batch)),
            instead='pass example_inputs as in the training (with the mask, say), or mode="batch"',
        )
    held = [(n, dim) for n, dim in known.takes.items() if isinstance(leaves[n], Tensor)]
    # One that has a single row holds for all rows.
    size, number = max((leaves[n].shape[dim] // known.each[n], n) for n, dim in held)
    return Batch(size, leaves[number].device)


def _known_otherwise(gate: Gate, called: Form, given: tuple[tuple[Place, int], ...]) -> Held | None:
    """What is known of a call with other flags, or without a mask or a cache."""
    for watched, known in list(gate.batch.items()):
        if same_tensors(called, watched):
            found = known.reordered(given)
            if found.takes:
                gate.batch[called] = found
                return found
    return None
