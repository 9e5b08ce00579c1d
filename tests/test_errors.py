"""Errors say what arrived, what was expected and what to do, wherever they travel."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stochastic_depth import errors
from stochastic_depth.errors import StochasticDepthError, StochasticDepthWarning, nearest

pytestmark = pytest.mark.oldest

ALL = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, StochasticDepthError)
]


def an_error(kind: type[StochasticDepthError]) -> StochasticDepthError:
    return kind("drop_rate is 1.5", expected="a number in [0, 1)", instead="pass drop_rate=0.5")


@pytest.mark.parametrize("kind", ALL)
def test_the_message_has_three_parts(kind: type[StochasticDepthError]) -> None:
    expected = "drop_rate is 1.5. Expected a number in [0, 1). Instead: pass drop_rate=0.5."
    assert str(an_error(kind)) == expected


@pytest.mark.parametrize("kind", ALL)
def test_errors_are_value_errors_with_a_docstring(kind: type[StochasticDepthError]) -> None:
    assert issubclass(kind, ValueError)
    assert kind.__doc__


@pytest.mark.parametrize("kind", ALL)
def test_errors_survive_pickling_and_copying(kind: type[StochasticDepthError]) -> None:
    error = an_error(kind)
    if sys.version_info >= (3, 11):
        error.add_note("seen on rank 3")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is kind
        assert str(again) == str(error)
        assert vars(again) == vars(error)


def test_a_sentence_that_ends_already_gets_no_second_full_stop() -> None:
    error = StochasticDepthError("It is so.", expected="that!", instead='did you mean "this"?')
    assert str(error) == 'It is so. Expected that! Instead: did you mean "this"?'


def test_the_warning_is_a_user_warning() -> None:
    assert issubclass(StochasticDepthWarning, UserWarning)


def test_nearest_names_what_was_probably_meant() -> None:
    assert nearest("unifrom", ["linear", "uniform"]) == 'did you mean "uniform"?'


def test_nearest_lists_what_there_is_where_nothing_is_near() -> None:
    assert nearest("zzz", ["linear", "uniform"]) == 'choose from "linear", "uniform"'
    assert nearest("zzz", []) == "there is nothing to choose from"
    many = nearest("zzz", [f"blocks.{index}" for index in range(24)])
    assert many.endswith('"blocks.5" and 18 more')


@given(st.lists(st.text(min_size=1), min_size=1, unique=True))
def test_nearest_finds_a_name_that_is_there(names: list[str]) -> None:
    assert nearest(names[-1], names).startswith(f'did you mean "{names[-1]}"')
