"""The optimizer step at which a model stands, and the warning where nobody tells it.

The clock of a copied model follows its original's until it is set itself. The step is pushed to the
followers when it is set, so that reading it costs an attribute.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from stochastic_depth.errors import warn

_PATIENCE = 3  # changes of the parameters without a step


class Clock:
    """The optimizer step."""

    def __init__(self, leader: Clock | None = None, step: int = 0) -> None:
        self.step: int = step if leader is None else leader.step
        self.owner: Callable[[], Any] = lambda: None  # its plan, by a weak reference
        # Somebody sets the step, or will.
        self.is_told: bool = leader is not None and leader.is_told
        self._leader = leader
        self._followers: list[weakref.ref[Clock]] = []  # a WeakSet takes longer to go through
        if leader is not None:
            leader._followers = [*(c for c in leader._followers if c()), weakref.ref(self)]
        self._seen: tuple[str, int] | None = None  # a gate, and its parameters' version
        self._changes, self._warned = 0, False

    def set(self, step: int) -> None:
        """Go on from this step, following nobody."""
        if self._leader is not None:
            self._leader._followers.remove(weakref.ref(self))
            self._leader = None
        for clock in self.with_followers():
            if clock.step != step and (plan := clock.owner()):
                plan.end_step()
            clock.step, clock._changes, clock._seen, clock.is_told = step, 0, None, True

    def with_followers(self) -> list[Clock]:
        """This clock and all that follow it, one after the other: copies of copies are many."""
        clocks = [self]
        for clock in clocks:  # which grows
            clocks += [found for follower in clock._followers if (found := follower())]
        return clocks

    def expect_steps(self, gate: str, module: nn.Module) -> bool:
        """Warn, once, where parameters change time and again and nobody sets the step.

        Called once a forward where something depends on the step: by the gate that is called
        first, and by the next one where it returns that this one has nothing to tell, as its
        parameters are frozen.
        """
        if self._warned:
            return True
        trained = [p for p in module.parameters() if p.requires_grad and not p.is_inference()]
        if not trained or (self._seen is not None and self._seen[0] != gate):
            return False
        version = sum(p._version for p in trained)
        self._changes += self._seen is not None and self._seen[1] != version
        self._seen = gate, version
        if self._changes >= _PATIENCE and not self._is_led():
            self._warned = True
            warn(
                f'the parameters of "{gate}" changed {_PATIENCE} times while stochastic '
                f"depth stands at step {self.step}: its schedule (or redraw) waits for "
                "depth.follow(optimizer), or for depth.step() after each optimizer step"
            )
        return True

    def _is_led(self) -> bool:
        """Whether a model that this one is a copy of is still there."""
        leader = self._leader
        while leader is not None and leader.owner() is None:
            leader = leader._leader
        return leader is not None

    def __getstate__(self) -> dict[str, Any]:
        leaders: list[Clock] = []
        clock = self._leader
        while clock is not None:
            leaders += [] if clock.owner() is None else [clock]
            clock = clock._leader
        # The first of them first, so that none is saved in the middle of another: no recursion.
        return {"step": self.step, "leaders": leaders[::-1]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        leaders = state["leaders"]
        Clock.__init__(self, leaders[-1] if leaders else None, state["step"])
