"""Reading what a user passes: a number of any library, and names or globs of blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Real
from typing import TypeVar

from stochastic_depth.errors import SelectionError, nearest

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
    matched: tuple[str, ...] = ()
    if isinstance(pattern, str):
        # A name that is there means itself, also where it holds a glob's special characters.
        exact = pattern in names
        matched = (pattern,) if exact else tuple(n for n in names if fnmatchcase(n, pattern))
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
