"""What the gates of one model share: rates, schedule, clock, call numbers, and the decisions.

A plan knows names and numbers, never the model: copying a module copies its plan, not the model
around it.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from stochastic_depth.discovery.blocks import ResidualBlock
from stochastic_depth.draw import Draw, uniform
from stochastic_depth.errors import StochasticDepthWarning
from stochastic_depth.schedules import ResolvedSchedule

_PATIENCE = 3  # changes of the parameters without a step of the clock

Unit = Literal["block", "branch"]
Scale = Literal["eval", "train", "none"]


@dataclass(eq=False)
class Clock:
    """The optimizer step; a copied model reads its original's until it steps by itself."""

    step: int = 0


@dataclass(frozen=True)
class Decision:
    """What one call of a block does, branch by branch.

    Attributes:
        kept: Whether each branch runs.
        factors: What each branch that runs is multiplied by.
    """

    kept: tuple[bool, ...]
    factors: tuple[float, ...]


@dataclass(eq=False)
class Plan:
    """Who is dropped how often, and how far the training has come."""

    blocks: tuple[ResidualBlock, ...]
    rates: tuple[float, ...]  # of each block, before the schedule
    unit: Unit
    scale: Scale
    schedule: ResolvedSchedule
    draw: Draw
    clock: Clock = field(default_factory=Clock)
    owns_clock: bool = True
    following: Any = None  # the handle of the hook on the optimizer
    forced: Mapping[str, bool] | None = None
    disabled: bool = False
    last_gates: dict[str, bool] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)  # of each container in this step
    calls_in_step: int = 0  # the step that `calls` counts in
    handle: weakref.ref[Any] | None = None
    last_seen: tuple[int, int] = (-1, -1)  # the step, and the version of a parameter in it
    missed_steps: int = 0  # how often a parameter changed while the clock stood still

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

    def drawn(self, block: int, call: tuple[int, ...]) -> Decision:
        """The decision of a training call."""
        units = self.units(block)
        rates = [self.rate(block, unit) for unit in units]
        number = () if self.draw.redraw == "step" else call
        kept = [
            rate == 0.0 or uniform(self.draw.seed, self.clock.step, number, unit) >= rate
            for unit, rate in zip(units, rates, strict=True)
        ]
        self.last_gates.update(zip(units, kept, strict=True))
        return self._spread(block, kept, self._factors(rates, training=True))

    def settled(
        self, block: int, *, training: bool, forced: Mapping[str, bool] | None = None
    ) -> Decision:
        """The decision where nothing is drawn: in eval mode, `disabled` or `fixed`."""
        units = self.units(block)
        rates = [self.rate(block, unit) for unit in units]
        kept = [(forced or {}).get(unit, True) for unit in units]
        as_trained = training and not self.disabled
        return self._spread(block, kept, self._factors(rates, training=as_trained))

    def _factors(self, rates: list[float], *, training: bool) -> list[float]:
        if self.scale == "train" and training:
            return [1.0 / (1.0 - rate) for rate in rates]
        if self.scale == "eval" and not training:
            return [1.0 - rate for rate in rates]
        return [1.0] * len(rates)

    def _spread(self, block: int, kept: list[bool], factors: list[float]) -> Decision:
        """One value for each branch, also where the branches share one."""
        branches = len(self.blocks[block].branches)
        share = branches if self.unit == "block" else 1
        return Decision(tuple(kept * share), tuple(factors * share))

    def advance(self) -> None:
        """One optimizer step; a copy leaves its original's clock for one of its own."""
        if not self.owns_clock:
            self.clock, self.owns_clock = Clock(self.clock.step), True
        self.clock.step += 1

    def expect_steps(self, version: int) -> None:
        """Warn, once, where the optimizer steps and nobody tells the clock.

        Args:
            version: A parameter's version, which changes whenever it is written.
        """
        needed = bool(self.schedule.by_name) or self.draw.redraw == "step"
        if not needed or self.missed_steps >= _PATIENCE:
            return
        step, known = self.last_seen
        self.last_seen = (self.clock.step, version)
        if step != self.clock.step:
            self.missed_steps = 0
        elif version != known:
            self.missed_steps += 1
            if self.missed_steps == _PATIENCE:
                warnings.warn(
                    f"the parameters changed {_PATIENCE} times while stochastic depth stands at "
                    f"step {step}: its schedule (or redraw) waits for depth.follow(optimizer), or "
                    "for depth.step() after each optimizer step",
                    StochasticDepthWarning,
                    stacklevel=2,
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.owns_clock = False
        twin.calls, twin.last_gates = dict(self.calls), dict(self.last_gates)
        twin.following = twin.handle = twin.forced = None
        twin.disabled = False
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # What comes out of a file stands on its own feet: no optimizer, no handle. A copy that is
        # saved beside its original still follows it.
        alone = {"following": None, "handle": None, "forced": None, "disabled": False}
        return {**self.__dict__, **alone}
