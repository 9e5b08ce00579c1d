"""How long the steps took, and how sure it is that those of a variant are faster."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from imagelib.timing import Estimate, Spread
from textlib.records import Step

FEWEST_COMPARED = 8  # steps, below which nothing is said about the time


def seconds_per_step(steps: Sequence[Step]) -> Spread | None:
    """None before any step was timed."""
    timed = [step.seconds for step in steps if step.timed]
    return Spread(*map(float, np.quantile(timed, (0.5, 0.1, 0.9)))) if timed else None


def time_to_plain(steps: Sequence[Step], plain: Sequence[Step]) -> Estimate | None:
    """The time of these steps as a share of what the plain model's took, with its 95% interval.

    Steps that something else held up (beyond twice the median) are left out. The interval comes
    from a bootstrap over the steps.
    """
    pairs = [
        (mine.seconds, its.seconds)
        for mine, its in zip(steps, plain, strict=False)  # Ctrl-C may have come in between
        if mine.timed and its.timed
    ]
    if len(pairs) < FEWEST_COMPARED:
        return None
    seconds = np.array(pairs)
    seconds = seconds[seconds.sum(1) <= 2 * np.median(seconds.sum(1))]
    drawn = np.random.default_rng(0).integers(len(seconds), size=(2000, len(seconds)))
    low, high = np.quantile(_ratio(seconds[drawn].sum(1)), (0.025, 0.975))
    return Estimate(float(_ratio(seconds.sum(0))), float(low), float(high))


def _ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return sums[..., 0] / sums[..., 1]
