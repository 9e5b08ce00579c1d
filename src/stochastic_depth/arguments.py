"""Reading what a user passes: a number of any library, and names or globs of blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Real

from stochastic_depth.errors import SelectionError, nearest, wrong_value


def as_number(value: object) -> float | None:
    """Returns a plain finite number, or None where the value is not one.

    Scalars of NumPy and torch count, integers stay integers; a bool is no number.

    Example:
        >>> as_number(3), as_number(0.5), as_number(True), as_number("0.5"), as_number(float("nan"))
        (3, 0.5, None, None, None)
    """
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "ndim", 0) == 0:
        value = item()
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        return None
    if not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(value)


@dataclass(frozen=True)
class Number:
    """A number that an option takes, and what its error says.

    Attributes:
        fits: Whether a number can be used.
        expected: What can be used, in words.
        instead: What to do instead.

    Example:
        >>> steps = Number(lambda steps: steps >= 0, expected="0 or more", instead="pass 1000")
        >>> steps.read(8, "linear_warmup(steps)")
        8
    """

    fits: Callable[[float], bool]
    expected: str
    instead: str

    def read(self, value: object, option: str) -> float:
        """Returns a plain finite number that fits, from a number of any library.

        Raises:
            OptionError: It is no number, or one that does not fit.
        """
        number = as_number(value)
        if number is None or not self.fits(number):
            raise wrong_value(option, value, expected=self.expected, instead=self.instead)
        return number


def matching(pattern: object, names: Sequence[str], *, argument: str) -> tuple[str, ...]:
    """Returns the names that a name or glob stands for, in their own order.

    Args:
        pattern: A name, or a glob in which ``*`` also crosses dots.
        names: What it may stand for.
        argument: The argument that the pattern came in, for the error.

    Raises:
        SelectionError: Nothing matched.

    Example:
        >>> matching("layer1.*", ["layer1.0", "layer1.1", "layer2.0"], argument="blocks")
        ('layer1.0', 'layer1.1')
    """
    # A name that is there means itself, also where it holds a glob's special characters.
    exact = tuple(name for name in names if name == pattern)
    globbed = (name for name in names if isinstance(pattern, str) and fnmatchcase(name, pattern))
    matched = exact or tuple(globbed)
    if not matched:
        raise SelectionError(
            f"{argument} names {pattern!r}, which is none of the {len(names)} names there",
            expected="a name, or a glob that matches some",
            instead=nearest(str(pattern), names),
        )
    return matched
