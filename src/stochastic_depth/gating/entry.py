"""A container's call begins: what is decided about its blocks, and for which batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from stochastic_depth.collectives import may_part
from stochastic_depth.deciding import Batch, Decision, drawn, probed, settled
from stochastic_depth.discovery.templates import Form, Place, order, same_tensors
from stochastic_depth.distributed.layout import WHOLE, Layout, wrapper_of
from stochastic_depth.distributed.reduction import Reduction
from stochastic_depth.errors import ChangedModelError
from stochastic_depth.gating.parts import hung_on, layout_for, make_sure_ranks_agree
from stochastic_depth.gating.passage import Gate, Passage, running
from stochastic_depth.gating.recomputation import remembered
from stochastic_depth.plan import Plan
from stochastic_depth.rows import Held
from stochastic_depth.torch_private import tree_leaves


class Entry(NamedTuple):
    """What is settled when a container is called, and holds in a recomputation as well."""

    decisions: dict[int, Decision]
    path: tuple[int, ...] = ()  # its call number, behind those of the calls around it
    wrapper: Any = None  # the DistributedDataParallel around it
    hung: Reduction | None = None
    layout: Layout = WHOLE
    may_part: bool = False  # other ranks may decide otherwise


def enter(
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

    def make() -> Entry:
        if plan.probe is not None:
            size = batch().size
            return Entry({n: probed(plan, n, size) for n in gate.blocks})
        layout = layout_for(gate, module if holder is None else holder)
        wrapper = wrapper_of(gate.name) if training else None
        if layout.in_parts:
            make_sure_ranks_agree(gate, module, layout)
        hung = hung_on(plan, layout, wrapper)
        if not training or plan.disabled or plan.forced is not None:
            forced = None if plan.disabled else plan.forced
            settled_ones = {
                n: settled(plan, n, training=training, forced=forced) for n in gate.blocks
            }
            return Entry(settled_ones, (), wrapper, hung, layout)
        path = _path(gate)
        given = batch() if plan.mode == "sample" else None
        drawn_ones = {n: drawn(plan, n, path, given) for n in gate.blocks}
        alike = plan.mode == "batch" and not plan.ranks_differ
        apart = not alike and may_part(plan, gate.name, gate.blocks)
        return Entry(drawn_ones, path, wrapper, hung, layout, apart)

    entry = remembered(gate, make, may_recompute=training)
    decisions = entry.decisions
    plain = all(decision.changes_nothing for decision in decisions.values())
    unchanged = gate.alone if plain else frozenset()
    if not plain and all(decision.all_on_all_rows for decision in decisions.values()):
        unchanged = gate.within
    return Passage(
        gate,
        decisions,
        training,
        entry.path,
        wrapper=entry.wrapper,
        hung=entry.hung,
        layout=entry.layout,
        plain=plain,
        unchanged=unchanged,
        may_part=entry.may_part,
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


def batch_of(gate: Gate, called: Form | None, args: Any, kwargs: Any) -> Batch:
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
