"""What one call of a block does: drawn in training, settled where nothing is drawn.

Pure functions of the plan's numbers, its clock and the call; only `last_gates` is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from stochastic_depth.distributed.groups import place
from stochastic_depth.draw import Counts, balanced, kept_count, order_of_rows, uniform
from stochastic_depth.errors import SetupError
from stochastic_depth.plan import Plan
from stochastic_depth.rows import Rows

# In newer torch `is_compiling` is true in all threads while one compiles; 2.6 has but that one.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
_TRIED = 256  # of many numbers of rows


@dataclass(frozen=True)
class Decision:
    """What one call of a block does, branch by branch.

    Attributes:
        kept: Whether each branch runs.
        factors: What each branch that runs is multiplied by.
        rows: The rows of the batch that it runs on; None: all.
        masked: Whether it runs on all rows and is masked, instead.
    """

    kept: tuple[bool, ...]
    factors: tuple[float, ...]
    rows: tuple[Rows | None, ...]
    masked: bool = False

    @cached_property
    def all_on_all_rows(self) -> bool:
        """Whether all branches run, on the whole batch."""
        return all(self.kept) and all(rows is None for rows in self.rows)

    @cached_property
    def changes_nothing(self) -> bool:
        """Whether the branches run as they are."""
        return self.all_on_all_rows and all(factor == 1.0 for factor in self.factors)


@dataclass(frozen=True)
class Batch:
    """The batch of a call in mode "sample"."""

    size: int
    device: torch.device


def drawn(plan: Plan, block: int, call: tuple[int, ...], batch: Batch | None) -> Decision:
    """The decision of a training call; `batch` is that of mode "sample".

    Raises:
        SetupError: torch.export writes the call down, and would write down this draw for good.
    """
    if _is_exporting():
        raise SetupError(
            f'torch.export met block "{plan.blocks[block].name}" in train mode',
            expected="a model for inference: a program cannot draw anew",
            instead="call model.eval() first; or, to export it for training, depth.remove()",
        )
    units = plan.units(block)
    rates = [plan.rate(block, unit) for unit in units]
    number = () if plan.draw.redraw == "step" else call
    factors = _factors(plan, rates, training=True)
    if batch is not None:
        rows = [
            _rows(plan, unit, number, batch, rate, plan.counts[block])
            for unit, rate in zip(units, rates, strict=True)
        ]
        shown = [range(found) if isinstance(found, int) else found for found in rows]
        plan.last_gates.update(zip(units, shown, strict=True))
        kept = [found != 0 for found in rows]
        some = [found if isinstance(found, Rows) else None for found in rows]
        return _spread(plan, block, kept, factors, some)
    kept = _kept(plan, units, rates, number)
    plan.last_gates.update(zip(units, kept, strict=True))
    return _spread(plan, block, kept, factors)


def _kept(
    plan: Plan, units: Sequence[str], rates: Sequence[float], call: tuple[int, ...]
) -> list[bool]:
    if plan.draw.sampling == "balanced":
        all_kept = _balanced(plan, call)
        return [all_kept[unit] for unit in units]
    return [
        rate == 0.0 or _uniform(plan, call, unit) >= rate
        for unit, rate in zip(units, rates, strict=True)
    ]


def keeps_any(plan: Plan, block: int, *, training: bool) -> bool:
    """Whether the next call of a block, not inside of another's, will run a branch; mode "batch".

    Nothing is counted or noted.
    """
    units = plan.units(block)
    if not training or plan.disabled or plan.forced is not None:
        forced = None if plan.disabled else plan.forced
        return any(settled(plan, block, training=training, forced=forced).kept)
    number = (
        () if plan.draw.redraw == "step" else (plan.calls_so_far(plan.blocks[block].container),)
    )
    return any(_kept(plan, units, [plan.rate(block, unit) for unit in units], number))


def _uniform(plan: Plan, call: tuple[int, ...], name: object) -> float:
    rank = place(plan.draw.process_group)[0] if plan.ranks_differ else None
    return uniform(plan.draw.seed, plan.clock.step, call, name, rank)


def _rows(
    plan: Plan, unit: str, call: tuple[int, ...], batch: Batch, rate: float, counts: Counts
) -> Rows | int:
    """The rows that a unit runs on; where that is none or all of them, their number."""
    if rate == 0.0:
        return batch.size
    count = kept_count(_uniform(plan, call, ("count", unit)), batch.size, rate, counts)
    if count in (0, batch.size):
        return count
    if plan.draw.rows == "random":
        return Rows(batch.size, 0, count, _chosen(plan, unit, call, batch, count))
    start = int(_uniform(plan, call, ("start", unit)) * batch.size)
    if batch.size % count == 0:
        start -= start % count  # windows side by side: none wraps around, which costs a copy
    return Rows(batch.size, start, count)


def possible_counts(plan: Plan, block: int, batch: int) -> list[int]:
    """The numbers of rows that a block may run on as a whole, at this step or another.

    A schedule takes a rate anywhere between 0 and what it is without.
    """
    if not plan.rates[block]:
        return [batch]
    counts = plan.counts[block]
    below, above = counts.around(batch * (1.0 - plan.rates[block]), batch)
    if few_counts(plan, block):
        return sorted({below, above} - {0})
    above = batch if plan.schedule.by_name else above
    if len(plan.units(block)) > 1:  # rows of their own: of groups any number, else all at once
        if plan.blocks[block].container not in plan.in_groups:
            return [batch]
        below, above = 1, batch
    return [n for n in range(max(below, 1), above + 1) if n in counts.around(n, batch)]


def many_counts(plan: Plan, batch: int) -> list[int]:
    """Where blocks may run on many numbers of rows: those of all blocks, the middle one first.

    Without one row and all rows, which are special; of more than `_TRIED` some, evenly spread.
    """
    blocks = [b for b in range(len(plan.blocks)) if not few_counts(plan, b)]
    found = {n for block in blocks for n in possible_counts(plan, block, batch)} - {1, batch}
    spread = sorted(found)[:: 1 + len(found) // _TRIED]
    return sorted(spread, key=lambda count: abs(count - spread[len(spread) // 2]))


def few_counts(plan: Plan, block: int) -> bool:
    """Whether blocks run, as a whole, on two numbers of rows at most: all are drawn at one rate."""
    return plan.one_rate and len(plan.units(block)) == 1


def _chosen(plan: Plan, unit: str, call: tuple[int, ...], batch: Batch, count: int) -> Tensor:
    """The numbers of a unit's rows; those of all units go to the device in one copy."""
    key = (plan.clock.step, _forward_of(call), batch)
    if plan.together[0] != key:
        units = [name for block in range(len(plan.blocks)) for name in plan.units(block)]
        rank = place(plan.draw.process_group)[0] if plan.ranks_differ else None
        orders = torch.tensor(
            [order_of_rows(plan.draw.seed, *key[:2], u, batch.size, rank) for u in units],
            device="cpu",
        )
        if batch.device.type == "cuda":
            orders = orders.pin_memory()
        orders = orders.to(batch.device, non_blocking=True)
        plan.together = (key, dict(zip(units, orders.unbind(), strict=True)))
    order: Tensor = plan.together[1][unit]
    return order[:count].sort().values


