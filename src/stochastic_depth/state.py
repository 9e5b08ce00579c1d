"""What a plan has come to: its rates of now, `print(depth)`, metrics, and its saved state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from stochastic_depth import folding
from stochastic_depth.discovery.blocks import ResidualBlock
from stochastic_depth.distributed import place
from stochastic_depth.errors import OptionError, StateMismatchError, warn
from stochastic_depth.plan import Plan

VERSION = 2  # of the sequence of draws; 1 had a hash for each block


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


def described(
    model: nn.Module, plan: Plan, skipped: set[str]
) -> list[tuple[ResidualBlock, GatedBlock, int, str]]:
    """Each block, its rates of now, how many parameters its branches have, how it is skipped.

    Args:
        model: The gated model.
        plan: What its gates share.
        skipped: The names of the modules that are skipped whole.
    """
    found = []
    for number, (block, now) in enumerate(zip(plan.blocks, gated_blocks(plan), strict=True)):
        names = [name for branch in block.branches for name in branch.modules]
        modules = map(model.get_submodule, [block.name] if block.explicit else names)
        size = sum(p.numel() for p in {p for module in modules for p in module.parameters()})
        is_whole = block.explicit or block.block_module in skipped
        found.append((block, now, size, _how(plan, number, now, is_whole=is_whole)))
    return found


def table(model: nn.Module, plan: Plan, skipped: set[str]) -> str:
    """A line for each block: name, class, rate, parameters, how it is skipped and why.

    The arguments are those of `described`.
    """
    rows = [["block", "class", "drop rate", "parameters", "when dropped"]]
    found = described(model, plan, skipped)
    for block, now, size, how in found:
        shown = ", ".join(dict.fromkeys(f"{branch.drop_rate:.4g}" for branch in now.branches))
        rows.append([block.name, block.kind, shown, f"{size:,}", how])
    total = sum(size for _, _, size, _ in found)
    running = sum(now.survival_probability for _, now, _, _ in found)
    blocks = f"{len(plan.blocks)} blocks"
    run = f"{running:.4g} of {blocks} run on average"
    options = f'unit="{plan.unit}", scale="{plan.scale}", step {plan.clock.step}'
    if plan.mode == "sample":
        run = f"on average a row goes through {running:.4g} blocks"
        options = f'mode="sample", {options}'
    head = f"Stochastic depth on {type(model).__name__}: {blocks}, {options}"
    return "\n".join([head, *aligned(rows), f"{total:,} parameters in gated branches; {run}"])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, its columns one below the other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


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
    if block.affine_too:
        notes.append(f"{', '.join(block.affine_too)}, which is affine, always runs")
    if plan.scale == "eval" and any(branch.fold.obstacle for branch in block.branches):
        notes.append("cannot be folded")
    return "; ".join([how, *notes])


def metrics(plan: Plan) -> dict[str, float]:
    """The mean rate, and of the last training forward how many blocks ran, as a logger shows it."""
    blocks, last = gated_blocks(plan), plan.last_gates()
    found = {"stochastic_depth/drop_rate": sum(b.drop_rate for b in blocks) / len(blocks)}
    shares: dict[int, list[float]] = {}
    for gate in plan.gates:
        for unit in gate.units if plan.units[gate.units[0]] in last else ():
            kept = last[plan.units[unit]]
            share = kept if isinstance(kept, bool) else len(kept) / (gate.last_batch or 1)
            shares.setdefault(plan.block_of[unit], []).append(float(share))
    if shares:
        # A block that was not drawn for, as it is in eval mode, runs.
        run = len(blocks) - sum(1.0 - sum(each) / len(each) for each in shares.values())
        found["stochastic_depth/blocks_run"] = run
        found["stochastic_depth/skipped"] = 1.0 - run / len(blocks)
    return found


def times_trained(plan: Plan) -> dict[str, float]:
    """How often each block ran in training.

    Raises:
        OptionError: None was called.
    """
    counts = list(plan.count_calls().values())
    times = dict.fromkeys((block.name for block in plan.blocks), 0.0)
    for count, number in zip(counts, plan.block_of, strict=True):
        times[plan.blocks[number].name] += count.calls - count.dropped
    if not any(times.values()):
        raise OptionError(
            'order="least_dropped" for a model that was not trained since',
            expected="blocks that ran in training, some more often than others",
            instead='load the training\'s depth.state_dict(), or pass order="even"',
        )
    return times


def save(plan: Plan) -> dict[str, Any]:
    """The state as plain numbers, strings and lists: `torch.load(weights_only=True)` takes it.

    Lists of pairs, no dicts: `torch.distributed.checkpoint` loads a dict by the keys that are there
    already, and a new run has called nothing yet. With the place in the sequence of draws goes what
    `fold_state_dict` needs.
    """
    step = plan.clock.step
    calls = [[gate.name, gate.calls] for gate in plan.gates if gate.calls and gate.step == step]
    # What each rank counted by itself is not in the file that one of them writes for all.
    is_shared = not plan.ranks_differ or place(plan.draw.process_group)[1] == 1
    counts = plan.count_calls().items() if is_shared else ()
    return {
        "version": VERSION,
        **_identity(plan),
        "step": step,
        "calls": calls,
        "statistics": [[name, n.calls, n.dropped] for name, n in counts],
        "fold": folding.saved_factors(plan),
    }


def load(plan: Plan, state: Mapping[str, Any]) -> None:
    """Set the plan to that place.

    Raises:
        StateMismatchError: The state was saved with other blocks, options or draws.
    """
    if not isinstance(state, Mapping):
        raise StateMismatchError(
            f"the state is a {type(state).__name__}",
            expected="what depth.state_dict() returned",
            instead="pass that, or leave load_state_dict() out to start a new sequence",
        )
    version = state.get("version", 1)
    if version != VERSION:
        raise StateMismatchError(
            f"the state is of version {version}, saved by another release of stochastic-depth",
            expected=f"version {VERSION}: the numbers that are drawn differ between the two",
            instead="resume with that release; or leave load_state_dict() out, and set the step "
            "with depth.step(), to go on with a new sequence",
        )
    differences, rates = _differences(state, _identity(plan))
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise StateMismatchError(
            f"the state differs from that of this model: {'; '.join(differences[:3])}{more}",
            expected="a state saved with the same blocks, options and draws",
            instead="apply stochastic depth with the options of the run that is resumed, or leave "
            "load_state_dict() out to start a new sequence",
        )
    if rates:
        more = f", and of {len(rates) - 1} more blocks" if len(rates) > 1 else ""
        warn(f"the state was saved with other rates: {rates[0]}{more}. Those of this run stand")
    plan.go_to(int(state["step"]), dict(state["calls"]))
    if counts := {name: numbers for name, *numbers in state.get("statistics", ())}:
        numbers = [counts.get(name, (0, 0.0)) for name in plan.units]
        plan.tally.start_from([calls for calls, _ in numbers], [dropped for _, dropped in numbers])


def _identity(plan: Plan) -> dict[str, Any]:
    """What the sequence of draws, and what is done with them, depends on."""
    blocks = zip(plan.blocks, plan.rates, strict=True)
    return {
        **{name: getattr(plan.draw, name) for name in ("seed", "sampling", "redraw")},
        **{name: getattr(plan, name) for name in ("unit", "mode", "scale")},
        "across_ranks": "different" if plan.ranks_differ else "same",
        "drop_rates": [[block.name, rate] for block, rate in blocks],
    }


def _differences(
    saved: Mapping[str, Any], current: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """In what a saved state differs: in what has to be the same, and in the drop rates."""
    if missing := [key for key in (*current, "step", "calls") if key not in saved]:
        return [f"it has no {key}" for key in missing], []
    there, here = dict(saved["drop_rates"]), dict(current["drop_rates"])
    options = [key for key in current if key != "drop_rates" and saved[key] != current[key]]
    differences = [f"{key} {saved[key]!r} there, {current[key]!r} here" for key in options]
    only = sorted(there.keys() ^ here.keys())
    differences += [f'block "{n}" is gated {"here" if n in here else "there"} only' for n in only]
    other = [n for n in here if there.get(n, here[n]) != here[n]]
    return differences, [f'that of "{n}" was {there[n]}, and is {here[n]} here' for n in other]
