"""What the gates of one model share: rates, schedule, clock, and the row of decisions of a forward.

A plan knows names and numbers, never modules: copying a module copies its plan, not the model
around it. A row is a cache of a pure function of (seed, step, call number, rank).
"""

from __future__ import annotations

import copy
import operator
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from stochastic_depth.clock import Clock
from stochastic_depth.counting import CallCount, Tally
from stochastic_depth.discovery.blocks import ResidualBlock
from stochastic_depth.distributed import place
from stochastic_depth.draw import Draw, Names, balanced, integers, limit, real
from stochastic_depth.errors import warn
from stochastic_depth.rows import Counts, Rows, kept_count
from stochastic_depth.schedules import ResolvedSchedule

_MANY_ROWS = 64  # that are kept

Unit = Literal["block", "branch"]
Mode = Literal["batch", "sample"]
Scale = Literal["eval", "train", "none"]
Factors = Sequence[tuple[float, ...] | None]
"""Of each gate, what its branches are multiplied by where they run; None: by nothing."""


@dataclass(eq=False)
class Counted:
    """What the plan knows of a gate: what it draws for, and how often it was called."""

    name: str
    units: tuple[int, ...] = ()  # of each of its branches, what it is drawn with
    blocks: tuple[int, ...] = ()
    step: int = 0  # in which `calls` counts
    calls: int = 0
    last_batch: int = -1  # in mode "sample": the number of rows in its last call; -1: unknown
    noted: tuple[int, int] = (0, 0)  # the step and calls whose outcome `gates_before` holds

    def next_call(self, step: int) -> int:
        """How often it was called in this step before."""
        if self.step != step:
            self.step, self.calls = step, 0
        self.calls += 1
        return self.calls - 1


class AtStep(NamedTuple):
    """What the rates come to under the schedules."""

    asked: dict[Any, float]  # what each schedule returned
    rates: tuple[float, ...]  # of each unit
    limits: tuple[int, ...]  # of each unit: the rates, for the integers that are drawn
    factors: tuple[Factors, Factors]  # in inference, in training


@dataclass(frozen=True, slots=True, eq=False)  # read at every call, and quicker than a tuple
class Row:
    """All decisions of one forward."""

    step: int
    number: int  # how often the gates that it is for were called in this step before
    states: Sequence[bool | None]  # of each gate: all branches run, none, or (None) look closer
    kept: Sequence[bool]  # of each unit, in mode "batch"
    drawn: Sequence[int]  # of each unit, in mode "sample": for the count, then for the start
    factors: Factors  # in training
    rates: tuple[float, ...]  # of each unit


_NO_ROW = Row(-1, -1, (), (), (), (), ())


