"""`print(depth)`: a table that says which blocks are gated, how often they drop, and how."""

from __future__ import annotations

from torch import nn

from stochastic_depth.plan import Plan


def table(model: nn.Module, plan: Plan, whole: frozenset[str]) -> str:
    """A line for each block: name, class, rate, parameters, how it is skipped and why.

    Args:
        model: The gated model.
        plan: What its gates share.
        whole: The names of the blocks that are skipped as a whole.
    """
    rows = [("block", "class", "drop rate", "parameters", "when dropped")]
    total, running, now = 0, float(len(plan.blocks)), plan.rates_at(plan.clock.step)
    for number, block in enumerate(plan.blocks):
        rates = [now[unit] for unit in plan.units_of(number)]
        running -= sum(rates) / len(rates)
        members = [name for branch in block.branches for name in branch.modules]
        modules = map(model.get_submodule, [block.name] if block.explicit else members)
        size = sum(p.numel() for p in {p for module in modules for p in module.parameters()})
        total += size
        shown = ", ".join(dict.fromkeys(f"{rate:.4g}" for rate in rates))
        how = _how(plan, number, rates, is_whole=block.name in whole)
        rows.append((block.name, block.kind, shown, f"{size:,}", how))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    blocks = f"{len(plan.blocks)} blocks"
    run = f"{running:.4g} of {blocks} run on average"
    options = f'unit="{plan.unit}", scale="{plan.scale}", step {plan.clock.step}'
    if plan.mode == "sample":
        run = f"on average a row goes through {running:.4g} blocks"
        options = f'mode="sample", {options}'
    head = f"Stochastic depth on {type(model).__name__}: {blocks}, {options}"
    return "\n".join([head, *lines, f"{total:,} parameters in gated branches; {run}"])


def _how(plan: Plan, number: int, rates: list[float], *, is_whole: bool) -> str:
    """How a block is skipped, and what to know of it."""
    block = plan.blocks[number]
    has_several_units = len(rates) > 1
    notes = []
    if plan.mode == "sample":
        how = "its branch runs on the kept rows"
        if is_whole and not has_several_units:
            how = "runs on the kept rows; dropped ones are handed on"
        least = plan.counts[number].fewest_dropped
        if any(0 < rate < least for rate in rates):
            notes.append(f"{least:.0%} of the rows at once, less often")
    elif is_whole:
        how = "skipped whole: returns its input"
        if has_several_units:
            how = "each branch skipped; whole where all are dropped"
    else:
        how = "its branch skipped, its skip path runs"
        in_line = sorted({p for branch in block.branches for p in branch.in_line_parameters})
        if in_line:
            notes.append(f"{', '.join(in_line)} may get zero gradients")
    if block.left_out:
        notes.append(f"{', '.join(block.left_out)} inside of its branch is left out")
    if plan.scale == "eval" and any(branch.fold.obstacle for branch in block.branches):
        notes.append("cannot be folded")
    return "; ".join([how, *notes])
