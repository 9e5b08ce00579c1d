"""`drop_warmup`: a share of the training in Composer's time, and the factor on the rates by it.

Timestamps count whole epochs, so that `State.get_elapsed_duration()` stands still within one where
the duration is in epochs. Here the batches of the epoch that is under way count, too.
"""

from __future__ import annotations

from composer.core import State, Time, TimeUnit

from stochastic_depth.errors import OptionError, as_number


class Factor:
    """A schedule that returns what it was set to last: the algorithm knows the time, not the step.

    Until a training begins it is 1, so that a model that is only evaluated is scaled.
    """

    is_constant = True  # over the steps, which are not what moves it

    def __init__(self) -> None:
        self.value = 1.0

    def __call__(self, step: int) -> float:
        """Returns the factor on the drop rates."""
        return self.value

    def __repr__(self) -> str:
        return f"Factor({self.value})"


def as_time(drop_warmup: object) -> Time:
    """A number (a share of the training), a time string, or a Time.

    Raises:
        OptionError: It is something else, or negative.
    """
    expected = 'a number from 0 to 1, a time string such as "0.1dur", "5ep" or "1000ba", or a Time'
    instead = 'pass 0.1 or "0.1dur" to have the drop rate rise over the first tenth of the training'
    number = as_number(drop_warmup)
    if number is not None:
        time = Time(float(number), TimeUnit.DURATION)
    elif isinstance(drop_warmup, Time):
        time = drop_warmup
    else:
        try:
            time = Time.from_timestring(drop_warmup)
        except (ValueError, TypeError) as error:
            raise OptionError(
                f"drop_warmup is {drop_warmup!r}", expected=expected, instead=instead
            ) from error
    if time.value < 0 or (time.unit is TimeUnit.DURATION and time.value > 1):
        raise OptionError(f"drop_warmup is {drop_warmup!r}", expected=expected, instead=instead)
    return time


def warmed_up(state: State, warmup: Time) -> float:
    """The share of the warmup that has passed, `min(1, elapsed / warmup)`."""
    if not warmup.value:
        return 1.0
    if warmup.unit is TimeUnit.DURATION:
        total = state.max_duration
        elapsed = _passed(state, total.unit) / total.value
    else:
        elapsed = _passed(state, warmup.unit)
    return min(1.0, elapsed / float(warmup.value))


def _passed(state: State, unit: TimeUnit) -> float:
    passed = float(state.timestamp.get(unit).value)
    if unit is TimeUnit.EPOCH and state.dataloader_len:
        passed += state.timestamp.batch_in_epoch.value / state.dataloader_len.value
    return passed
