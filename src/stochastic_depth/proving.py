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

from stochastic_depth.discovery.blocks import Discovery
from stochastic_depth.discovery.undisturbed import (
    Arguments,
    Mode,
    SingleBlock,
    is_unmaterialised,
    undisturbed,
    without_values,
)
from stochastic_depth.gating.batch import MORE, with_more_rows
from stochastic_depth.gating.block import carry_out, decision_of, run_in_part
from stochastic_depth.gating.gate import ModuleCall, running
from stochastic_depth.gating.ranks import LOCAL
from stochastic_depth.plan import Plan
from stochastic_depth.rows import Rows
from stochastic_depth.selection import refuse
from stochastic_depth.torch_private.trees import tree_flatten, tree_leaves, tree_map, tree_unflatten

Called = tuple[nn.Module, Arguments]
"""A module, and what to call it with."""


def prove(model: nn.Module, found: Discovery, plan: Plan, example: Arguments) -> None:
    """Try the blocks of a gated model.

    Args:
        model: The model.
        found: What was found in it.
        plan: What its gates share.
        example: What it was watched with.

    Raises:
        RefusedBlockError: A block cannot be skipped exactly.
    """
    mode: Mode = found.recording.mode
    if plan.mode == "sample":
        example, mode = with_more_rows(_telling(example))[0], "eval"
    elif is_unmaterialised(model):
        return
    reasons: dict[str, str] = {}
    name_of = [plan.blocks[number].name for number in plan.block_of]
    is_nested = any(block.nesting for block in plan.blocks)

    def look(call: ModuleCall) -> Any:
        """Try a block; returns what the model goes on with, where not with the open block."""
        units, together = list(dict.fromkeys(call.gate.units)), {}
        if plan.mode == "batch":
            try:
                closed = _under(call, units, runs=False)
                return None if is_nested else closed
            except Exception as error:
                together = {name_of[units[0]]: f"with it dropped the forward fails: {error}"}
        by_unit = {name_of[unit]: why for unit in units if (why := _differs(call, unit))}
        reasons.update({**(by_unit or together), **reasons})
        return None

    is_meta = is_unmaterialised(model)
    try:
        for tried, inputs in _blocks(model, plan, example) if is_meta else [(model, example)]:
            _at_each_call(tried, plan, inputs, mode, look)
    except Exception as error:
        if plan.mode == "sample":
            raise
        reasons[name_of[0]] = f"with all blocks dropped the forward fails: {error}"
    if reasons:
        raise refuse(reasons, plan.blocks, found=found)


def _telling(example: Arguments) -> Arguments:
    """The same example, with noise in the place of a constant main input, which proves nothing.

    The main input is the largest tensor of floating numbers. All others are left alone: a noise
    level, say, may not be negative.
    """
    leaves, spec = tree_flatten(example)
    floats = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    main = max(floats, key=lambda leaf: leaf.numel(), default=None)
    if main is None or main.is_meta or main.numel() < 2 or bool((main != main.flatten()[0]).any()):
        return example
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(main.shape, generator=generator, device="cpu")
    made = noise.to(dtype=main.dtype, device=main.device)
    return tree_unflatten([made if leaf is main else leaf for leaf in leaves], spec)


def _blocks(model: nn.Module, plan: Plan, example: Arguments) -> Iterator[Called]:
    """Each block of a model without weights on its own, and what to call it with.

    A block that is a part of another one's branch is tried in that.
    """
    calls: dict[str, list[Any]] = {}

    def note(call: ModuleCall) -> None:
        if not call.gate.owners:
            calls.setdefault(call.gate.name, []).append((call.args, call.kwargs))

    with without_values(model, example) as fake:
        _at_each_call(model, plan, fake, "eval", note)
    for name in sorted(calls):
        yield SingleBlock(model.get_submodule(name), calls[name], plan), ((), {})


def _at_each_call(
    model: nn.Module, plan: Plan, example: Arguments, mode: Mode, look: Callable[[ModuleCall], Any]
) -> None:
    """Call the model once and look at each call of a block, which is open unless that says else."""

    def trial(call: ModuleCall) -> Any:
        running.trial = None
        instead = look(call) if call.gate.plan is plan else None
        running.trial = trial
        return _under(call, (), runs=True) if instead is None else instead

    running.trial = trial
    try:
        # Forced, so that no call goes the fast way.
        with plan.force({}), undisturbed(model, mode), torch.no_grad():
            model(*example[0], **example[1])
    finally:
        running.trial = None


def _under(call: ModuleCall, units: Sequence[int], *, runs: Rows | bool) -> Any:
    """What a block's call comes to where these units run, are dropped, or run on these rows."""
    gate = call.gate
    chosen = [runs if unit in units else True for unit in gate.units]
    # Where some of its units may be dropped, its branches are left out one by one.
    in_part = runs is not True and len(set(gate.units)) > 1
    return (run_in_part if in_part else carry_out)(call, decision_of(gate, chosen, None, LOCAL))


def _differs(call: ModuleCall, unit: int) -> str | None:
    """Why a unit of a block cannot be dropped, or run on some rows."""
    plan, batch = call.gate.plan, call.gate.batch

    def outcome(*, runs: Rows | bool) -> Any:
        args, kwargs = tree_map(_apart, (call.args, call.kwargs))
        return _under(call._replace(args=args, kwargs=kwargs), [unit], runs=runs)

    doing = "with it dropped the forward fails"
    try:
        closed = outcome(runs=False)
        if batch is None:
            return None
        doing = 'mode="sample": it fails on some rows of the batch alone'
        opened, size = outcome(runs=True), batch.size(call.args, call.kwargs)
        for leaf, dim, each in batch.leaves(call.args, call.kwargs):
            if each > 1 and leaf.shape[dim] == each * size:  # the first example comes twice
                twice = [leaf.narrow(dim, n * each, each) for n in (0, size - MORE)]
                if not _close(*twice):
                    return 'mode="sample": the rows of an example do not lie side by side'
        for rows in _windows(size, lone=plan.counts[plan.block_of[unit]].lone):
            if why := _unlike(batch.outputs, rows, opened, closed, outcome(runs=rows)):
                return f'mode="sample": {why}'
    except Exception as error:
        return f"{doing}: {error}"
    return None


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
    for number, (runs, skipped, ours) in enumerate(zip(*leaves, strict=True)):
        if not isinstance(runs, Tensor):
            continue
        expected = runs
        if number in outputs:
            dim = outputs[number]
            expected = rows.join(rows.cut(runs, dim)[0], dim, rows.cut(skipped, dim)[1])
        if not bool(expected.isfinite().all()):
            return "with these weights it computes inf or NaN, which tells nothing about its rows"
        if not _close(ours, expected):
            return (
                "it computes something else on some rows of the batch alone: its rows depend on "
                "each other, or something that holds the batch reaches it unseen"
            )
    return None


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two results are the same but for the rounding of other batch sizes."""
    if ours.shape != theirs.shape or not ours.is_floating_point():
        return torch.equal(ours, theirs)
    # Other batch sizes take other kernels; a mix-up of rows is as large as the values themselves.
    bound = 1e-3 if ours.dtype.itemsize >= 4 else 5e-2
    return bool((ours - theirs).norm() <= bound * theirs.norm())
