"""The forward of a compiled container: a graph where all its branches run, else its own code."""

from __future__ import annotations

import functools
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from stochastic_depth.deciding import few_counts, many_counts, possible_counts
from stochastic_depth.gating.passage import Gate, Original, Passage, running
from stochastic_depth.gating.recomputation import note, recall
from stochastic_depth.gating.traced import graphs
from stochastic_depth.rows import Held, Rows, put_back, take
from stochastic_depth.torch_private import tree_leaves

# Which graph: for so many rows of the batch, None: for all that are given; and what its branches
# are multiplied by. Where a schedule, or several rates, bring many numbers of rows, 0 is for any
# but one: torch makes a constant of a length of one.
Graph = tuple[int | None, tuple[float, ...]]
_ANY = 0


class NoGraphError(Exception):
    """There is no graph for a call."""


def compiled_forward(forward: Original) -> Original:
    """What stands in a gated class for its own class's forward."""

    @functools.wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return forward(self, *args, **kwargs)
        gate: Gate = self.__dict__["_stochastic_depth"]
        compiler = gate.plan.compiler
        if compiler is None or running.open_all:
            return forward(self, *args, **kwargs)
        passage = running.passages[-1] if running.passages else None
        if passage is None or passage.gate is not gate:  # a checkpoint begins beneath the gate
            passage, graph = None, recall(gate.beneath)[1]
        else:
            # Where collectives are looked for it runs eagerly, and so does its recomputation.
            graph = None if passage.may_part else _of(passage)
            note(gate.beneath, graph, passage.decisions, may_recompute=passage.training)
        if graph is None:
            return forward(self, *args, **kwargs)
        try:
            output = compiler.run(gate, graph, self, args, kwargs)
        except NoGraphError:
            return forward(self, *args, **kwargs)
        if passage is not None:
            passage.visits = gate.expected  # its members are parts of the graph
        return output

    return run


def _of(passage: Passage) -> Graph | None:
    """The graph for what is decided; None where not all branches run on all that is given."""
    rows = passage.given
    for decision in passage.decisions.values():
        if not all(decision.kept) or any(
            some is not None and some is not rows for some in decision.rows
        ):
            return None
    return _graph(passage, rows)


def _graph(passage: Passage, rows: Rows | None) -> Graph:
    count = None if rows is None else rows.count
    if count not in (None, 1) and not few_counts(passage.gate.plan, passage.gate.blocks[0]):
        count = _ANY
    return count, _factors(passage)


def _factors(passage: Passage) -> tuple[float, ...]:
    """Those of its branches; none where no step of the schedule would multiply them."""
    plan = passage.gate.plan
    factors = tuple(f for decision in passage.decisions.values() for f in decision.factors)
    trains = passage.training and not plan.disabled
    multiplies = plan.scale == ("train" if trains else "eval") and any(
        plan.rates[block] for block in passage.gate.blocks
    )
    return factors if multiplies or any(factor != 1.0 for factor in factors) else ()


def build(
    passage: Passage, module: nn.Module, held: Held | None, size: int, args: Any, kwargs: Any
) -> None:
    """Build the graphs that calls of a container may need under other draws.

    Weights that are sharded are not there where a block is dropped. Then its graph is built when it
    runs, on all ranks at once.

    Args:
        passage: The call, before it runs.
        module: The container.
        held: In mode "sample": where its arguments and its output hold the batch.
        size: In mode "sample": the number of rows; else 0.
        args: Its arguments.
        kwargs: The same, by keyword.
    """
    gate, plan, compiler = passage.gate, passage.gate.plan, passage.gate.plan.compiler
    call = (gate.name, size, plan.disabled, plan.forced is None, torch.is_grad_enabled())
    if passage.layout.sharded or call in compiler.ready:
        return
    compiler.ready.add(call)
    for graph, draws in _other_draws(passage, size).items():
        if compiler.knows(gate, graph, module):
            continue
        _build(gate, graph, module, held, draws, (args, kwargs))
        for given in compiler.formats.others(args, kwargs):
            with suppress(Exception):  # it may not be able to run on these, which may never come
                _build(gate, graph, module, held, draws, given)


def _build(
    gate: Gate,
    graph: Graph,
    module: nn.Module,
    held: Held | None,
    draws: list[Rows | None],
    given: tuple[Any, Any],
) -> None:
    """Build one graph of a block, and note the memory formats of what it makes.

    Torch may make a graph for any number of rows and have it hold up to some number, or for
    multiples of one: where the first of the draws needed another graph, so may each of the others.
    """
    before = graphs()
    for rows in draws:
        _build_on(gate, graph, module, held, rows, given)
        if graphs() == before:
            return


def _build_on(
    gate: Gate,
    graph: Graph,
    module: nn.Module,
    held: Held | None,
    rows: Rows | None,
    given: tuple[Any, Any],
) -> None:
    """Build it for these rows of what is given."""
    compiler = gate.plan.compiler
    if rows is None or held is None:
        compiler.formats.note(compiler.build(gate, graph, module, *given, {}))
        return
    varies = held.takes if graph[0] == _ANY else {}
    for window in _windows(gate, rows, given):
        (some, named), rests = take(given, held.takes, window)
        output = compiler.build(gate, graph, module, some, named, varies)
        if output is not None:
            compiler.formats.note(put_back(output, held.gives, rests, window))


def _windows(gate: Gate, rows: Rows, given: tuple[Any, Any]) -> list[Rows]:
    """As many rows as in all ways in which they may lie in memory."""
    if gate.plan.draw.rows == "random" or gate.name in gate.plan.in_groups:
        device = next(leaf.device for leaf in tree_leaves(given) if isinstance(leaf, Tensor))
        return [replace(rows, chosen=torch.arange(rows.count, device=device))]  # always a copy
    # A window that wraps around is a copy, whose strides may be others.
    return [rows] if rows.count == 1 else [rows, replace(rows, start=rows.batch - 1)]


def _other_draws(passage: Passage, size: int) -> dict[Graph, list[Rows | None]]:
    """For each graph the rows that a drawn call may run on as a whole."""
    gate, plan, many = passage.gate, passage.gate.plan, passage.gate.plan.compiler.many_counts
    if not size:
        return {_graph(passage, None): [None]}
    if plan.forced is not None or plan.disabled:
        return {}
    found: dict[Graph, list[Rows | None]] = {}
    for count in possible_counts(plan, gate.blocks[0], size):
        rows = None if count == size else Rows(size, 0, count)
        graph = _graph(passage, rows)
        if graph[0] != _ANY:
            found[graph] = [rows]
        elif graph not in found:
            if size not in many:  # it looks at all blocks: not once more for each of them
                many[size] = many_counts(plan, size)
            found[graph] = [Rows(size, 0, each) for each in many[size]]
    return found


def as_made(leaf: Any) -> Any:
    """What a dropped block hands on, needing a gradient as what it makes does: else graphs differ.

    Only in front of all parameters does it need none.
    """
    if not isinstance(leaf, Tensor) or leaf.requires_grad or not leaf.is_floating_point():
        return leaf
    return leaf.detach().requires_grad_().clone()
