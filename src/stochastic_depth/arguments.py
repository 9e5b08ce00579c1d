"""Reading what a user passes: a number of any library, and names or globs of blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Real
from typing import TypeVar

from stochastic_depth.errors import SelectionError, nearest, wrong_value

Value = TypeVar("Value")


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


def number(
    value: object, option: str, *, fits: Callable[[float], bool], expected: str, instead: str
) -> float:
    """Returns a plain finite number that fits.

    Args:
        value: What the user passed.
        option: What it was passed as, for the error.
        fits: Whether a number can be used.
        expected: What can be used, in words.
        instead: What to pass instead.

    Raises:
        OptionError: It is no number, or one that does not fit.

    Example:
        >>> number(8, "steps", fits=lambda n: n >= 0, expected="0 or more", instead="pass 1000")
        8
    """
    plain = as_number(value)
    if plain is None or not fits(plain):
        raise wrong_value(option, value, expected=expected, instead=instead)
    return plain


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


def spread(
    mapping: Mapping[str, Value], names: Sequence[str], *, argument: str
) -> dict[str, Value]:
    """Returns the value of each name that a mapping's names and globs stand for.

    Later keys override earlier ones; names that no key matches are left out.

    Example:
        >>> spread(
        ...     {"layer*": 0.1, "layer2": 0.4}, ["stem", "layer1", "layer2"], argument="drop_rate"
        ... )
        {'layer1': 0.1, 'layer2': 0.4}
    """
    values: dict[str, Value] = {}
    for key, value in mapping.items():
        values.update(dict.fromkeys(matching(key, names, argument=argument), value))
    return values
