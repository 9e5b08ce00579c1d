"""What the package raises and warns with, and the reading of what a user passes, which raises it.

Every error says three things: what arrived, what was expected, and what to do instead.
"""

from __future__ import annotations

import difflib
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

_PACKAGE = str(Path(__file__).parent)


class StochasticDepthError(ValueError):
    """An argument, a model or a call that stochastic depth cannot work with.

    Args:
        arrived: What arrived, with the name of the argument or module.
        expected: What was expected in its place.
        instead: What to do about it.

    Example:
        >>> print(
        ...     StochasticDepthError(
        ...         "drop_rate is 1.5",
        ...         expected="a number in [0, 1)",
        ...         instead="pass 0.5 to drop the last block in half of the steps",
        ...     )
        ... )
        drop_rate is 1.5. Expected a number in [0, 1). Instead: pass 0.5 to drop the last block in
        half of the steps.
    """

    def __init__(self, arrived: str, *, expected: str, instead: str) -> None:
        super().__init__(
            f"{_sentence(arrived)} Expected {_sentence(expected)} Instead: {_sentence(instead)}"
        )
        self.arrived = arrived
        self.expected = expected
        self.instead = instead

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions rebuild themselves from positional arguments; ours takes keywords.
        rebuild = partial(type(self), expected=self.expected, instead=self.instead)
        return rebuild, (self.arrived,), self.__dict__


class OptionError(StochasticDepthError):
    """An option has a value that it cannot take."""


class SelectionError(StochasticDepthError):
    """A name or glob matched nothing, or an option's name is unknown."""


class NoResidualBlocksError(StochasticDepthError):
    """The model holds no residual block that could be skipped."""


class ExampleInputsError(StochasticDepthError):
    """The model cannot be watched with these example inputs, or without any."""


class RefusedBlockError(StochasticDepthError):
    """A block cannot be skipped exactly with these options.

    Attributes:
        reasons: Of each block that `apply_stochastic_depth` refuses, by name, why.
    """

    reasons: Mapping[str, str] = {}


class ActiveDropPathError(StochasticDepthError):
    """The model drops residual branches on its own already."""


class ChangedModelError(StochasticDepthError):
    """A gated module was replaced, or is called differently than when it was watched."""


class RecomputationError(StochasticDepthError):
    """A recomputed forward cannot be matched with the forward that it recomputes."""


class StateMismatchError(StochasticDepthError):
    """A saved state belongs to other blocks, rates or draws."""


class SetupError(StochasticDepthError):
    """The way in which the model is trained cannot be served exactly."""


class StochasticDepthWarning(UserWarning):
    """Something that works, though hardly as it was meant."""


def wrong_value(option: str, value: object, *, expected: str, instead: str) -> OptionError:
    """Returns the error for a value of an option, with the value's type."""
    arrived = f"{option} is {value!r}, of type {type(value).__name__}"
    return OptionError(arrived, expected=expected, instead=instead)


def warn(message: str) -> None:
    """Warn at the line outside of this package that is to blame."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, StochasticDepthWarning, stacklevel=level)


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Says which of the candidates a mistyped name probably meant.

    Example:
        >>> nearest("layer3.22", ["layer1.0", "layer3.2"])
        'did you mean "layer3.2"?'
        >>> nearest("block", ["layer1.0", "layer3.2"])
        'choose from "layer1.0", "layer3.2"'
    """
    known = list(candidates)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.75)
    shown = [f'"{candidate}"' for candidate in close or known[:6]]
    if close:
        return f"did you mean {' or '.join(shown)}?"
    if not known:
        return "there is nothing to choose from"
    more = f" and {len(known) - len(shown)} more" if len(known) > len(shown) else ""
    return f"choose from {', '.join(shown)}{more}"


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?", "!", "\n")) else f"{text}."


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
    number = value if isinstance(value, int) else float(value)
    return number if -math.inf < number < math.inf else None


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