@dataclass(eq=False)
class Plan:
    """Who is dropped how often, and how far the training has come.

    What it draws with is a unit: a block, or with unit="branch" each of its branches.
    """

    blocks: tuple[ResidualBlock, ...]
    rates: tuple[float, ...]  # of each block, before the schedule
    unit: Unit
    mode: Mode
    scale: Scale
    schedule: ResolvedSchedule
    draw: Draw
    counts: tuple[Counts, ...] = ()  # of each block: how many rows it may run on
    talks: dict[str, str] = field(default_factory=dict)  # gates in which ranks talk to each other
    clock: Clock = field(default_factory=Clock)
    gates: list[Counted] = field(default_factory=list)  # of the blocks, in forward order
    one_to_one: bool = False  # whether each gate has one unit, in their order
    tally: Tally = field(default_factory=lambda: Tally(0))

    def __post_init__(self) -> None:
        units = [
            (number, name)
            for number, block in enumerate(self.blocks)
            for name in ([block.name] if self.unit == "block" else [b.name for b in block.branches])
        ]
        self.units: tuple[str, ...] = tuple(name for _, name in units)
        self.block_of: tuple[int, ...] = tuple(number for number, _ in units)
        self.base_rates: tuple[float, ...] = tuple(self.rates[number] for number, _ in units)
        across = self.draw.across_ranks
        self.ranks_differ = across == "different" or (across == "auto" and self.mode == "sample")
        starts = [f"start of {name}" for name in self.units] if self.mode == "sample" else []
        self._names = Names((*self.units, *starts))
        if len(self.tally.calls) != len(units):
            self.tally = Tally(len(units))
        self.graphs: Mapping[str, Any] = {}  # of gates: what `compile()` made
        self.forget()

    def forget(self) -> None:
        """Start anew with what a copy does not share, and what is known of the gates."""
        self.clock.owner = weakref.ref(self)
        self.row: Row = _NO_ROW  # the last one
        self._at: AtStep | None = None  # likewise
        self.drawn = lru_cache(_MANY_ROWS)(self._drawn)
        by_name = self.schedule.by_name
        self._name_of: dict[Any, str] = {schedule: name for name, schedule in by_name.items()}
        self.needs_steps = bool(by_name) or self.draw.redraw == "step"
        self._thread = threading.local()
        self.forcing = 0  # how many `fixed` and `disabled` are in force, in any thread
        self.following: Any = None  # the `Following` of an optimizer
        self.handle: weakref.ref[Any] | None = None
        self.is_of_a_callback = False  # whether a trainer's callback put the gates on
        self.told_of: set[str] = set()  # gates that run all the same where they are dropped
        self.told_of_graphs = False  # that a user's torch.compile breaks at each gate
        self.setups: dict[str, Any] = {}  # by gate: how several processes train its block
        self.ranks_differed = False  # whether ranks may have skipped other blocks than each other
        self.gates_before: dict[str, bool | tuple[int, ...]] = {}  # the counts were set
        self.agreed: set[str] = set()  # gates called since ranks last compared their draws
        self._callers: list[Counted] = []  # of each unit, a gate whose calls are its own

    def units_of(self, block: int) -> list[int]:
        """What each branch of a block is drawn with."""
        units = [unit for unit, number in enumerate(self.block_of) if number == block]
        return units if self.unit == "branch" else units * len(self.blocks[block].branches)

    # The rates and factors of a step.

    def at(self, step: int) -> AtStep:
        """The rates of a step: the same object as long as the schedules return the same."""
        if self._at is not None and not self._name_of:
            return self._at
        # A schedule may look at more than the step: it is asked every time.
        asked = {one: self.schedule(step, name) for one, name in self._name_of.items()}
        if self._at is None or self._at.asked != asked:
            of_units = zip(self.base_rates, map(self.schedule.by_name.get, self.units), strict=True)
            rates = tuple([rate * asked.get(one, 1.0) for rate, one in of_units])
            factors = self._factors(rates, training=False), self._factors(rates, training=True)
            self._at = AtStep(asked, rates, tuple(map(limit, rates)), factors)
        return self._at

    def for_inference(self) -> Factors:
        """What the branches of each gate are multiplied by in inference."""
        if self._at is not None and not self._name_of:
            return self._at.factors[False]
        self.warn_unstepped("an evaluation")
        return self.at(self.clock.step).factors[False]

    def warn_unstepped(self, what: str) -> None:
        """Warn, once, of the inference scale of a schedule's step 0 where nobody trained."""
        if not self._name_of or self.scale != "eval" or self.clock.step or self.clock.is_told:
            return
        if all(getattr(schedule, "is_constant", False) for schedule in self._name_of):
            return
        if any(gate.calls for gate in self.gates):  # where that is wrong the clock says so
            return
        self.clock.is_told = True
        warn(
            f"{what} at step 0 of a schedule: the branches are scaled by the rates of its "
            "beginning. Those of a trained model come with depth.load_state_dict(), or with the "
            "state of an optimizer that is followed"
        )

    def _factors(self, rates: tuple[float, ...], *, training: bool) -> Factors:
        if self.scale != ("train" if training else "eval"):
            return [None] * len(self.gates)
        of_unit = [1.0 / (1.0 - rate) if training else 1.0 - rate for rate in rates]
        each = (tuple([of_unit[unit] for unit in gate.units]) for gate in self.gates)
        return [None if set(of_gate) <= {1.0} else of_gate for of_gate in each]

    def inference_factors(self, units: tuple[int, ...]) -> tuple[float, ...] | None:
        """What one gate multiplies by in inference, in a way that torch.compile can follow."""
        if self.scale != "eval":
            return None
        rates = [(self.base_rates[unit], self.units[unit]) for unit in units]
        return tuple([1.0 - rate * self.schedule(self.clock.step, name) for rate, name in rates])

    # The row of a forward.

    def row_for(self, number: int) -> Row:
        """The decisions of the forward in which gates are called that were so many times before."""
        row = self.row = self.drawn(self.clock.step, number)
        if self.tally.note(row):
            self.count_calls()
        return row

    def _drawn(self, step: int, number: int) -> Row:
        """The row of a forward, drawn."""
        draw, now = self.draw, self.at(step)
        call = 0 if draw.redraw == "step" else number
        rank, ranks = place(draw.process_group) if self.ranks_differ else (None, 1)
        drawn: tuple[int, ...] = ()
        if draw.sampling == "balanced":
            of_unit = dict(zip(self.units, now.rates, strict=True))
            found = balanced(draw.seed, step, call, of_unit, (rank or 0) / ranks)
            kept = [found[unit] for unit in self.units]
        else:
            drawn = integers(draw.seed, step, call, self._names, rank)
            kept = list(map(operator.ge, drawn, now.limits))
        states: Sequence[bool | None] = kept
        if self.mode == "sample":
            kept, states = [True] * len(self.units), [None] * len(self.gates)
        elif not self.one_to_one:
            states = [_alike([kept[unit] for unit in gate.units]) for gate in self.gates]
        return Row(step, number, states, kept, drawn, now.factors[True], now.rates)

    def rows_kept(self, row: Row, unit: int, batch: int) -> Rows | int:
        """Mode "sample": the rows that a unit runs on; where that is none or all, their number."""
        rate = row.rates[unit]
        if not rate:
            return batch
        allowed = self.counts[self.block_of[unit]]
        count = kept_count(real(row.drawn[unit]), batch, rate, allowed)
        if count in (0, batch):
            return count
        start = int(real(row.drawn[len(self.units) + unit]) * batch)
        if batch % count == 0:
            start -= start % count  # windows side by side: none wraps around, which costs a copy
        return Rows(batch, start, count)

    def last_gates(self) -> dict[str, bool | tuple[int, ...]]:
        """What the last training call of each gate came to, by unit."""
        found = dict(self.gates_before)
        for gate in self.gates:
            if not gate.calls or (gate.step, gate.calls) == gate.noted:
                continue
            if self.mode == "sample" and gate.last_batch < 0:
                continue  # counted in a state that was loaded, of a batch that nobody knows
            row = self.drawn(gate.step, gate.calls - 1)
            for unit in gate.units:
                kept: Any = row.kept[unit]
                if self.mode == "sample":
                    rows = self.rows_kept(row, unit, gate.last_batch)
                    kept = tuple(range(rows)) if isinstance(rows, int) else rows.numbers
                found[self.units[unit]] = kept
        return found

    # How often each unit was called and dropped.

    def end_step(self) -> None:
        """Note how often the gates were called in the step that ends now."""
        if self.tally.rows:
            self.tally.end_step(self.clock.step, self._calls_now(), self._row_of)
        self.tally.counted = None  # none was called since, or all are noted

    def count_calls(self) -> dict[str, CallCount]:
        """Count all training calls so far, by unit."""
        self.tally.count(self.clock.step, self._calls_now(), self._row_of)
        counts = map(CallCount, self.tally.calls, self.tally.dropped)
        return dict(zip(self.units, counts, strict=True))

    def count_rows(self, gate: Counted, kept: Mapping[int, Rows | int], batch: int) -> None:
        """Mode "sample": count the fraction of the rows that a call drops."""
        for unit, rows in kept.items():
            if self._caller(unit) is gate:
                number = rows if isinstance(rows, int) else rows.count
                self.tally.dropped[unit] += 1.0 - number / batch if batch else 0.0

    def _row_of(self, step: int, number: int) -> Row:
        row: Row | None = self.tally.rows.get((step, number))
        return self.drawn(step, number) if row is None else row

    def _caller(self, unit: int) -> Counted:
        """The gate whose calls count as those of a unit: its first."""
        if not self._callers:
            first = {unit: gate for gate in self.gates[::-1] for unit in gate.units}
            self._callers = [first[unit] for unit in range(len(self.units))]
        return self._callers[unit]

    def _calls_now(self) -> list[int]:
        """How often each unit was called in this step."""
        self._caller(0)
        step = self.clock.step
        return [gate.calls if gate.step == step else 0 for gate in self._callers]

    def set_rates(self, rates: tuple[float, ...]) -> None:
        """Draw with other rates from now on, as do copies that follow; the draws go on."""
        for plan in [plan for clock in self.clock.with_followers() if (plan := clock.owner())]:
            plan.gates_before = plan.last_gates()
            plan.count_calls()
            for gate in plan.gates:
                gate.noted = gate.step, gate.calls
            plan.rates = rates
            plan.base_rates = tuple([rates[number] for number in plan.block_of])
            plan._at, plan.row = None, _NO_ROW
            plan.drawn.cache_clear()

    def scale_by(self, scale: Scale) -> None:
        """Multiply the branches by other factors from now on."""
        self.scale, self._at, self.row = scale, None, _NO_ROW
        self.drawn.cache_clear()

    def go_to(self, step: int, calls: Mapping[str, int]) -> None:
        """Go on from another place: an optimizer step, and the calls of gates in it so far."""
        self.gates_before = self.last_gates()
        self.count_calls()
        self.clock.set(step)  # copies that follow this clock come along
        self.row = _NO_ROW
        self.drawn.cache_clear()
        for gate in self.gates:
            gate.step, gate.calls, gate.noted = step, calls.get(gate.name, 0), (step, 0)
        self.tally.counted = self._calls_now()

    def drawn_from(self) -> dict[str, object]:
        """All that the draws of the next forward follow from, for ranks to compare."""
        step, (fixed, disabled) = self.clock.step, self.forced
        return {
            "seed": self.draw.seed,
            "the step": step,
            "what is disabled": disabled,
            "what is fixed": sorted(fixed.items()) if fixed is not None else None,
            "the drop rates at this step": self.at(step).rates,
            "the number of calls in this step": [
                (gate.name, gate.calls) for gate in self.gates if gate.step == step
            ],
        }

    # What is forced in this thread.

    @property
    def forced(self) -> tuple[Mapping[str, Any] | None, bool]:
        """What `fixed` says in this thread, and whether `disabled` is in force."""
        return getattr(self._thread, "forced", (None, False))

    @contextmanager
    def force(self, fixed: Mapping[str, Any] | None, *, disabled: bool = False) -> Iterator[None]:
        """Force gates in this thread, on top of what is forced already."""
        clocks = self.clock.with_followers() if disabled else [self.clock]  # an average's, too
        plans: list[Plan] = [plan for clock in clocks if (plan := clock.owner())]
        before = [plan.forced for plan in plans]
        for plan in plans:
            chosen, off = plan.forced
            plan._thread.forced = chosen if fixed is None else fixed, off or disabled
            plan.forcing += 1
        try:
            yield
        finally:
            for plan, forced in zip(plans, before, strict=True):
                plan._thread.forced = forced
                plan.forcing -= 1

    # Copies.

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        twin = object.__new__(Plan)
        memo[id(self)] = twin
        twin.__dict__.update(self.__dict__, clock=Clock(self.clock))
        twin.tally = self.tally.copy()
        twin.forget()
        twin.gates = copy.deepcopy(self.gates, memo)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # What comes out of a file stands on its own feet: no optimizer, no handle. A copy that is
        # saved beside its original still follows it.
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()


def _alike(kept: Sequence[bool]) -> bool | None:
    """What all of them are; None where they differ."""
    if len(kept) == 1 or all(kept):
        return bool(kept[0])
    return None if any(kept) else False
