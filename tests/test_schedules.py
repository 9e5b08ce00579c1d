"""Schedules: values at steps computed by hand, and that they print, pickle, compare and compose."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stochastic_depth import schedules
from stochastic_depth.errors import OptionError, SelectionError
from stochastic_depth.schedules import (
    Schedule,
    constant,
    linear_decay,
    linear_warmup,
    piecewise_linear,
    resolve_schedule,
)

pytestmark = pytest.mark.oldest

NAMES = ["blocks.0", "blocks.0:0", "blocks.0:1", "blocks.1", "blocks.1:0", "blocks.1:1"]

steps = st.integers(0, 10**6)
factors = st.floats(0, 1)


@st.composite
def decays(draw: st.DrawFn) -> Schedule:
    start, end = sorted([draw(steps), draw(steps)])
    return linear_decay(end, start)


simple = st.one_of(
    factors.map(constant),
    steps.map(linear_warmup),
    decays(),
    st.dictionaries(steps, factors, min_size=1, max_size=5).map(
        lambda points: piecewise_linear(sorted(points.items()))
    ),
)
any_schedule = st.recursive(
    simple, lambda each: st.tuples(each, each).map(lambda ab: ab[0] * ab[1])
)


# Values computed by hand.


def values(schedule: Callable[[int], float], *at: int) -> list[float]:
    return [schedule(step) for step in at]


def test_warmup_rises_from_0_at_step_0_to_1_at_its_last() -> None:
    assert values(linear_warmup(4), 0, 1, 2, 3, 4, 5, 1000) == [0, 0.25, 0.5, 0.75, 1, 1, 1]


def test_a_warmup_of_0_steps_is_full_rate_from_the_first() -> None:
    assert values(linear_warmup(0), 0, 1) == [1, 1]


def test_decay_reaches_0_and_stays_there() -> None:
    assert values(linear_decay(4), 0, 1, 2, 3, 4, 5, 1000) == [1, 0.75, 0.5, 0.25, 0, 0, 0]
    assert values(linear_decay(6, start=2), 0, 2, 3, 5, 6, 7) == [1, 1, 0.75, 0.25, 0, 0]


def test_a_decay_that_ends_where_it_starts_is_a_jump() -> None:
    assert values(linear_decay(3, start=3), 2, 3, 4) == [1, 0, 0]
    assert values(linear_decay(0), 0, 1) == [0, 0]


def test_piecewise_is_constant_outside_its_points() -> None:
    schedule = piecewise_linear([(10, 1), (20, 0.5), (40, 0)])
    assert values(schedule, 0, 10, 15, 20, 30, 40, 99) == [1, 1, 0.75, 0.5, 0.25, 0, 0]
    assert values(piecewise_linear([(10, 0.3)]), 0, 10, 99) == [0.3, 0.3, 0.3]


def test_products_multiply() -> None:
    up_and_down = linear_warmup(4) * linear_decay(8, start=4)
    assert values(up_and_down, 0, 2, 4, 6, 8) == [0, 0.5, 1, 0.5, 0]
    assert values(0.5 * linear_warmup(4), 0, 2, 4) == [0, 0.25, 0.5]
    assert values(linear_warmup(4) * (lambda step: 0.5), 2) == [0.25]
    assert values((lambda step: 0.5) * linear_warmup(4), 2) == [0.25]


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (linear_warmup(1000), "linear_warmup(1000)"),
        (linear_warmup(torch.tensor(1000)), "linear_warmup(1000)"),  # type: ignore[arg-type]
        (linear_decay(5000), "linear_decay(5000)"),
        (linear_decay(5000, 1000), "linear_decay(5000, start=1000)"),
        (constant(0.5), "constant(0.5)"),
        (piecewise_linear([(0, 1), (10, 0.5)]), "piecewise_linear([(0, 1), (10, 0.5)])"),
        (0.5 * linear_warmup(10), "constant(0.5) * linear_warmup(10)"),
    ],
)
def test_each_prints_as_the_call_that_makes_it(schedule: Schedule, text: str) -> None:
    assert repr(schedule) == text


# What holds for all of them.


@given(any_schedule, st.integers(0, 2 * 10**6))
def test_factors_stay_between_0_and_1(schedule: Schedule, step: int) -> None:
    assert 0 <= schedule(step) <= 1


@given(any_schedule)
def test_printing_and_pickling_round_trip(schedule: Schedule) -> None:
    for again in (
        eval(repr(schedule), vars(schedules)),
        pickle.loads(pickle.dumps(schedule)),
        copy.deepcopy(schedule),
    ):
        assert again == schedule
        assert hash(again) == hash(schedule)


@given(simple, simple, simple)
def test_products_do_not_depend_on_brackets(a: Schedule, b: Schedule, c: Schedule) -> None:
    assert (a * b) * c == a * (b * c)


@given(st.dictionaries(steps, factors, min_size=1, max_size=5))
def test_piecewise_passes_through_its_points(points: dict[int, float]) -> None:
    schedule = piecewise_linear(sorted(points.items()))
    assert {step: schedule(step) for step in points} == points


@given(st.integers(1, 10**6), st.integers(0, 10**6))
def test_warmup_and_decay_add_up_to_one(length: int, step: int) -> None:
    assert linear_warmup(length)(step) + linear_decay(length)(step) == pytest.approx(1)


def test_schedules_of_different_kinds_differ() -> None:
    warmup: Schedule = linear_warmup(10)
    assert warmup != linear_decay(10)
    assert warmup == linear_warmup(10.0)


# One for all, or one per name or glob.


def test_no_schedule_is_the_full_rate() -> None:
    assert resolve_schedule(None, NAMES)(5, "blocks.1:0") == 1


def test_one_schedule_for_all() -> None:
    factor = resolve_schedule(linear_warmup(10), NAMES)
    assert {factor(5, name) for name in NAMES} == {0.5}


def test_a_blocks_schedule_holds_for_its_branches() -> None:
    factor = resolve_schedule({"blocks.1": linear_warmup(10)}, NAMES)
    assert [factor(5, name) for name in NAMES] == [1, 1, 1, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("own_first", [True, False])
def test_a_branchs_own_schedule_wins(own_first: bool) -> None:
    entries: list[tuple[str, Schedule]] = [("*:1", constant(0.1)), ("blocks.*", constant(0.5))]
    factor = resolve_schedule(dict(entries if own_first else entries[::-1]), NAMES)
    assert [factor(0, name) for name in NAMES] == [0.5, 0.5, 0.1, 0.5, 0.5, 0.1]


def test_later_keys_override_earlier_ones() -> None:
    factor = resolve_schedule(
        {"*": constant(0.5), "blocks.1": constant(0.2)}, ["blocks.0", "blocks.1"]
    )
    assert [factor(0, name) for name in ("blocks.0", "blocks.1")] == [0.5, 0.2]


def test_a_resolved_schedule_can_be_pickled() -> None:
    factor = resolve_schedule({"*:0": linear_warmup(10)}, NAMES)
    again = pickle.loads(pickle.dumps(factor))
    assert again == factor
    assert again(5, "blocks.0:0") == 0.5


# Bad cases: each its own error.

NO_NUMBER: Any = "0.1dur"
NO_SCHEDULE: Any = 0.5


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), float("inf"), None, "0.5"])
def test_a_factor_outside_the_range_names_step_and_value(value: Any) -> None:
    factor = resolve_schedule(lambda step: value if step == 7 else 1.0, ["blocks.0"])
    assert factor(6, "blocks.0") == 1
    with pytest.raises(OptionError) as error:
        factor(7, "blocks.0")
    assert f'of "blocks.0" at step 7 is {value!r}' in error.value.arrived
    assert error.value.expected == "a factor on the drop rate, from 0 to 1"
    assert error.value.instead == "give 1 for the full rate and 0 for none"


@pytest.mark.parametrize(
    ("make", "arrived"),
    [
        (lambda: linear_warmup(-1), "linear_warmup(steps) is -1"),
        (lambda: linear_warmup(NO_NUMBER), "linear_warmup(steps) is '0.1dur', of type str"),
        (lambda: linear_warmup(float("nan")), "linear_warmup(steps) is nan"),
        (lambda: linear_decay(True), "linear_decay(steps) is True"),
        (lambda: linear_decay(10, -1), "linear_decay(start) is -1"),
        (lambda: linear_decay(10, start=20), "starts at step 20 and reaches 0 at step 10"),
        (lambda: constant(1.5), "constant(factor) is 1.5"),
        (lambda: linear_warmup(5) * 2, "a factor is 2"),
        (lambda: piecewise_linear([]), "has the points []"),
        (lambda: piecewise_linear([(5, 1), (5, 0)]), "has the points [(5, 1), (5, 0)]"),
        (lambda: piecewise_linear([(5, 1), (2, 0)]), "has the points [(5, 1), (2, 0)]"),
        (lambda: piecewise_linear([(0, 2)]), "a point's factor is 2"),
        (lambda: resolve_schedule(NO_SCHEDULE, NAMES), "schedule is 0.5, of type float"),
        (lambda: resolve_schedule({"*": NO_SCHEDULE}, NAMES), "schedule['*'] is 0.5"),
    ],
)
def test_what_is_no_schedule_is_refused(make: Callable[[], object], arrived: str) -> None:
    with pytest.raises(OptionError) as error:
        make()
    assert arrived in error.value.arrived
    assert error.value.expected
    assert error.value.instead


@pytest.mark.parametrize(
    ("key", "instead"),
    [("block.1", 'did you mean "blocks.1"'), ("blocks.2:0", 'did you mean "blocks.1:0"')],
)
def test_a_key_that_matches_nothing_names_what_is_near(key: str, instead: str) -> None:
    with pytest.raises(SelectionError, match=f"schedule names '{key}'") as error:
        resolve_schedule({key: constant(0.5)}, NAMES)
    assert instead in error.value.instead


def test_a_branchs_key_where_blocks_draw_as_a_whole() -> None:
    with pytest.raises(SelectionError, match=r"none of the 2 names") as error:
        resolve_schedule({"blocks.1:0": constant(0.5)}, ["blocks.0", "blocks.1"])
    assert 'did you mean "blocks.1"' in error.value.instead
