"""Whether waiting for data eats what stochastic depth saves: faster steps do not load faster."""

from __future__ import annotations

import time

_WINDOW = 20  # batches that a judgement is based on
_NOTICEABLE = 0.1  # a share of the time below which nothing is said


class Waiting:
    """Adds up how long the training waits for its batches, and how long it works on them.

    Of each window the longest wait is left out: a file system may stall once.
    """

    def __init__(self) -> None:
        self._waits: list[float] = []
        self._work = 0.0
        self._since = time.perf_counter()

    def ask(self) -> None:
        """A batch is asked for."""
        self._since = time.perf_counter()

    def receive(self, *, first_of_epoch: bool) -> None:
        """It is there. That of an epoch's first one is the loader's start, and does not count."""
        now = time.perf_counter()
        self._waits.append(0.0 if first_of_epoch else now - self._since)
        self._since = now

    def finish(self) -> None:
        """The training has done its work on it."""
        self._work += time.perf_counter() - self._since

    def share(self) -> float | None:
        """The share of the time that went into waiting, once in a window; None in between."""
        if len(self._waits) < _WINDOW:
            return None
        waited = sum(self._waits) - max(self._waits)
        share = waited / (waited + self._work)
        self._waits, self._work = [], 0.0
        return share


def remark(waiting: float, dropped: float) -> str | None:
    """What to say about it, where it is too much.

    Args:
        waiting: The share of the time that goes into waiting.
        dropped: The share of the blocks that is dropped: more than that of the work is not saved.
    """
    if waiting <= max(_NOTICEABLE, dropped):
        return None
    return (
        f"{waiting:.0%} of the training's time goes into waiting for data, which faster steps do "
        f"not shorten: that eats the saving, as stochastic depth leaves out {dropped:.0%} of the "
        "blocks. Load faster (more workers, smaller or preprocessed files), or train without it"
    )
