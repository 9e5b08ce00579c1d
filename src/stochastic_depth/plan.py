"""What the gates of one model share: rates, schedule, clock, and the row of decisions of a forward.

A plan knows names and numbers, never modules: copying a module copies its plan, not the model
around it. A row is a cache of a pure function of (seed, step, call number, rank).
"""

from __future__ import annotations

import copy
import operator
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import nn

from stochastic_depth.discovery.blocks import ResidualBlock
from stochastic_depth.distributed import place
from stochastic_depth.draw import (
    Counts,
    Draw,
    Names,
    balanced,
    integers,
    kept_count,
    limit,
    uniforms,
)
from stochastic_depth.errors import warn
from stochastic_depth.rows import Rows
from stochastic_depth.schedules import ResolvedSchedule

_PATIENCE = 3  # changes of the parameters without a step of the clock
_MANY_ROWS = 64  # that are kept of one step

Unit = Literal["block", "branch"]
Mode = Literal["batch", "sample"]
Scale = Literal["eval", "train", "none"]


class Clock:
    """The optimizer step. That of a copied model follows its original's until it is set.

    The step is pushed to the followers when it is set, so that reading it costs an attribute.
    """

    def __init__(self, leader: Clock | None = None, step: int = 0) -> None:
        self.step: int = step if leader is None else leader.step
        self.leader = leader
        self._owner: Callable[[], Plan | None] = lambda: None
        self._followers: weakref.WeakSet[Clock] = weakref.WeakSet()
        if leader is not None:
            leader._followers.add(self)

    def belong_to(self, plan: Plan) -> None:
        """Know whose clock it is: one that nobody owns any more leads no copy that is saved."""
        self._owner = weakref.ref(plan)

    def set(self, step: int) -> None:
        """Go on from this step, following nobody."""
        if self.leader is not None:
            self.leader._followers.discard(self)
            self.leader = None
        clocks = [self]
        for clock in clocks:  # which grows
            clock.step = step
            clocks += clock._followers

    def __getstate__(self) -> dict[str, Any]:
        leaders: list[Clock] = []
        leader = self.leader
        while leader is not None:
            leaders += [] if leader._owner() is None else [leader]
            leader = leader.leader
        # The first of them first, so that none is saved in the middle of another: no recursion.
        return {"step": self.step, "leaders": leaders[::-1]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        leader = state["leaders"][-1] if state["leaders"] else None
        Clock.__init__(self, leader, state["step"])


@dataclass(eq=False)
class Counted:
    """A gate that decides about a block, as far as the plan knows it: how often it was called."""

    name: str
    units: tuple[int, ...] = ()  # of each of its branches, what it is drawn with
    blocks: tuple[int, ...] = ()
    step: int = 0  # in which `calls` counts
    calls: int = 0
    last_batch: int = 0  # in mode "sample": the number of rows in its last call

    def next_call(self, step: int) -> int:
        """How often it was called in this step before."""
        if self.step != step:
            self.step, self.calls = step, 0
        self.calls += 1
        return self.calls - 1


class Row(NamedTuple):
    """All decisions of one forward."""

    step: int
    number: int  # how often the gates that it is for were called in this step before
    states: Sequence[bool | None]  # of each gate: all branches run, none, or (None) look closer
    kept: Sequence[bool]  # of each unit, in mode "batch"
    uniforms: Sequence[float]  # of each unit, in mode "sample": for the count, then for the start
    factors: Sequence[tuple[float, ...] | None]  # of each gate, in training


_NO_ROW = Row(-1, -1, (), (), (), ())


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
    counts: tuple[Counts, ...] = ()  # of each block: how many rows it may run on
    clock: Clock = field(default_factory=Clock)
    gates: list[Counted] = field(default_factory=list)  # of the blocks, in forward order
    talks: dict[str, str] = field(default_factory=dict)  # gates in which ranks talk to each other
    forcing: int = 0  # how many `fixed` and `disabled` are in force, in any thread
    following: Any = None  # the handle of the hook on the optimizer
    handle: weakref.ref[Any] | None = None
    graphs: Mapping[str, Any] = field(default_factory=dict)  # of gates: what `compile()` made
    one_to_one: bool = False  # whether each gate has one unit, in their order
    row: Row = _NO_ROW  # the last one

    def __post_init__(self) -> None:
        self.clock.belong_to(self)
        self.units: tuple[str, ...] = tuple(
            name
            for block in self.blocks
            for name in (
                [block.name] if self.unit == "block" else [branch.name for branch in block.branches]
            )
        )
        self.base_rates: tuple[float, ...] = tuple(
            rate for n, rate in enumerate(self.rates) for _ in self.units_of(n)
        )
        self._forget()

    def _forget(self) -> None:
        """Start anew with what a copy does not share."""
        self.row, self._rows = _NO_ROW, dict[int, Row]()
        self._rates: tuple[tuple[Any, ...], tuple[float, ...]] = ((), ())
        self._factors: dict[bool, tuple[tuple[float, ...], Sequence[tuple[float, ...] | None]]] = {}
        self._limits_of: tuple[tuple[float, ...], tuple[int, ...]] = ((), ())
        self._names = Names(self.units)
        self._forced = threading.local()
        self.forcing, self.following, self.handle = 0, None, None
        self.setups: dict[str, Any] = {}  # by gate: how several processes train its block
        self.ranks_differed = False  # whether ranks may have skipped other blocks than each other
        self.agreed: set[str] = set()  # gates called since ranks last compared their draws
        self.looked_at: tuple[str, int] | None = None  # a gate, and its parameters' version
        self.changes, self.warned = 0, set[str]()
        self.gates_before: dict[str, bool | tuple[int, ...]] = {}  # the counts were set

    @property
    def ranks_differ(self) -> bool:
        """Whether each rank has draws of its own."""
        across = self.draw.across_ranks
        return across == "different" or (across == "auto" and self.mode == "sample")

    def units_of(self, block: int) -> range:
        """What is drawn for in a block: itself, or each of its branches."""
        if self.unit == "block":
            return range(block, block + 1)
        start = sum(len(other.branches) for other in self.blocks[:block])
        return range(start, start + len(self.blocks[block].branches))

    def block_of(self, unit: int) -> int:
        """The block that a unit is, or is a branch of."""
        return next(n for n in range(len(self.blocks)) if unit in self.units_of(n))

    # The rates and factors of a step.

    def rates_at(self, step: int) -> tuple[float, ...]:
        """The drop rate of each unit: the same object as long as the schedules give the same."""
        by_name = self.schedule.by_name
        if not by_name:
            return self.base_rates
        # A schedule may look at more than the step: what it gives is asked for every time.
        key = (step, *[schedule(step) for schedule in dict.fromkeys(by_name.values())])
        if self._rates[0] != key:
            both = zip(self.base_rates, self.units, strict=True)
            rates = tuple(rate and rate * self.schedule(step, unit) for rate, unit in both)
            self._rates = key, rates
        return self._rates[1]

    def _limits(self, step: int) -> tuple[int, ...]:
        """The rates as limits on the integers that are drawn."""
        rates = self.rates_at(step)
        if self._limits_of[0] is not rates:
            self._limits_of = rates, tuple(map(limit, rates))
        return self._limits_of[1]

    def factors_at(self, step: int, *, training: bool) -> Sequence[tuple[float, ...] | None]:
        """What each gate's branches are multiplied by where they run; None: by nothing."""
        rates = self.rates_at(step)
        known = self._factors.get(training)
        if known is None or known[0] is not rates or len(known[1]) != len(self.gates):
            of_unit = [1.0] * len(rates)
            if self.scale == ("train" if training else "eval"):
                of_unit = [1.0 / (1.0 - r) if training else 1.0 - r for r in rates]
            each = (tuple(of_unit[unit] for unit in gate.units) for gate in self.gates)
            known = rates, [None if set(own) <= {1.0} else own for own in each]
            self._factors[training] = known
        return known[1]

    def may_multiply(self, units: tuple[int, ...], *, training: bool) -> bool:
        """Whether branches of these units are multiplied at one step or another."""
        applies = self.scale == ("train" if training else "eval")
        return applies and any(self.base_rates[unit] for unit in units)

    def inference_factors(self, units: tuple[int, ...]) -> tuple[float, ...] | None:
        """The same for one gate in inference, in a way that torch.compile can follow."""
        if self.scale != "eval":
            return None
        rates = [self.base_rates[unit] for unit in units]
        if self.schedule.by_name:
            step = self.clock.step
            names = [self.units[unit] for unit in units]
            rates = [r * self.schedule(step, n) for r, n in zip(rates, names, strict=True)]
        return tuple([1.0 - rate for rate in rates])

    # The row of a forward.

    def row_for(self, number: int) -> Row:
        """The decisions of the forward in which gates are called that were so many times before."""
        step = self.clock.step
        row = self._rows.get(number)
        if row is None or row.step != step:
            if self.row.step != step or len(self._rows) >= _MANY_ROWS:
                self._rows = {}
            row = self._rows[number] = self.drawn(step, number)
        self.row = row
        return row

    def go_to(self, step: int, calls: Mapping[str, int]) -> None:
        """Go on from another place: an optimizer step, and the calls of gates in it so far."""
        self.gates_before = self.last_gates()
        self.clock.set(step)  # copies that follow this clock come along
        self.row, self._rows = _NO_ROW, {}
        for gate in self.gates:
            gate.step, gate.calls = step, calls.get(gate.name, 0)

    def drawn(self, step: int, number: int) -> Row:
        """The row of a forward, drawn."""
        draw = self.draw
        call = 0 if draw.redraw == "step" else number
        rank, ranks = place(draw.process_group) if self.ranks_differ else (None, 1)
        factors = self.factors_at(step, training=True)
        if self.mode == "sample":
            names = (*self.units, *(f"start of {unit}" for unit in self.units))
            both = uniforms(draw.seed, step, call, names, rank)
            return Row(step, number, (None,) * len(self.gates), (), both, factors)
        if draw.sampling == "balanced":
            of_unit = dict(zip(self.units, self.rates_at(step), strict=True))
            found = balanced(draw.seed, step, call, of_unit, (rank or 0) / ranks)
            kept = [found[unit] for unit in self.units]
        else:
            numbers = integers(draw.seed, step, call, self._names, rank)
            kept = list(map(operator.ge, numbers, self._limits(step)))
        states: Sequence[bool | None] = kept
        if not self.one_to_one:
            states = [_alike([kept[unit] for unit in gate.units]) for gate in self.gates]
        return Row(step, number, states, kept, (), factors)

    def rows_kept(self, row: Row, unit: int, batch: int) -> Rows | int:
        """Mode "sample": the rows that a unit runs on; where that is none or all, their number."""
        rate = self.rates_at(row.step)[unit]
        if not rate:
            return batch
        count = kept_count(row.uniforms[unit], batch, rate, self.counts[self.block_of(unit)])
        if count in (0, batch):
            return count
        start = int(row.uniforms[len(self.units) + unit] * batch)
        if batch % count == 0:
            start -= start % count  # windows side by side: none wraps around, which costs a copy
        return Rows(batch, start, count)

    def last_gates(self) -> dict[str, bool | tuple[int, ...]]:
        """What the last training call of each gate came to, by unit."""
        found = dict(self.gates_before)
        for gate in self.gates:
            if not gate.calls:
                continue
            row = self.drawn(gate.step, gate.calls - 1)
            for unit in dict.fromkeys(gate.units):
                if self.mode == "batch":
                    found[self.units[unit]] = bool(row.kept[unit])
                else:
                    kept = self.rows_kept(row, unit, gate.last_batch)
                    found[self.units[unit]] = (
                        tuple(range(kept)) if isinstance(kept, int) else kept.numbers
                    )
        return found

    def drawn_from(self) -> dict[str, object]:
        """All that the draws of the next forward follow from, for ranks to compare."""
        step, (fixed, disabled) = self.clock.step, self.forced
        return {
            "seed": self.draw.seed,
            "the step": step,
            "what is disabled": disabled,
            "what is fixed": sorted(fixed.items()) if fixed is not None else None,
            "the drop rates at this step": self.rates_at(step),
            "the number of calls in this step": [
                (gate.name, gate.calls) for gate in self.gates if gate.step == step
            ],
        }

    # What is forced in this thread.

    @property
    def forced(self) -> tuple[Mapping[str, Any] | None, bool]:
        """What `fixed` says in this thread, and whether `disabled` is in force."""
        return getattr(self._forced, "state", (None, False))

    def force(self, fixed: Mapping[str, Any] | None, *, disabled: bool) -> Any:
        """Force gates in this thread, on top of what is forced already; returns what undoes it."""
        before = self.forced
        self._forced.state = (
            before[0] if fixed is None else fixed,
            before[1] or disabled,
        )
        self.forcing += 1

        def undo() -> None:
            self._forced.state = before
            self.forcing -= 1

        return undo

    # The clock.

    def advance(self) -> None:
        """One optimizer step; the clock of a copy leaves its original's."""
        self.clock.set(self.clock.step + 1)
        self.changes, self.looked_at = 0, None

    def expect_steps(self, gate: str, module: nn.Module) -> bool:
        """Warn, once, where parameters change time and again and nobody tells the clock.

        Called once a forward, by the gate that is called first, and by the next one where it says
        that this one has nothing to tell: its parameters are frozen.
        """
        if "steps" in self.warned or not (self.schedule.by_name or self.draw.redraw == "step"):
            return True
        if self.looked_at is not None and self.looked_at[0] != gate:
            return False
        trained = [p for p in module.parameters() if p.requires_grad and not p.is_inference()]
        if not trained:
            return False
        version = sum(p._version for p in trained)
        self.changes += self.looked_at is not None and self.looked_at[1] != version
        self.looked_at = (gate, version)
        if self.changes >= _PATIENCE and self.clock.leader is None:
            self.warn_once(
                "steps",
                f'the parameters of "{gate}" changed {_PATIENCE} times while stochastic '
                f"depth stands at step {self.clock.step}: its schedule (or redraw) waits for "
                "depth.follow(optimizer), or for depth.step() after each optimizer step",
            )
        return True

    def warn_once(self, about: str, message: str) -> None:
        """Warn, the first time that it is about this."""
        if about not in self.warned:
            self.warned.add(about)
            warn(message)

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        twin = object.__new__(Plan)
        memo[id(self)] = twin
        twin.__dict__.update(self.__dict__)
        twin.clock = Clock(leader=self.clock)
        twin.clock.belong_to(twin)
        twin._forget()
        twin.gates = copy.deepcopy(self.gates, memo)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # What comes out of a file stands on its own feet: no optimizer, no handle. A copy that is
        # saved beside its original still follows it.
        names = "blocks rates unit mode scale schedule draw counts clock gates talks one_to_one"
        return {name: getattr(self, name) for name in (*names.split(), "units", "base_rates")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, graphs={})
        self.clock.belong_to(self)
        self._forget()


def _alike(kept: Sequence[bool]) -> bool | None:
    """What all of them are; None where they differ."""
    if len(kept) == 1 or all(kept):
        return bool(kept[0])
    return None if any(kept) else False
