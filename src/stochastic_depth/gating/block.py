"""A call of a block, in full: what is decided about it, and what it comes to.

In training its plan's row says which branches run. Where none does and the block is known to return
its input then, its forward does not run. Otherwise it runs, on all rows of the batch or on some,
and the modules of its branches look up what was decided (`branch`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.discovery.undisturbed import eagerly
from stochastic_depth.distributed.groups import is_running
from stochastic_depth.distributed.layout import refuse_replica
from stochastic_depth.errors import ChangedModelError, SetupError
from stochastic_depth.gating import hooks
from stochastic_depth.gating.batch import named
from stochastic_depth.gating.branch import Passage
from stochastic_depth.gating.compiled import Compiled, let_rows_vary, run_compiled
from stochastic_depth.gating.gate import KEY, Gate, Original, changed, running
from stochastic_depth.gating.ranks import ALONE, Setup, setup_of
from stochastic_depth.gating.recomputation import remembered
from stochastic_depth.plan import Row
from stochastic_depth.rows import Rows, put_back, take
from stochastic_depth.torch_private.tracing import is_compiled, is_traced_by_fx
from stochastic_depth.torch_private.trees import PLAIN_VALUES, tree_map

# In newer torch `is_compiling` is true in all threads while one compiles; 2.6 has but that one.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


@dataclass(frozen=True, slots=True)
class Decision:
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


def call_block(gate: Gate, module: nn.Module, original: Original, args: Any, kwargs: Any) -> Any:
    """Call a block's module: drawn, settled without a draw, or as in the forward recomputed."""
    if running.open_all or not gate.units:
        return original(module, *args, **kwargs)
    if running.trial is not None:
        return running.trial(gate, module, original, args, kwargs)
    if is_traced_by_fx() and not _is_exporting():
        raise _no_trace(gate, "torch.fx")
    decision = remembered(
        gate, lambda: decide(gate, module, lambda: gate.batch.size(args, kwargs), module)
    )
    if module.training or not all(decision.kept):
        _check_arguments(gate, args, kwargs)
    return carry_out(gate, decision, module, original, args, kwargs)


def run_drawn(
    gate: Gate, module: nn.Module, original: Original, args: Any, kwargs: Any, row: Row
) -> Any:
    """Call a block's module as this row of mode "batch" says: not under a checkpoint."""
    setup = setup_of(gate.plan, gate, module) if is_running() else ALONE
    setup.agree(gate.plan, gate, training=True)
    decision = _of_row(gate, row, setup, lambda: 0)
    return carry_out(gate, decision, module, original, args, kwargs)


def begin(gate: Gate, module: nn.Module, number: int) -> Row:
    """The row of a forward, and what is looked at once in it: by the gate that is called first.

    Raises:
        SetupError: A trace writes the call down, and would write down this draw for good.
    """
    if _is_exporting():
        raise _no_trace(gate, "torch.export")
    if is_traced_by_fx() or torch._C._get_tracing_state() is not None:
        raise _no_trace(gate, "a trace (torch.jit.trace or torch.fx)")
    refuse_replica(module, gate.name)
    plan = gate.plan
    row = plan.row_for(number)
    if not plan.expect_steps(gate.name, module):
        plan.row = row._replace(number=-1)  # the next gate comes here, too
    if is_running() and any(state is not None for state in row.states):
        plan.row = row = row._replace(states=(None,) * len(plan.gates))  # none goes the fast way
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
    setup = setup_of(plan, gate, holder) if is_running() else ALONE
    setup.agree(plan, gate, training=training)
    step = plan.clock.step
    if training and fixed is None and not disabled:
        number = gate.next_call(step)
        row = plan.row
        if row.number != number or row.step != step:
            row = begin(gate, module, number)
        return _of_row(gate, row, setup, batch)
    factors = plan.factors_at(step, training=training and not disabled)[gate.index]
    chosen = [
        True if disabled else (fixed or {}).get(plan.units[unit], True) for unit in gate.units
    ]
    rows = tuple(each if isinstance(each, Rows) else None for each in chosen)
    kept = tuple(each is not False for each in chosen)
    return Decision(gate, kept, factors, rows if any(rows) else None, setup)


def _of_row(gate: Gate, row: Row, setup: Setup, batch: Callable[[], int]) -> Decision:
    """What a drawn row says about a gate."""
    plan, factors = gate.plan, row.factors[gate.index]
    setup.may_draw(plan, gate)
    if plan.mode == "batch":
        return Decision(gate, tuple([row.kept[unit] for unit in gate.units]), factors, None, setup)
    gate.last_batch = size = batch()
    setup.check_rows(plan, gate, size)
    drawn = {unit: plan.rows_kept(row, unit, size) for unit in dict.fromkeys(gate.units)}
    some = {unit: each if isinstance(each, Rows) else None for unit, each in drawn.items()}
    kept = tuple(drawn[unit] != 0 for unit in gate.units)
    rows = tuple(some[unit] for unit in gate.units)
    return Decision(gate, kept, factors, rows if any(rows) else None, setup)


