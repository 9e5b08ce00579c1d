"""What the package raises and warns with.

Every error says three things: what arrived, what was expected, and what to do instead.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable
from functools import partial
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
    """A block cannot be skipped exactly with these options."""


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
