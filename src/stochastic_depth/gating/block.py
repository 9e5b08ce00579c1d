"""A call of a block, in full: what is decided about it, and what it comes to.

In training its plan's row says which branches run. Where none does and the block is known to return
its input then, its forward does not run. Otherwise it runs, on all rows of the batch or on some,
and the modules of its branches look up what was decided (`branch`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stochastic_depth.discovery.undisturbed import eagerly
from stochastic_depth.distributed import is_running
from stochastic_depth.errors import SetupError, warn
from stochastic_depth.gating.branch import Passage
from stochastic_depth.gating.compiled import Compiled, let_rows_vary, run_compiled
from stochastic_depth.gating.gate import KEY, Gate, ModuleCall, changed, running
from stochastic_depth.gating.ranks import LOCAL, Setup, known_states, refuse, refuse_talk, setup_of
from stochastic_depth.gating.recomputation import remembered
from stochastic_depth.gating.stand_in import around, library_hooks, show
from stochastic_depth.plan import Row
from stochastic_depth.rows import Rows, change_leaves
from stochastic_depth.torch_private.tracing import is_compiled, is_traced_by_fx
from stochastic_depth.torch_private.trees import tree_leaves, tree_map

# In newer torch `is_compiling` is true in all threads while one compiles; 2.6 has but that one.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


class Decision(NamedTuple):
    """What one call of a block does.

    Attributes:
        gate: Of the block.
        kept: Whether each branch runs.
        factors: What each is multiplied by where it runs; None: by nothing.
        rows: The rows of the batch that each runs on, where not on all; None: all on all.
        setup: How several processes train it.
    """

    gate: Gate
    kept: tuple[bool, ...]
    factors: tuple[float, ...] | None
    rows: tuple[Rows | None, ...] | None
    setup: Setup


def call_block(call: ModuleCall) -> Any:
    """Call a block's module: drawn, settled without a draw, or as in the forward recomputed."""
    gate, module = call.gate, call.module
    if running.open_all or not gate.units:
        return call()
    if running.trial is not None:
        return running.trial(call)
    if is_traced_by_fx() and not _is_exporting():
        raise _no_trace(gate, "torch.fx")
    decision: Any = remembered(
        gate,
        lambda: decide(gate, module, lambda: gate.batch.size(call.args, call.kwargs), module),
        is_certain=not module.training,
    )
    if isinstance(decision, Row):  # of a forward that went the fast way
        return run_drawn(call, decision)
    return carry_out(call, decision)


def run_drawn(call: ModuleCall, row: Row) -> Any:
    """Call a block's module as this row of mode "batch" says."""
    gate = call.gate
    setup = LOCAL
    if is_running():
        setup = setup_of(gate.plan, gate, call.module)
        setup.agree(gate.plan, gate, training=True)
    return carry_out(call, _of_row(gate, row, setup, lambda: 0))


def begin(gate: Gate, module: nn.Module, number: int) -> Row:
    """The row of a forward, and what is looked at once in it: by the gate that is called first.

    Raises:
        SetupError: A trace writes the call down, and would write down this draw for good.
    """
    if _is_exporting():
        raise _no_trace(gate, "torch.export")
    if is_traced_by_fx() or torch._C._get_tracing_state() is not None:
        raise _no_trace(gate, "a trace (torch.jit.trace or torch.fx)")
    if "_is_replica" in module.__dict__:
        refuse(module, f'block "{gate.name}"')
    plan = gate.plan
    row = plan.row_for(number)
    if is_running():  # those that look closer do not go the fast way
        plan.row = row = replace(row, states=known_states(plan, gate, row.states))
    if plan.needs_steps and not plan.clock.expect_steps(gate.name, module):
        plan.row = replace(row, number=-1)  # the next gate comes here, too
    return row


def _no_trace(gate: Gate, what: str) -> SetupError:
    return SetupError(
        f'{what} met block "{gate.name}" with its gate',
        expected="a model for inference: a program cannot draw anew",
        instead="call depth.fold() (or depth.remove()) first; with torch.export and "
        "torch.jit.trace model.eval() is enough",
    )


def decide(gate: Gate, module: nn.Module, batch: Callable[[], int], holder: nn.Module) -> Decision:
    """What a call of a block does; counts as a call where it is drawn.

    Args:
        gate: Of the block.
        module: Its module.
        batch: Tells, for mode "sample", the number of rows that it is called with.
        holder: The module that holds its parameters.
    """
    plan, training = gate.plan, module.training
    fixed, disabled = plan.forced
    setup = setup_of(plan, gate, holder) if is_running() else LOCAL
    setup.agree(plan, gate, training=training)
    step = plan.clock.step
    if training and fixed is None and not disabled:
        number = gate.next_call(step)
        row = plan.row
        if row.number != number or row.step != step:
            row = begin(gate, module, number)
        return _of_row(gate, row, setup, batch)
    in_training = training and not disabled
    factors = (plan.at(step).factors[True] if in_training else plan.for_inference())[gate.index]
    chosen = [disabled or (fixed or {}).get(plan.units[unit], True) for unit in gate.units]
    return decision_of(gate, chosen, factors, setup)


