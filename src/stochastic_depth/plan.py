"""What the gates of one model share: rates, schedule, clock, call numbers, and the decisions.

A plan knows names and numbers, never the model: copying a module copies its plan, not the model
around it.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stochastic_depth.discovery.blocks import ResidualBlock
from stochastic_depth.distributed import Reduction, place
from stochastic_depth.draw import Draw, balanced, kept_count, order_of_rows, uniform
from stochastic_depth.errors import warn
from stochastic_depth.rows import Rows
from stochastic_depth.schedules import ResolvedSchedule

_PATIENCE = 3  # changes of the parameters without a step of the clock

Unit = Literal["block", "branch"]
Mode = Literal["batch", "sample"]
Scale = Literal["eval", "train", "none"]


@dataclass(eq=False)
class Clock:
    """The optimizer step; that of a copied model follows its original's until it is set."""

    own_step: int = 0
    follows: Clock | None = None

    @property
    def step(self) -> int:
        """How often the optimizer has stepped."""
        return self.own_step if self.follows is None else self.follows.step

    def set(self, step: int) -> None:
        """Go on from this step, following nobody."""
        self.own_step, self.follows = step, None


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


@dataclass(frozen=True)
class Probe:
    """Blocks that run on two rows of the batch, or on all and are masked: is it the same?"""

    blocks: frozenset[int]
    masked: bool
    values: list[Tensor] = field(default_factory=list)  # what their branches came to


@dataclass(frozen=True)
class Batch:
    """The batch of a call in mode "sample"."""

    size: int
    device: torch.device