def _balanced(plan: Plan, call: tuple[int, ...]) -> dict[str, bool]:
    """The draw of all blocks together, made by the first that asks."""
    key = (plan.clock.step, _forward_of(call))
    if plan.together[0] != key:
        rates = {
            unit: plan.rate(block, unit)
            for block in range(len(plan.blocks))
            for unit in plan.units(block)
        }
        rank, ranks = place(plan.draw.process_group) if plan.ranks_differ else (0, 1)
        draws = balanced(plan.draw.seed, *key, rates, rank / ranks)
        plan.together = (key, draws)
    return plan.together[1]


def settled(
    plan: Plan, block: int, *, training: bool, forced: Mapping[str, bool] | None
) -> Decision:
    """The decision where nothing is drawn: in eval mode, `disabled` or `fixed`."""
    units = plan.units(block)
    rates = [plan.rate(block, unit) for unit in units]
    kept = [(forced or {}).get(unit, True) for unit in units]
    as_trained = training and not plan.disabled
    return _spread(plan, block, kept, _factors(plan, rates, training=as_trained))


def inference_factor(plan: Plan, block: int, branch: int) -> float:
    """What one branch is multiplied by in inference, in a way that torch.compile can follow."""
    units = plan.units(block)
    rate = plan.rate(block, units[branch if len(units) > 1 else 0])
    return _factors(plan, [rate], training=False)[0]


def probed(plan: Plan, block: int, batch: int) -> Decision:
    """The decision where it is tried out whether the block can run on some rows alone."""
    assert plan.probe is not None
    units = plan.units(block)
    probes = block in plan.probe.blocks
    rows = [Rows(batch, batch - 1, 2) if probes else None for _ in units]  # of each its own
    decided = _spread(plan, block, [True] * len(units), [1.0] * len(units), rows)
    return replace(decided, masked=plan.probe.masked)


def _factors(plan: Plan, rates: list[float], *, training: bool) -> list[float]:
    if plan.scale == "train" and training:
        return [1.0 / (1.0 - rate) for rate in rates]
    if plan.scale == "eval" and not training:
        return [1.0 - rate for rate in rates]
    return [1.0] * len(rates)


def _spread(
    plan: Plan,
    block: int,
    kept: list[bool],
    factors: list[float],
    rows: Sequence[Rows | None] | None = None,
) -> Decision:
    """One value for each branch, also where the branches share one."""
    branches = len(plan.blocks[block].branches)
    share = branches if plan.unit == "block" else 1
    if rows is None:
        return _on_all_rows(tuple(kept * share), tuple(factors * share))
    return Decision(tuple(kept * share), tuple(factors * share), tuple([*rows] * share))


@lru_cache(maxsize=4096)
def _on_all_rows(kept: tuple[bool, ...], factors: tuple[float, ...]) -> Decision:
    """The same few decisions are made all the time."""
    return Decision(kept, factors, (None,) * len(kept))


def _forward_of(call: tuple[int, ...]) -> tuple[int, ...]:
    """The call whose draws are made together: a first one inside of another belongs to that."""
    while len(call) > 1 and not call[-1]:
        call = call[:-1]
    return call