def carry_out(
    gate: Gate, decision: Decision, module: nn.Module, original: Original, args: Any, kwargs: Any
) -> Any:
    """What a call comes to under a decision."""
    rows, setup = decision.rows, decision.setup
    if rows is None and all(decision.kept):
        output = _run(gate, decision, module, original, args, kwargs)
    elif not any(decision.kept) and gate.whole is not None and _flags_are_known(gate, args, kwargs):
        output = _skip_value(gate, setup, module, args, kwargs)
    elif rows is not None and gate.whole is not None and all(each is rows[0] for each in rows):
        output = _run_on_rows(gate, decision, module, original, args, kwargs)
    else:
        output = _run_in_part(gate, decision, module, original, args, kwargs)
    return setup.ran(output, (args, kwargs))


def _run(
    gate: Gate, decision: Decision, module: nn.Module, original: Original, args: Any, kwargs: Any
) -> Any:
    """All branches, on all that is given."""
    factors = decision.factors
    if factors is not None and not gate.simple_ends:
        return _run_in_part(gate, decision, module, original, args, kwargs)
    check_parts(gate, module)
    gate.factors = factors
    gate.depth += 1
    try:
        if gate.plan.graphs or running.compiler is not None or is_compiled(module):
            return run_compiled(gate, module, original, args, kwargs)
        return original(module, *args, **kwargs)
    finally:
        gate.depth -= 1


def _run_on_rows(
    gate: Gate, decision: Decision, module: nn.Module, original: Original, args: Any, kwargs: Any
) -> Any:
    """All branches on the same rows of the batch; a dropped row comes to what it is given."""
    assert decision.rows is not None
    rows = decision.rows[0]
    assert rows is not None
    dims = gate.batch.of_call(args, kwargs)
    (some, named), rests = take((args, kwargs), dims.takes, rows)
    on_rows = Decision(gate, decision.kept, decision.factors, None, decision.setup)
    let_rows_vary(gate, module, (some, named), dims.takes)
    library_hooks = hooks.of_library(module)
    run = hooks.around(library_hooks, module, original)
    output = _run(gate, on_rows, module, run, some, named)
    output = put_back(output, dims.handed_on, rests, rows)
    hooks.show(library_hooks, module, args, kwargs, output)
    return output


def _run_in_part(
    gate: Gate, decision: Decision, module: nn.Module, original: Original, args: Any, kwargs: Any
) -> Any:
    """Some of the branches, or on some rows: their modules look up what was decided."""
    check_parts(gate, module)
    closed = not all(decision.kept)
    if closed and not gate.stands_in:
        _warn_of_waste(gate, args, kwargs)
    running.passages.append(Passage(gate, decision))
    try:
        if not is_compiled(module) or isinstance(module._compiled_call_impl, Compiled):
            return original(module, *args, **kwargs)
        with eagerly():  # a graph knows of no draw
            return original(module, *args, **kwargs)
    finally:
        running.passages.pop()


def _skip_value(gate: Gate, setup: Setup, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """What a block without its branches comes to; its forward does not run."""
    assert gate.whole is not None
    value = gate.whole.build(args, kwargs, positional=gate.positional)
    if gate.returns_copy:
        value = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)
    value = setup.skipped(value, module)
    hooks.show(hooks.of_library(module), module, args, kwargs, value)
    return value


def check_parts(gate: Gate, module: nn.Module) -> None:
    """Raises where a module that ends a branch is not the one that was gated."""
    for path in gate.parts:
        part: Any = module
        try:
            for name in path:  # a wrapper around it (a checkpoint's, say) hands attributes on
                part = getattr(part, name)
            found = getattr(part, KEY, None)
        except AttributeError:
            found = None
        if found is None:
            raise changed(gate, f'its "{".".join(path)}" was replaced')


def _check_arguments(gate: Gate, args: Any, kwargs: Any) -> None:
    """Raises where a call has a tensor, or an object, where the example had none.

    The forward may then run a branch that nobody has seen. Fewer are fine: a branch that does not
    run needs nothing.
    """
    for place, value in [*enumerate(args), *kwargs.items()] if kwargs else enumerate(args):
        if place not in gate.places and not isinstance(value, PLAIN_VALUES):
            raise ChangedModelError(
                f'block "{gate.name}" is called with a {type(value).__name__} as '
                f'"{named(place, gate.positional)}", where the example had none',
                expected="the arguments that it was watched with",
                instead="pass the example that you train with, as example_inputs and "
                "example_kwargs (with the mask, say)",
            )


def _flags_are_known(gate: Gate, args: Any, kwargs: Any) -> bool:
    """Whether the plain values among the arguments are those of a watched call.

    With others the forward may do more than hand its input on.
    """
    if len(args) == 1 and not kwargs and gate.is_one_tensor:
        return True
    given = {**gate.defaults, **_flags(gate, args, kwargs)}
    return any(given == flags for flags in gate.flags)


def _flags(gate: Gate, args: Any, kwargs: Any) -> Mapping[int | str, Any]:
    given = {named(place, gate.positional): value for place, value in enumerate(args)} | kwargs
    return {
        name: value
        for name, value in given.items()
        # What the forward takes as **kwargs is handed on to its modules.
        if name not in gate.places and name in gate.positional and isinstance(value, PLAIN_VALUES)
    }


def _warn_of_waste(gate: Gate, args: Any, kwargs: Any) -> None:
    gate.plan.warn_once(
        gate.name,
        f'block "{gate.name}" is called with {dict(_flags(gate, args, kwargs))}, unlike in the '
        "example: where it is dropped its branches are computed all the same, and thrown away. "
        "Pass the example that you train with, as example_inputs and example_kwargs",
    )