def _of_row(gate: Gate, row: Row, setup: Setup, batch: Callable[[], int]) -> Decision:
    """What a drawn row says about a gate."""
    plan, factors = gate.plan, row.factors[gate.index]
    refuse_talk(plan, gate)
    if plan.mode == "batch":
        return Decision(gate, tuple([row.kept[unit] for unit in gate.units]), factors, None, setup)
    gate.last_batch = size = batch()
    setup.check_rows(plan, gate, size)
    drawn = {unit: plan.rows_kept(row, unit, size) for unit in dict.fromkeys(gate.units)}
    plan.count_rows(gate, drawn, size)
    return decision_of(gate, [drawn[unit] for unit in gate.units], factors, setup)


def decision_of(
    gate: Gate, chosen: list[Any], factors: tuple[float, ...] | None, setup: Setup
) -> Decision:
    """Of whether each branch runs, on which rows, or on how many: on none or all."""
    rows = tuple([each if isinstance(each, Rows) else None for each in chosen])
    return Decision(gate, tuple(map(bool, chosen)), factors, rows if any(rows) else None, setup)


def carry_out(call: ModuleCall, decision: Decision) -> Any:
    """What a call comes to under a decision."""
    gate, kept, _, rows, setup = decision
    runs_whole = rows is None and all(kept)
    is_known = runs_whole and not call.module.training  # then nothing depends on it
    is_known = is_known or gate.known.include(call.args, call.kwargs)
    if runs_whole:
        return _run(call, decision)
    if gate.whole is not None and not any(kept) and is_known:
        return _skip_value(call, setup)
    if gate.whole is not None and rows is not None and all(each is rows[0] for each in rows):
        return _run_on_rows(call, decision)
    return run_in_part(call, decision)


def _run(call: ModuleCall, decision: Decision) -> Any:
    """All branches, on all that is given."""
    gate, factors = call.gate, decision.factors
    if factors is not None and not gate.simple_ends:
        return run_in_part(call, decision)
    as_graph = gate.plan.graphs or running.compiler is not None or is_compiled(call.module)
    check_parts(gate, call.module)
    if as_graph or factors is not None:
        set_ends(gate, call.module, awake=True)
    running.blocks.append((gate, factors, None, torch.is_grad_enabled(), None))
    try:
        if as_graph:
            return run_compiled(call, factors)
        return call()
    finally:
        running.blocks.pop()


def _run_on_rows(call: ModuleCall, decision: Decision) -> Any:
    """All branches on the same rows of the batch; a dropped row comes to what it is given."""
    gate, module, run, args, kwargs = call
    assert decision.rows is not None
    rows = decision.rows[0]
    assert rows is not None
    some, named, rests = gate.batch.take(rows, args, kwargs)
    let_rows_vary(gate, module, some, named)
    hooks = library_hooks(module)
    run = around(hooks, module, run)
    found = _run(ModuleCall(gate, module, run, some, named), decision._replace(rows=None))
    output = gate.batch.put_back(rows, found, rests)
    if gate.batch.writes:
        written = gate.batch.write_back(rows, (args, kwargs), (some, named), rests)
        # It may hand out its very input.
        inputs = {n: written[id(x)] for n, x in enumerate(tree_leaves(found)) if id(x) in written}
        output = change_leaves(output, inputs, lambda leaf, n: inputs[n])
    show(hooks, module, args, kwargs, output)
    return output


def run_in_part(call: ModuleCall, decision: Decision) -> Any:
    """Some of the branches, or on some rows: their modules look up what was decided."""
    gate, module, _, args, kwargs = call
    check_parts(gate, module)
    set_ends(gate, module, awake=True)
    if not gate.stands_in and not all(decision.kept) and gate.name not in gate.plan.told_of:
        gate.plan.told_of.add(gate.name)
        warn(
            f'block "{gate.name}" is called with {gate.known.flags(args, kwargs)}, unlike in the '
            "example: where it is dropped its branches are computed all the same, and thrown away. "
            "Pass the example that you train with, as example_inputs and example_kwargs",
        )
    passage = Passage(gate, decision)
    running.blocks.append((gate, None, passage, torch.is_grad_enabled(), None))
    try:
        if not is_compiled(module) or isinstance(module._compiled_call_impl, Compiled):
            return call()
        with eagerly():  # a graph knows of no draw
            return call()
    finally:
        running.blocks.pop()


def _skip_value(call: ModuleCall, setup: Setup) -> Any:
    """What a block without its branches comes to; its forward does not run."""
    gate, module, _, args, kwargs = call
    assert gate.whole is not None
    value = gate.whole.build(args, kwargs, positional=gate.known.positional)
    if gate.returns_copy:
        value = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)
    value = setup.skipped(value, gate, module)
    show(library_hooks(module), module, args, kwargs, value)
    return value


def check_parts(gate: Gate, module: nn.Module) -> None:
    """Raises where a module of a branch is not the one that was gated."""
    for path in gate.parts:
        part: Any = module
        for name in path:  # a wrapper around it (a checkpoint's, say) hands attributes on
            part = getattr(part, name, None)
        if getattr(part, KEY, None) is None:
            raise changed(gate, f'its "{".".join(path)}" was replaced')


def set_ends(gate: Gate, module: nn.Module, *, awake: bool) -> None:
    """Wake the ends of a block's branches, or let them sleep.

    Raises:
        ChangedModelError: One was replaced or compiled while it slept.
    """
    if gate.asleep is awake:
        from stochastic_depth.gating import swap  # which makes classes of these calls

        if not awake:
            swap.let_sleep(gate, module)
        elif not swap.wake(gate, module):
            raise changed(gate, "a module that ends its branch was replaced, or compiled by itself")
