"""A container's call: what is decided about its blocks, and what it comes to.

Where the whole block is dropped its forward does not run. Otherwise it runs, on all rows of the
batch or on some, and its members look up what was decided.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from stochastic_depth.collectives import Refusal
from stochastic_depth.deciding import Decision
from stochastic_depth.discovery.templates import (
    Form,
    Template,
    form,
)
from stochastic_depth.discovery.undisturbed import eagerly
from stochastic_depth.distributed.layout import Layout
from stochastic_depth.distributed.sharded import as_unit_would
from stochastic_depth.gating import hooks
from stochastic_depth.gating.compiled import as_made, build
from stochastic_depth.gating.entry import batch_of, enter
from stochastic_depth.gating.groups import run_in_groups
from stochastic_depth.gating.passage import Gate, Original, Passage, changed, running
from stochastic_depth.gating.traced import run_uncompiled
from stochastic_depth.rows import Rows, put_back, take
from stochastic_depth.torch_private import backward_is_running, is_compiled, tree_map


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
    passage = enter(gate, module, lambda: batch_of(gate, called, args, kwargs))
    if gate.batch and gate.plan.probe is None and hooks.collects(module):
        # On some rows alone it would show its library those rows alone.
        for block, decision in passage.decisions.items():
            passage.decisions[block] = replace(decision, masked=True)
    if passage.training and gate.plan.compiler is not None and gate.beneath is not None:
        held = gate.batch.get(called) if called else None
        size = batch_of(gate, called, args, kwargs).size if held else 0
        build(passage, module, held, size, args, kwargs)
    if passage.plain:
        output = _run(passage, module, original, args, kwargs)
    else:
        output = _run_in_part(passage, module, original, called or form(args, kwargs), args, kwargs)
    if passage.wrapper is not None and not backward_is_running():
        # Where a reentrant checkpoint runs the forward without gradients, only the input has any.
        differ = gate.plan.ranks_differ or gate.plan.forced is not None
        gate.plan.reduction.expect(passage.wrapper, (output, args, kwargs), differ=differ)
    return output


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
            output = tree_map(as_made, output)
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
                lambda kept, group, some, named: _run(
                    _of_group(passage, decision, kept, group), module, original, some, named
                ),
                (args, kwargs),
            )
        return _run(passage, module, original, args, kwargs)
    (some, named), rests = take((args, kwargs), gate.batch[called].takes, rows)
    passage.given, passage.unchanged = rows, gate.within
    output = _run(passage, module, original, some, named)
    # A dropped row comes to what it is in a dropped block.
    return put_back(output, gate.batch[called].gives, rests, rows)


def _of_group(passage: Passage, decision: Decision, kept: tuple[bool, ...], group: Rows) -> Passage:
    """The same call for those rows of the batch on which just these branches run."""
    decided = Decision(kept, decision.factors, (None,) * len(kept))
    decisions = {passage.gate.blocks[0]: decided}
    return replace(
        passage, decisions=decisions, counts={}, given=group, visits=0, unchanged=frozenset()
    )


def _run(passage: Passage, module: nn.Module, original: Original, args: Any, kwargs: Any) -> Any:
    """The container's own forward, in which its members look up what was decided."""
    passage.compiled = passage.plain and is_compiled(module)
    running.passages.append(passage)
    try:
        with without_collectives(passage) if passage.may_part else nullcontext():
            if passage.compiled:
                return original(module, *args, **kwargs)
            if is_compiled(module):
                output = run_uncompiled(passage, original, module, args, kwargs)
            else:
                output = original(module, *args, **kwargs)
    finally:
        running.passages.pop()
    if passage.visits != passage.gate.expected:
        made = f"{passage.visits} calls of gated modules were made in its forward"
        fused = not passage.visits and not module.training
        why = f"{made}, perhaps by a fused inference path" if fused else made
        raise changed(passage.gate, why)
    return output


@contextmanager
def without_collectives(passage: Passage) -> Iterator[None]:
    """Raises where a collective begins in a block that other ranks may drop."""
    plan, name = passage.gate.plan, passage.gate.name
    with eagerly(), Refusal(plan, name):  # which sees the operations of no graph
        yield
    if all(all(decision.kept) for decision in passage.decisions.values()):
        plan.silent.add(name)


def _has_to_run(passage: Passage, whole: Template | None, module: nn.Module) -> bool:
    """Whether the forward of a block without branches has to run all the same.

    For somebody who looks on; for the weights of its skip path to be gathered, or because others
    may run the block and wait for this rank's part of its weights.
    """
    gathers = passage.layout.unit and passage.hung is not None
    return gathers or hooks.collects(module)


def _dropped(
    gate: Gate,
    layout: Layout,
    whole: Template,
    module: nn.Module,
    args: Any,
    kwargs: Any,
) -> Any:
    """What a container comes to without its branches; its forward does not run."""
    value = whole.build(args, kwargs, positional=gate.positional)
    return as_unit_would(module, value) if layout.sharded else value


def _shared_rows(decision: Decision) -> Rows | None:
    """The rows of the batch that all branches run on, where those are not all."""
    first = decision.rows[0]
    return first if not decision.masked and all(r is first for r in decision.rows) else None
