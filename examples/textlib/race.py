"""Variants take turns, step by step, so that a machine that drifts does so for all of them."""

import random
from collections.abc import Iterator, Sequence

from textlib.contender import Contender
from textlib.windows import Windows


def race(contenders: Sequence[Contender], windows: Windows, *, looks: int) -> Iterator[int]:
    """Trains all to their ends from where they are; yields after every step how many were taken.

    At the same step all see the same batch, in an order drawn anew for each step: in a fixed one
    each would find the memory and the caches as the same other left them. `looks` is how often
    each looks at the held-out part, the last time at its end.
    """
    first = max((len(c.steps) for c in contenders), default=0)
    for number in range(first, max((c.total_steps for c in contenders), default=0)):
        batch = windows.for_training(number)
        going = [contender for contender in contenders if not contender.finished]
        for contender in random.Random(number).sample(going, len(going)):
            contender.take_turn(batch)
            if len(contender.steps) in look_after(contender.total_steps, looks):
                contender.look_at_held_out(windows)
        yield number + 1


def look_after(total_steps: int, looks: int) -> set[int]:
    """After how many steps the held-out part is looked at.

    >>> sorted(look_after(10, 4))
    [2, 5, 8, 10]
    """
    return {max(1, round(total_steps * share / looks)) for share in range(1, looks + 1)}


def affordable_steps(contenders: Sequence[Contender]) -> dict[str, int]:
    """How many steps of each the FLOPs buy that the cheapest spent; not where that is all it took.

    A drop schedule that is shrunk to fewer steps costs the same on average, to the luck of the
    draws.
    """
    budget = min(contender.flops for contender in contenders)
    steps = {c.name: max(1, round(c.total_steps * budget / c.flops)) for c in contenders}
    return {c.name: steps[c.name] for c in contenders if steps[c.name] < c.total_steps}
