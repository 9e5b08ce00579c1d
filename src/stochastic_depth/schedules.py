"""Step -> factor in [0, 1] on the drop rates. Pure functions, no torch.

A schedule is any function of the optimizer step. Those made here can also be pickled, compared,
multiplied with each other, and print as the call that made them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from stochastic_depth.errors import Number, OptionError, matching, wrong_value

ScheduleFunction = Callable[[int], float]

_STEPS = Number(
    lambda steps: steps >= 0,
    expected="a finite number of optimizer steps, 0 or more",
    instead="pass how many optimizer steps it takes, such as 0.1 * epochs * len(loader)",
)
_FACTOR = Number(
    lambda factor: 0 <= factor <= 1,
    expected="a factor on the drop rate, from 0 to 1",
    instead="give 1 for the full rate and 0 for none",
)


@dataclass(frozen=True)
class Schedule:
    """A factor on the drop rates for each optimizer step: the product of what its functions return.

    Example:
        >>> linear_warmup(1000) * linear_decay(5000, start=4000)
        linear_warmup(1000) * linear_decay(5000, start=4000)
    """

    functions: tuple[ScheduleFunction, ...]

    def __call__(self, step: int) -> float:
        """Returns the factor at this step."""
        return math.prod([function(step) for function in self.functions])  # torch follows lists

    @property
    def is_constant(self) -> bool:
        """Whether it is the same at every step."""
        return all(isinstance(f, _Lines) and len(f.points) == 1 for f in self.functions)

    def __mul__(self, other: object) -> Schedule:
        return Schedule(self.functions + _functions(other))

    def __rmul__(self, other: object) -> Schedule:
        return Schedule(_functions(other) + self.functions)

    def __repr__(self) -> str:
        return " * ".join(map(repr, self.functions))


def _functions(schedule: object) -> tuple[ScheduleFunction, ...]:
    if isinstance(schedule, Schedule):
        return schedule.functions
    if callable(schedule):
        return (schedule,)
    return constant(_FACTOR.read(schedule, "a factor")).functions


@dataclass(frozen=True)
class _Lines:
    """Straight lines between points (step, factor); two points at one step are a jump there."""

    points: tuple[tuple[float, float], ...]
    made_by: str = field(compare=False)

    def __call__(self, step: int) -> float:
        start, factor = self.points[0]
        for stop, following in self.points[1:]:
            if step < stop:
                share = (step - start) / (stop - start) if step > start else 0.0
                return factor + share * (following - factor)
            start, factor = stop, following
        return factor

    def __repr__(self) -> str:
        return self.made_by


@dataclass(frozen=True)
class Progressive:
    """`1 - exp(-gamma * t)`: from 0 towards 1, as Progressive Layer Dropping sets in.

    Attributes:
        gamma: How fast, per optimizer step.

    Example:
        >>> schedule = Progressive(gamma=0.001)
        >>> [round(schedule(step), 4) for step in (0, 1000, 5000)]
        [0.0, 0.6321, 0.9933]
    """

    gamma: float

    def __call__(self, step: int) -> float:
        """Returns the factor at this step."""
        return -math.expm1(-self.gamma * step)


def constant(factor: float) -> Schedule:
    """The same factor at every step.

    Example:
        >>> constant(0.5)(123)
        0.5
    """
    factor = _FACTOR.read(factor, "constant(factor)")
    return _lines(f"constant({factor})", (0, factor))


def linear_warmup(steps: float) -> Schedule:
    """Rises linearly from 0 at step 0 to 1 at step ``steps``, as Composer's ``drop_warmup`` does.

    With ``steps=0`` it is 1 from the first step on.

    Example:
        >>> warmup = linear_warmup(1000)
        >>> warmup(0), warmup(250), warmup(1000), warmup(9999)
        (0.0, 0.25, 1.0, 1.0)
    """
    steps = _STEPS.read(steps, "linear_warmup(steps)")
    return _lines(f"linear_warmup({steps})", (0, 0.0), (steps, 1.0))


def linear_decay(steps: float, start: float = 0) -> Schedule:
    """1 until step ``start``, then falls linearly to 0 at step ``steps``, and stays there.

    Dropping early in the training alone counters underfitting, dropping late alone (a warmup)
    counters overfitting (Liu et al. 2023, "Dropout reduces underfitting").

    Example:
        >>> decay = linear_decay(5000, start=1000)
        >>> decay(1000), decay(2000), decay(5000), decay(9999)
        (1.0, 0.75, 0.0, 0.0)
    """
    steps = _STEPS.read(steps, "linear_decay(steps)")
    start = _STEPS.read(start, "linear_decay(start)")
    if start > steps:
        raise OptionError(
            f"linear_decay starts at step {start} and reaches 0 at step {steps}",
            expected="a start no later than the step at which it reaches 0",
            instead=f"pass linear_decay({start}, start={steps}) if they are swapped",
        )
    text = f"linear_decay({steps}, start={start})" if start else f"linear_decay({steps})"
    return _lines(text, (start, 1.0), (steps, 0.0))


def piecewise_linear(points: Iterable[tuple[float, float]] | Mapping[float, float]) -> Schedule:
    """Straight lines between points ``(step, factor)``, constant before the first, after the last.

    A mapping from steps to factors says the same.

    Zipformer (icefall) schedules the rates of its branches so, one schedule per kind of branch.

    Example:
        >>> schedule = piecewise_linear([(1000, 1.0), (2000, 0.5), (4000, 0.0)])
        >>> [schedule(step) for step in (0, 1500, 3000, 9999)]
        [1.0, 0.75, 0.25, 0.0]
        >>> piecewise_linear({0: 0.0, 10: 1.0})(5)
        0.5
    """
    pairs = points.items() if isinstance(points, Mapping) else points
    checked = [
        (_STEPS.read(s, "a point's step"), _FACTOR.read(f, "a point's factor")) for s, f in pairs
    ]
    if not checked or any(later <= earlier for (earlier, _), (later, _) in pairwise(checked)):
        raise OptionError(
            f"piecewise_linear has the points {checked}",
            expected="at least one (step, factor), with steps that rise from point to point",
            instead="pass them sorted by step, one for each step",
        )
    return _lines(f"piecewise_linear({checked})", *checked)


def _lines(made_by: str, *points: tuple[float, float]) -> Schedule:
    return Schedule((_Lines(points, made_by),))


@dataclass(frozen=True)
class ResolvedSchedule:
    """The factor of every block and branch at every step, checked as it is asked for."""

    by_name: Mapping[str, ScheduleFunction]

    def __call__(self, step: int, name: str) -> float:
        """Returns the factor on the rate of this block or branch, 1 where it has no schedule."""
        schedule = self.by_name.get(name)
        factor = 1.0 if schedule is None else schedule(step)
        if type(factor) is float and 0 <= factor <= 1:  # nearly always, and every gate asks
            return factor
        return float(_FACTOR.read(factor, f'schedule {schedule!r} of "{name}" at step {step}'))


def resolve_schedule(
    schedule: ScheduleFunction | Mapping[str, ScheduleFunction] | None, names: Sequence[str]
) -> ResolvedSchedule:
    """Returns the factor as a function of the step and of a block's or branch's name.

    Args:
        schedule: One for all; or ``{name or glob: schedule}``, where later keys override earlier
            ones and what no key matches keeps its full rate. A block's key holds for its branches
            too, unless a key with a colon ("blocks.3:0", "*:1") names the branch itself.
        names: The names of the blocks, and of branches ("blocks.3:0") where they draw on their own.

    Raises:
        OptionError: Something that is no schedule.
        SelectionError: A key that matches nothing.

    Example:
        >>> names = ["blocks.0", "blocks.0:0", "blocks.0:1"]
        >>> factor = resolve_schedule({"blocks.*": linear_warmup(100), "*:1": constant(1)}, names)
        >>> factor(50, "blocks.0:0"), factor(50, "blocks.0:1")
        (0.5, 1.0)
    """
    if schedule is None:
        return ResolvedSchedule({})
    by_key = schedule if isinstance(schedule, Mapping) else {"*": schedule}
    blocks = list(dict.fromkeys(name.partition(":")[0] for name in names))
    branches = [name for name in names if ":" in name]
    by_name: dict[str, ScheduleFunction] = {}
    # Keys of branches come last: they override those of blocks.
    for key, function in sorted(by_key.items(), key=lambda item: ":" in str(item[0])):
        of_ours = getattr(function, "__module__", None) == __name__
        is_uncalled = of_ours and not isinstance(function, Schedule | Progressive)
        instead = "pass linear_warmup(steps), say, or constant(0.5) for a fixed factor"
        if is_uncalled:
            instead = f"did you mean sd.{getattr(function, '__name__', '')}(steps)?"
        if is_uncalled or not callable(function):
            raise wrong_value(
                "schedule" if by_key is not schedule else f"schedule[{key!r}]",
                function,
                expected="a function of the optimizer step that returns a factor in [0, 1]",
                instead=instead,
            )
        # Without branches that draw on their own, a branch's key fails beside the blocks' names.
        choices = branches if branches and ":" in str(key) else blocks
        matched = matching(key, choices, argument="schedule")
        by_name |= {n: function for n in names if n in matched or n.partition(":")[0] in matched}
    return ResolvedSchedule(by_name)
