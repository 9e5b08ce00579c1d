"""Mode "sample": does each block come to the same on some rows of the batch as on all of them?

At every call of a block, in one forward, it is run open, closed, and on several windows of rows. A
kept row has to come to what it is in the open run, a dropped one to what it is in the closed run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.discovery.undisturbed import undisturbed
from stochastic_depth.gating.block import Decision, carry_out
from stochastic_depth.gating.gate import Gate, ModuleCall, running
from stochastic_depth.gating.ranks import ALONE
from stochastic_depth.plan import Plan
from stochastic_depth.rows import Rows
from stochastic_depth.torch_private.trees import tree_leaves, tree_map


def differ_on_rows(model: nn.Module, plan: Plan, args: Any, kwargs: Any) -> dict[str, str]:
    """Which blocks do not, and how, by name.

    Args:
        model: The gated model.
        plan: What its gates share.
        args: What to call it with, a batch of at least three examples.
        kwargs: The same, by keyword.
    """
    reasons: dict[str, str] = {}

    def trial(call: ModuleCall) -> Any:
        gate = call.gate
        for block in gate.blocks if gate.plan is plan else ():
            name = plan.blocks[block].name
            if name not in reasons:
                why = _tried(call, block)
                if why is not None:
                    reasons[name] = f'mode="sample": {why}'
        everything = Decision(gate, (True,) * len(gate.units), None, None, ALONE)
        return carry_out(call, everything)

    undo = plan.force({}, disabled=False)  # so that no call goes the fast way
    running.trial = trial
    try:
        with undisturbed(model), torch.no_grad():
            model(*args, **kwargs)
    finally:
        running.trial = None
        undo()
    return reasons


def _tried(call: ModuleCall, block: int) -> str | None:
    """How one block on some rows differs from what it should come to."""
    gate = call.gate
    own = [gate.plan.block_of(unit) == block for unit in gate.units]
    trial, running.trial = running.trial, None

    def run(rows: Rows | None, *, kept: bool = True) -> list[Any]:
        of_branches = tuple(rows if mine else None for mine in own)
        decision = Decision(
            gate,
            tuple(kept or not mine for mine in own),
            None,
            of_branches if rows is not None else None,
            ALONE,
        )
        args, kwargs = tree_map(_apart, (call.args, call.kwargs))
        return tree_leaves(carry_out(call._replace(args=args, kwargs=kwargs), decision))

    try:
        size = gate.batch.size(call.args, call.kwargs)
        opened, closed = run(None), run(None, kept=False)
        for rows in _windows(size, lone=gate.plan.counts[block].lone):
            found = run(rows)
            if why := _differs(gate, rows, opened, closed, found):
                return why
    except Exception as error:
        return f"it fails on some rows of the batch alone: {error}"
    finally:
        running.trial = trial
    return None


def _windows(size: int, *, lone: bool) -> Iterator[Rows]:
    """Some rows: a window that wraps around the end, one inside, and a single row."""
    if size < 3:
        return
    yield Rows(size, size - 1, 2)
    yield Rows(size, 1, 2)
    if size > 3:
        yield Rows(size, 0, 3)
    if lone:
        yield Rows(size, 1, 1)


def _apart(leaf: Any) -> Any:
    """What a run may change: caches and in-place code."""
    if isinstance(leaf, Tensor):
        return leaf.clone()
    return leaf if isinstance(leaf, nn.Module) else copy.deepcopy(leaf)


def _differs(
    gate: Gate, rows: Rows, opened: list[Any], closed: list[Any], found: list[Any]
) -> str | None:
    if len({len(opened), len(closed), len(found)}) > 1:
        return "it runs otherwise on some rows of the batch alone"
    for number, (whole, skipped, mine) in enumerate(zip(opened, closed, found, strict=True)):
        if not isinstance(whole, Tensor):
            continue
        dim = gate.batch.outputs.get(number)
        expected = whole if dim is None else _where(rows, dim, whole, skipped)
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