@dataclass(eq=False)
class Plan:
    """Who is dropped how often, and how far the training has come."""

    blocks: tuple[ResidualBlock, ...]
    rates: tuple[float, ...]  # of each block, before the schedule
    unit: Unit
    mode: Mode
    scale: Scale
    schedule: ResolvedSchedule
    draw: Draw
    clock: Clock = field(default_factory=Clock)
    following: Any = None  # the handle of the hook on the optimizer
    forced: Mapping[str, bool] | None = None
    probe: Probe | None = None
    lone_rows: tuple[bool, ...] = ()  # of each block: whether one row of the batch is enough
    disabled: bool = False
    last_gates: dict[str, bool | Rows | range] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)  # of each container in this step
    calls_in_step: int = 0  # the step that `calls` counts in
    handle: weakref.ref[Any] | None = None
    versions: dict[str, int] = field(default_factory=dict)  # of each container's parameters
    changes: dict[str, int] = field(default_factory=dict)  # of them, while the clock stood still
    warned: bool = False
    reduction: Reduction = field(default_factory=Reduction)
    together: tuple[Any, dict[str, Any]] = (None, {})  # what was last drawn for all units at once

    @property
    def ranks_differ(self) -> bool:
        """Whether each rank has draws of its own."""
        across = self.draw.across_ranks
        return across == "different" or (across == "auto" and self.mode == "sample")

    def units(self, block: int) -> tuple[str, ...]:
        """The names of what is drawn for in a block: itself, or each of its branches."""
        found = self.blocks[block]
        if self.unit == "block":
            return (found.name,)
        return tuple(branch.name for branch in found.branches)

    def rate(self, block: int, unit: str) -> float:
        """The drop rate at this step."""
        base = self.rates[block]
        return base * self.schedule(self.clock.step, unit) if base else 0.0

    def next_call(self, container: str, calls: dict[str, int] | None) -> int:
        """How often the container was called before, in this step or in the call around it."""
        if calls is None:
            if self.calls_in_step != self.clock.step:
                self.calls_in_step, self.calls = self.clock.step, {}
            calls = self.calls
        number = calls.get(container, 0)
        calls[container] = number + 1
        return number

    def drawn(self, block: int, call: tuple[int, ...], batch: Batch | None) -> Decision:
        """The decision of a training call; `batch` is that of mode "sample"."""
        units = self.units(block)
        rates = [self.rate(block, unit) for unit in units]
        number = () if self.draw.redraw == "step" else call
        factors = self._factors(rates, training=True)
        if batch is not None:
            rows = [
                self._rows(unit, number, batch, rate, lone=self.lone_rows[block])
                for unit, rate in zip(units, rates, strict=True)
            ]
            shown = [range(found) if isinstance(found, int) else found for found in rows]
            self.last_gates.update(zip(units, shown, strict=True))
            kept = [found != 0 for found in rows]
            some = [found if isinstance(found, Rows) else None for found in rows]
            return self._spread(block, kept, factors, some)
        if self.draw.sampling == "balanced":
            all_kept = self._balanced(number)
            kept = [all_kept[unit] for unit in units]
        else:
            kept = [
                rate == 0.0 or self._uniform(number, unit) >= rate
                for unit, rate in zip(units, rates, strict=True)
            ]
        self.last_gates.update(zip(units, kept, strict=True))
        return self._spread(block, kept, factors)

    def _uniform(self, call: tuple[int, ...], name: object) -> float:
        rank = place(self.draw.process_group)[0] if self.ranks_differ else None
        return uniform(self.draw.seed, self.clock.step, call, name, rank)

    def _rows(
        self, unit: str, call: tuple[int, ...], batch: Batch, rate: float, *, lone: bool
    ) -> Rows | int:
        """The rows that a unit runs on; where that is none or all of them, their number."""
        if rate == 0.0:
            return batch.size
        count = kept_count(self._uniform(call, ("count", unit)), batch.size, rate, lone=lone)
        if count in (0, batch.size):
            return count
        if self.draw.rows == "random":
            return Rows(batch.size, 0, count, self._chosen(unit, call, batch, count))
        start = int(self._uniform(call, ("start", unit)) * batch.size)
        return Rows(batch.size, start, count)

    def _chosen(self, unit: str, call: tuple[int, ...], batch: Batch, count: int) -> Tensor:
        """The numbers of a unit's rows; those of all units go to the device in one copy."""
        key = (self.clock.step, _forward_of(call), batch)
        if self.together[0] != key:
            units = [name for block in range(len(self.blocks)) for name in self.units(block)]
            rank = place(self.draw.process_group)[0] if self.ranks_differ else None
            orders = torch.tensor(
                [order_of_rows(self.draw.seed, *key[:2], u, batch.size, rank) for u in units]
            )
            if batch.device.type == "cuda":
                orders = orders.pin_memory()
            orders = orders.to(batch.device, non_blocking=True)
            self.together = (key, dict(zip(units, orders.unbind(), strict=True)))
        order: Tensor = self.together[1][unit]
        return order[:count].sort().values

    def _balanced(self, call: tuple[int, ...]) -> dict[str, bool]:
        """The draw of all blocks together, made by the first that asks."""
        key = (self.clock.step, _forward_of(call))
        if self.together[0] != key:
            rates = {
                unit: self.rate(block, unit)
                for block in range(len(self.blocks))
                for unit in self.units(block)
            }
            rank, ranks = place(self.draw.process_group) if self.ranks_differ else (0, 1)
            draws = balanced(self.draw.seed, *key, rates, rank / ranks)
            self.together = (key, draws)
        return self.together[1]

    def settled(self, block: int, *, training: bool, forced: Mapping[str, bool] | None) -> Decision:
        """The decision where nothing is drawn: in eval mode, `disabled` or `fixed`."""
        units = self.units(block)
        rates = [self.rate(block, unit) for unit in units]
        kept = [(forced or {}).get(unit, True) for unit in units]
        as_trained = training and not self.disabled
        return self._spread(block, kept, self._factors(rates, training=as_trained))

    def probed(self, block: int, batch: int) -> Decision:
        """The decision where it is tried out whether the block can run on some rows alone."""
        assert self.probe is not None
        units = self.units(block)
        rows = Rows(batch, batch - 1, 2) if block in self.probe.blocks else None
        decided = self._spread(block, [True] * len(units), [1.0] * len(units), [rows] * len(units))
        return replace(decided, masked=self.probe.masked)

    def _factors(self, rates: list[float], *, training: bool) -> list[float]:
        if self.scale == "train" and training:
            return [1.0 / (1.0 - rate) for rate in rates]
        if self.scale == "eval" and not training:
            return [1.0 - rate for rate in rates]
        return [1.0] * len(rates)

    def _spread(
        self,
        block: int,
        kept: list[bool],
        factors: list[float],
        rows: Sequence[Rows | None] | None = None,
    ) -> Decision:
        """One value for each branch, also where the branches share one."""
        branches = len(self.blocks[block].branches)
        share = branches if self.unit == "block" else 1
        rows = rows or [None] * len(kept)
        return Decision(tuple(kept * share), tuple(factors * share), tuple([*rows] * share))

    def advance(self) -> None:
        """One optimizer step; the clock of a copy leaves its original's."""
        self.clock.set(self.clock.step + 1)
        self.changes.clear()

    def expect_steps(self, container: str, parameters: Iterable[nn.Parameter]) -> None:
        """Warn, once, where parameters change time and again and nobody tells the clock.

        Args:
            container: Whose call it is.
            parameters: The container's.
        """
        if self.warned or not (self.schedule.by_name or self.draw.redraw == "step"):
            return
        version = sum(p._version for p in parameters if p.requires_grad and not p.is_inference())
        if self.versions.get(container, version) != version:
            self.changes[container] = self.changes.get(container, 0) + 1
        self.versions[container] = version
        if self.changes.get(container, 0) >= _PATIENCE and self.clock.follows is None:
            self.warned = True
            warn(
                f'the parameters of "{container}" changed {_PATIENCE} times while stochastic '
                f"depth stands at step {self.clock.step}: its schedule (or redraw) waits for "
                "depth.follow(optimizer), or for depth.step() after each optimizer step"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.clock = Clock(follows=self.clock)
        twin.versions, twin.changes, twin.reduction = {}, {}, Reduction()
        twin.together = (None, {})
        twin.calls, twin.last_gates = dict(self.calls), dict(self.last_gates)
        twin.following = twin.handle = twin.forced = None
        twin.disabled = False
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # What comes out of a file stands on its own feet: no optimizer, no handle. A copy that is
        # saved beside its original still follows it.
        alone: dict[str, Any] = {"following": None, "handle": None, "forced": None}
        alone |= {"disabled": False, "reduction": Reduction(), "together": (None, {})}
        return {**self.__dict__, **alone}


def _forward_of(call: tuple[int, ...]) -> tuple[int, ...]:
    """The call whose draws are made together: a first one inside of another belongs to that."""
    while len(call) > 1 and not call[-1]:
        call = call[:-1]
    return call
