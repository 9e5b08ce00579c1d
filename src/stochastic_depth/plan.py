"""What the gates of one model share: rates, schedule, clock, call numbers, and the decisions.

A plan knows names and numbers, never the model: copying a module copies its plan, not the model
around it.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, nn

from stochastic_depth.discovery.blocks import ResidualBlock
from stochastic_depth.distributed.agreement import check_agreement
from stochastic_depth.distributed.reduction import Reduction
from stochastic_depth.draw import Counts, Draw
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
class Probe:
    """Blocks that run on two rows of the batch, or on all and are masked: is it the same?"""

    blocks: frozenset[int]
    masked: bool
    values: list[Tensor] = field(default_factory=list)  # what their branches came to


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
    counts: tuple[Counts, ...] = ()  # of each block: how many rows it may run on
    synchronised: Mapping[str, str] = field(default_factory=dict)  # SyncBatchNorms, by container
    silent: set[str] = field(default_factory=set)  # containers that talk to no other rank
    in_groups: frozenset[str] = frozenset()  # containers that run once for each kind of row
    disabled: bool = False
    last_gates: dict[str, bool | Rows | range] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)  # of each container in this step
    calls_in_step: int = 0  # the step that `calls` counts in
    handle: weakref.ref[Any] | None = None
    looked_at: tuple[str, int] | None = None  # a container, and the version of its parameters
    changes: int = 0  # of these, while the clock stood still
    warned: bool = False
    reduction: Reduction = field(default_factory=Reduction)
    compiler: Any = None  # what `depth.compile()` made
    told_to_compile: bool = False
    together: tuple[Any, dict[str, Any]] = (None, {})  # what was last drawn for all units at once
    agreed: set[str] = field(default_factory=set)  # containers called since ranks were compared
    forwards: int = 0  # in which they had to agree
    listed_in: int = 0  # the last of these in which lists of units to prefetch were looked at

    @property
    def ranks_differ(self) -> bool:
        """Whether each rank has draws of its own."""
        across = self.draw.across_ranks
        return across == "different" or (across == "auto" and self.mode == "sample")

    def __post_init__(self) -> None:
        alone = self.unit == "block"
        self._units = tuple(
            (block.name,) if alone else tuple(branch.name for branch in block.branches)
            for block in self.blocks
        )

    @cached_property
    def one_rate(self) -> bool:
        """Whether all that is dropped is dropped at one rate, at every step."""
        return not self.schedule.by_name and len({rate for rate in self.rates if rate}) <= 1

    def units(self, block: int) -> tuple[str, ...]:
        """The names of what is drawn for in a block: itself, or each of its branches."""
        return self._units[block]

    def rate(self, block: int, unit: str) -> float:
        """The drop rate at this step."""
        base = self.rates[block]
        if not base or not self.schedule.by_name:
            return base
        return base * self.schedule(self.clock.step, unit)

    def next_round(self, block: int, branch: int, calls: dict[str, int] | None) -> int:
        """The same for a `Residual`: those of one layer count together, from call to call of it.

        A new round begins where one is called that was called in this round before.
        """
        name, called = self.blocks[block].name, 1 << branch
        calls = self._calls(calls)
        seen = calls.get(f"{name}:seen", 0)
        if not seen or seen & called:
            calls[name], seen = calls.get(name, 0) + 1, 0
        calls[f"{name}:seen"] = seen | called
        return calls[name] - 1

    def next_call(self, container: str, calls: dict[str, int] | None) -> int:
        """How often the container was called before, in this step or in the call around it."""
        calls = self._calls(calls)
        number = calls.get(container, 0)
        calls[container] = number + 1
        return number

    def calls_so_far(self, container: str) -> int:
        """How often it was called in this step."""
        return self._calls(None).get(container, 0)

    def _calls(self, around: dict[str, int] | None) -> dict[str, int]:
        """The counts of this step, or of the call around."""
        if around is not None:
            return around
        if self.calls_in_step != self.clock.step:
            self.calls_in_step, self.calls = self.clock.step, {}
        return self.calls

    def agree(self, container: str, ranks: tuple[int, ...] | None, *, training: bool) -> None:
        """Have all ranks compare what they draw from, at the first call of each forward.

        Args:
            container: Whose call it is.
            ranks: Those that have to agree; None: all.
            training: Whether it trains.

        Raises:
            SetupError: On all ranks, where they differ.
        """
        begins = not self.agreed or container in self.agreed
        self.agreed = {container} if begins else self.agreed | {container}
        if not begins:
            return
        self.forwards += 1
        every = self.draw.check_every
        if every and (self.forwards - 1) % every == 0:
            check_agreement(container, ranks, lambda: self._drawn_from(training=training))

    def _drawn_from(self, *, training: bool) -> dict[str, object]:
        """All that the draws of the next forward follow from."""
        by_name = self.schedule.by_name
        return {
            "seed": self.draw.seed,
            "training": training,
            "the step": self.clock.step,
            "what is disabled": self.disabled,
            "what is fixed": sorted(self.forced.items()) if self.forced is not None else None,
            "the drop rates": self.rates,
            "the number of calls in this step": sorted(self._calls(None).items()),
            "the drop rates at this step": [
                self.rate(n, unit)
                for n in range(len(self.blocks) if by_name else 0)
                for unit in self.units(n)
            ],
        }

    def advance(self) -> None:
        """One optimizer step; the clock of a copy leaves its original's."""
        self.clock.set(self.clock.step + 1)
        self.changes, self.looked_at = 0, None

    def expect_steps(self, container: str, module: nn.Module) -> None:
        """Warn, once, where parameters change time and again and nobody tells the clock.

        One container is enough, the first that is called and trained.

        Args:
            container: Whose call it is.
            module: The container.
        """
        if self.warned or not (self.schedule.by_name or self.draw.redraw == "step"):
            return
        if self.looked_at is not None and self.looked_at[0] != container:
            return
        trained = [p for p in module.parameters() if p.requires_grad and not p.is_inference()]
        if not trained:
            return
        version = sum(p._version for p in trained)
        self.changes += self.looked_at is not None and self.looked_at[1] != version
        self.looked_at = (container, version)
        if self.changes >= _PATIENCE and self.clock.follows is None:
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
        twin.looked_at, twin.changes, twin.reduction = None, 0, Reduction()
        twin.together, twin.agreed = (None, {}), set()
        twin.calls, twin.last_gates = dict(self.calls), dict(self.last_gates)
        twin.following = twin.handle = twin.forced = None
        twin.disabled = False
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # What comes out of a file stands on its own feet: no optimizer, no handle. A copy that is
        # saved beside its original still follows it.
        alone: dict[str, Any] = {"following": None, "handle": None, "forced": None}
        alone |= {"disabled": False, "reduction": Reduction(), "together": (None, {})}
        alone |= {"compiler": None}  # as torch does with what it compiled
        alone["agreed"] = set()
        return {**self.__dict__, **alone}
