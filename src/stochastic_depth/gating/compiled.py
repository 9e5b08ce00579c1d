"""The forward of a compiled container: a graph where all its branches run, else its own code."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.compiler import is_dynamo_compiling

from stochastic_depth import distributed
from stochastic_depth.deciding import possible_counts
from stochastic_depth.discovery.undisturbed import restored
from stochastic_depth.gating.passage import Gate, Original, Passage, running
from stochastic_depth.gating.recomputation import note, recall
from stochastic_depth.rows import Dims, Rows, take
from stochastic_depth.torch_private import tree_leaves, tree_map

# Which graph: how many rows it is for, None: all; and what the branches are multiplied by.
Graph = tuple[int | None, tuple[float, ...]]


def compiled_forward(forward: Original) -> Original:
    """What stands in a gated class for its own class's forward."""

    @functools.wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return forward(self, *args, **kwargs)
        gate: Gate = self.__dict__["_stochastic_depth"]
        compiler = gate.plan.compiler
        graph = None if compiler is None or running.open_all else _of_this_call(gate)
        if graph is None:
            return forward(self, *args, **kwargs)
        return compiler.call(gate, graph, self, args, kwargs)

    return run


def _of_this_call(gate: Gate) -> Graph | None:
    """The graph for the call of the container whose forward is called."""
    passage = running.passages[-1] if running.passages else None
    if passage is None or passage.gate is not gate:  # a checkpoint begins beneath the gate
        found: Graph | None = recall(gate.beneath)[1]
        return found
    graph = _of(passage)
    note(gate.beneath, graph, may_recompute=passage.training)
    if graph is not None:
        passage.visits = gate.expected  # its members are a part of the graph
    return graph


def _of(passage: Passage) -> Graph | None:
    """The graph for what is decided; None where not all branches run on all that is given."""
    decisions = passage.decisions.values()
    rows = next(iter(decisions)).rows[0] if passage.on_rows else None
    for decision in decisions:
        if not all(decision.kept) or any(some is not rows for some in decision.rows):
            return None
    return (None if rows is None else rows.count), _factors(passage)


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
    passage: Passage, module: nn.Module, takes: Dims, size: int, args: Any, kwargs: Any
) -> None:
    """Build the graphs that this call of a container would need under other draws.

    It leaves no trace. Weights that are sharded are not there where a block is dropped; then its
    graph is built when it runs, on all ranks at once.

    Args:
        passage: The call, before it runs.
        module: The container.
        takes: In mode "sample": the leaves of its arguments that hold the batch.
        size: In mode "sample": the number of rows; else 0.
        args: Its arguments.
        kwargs: The same, by keyword.
    """
    gate, own = passage.gate, _of(passage)
    for rows in _other_draws(passage, size):
        graph = (None if rows is None else rows.count), _factors(passage)
        if own == graph or gate.plan.compiler.knows(gate, graph, module):
            continue
        if distributed.sharding(module) or not all(map(_is_plain, tree_leaves((args, kwargs)))):
            return
        with restored(module), saved_tensors_hooks(_same, _same):
            for window in _windows(rows):
                with torch.enable_grad():
                    some = tree_map(_apart, (args, kwargs))
                if window is not None:
                    some, _ = take(some, takes, window)
                gate.plan.compiler.call(gate, graph, module, *some)


def _other_draws(passage: Passage, size: int) -> list[Rows | None]:
    """The rows that a drawn call may run on as a whole."""
    gate, plan = passage.gate, passage.gate.plan
    if not size:
        return [None]
    if plan.forced is not None or plan.disabled:
        return []
    counts = possible_counts(plan, gate.blocks[0], size)
    return [None if count == size else Rows(size, 0, count) for count in counts]


def _windows(rows: Rows | None) -> Iterator[Rows | None]:
    """One that wraps around is a copy, whose strides may be others."""
    yield rows
    if rows is not None and rows.count > 1 and rows.batch % rows.count:
        yield Rows(rows.batch, rows.batch - 1, rows.count)


def _is_plain(leaf: Any) -> bool:
    """Whether a forward cannot leave a trace in it (as in a cache)."""
    return isinstance(leaf, Tensor | int | float | str | None | torch.dtype | torch.device)


def _apart(leaf: Any) -> Any:
    """A copy of a tensor that looks the same from within a graph."""
    if not isinstance(leaf, Tensor):
        return leaf
    alone = leaf.detach().requires_grad_(leaf.requires_grad)
    copy = alone.clone()  # a forward may change it in place
    return copy if copy.stride() == leaf.stride() else alone


def _same(saved: Tensor) -> Tensor:
    """A hook that keeps what is saved out of the checkpoints around."""
    return saved
