"""What is tried on the gated model before it is handed over: does every block run when dropped?

In mode "batch" one forward is made with all blocks closed. In mode "sample" each call of a block in
one forward is repeated closed, open and on several windows of rows: a kept row has to come to what
it is in the open call, a dropped one to what it is in the closed call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.discovery import Discovery
from stochastic_depth.discovery.batch import MORE, with_more_rows
from stochastic_depth.discovery.example import Example, telling
from stochastic_depth.discovery.undisturbed import Mode, undisturbed
from stochastic_depth.discovery.unmaterialised import Alone, is_unmaterialised, without_values
from stochastic_depth.gating.block import Decision, carry_out, run_in_part
from stochastic_depth.gating.gate import ModuleCall, running
from stochastic_depth.gating.ranks import ALONE
from stochastic_depth.plan import Plan
from stochastic_depth.rows import Rows
from stochastic_depth.selection import refuse
from stochastic_depth.torch_private.trees import tree_leaves, tree_map


def prove(model: nn.Module, found: Discovery, plan: Plan, example: Example) -> None:
    """Try the blocks of a gated model.

    Args:
        model: The model.
        found: What was found in it.
        plan: What its gates share.
        example: What it was watched with.

    Raises:
        RefusedBlockError: A block cannot be skipped exactly.
    """
    mode = found.recording.mode
    if plan.mode == "sample":
        (example, _), mode = with_more_rows(telling(example)), "eval"
    reasons: dict[str, str] = {}
    if not is_unmaterialised(model):
        reasons = _what_fails(model, plan, example, mode)
    elif plan.mode == "sample":
        for name, calls in _calls_without_values(model, plan, example):
            reasons |= _what_fails(
                Alone(model.get_submodule(name), calls, plan), plan, ((), {}), mode
            )
    if reasons:
        raise refuse(reasons, plan.blocks, found=found)


def _under(
    call: ModuleCall, units: Sequence[int], *, kept: bool = True, rows: Rows | None = None
) -> Any:
    """What a block's call comes to where these units are dropped, or run on these rows."""
    gate = call.gate
    mine = [unit in units for unit in gate.units]
    of_rows = tuple(rows if own else None for own in mine) if rows is not None else None
    decision = Decision(gate, tuple(kept or not own for own in mine), None, of_rows, ALONE)
    if gate.batch is not None:
        args, kwargs = tree_map(_apart, (call.args, call.kwargs))
        call = call._replace(args=args, kwargs=kwargs)
    # Where some of its units may be dropped, its branches are left out one by one.
    return (carry_out if len(set(gate.units)) == 1 else run_in_part)(call, decision)


def _differs(call: ModuleCall, unit: int) -> str | None:
    """Why a unit of a block cannot be dropped, or run on some rows."""
    gate, batch = call.gate, call.gate.batch
    doing = "with it dropped the forward fails"
    try:
        closed = _under(call, [unit], kept=False)
        if batch is None:
            return None
        doing = 'mode="sample": it fails on some rows of the batch alone'
        opened, size = _under(call, [unit]), batch.size(call.args, call.kwargs)
        if _are_scattered(call, size):
            return 'mode="sample": the rows of an example do not lie side by side'
        for rows in _windows(size, lone=gate.plan.counts[gate.plan.block_of[unit]].lone):
            found = _under(call, [unit], rows=rows)
            if why := _unlike(batch.outputs, rows, opened, closed, found):
                return f'mode="sample": {why}'
    except Exception as error:
        return f"{doing}: {error}"
    return None


def _are_scattered(call: ModuleCall, size: int) -> bool:
    """Whether the rows of an example do not lie side by side: the first example comes twice."""
    for leaf, dim, each in call.gate.batch.leaves(call.args, call.kwargs):
        if each > 1 and leaf.shape[dim] == each * size:
            again = leaf.narrow(dim, (size - MORE) * each, each)
            if not close(again, leaf.narrow(dim, 0, each)):
                return True
    return False


