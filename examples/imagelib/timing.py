"""How fast the networks trained, how much time was saved, and how sure that is.

The 95% intervals come from a bootstrap over stretches of the training, so that neighbouring steps,
which share what else the machine was doing, count as one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from imagelib.records import Step

Array = NDArray[np.float64]

ENOUGH = 0.8  # of the possible saving; below, the table says so
TOO_MUCH_WAITING = 0.2  # of a network's time; above, the table says so
FEWEST_COMPARED = 8  # steps, below which nothing is said about the saving


@dataclass(frozen=True)
class Spread:
    """A median with the tenth and the ninetieth percentile around it."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%})"


@dataclass(frozen=True)
class Speed:
    """How fast one of the networks trained."""

    images_per_second: Spread
    seconds_per_epoch: Spread
    waiting_for_data: float  # as a share of its time

    def remark(self) -> str | None:
        """A plain warning where loading has become the bottleneck."""
        if self.waiting_for_data < TOO_MUCH_WAITING:
            return None
        return (
            f"Loading has become the bottleneck: {self.waiting_for_data:.0%} of the time with "
            "stochastic depth goes into waiting for data, which faster steps do not shorten."
        )


@dataclass(frozen=True)
class Saving:
    """How much of the plain network's time stochastic depth saved, and how much it could have.

    What could be saved is what the physically shortened network saves under the same draws.
    """

    time_saved: Estimate
    possible: Estimate
    share_of_possible: Estimate
    compared_steps: int  # those at which the shortened network ran as well
    interrupted_steps: int  # left out, as something else held up the machine

    def remark(self) -> str:
        share = self.share_of_possible
        if self.possible.low <= 0 or share.low < ENOUGH <= share.high:
            return f"Too noisy to tell whether {ENOUGH:.0%} of what could be saved was saved."
        if share.high < ENOUGH:
            return f"Less than {ENOUGH:.0%} of what could be saved was saved."
        return f"At least {ENOUGH:.0%} of what could be saved was saved."


def column(steps: Sequence[Step], name: str) -> Array:
    return np.array([getattr(step, name) for step in steps], dtype=np.float64)


def speed_of(
    steps: Sequence[Step], seconds: str, batch_size: int, steps_per_epoch: int
) -> Speed | None:
    """Of the network whose times are in the column `seconds`; None before any step was timed."""
    timed = [step for step in steps if step.timed]
    if not timed:
        return None
    waiting = column(timed, "data_seconds")
    total = waiting + column(timed, seconds)
    return Speed(
        _spread(batch_size / total),
        _spread(epoch_seconds(steps, seconds, steps_per_epoch)),
        float(waiting.sum() / total.sum()),
    )


def epoch_seconds(steps: Sequence[Step], seconds: str, steps_per_epoch: int) -> Array:
    """How long each epoch would have taken without the other networks, from its timed steps."""
    timed = [step for step in steps if step.timed]
    total = column(timed, "data_seconds") + column(timed, seconds)
    epochs = column(timed, "epoch")
    everywhere = total.mean() if timed else math.nan
    return steps_per_epoch * np.array([
        total[epochs == epoch].mean() if epoch in epochs else everywhere
        for epoch in np.unique(column(steps, "epoch"))
    ])  # fmt: skip


def saving_of(steps: Sequence[Step]) -> Saving | None:
    """None where the plain network is missing, or too few steps were compared to say anything."""
    timed = [step for step in steps if step.timed and not math.isnan(step.plain_seconds)]
    if not timed:
        return None
    limit = 2 * float(np.median(column(timed, "plain_seconds")))
    calm = [s for s in timed if not max(s.plain_seconds, s.seconds, s.shortened_seconds) > limit]
    compared = ~np.isnan(column(calm, "shortened_seconds"))
    if compared.sum() < FEWEST_COMPARED:
        return None
    ours = column(calm, "seconds")
    columns = np.stack([
        column(calm, "plain_seconds"),
        ours,
        column(calm, "data_seconds"),
        np.where(compared, ours, 0.0),
        np.where(compared, column(calm, "shortened_seconds"), 0.0),
    ])  # fmt: skip
    starts = np.flatnonzero(compared)[:: compared.sum() // 50 + 1]  # of some 50 stretches
    starts[0] = 0
    sums = np.add.reduceat(columns, starts, axis=1)
    drawn = np.random.default_rng(0).integers(len(starts), size=(2000, len(starts)))
    values, resampled = _shares(sums.sum(1)), _shares(sums[:, drawn].sum(2))
    saved, possible, share = map(_estimate, values, resampled)
    return Saving(saved, possible, share, int(compared.sum()), len(timed) - len(calm))


def _estimate(value: Array, resampled: Array) -> Estimate:
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Estimate(float(value), float(low), float(high))


def _shares(sums: Array) -> tuple[Array, Array, Array]:
    """Time saved, time that could have been saved, and the one as a share of the other.

    The shortened network ran at some steps only; by how much it was faster there, it is taken to
    be faster everywhere.
    """
    plain, ours, data, ours_compared, shortened = sums
    saved, possible = plain - ours, plain - ours * shortened / ours_compared
    return saved / (plain + data), possible / (plain + data), saved / possible


def _spread(values: Array) -> Spread:
    return Spread(*(float(q) for q in np.quantile(values, (0.5, 0.1, 0.9))))
