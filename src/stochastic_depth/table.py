"""`print(depth)`: a table that says which blocks are gated, how often they drop, and how."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from stochastic_depth.discovery.blocks import ResidualBlock
from stochastic_depth.plan import Plan


def table(model: nn.Module, plan: Plan, whole: frozenset[str]) -> str:
    """A line for each block: name, class, rate, parameters, how it is skipped and why.

    Args:
        model: The gated model.
        plan: What its gates share.
        whole: The names of the blocks that are skipped as a whole.
    """
    rows = [("block", "class", "drop rate", "parameters", "when dropped")]
    total, now = 0, plan.rates_at(plan.clock.step)
    for number, block in enumerate(plan.blocks):
        modules = [
            model.get_submodule(name)
            for name in ([block.name] if block.explicit else _members(block))
        ]
        size = sum(p.numel() for p in {p for module in modules for p in module.parameters()})
        total += size
        rates = [now[unit] for unit in plan.units_of(number)]
        shown = ", ".join(dict.fromkeys(f"{rate:.4g}" for rate in rates))
        how = _how(plan, number, whole)
        rows.append((block.name, block.kind, shown, f"{size:,}", how))
    mode = 'mode="sample", ' if plan.mode == "sample" else ""
    head = (
        f"Stochastic depth on {type(model).__name__}: {len(plan.blocks)} blocks, "
        f'{mode}unit="{plan.unit}", scale="{plan.scale}", step {plan.clock.step}'
    )
    expected = sum(
        now[unit] / len(plan.units_of(number))
        for number in range(len(plan.blocks))
        for unit in plan.units_of(number)
    )
    run = f"{len(plan.blocks) - expected:.4g} of {len(plan.blocks)} blocks run on average"
    if plan.mode == "sample":
        run = f"on average a row goes through {len(plan.blocks) - expected:.4g} blocks"
    foot = f"{total:,} parameters in gated branches; {run}"
    return "\n".join([head, *_aligned(rows), foot])


def _members(block: ResidualBlock) -> list[str]:
    return list(dict.fromkeys(m for branch in block.branches for m in branch.modules))


def _how(plan: Plan, number: int, whole: frozenset[str]) -> str:
    block = plan.blocks[number]
    notes = []
    if plan.mode == "sample":
        how = "its branch runs on the kept rows"
        if block.name in whole and (plan.unit == "block" or len(block.branches) == 1):
            how = "runs on the kept rows; dropped ones are handed on"
        least = plan.counts[number].fewest_dropped
        now = plan.rates_at(plan.clock.step)
        if any(0 < now[unit] < least for unit in plan.units_of(number)):
            notes.append(f"{least:.0%} of the rows at once, less often")
    elif block.name in whole:
        how = "skipped whole: returns its input"
        if plan.unit == "branch" and len(block.branches) > 1:
            how = "each branch skipped; whole where all are dropped"
    else:
        how = "its branch skipped, its skip path runs"
        in_line = sorted({p for branch in block.branches for p in branch.in_line_parameters})
        if in_line:
            notes.append(f"{', '.join(in_line)} may get zero gradients")
    if plan.scale == "eval":
        stuck = [branch.name for branch in block.branches if branch.fold.obstacle]
        if stuck:
            notes.append("cannot be folded")
    return "; ".join([how, *notes])


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