def _what_fails(model: nn.Module, plan: Plan, example: Example, mode: Mode) -> dict[str, str]:
    """Which blocks cannot be dropped, or run on some rows, and why, by name."""
    reasons: dict[str, str] = {}
    name_of = [plan.blocks[number].name for number in plan.block_of]
    is_nested = any(block.nesting for block in plan.blocks)

    def look(call: ModuleCall) -> Any:
        """Try a block; returns what the model goes on with, where not with the open block."""
        units, together = list(dict.fromkeys(call.gate.units)), {}
        if plan.mode == "batch":
            try:
                closed = _under(call, units, kept=False)
                return None if is_nested else closed
            except Exception as error:
                together = {name_of[units[0]]: f"with it dropped the forward fails: {error}"}
        alone = {name_of[unit]: why for unit in units if (why := _differs(call, unit))}
        reasons.update({**(alone or together), **reasons})
        return None

    try:
        _at_each_call(model, plan, example, mode, look)
    except Exception as error:
        if plan.mode == "sample":
            raise
        first = plan.blocks[0].name
        reasons[first] = f"with all blocks dropped the forward fails: {error}"
    return reasons


def _calls_without_values(
    model: nn.Module, plan: Plan, example: Example
) -> list[tuple[str, list[Any]]]:
    """For each block's module, the arguments of its calls."""
    calls: dict[str, list[Any]] = {}

    def note(call: ModuleCall) -> None:
        calls.setdefault(call.gate.name, []).append((call.args, call.kwargs))

    with without_values(model, example) as fake:
        _at_each_call(model, plan, fake, "eval", note)
    return sorted(calls.items())


def _at_each_call(
    model: nn.Module, plan: Plan, example: Example, mode: Mode, look: Callable[[ModuleCall], Any]
) -> None:
    """Call the model once and look at each call of a block, which is open unless that says else."""

    def trial(call: ModuleCall) -> Any:
        instead, running.trial = None, None
        if call.gate.plan is plan:
            instead = look(call)
        running.trial = trial
        if instead is not None:
            return instead
        everything = Decision(call.gate, (True,) * len(call.gate.units), None, None, ALONE)
        return carry_out(call, everything)

    running.trial = trial
    try:
        with plan.force({}), undisturbed(model, mode), torch.no_grad():  # none goes the fast way
            model(*example[0], **example[1])
    finally:
        running.trial = None


def _windows(size: int, *, lone: bool) -> Iterator[Rows]:
    """Some rows: a window that wraps around the end, two inside, and a single row."""
    for start, count in [(size - 1, 2), (1, 2), (0, 3), (1, 1)]:
        if size > 3 and (count > 1 or lone):
            yield Rows(size, start, count)


def _apart(leaf: Any) -> Any:
    """A copy of what a call may change: caches, and tensors in place."""
    if isinstance(leaf, Tensor):
        return leaf.clone()
    return leaf if isinstance(leaf, nn.Module) else copy.deepcopy(leaf)


def _unlike(
    outputs: Mapping[int, int], rows: Rows, opened: Any, closed: Any, found: Any
) -> str | None:
    """How an output on some rows is not what the open and the closed ones say."""
    leaves = [tree_leaves(output) for output in (opened, closed, found)]
    if len(set(map(len, leaves))) > 1:
        return "it runs otherwise on some rows of the batch alone"
    for number, (whole, skipped, mine) in enumerate(zip(*leaves, strict=True)):
        if not isinstance(whole, Tensor):
            continue
        expected = whole
        if number in outputs:
            expected = _where(rows, outputs[number], whole, skipped)
        if not bool(expected.isfinite().all()):
            return "with these weights it computes inf or NaN, which tells nothing about its rows"
        if not close(mine, expected):
            return (
                "it computes something else on some rows of the batch alone: its rows depend on "
                "each other, or something that holds the batch reaches it unseen"
            )
    return None


def _where(rows: Rows, dim: int, kept: Tensor, dropped: Tensor) -> Tensor:
    mask = torch.zeros(rows.batch, dtype=torch.bool, device=kept.device)
    mask[list(rows.numbers)] = True
    shape = [1] * kept.ndim
    shape[dim] = -1
    each = kept.shape[dim] // rows.batch
    return torch.where(mask.repeat_interleave(each).view(shape), kept, dropped)


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two results are the same but for the rounding of other batch sizes."""
    if ours.shape != theirs.shape:
        return False
    if not ours.is_floating_point():
        return torch.equal(ours, theirs)
    # Other batch sizes take other kernels; a mix-up of rows is as large as the values themselves.
    bound = 1e-3 if ours.dtype.itemsize >= 4 else 5e-2
    return bool((ours - theirs).norm() <= bound * theirs.norm())
