"""What a user sees of a plan: its blocks with their rates, and `print(depth)` as a table."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from stochastic_depth.plan import Plan


@dataclass(frozen=True)
class GatedBranch:
    """A branch and its rate at this step.

    Attributes:
        name: The block's name and the branch's number, `"blocks.3:0"`.
        drop_rate: The chance that it is dropped now.
    """

    name: str
    drop_rate: float

    @property
    def survival_probability(self) -> float:
        """`1 - drop_rate`."""
        return 1.0 - self.drop_rate


@dataclass(frozen=True)
class GatedBlock(GatedBranch):
    """A block and its rate at this step; where branches are drawn on their own, their mean.

    Attributes:
        branches: Its branches, likewise.
    """

    branches: tuple[GatedBranch, ...]


def gated_blocks(plan: Plan) -> tuple[GatedBlock, ...]:
    """The gated blocks in forward order, with their rates at this step."""
    found, now = [], plan.at(plan.clock.step).rates
    for number, block in enumerate(plan.blocks):
        rates = [now[unit] for unit in plan.units_of(number)]
        branches = tuple(map(GatedBranch, [branch.name for branch in block.branches], rates))
        rate = rates[0] if plan.unit == "block" else sum(rates) / len(rates)
        found.append(GatedBlock(block.name, rate, branches))
    return tuple(found)


def table(model: nn.Module, plan: Plan, whole: set[str]) -> str:
    """A line for each block: name, class, rate, parameters, how it is skipped and why.

    Args:
        model: The gated model.
        plan: What its gates share.
        whole: The names of the modules that are skipped as a whole.
    """
    rows = [("block", "class", "drop rate", "parameters", "when dropped")]
    total, running = 0, 0.0
    for number, (block, now) in enumerate(zip(plan.blocks, gated_blocks(plan), strict=True)):
        running += now.survival_probability
        members = [name for branch in block.branches for name in branch.modules]
        modules = map(model.get_submodule, [block.name] if block.explicit else members)
        size = sum(p.numel() for p in {p for module in modules for p in module.parameters()})
        total += size
        shown = ", ".join(dict.fromkeys(f"{branch.drop_rate:.4g}" for branch in now.branches))
        how = _how(plan, number, now, is_whole=block.explicit or block.container in whole)
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


def _how(plan: Plan, number: int, now: GatedBlock, *, is_whole: bool) -> str:
    """How a block is skipped, and what to know of it."""
    block = plan.blocks[number]
    has_several_units = plan.unit == "branch" and len(block.branches) > 1
    notes = []
    if plan.mode == "sample":
        how = "its branch runs on the kept rows"
        if is_whole and not has_several_units:
            how = "runs on the kept rows; dropped ones are handed on"
        least = plan.counts[number].fewest_dropped
        if any(0 < branch.drop_rate < least for branch in now.branches):
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
