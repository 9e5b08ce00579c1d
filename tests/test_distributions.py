"""Drop rates over depth: the published formulas, and an error of its own for every bad case."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stochastic_depth.distributions import resolve_rates
from stochastic_depth.errors import OptionError, SelectionError, StochasticDepthError

pytestmark = pytest.mark.oldest

NAMES = ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]

rates_in_range = st.floats(0, 1, exclude_max=True)
distributions = st.sampled_from(["linear", "linear_from_zero", "uniform"])


def names(count: int) -> list[str]:
    return [f"blocks.{index}" for index in range(count)]


# Values computed by hand.


def test_linear_is_the_rule_of_huang_et_al() -> None:
    assert resolve_rates(0.5, "linear", names(5)) == pytest.approx((0.1, 0.2, 0.3, 0.4, 0.5))


def test_a_number_alone_is_linear() -> None:
    assert resolve_rates(0.5, None, NAMES) == (0.125, 0.25, 0.375, 0.5)


def test_linear_from_zero_is_the_rule_of_timm() -> None:
    assert resolve_rates(0.4, "linear_from_zero", names(5)) == pytest.approx(
        (0, 0.1, 0.2, 0.3, 0.4)
    )


def test_uniform_is_the_same_everywhere() -> None:
    assert resolve_rates(0.2, "uniform", names(3)) == (0.2, 0.2, 0.2)


def test_one_block() -> None:
    assert resolve_rates(0.5, "linear", ["only"]) == (0.5,)
    assert resolve_rates(0.5, "linear_from_zero", ["only"]) == (0.0,)
    assert resolve_rates(0.5, "uniform", ["only"]) == (0.5,)


def test_a_function_of_count_and_rate() -> None:
    def last_alone(num_blocks: int, drop_rate: float) -> list[float]:
        return [0.0] * (num_blocks - 1) + [drop_rate]

    assert resolve_rates(0.3, last_alone, NAMES) == (0, 0, 0, 0.3)


def test_a_list_is_one_rate_per_block() -> None:
    assert resolve_rates([0.1, 0.2, 0.3, 0.4], None, NAMES) == (0.1, 0.2, 0.3, 0.4)


def test_a_mapping_gives_the_others_zero_and_later_keys_override() -> None:
    assert resolve_rates({"layer2.*": 0.2, "layer2.1": 0.4}, None, NAMES) == (0, 0, 0.2, 0.4)
    assert resolve_rates({"layer2.1": 0.4, "layer2.*": 0.2}, None, NAMES) == (0, 0, 0.2, 0.2)
    assert resolve_rates({"*.0": 0.1}, None, NAMES) == (0.1, 0, 0.1, 0)


def test_a_name_with_a_globs_characters_is_found_as_it_stands() -> None:
    assert resolve_rates({"blocks[0]": 0.1}, None, ["blocks[0]", "blocks0"]) == (0.1, 0)


@pytest.mark.parametrize("value", [Fraction(1, 4), torch.tensor(0.25), torch.tensor(0.25).double()])
def test_numbers_of_any_library(value: Any) -> None:
    assert resolve_rates(value, "uniform", ["a", "b"]) == (0.25, 0.25)
    assert resolve_rates([value, 0], None, ["a", "b"]) == (0.25, 0)
    assert resolve_rates({"a": value}, None, ["a", "b"]) == (0.25, 0)


def test_tensors_of_rates() -> None:
    assert resolve_rates(torch.tensor([0.25, 0.5]), None, ["a", "b"]) == (0.25, 0.5)
    assert resolve_rates(0.5, lambda n, rate: torch.linspace(0, rate, n), ["a", "b"]) == (0, 0.5)


# What holds for all rates and depths.


@given(rate=rates_in_range, count=st.integers(0, 200), distribution=distributions)
def test_rates_rise_to_the_rate_and_stay_in_range(
    rate: float, count: int, distribution: str
) -> None:
    rates = resolve_rates(rate, distribution, names(count))
    assert len(rates) == count
    assert all(0 <= each < 1 and type(each) is float for each in rates)
    assert list(rates) == sorted(rates)
    if count > 1:
        assert rates[-1] == rate


@given(rate=rates_in_range, count=st.integers(2, 200))
def test_linear_from_zero_is_linspace(rate: float, count: int) -> None:
    rates = resolve_rates(rate, "linear_from_zero", names(count))
    assert rates == pytest.approx(torch.linspace(0, rate, count, dtype=torch.float64).tolist())


@given(st.lists(rates_in_range))
def test_a_list_comes_back_as_it_is_and_so_does_the_mapping_of_it(given_rates: list[float]) -> None:
    found = names(len(given_rates))
    assert resolve_rates(given_rates, None, found) == tuple(given_rates)
    if given_rates:
        assert resolve_rates(dict(zip(found, given_rates, strict=True)), None, found) == tuple(
            given_rates
        )


# Bad cases: each its own error.


@pytest.mark.parametrize(
    "value",
    [
        -0.1,
        1,
        1.0,
        1.5,
        float("nan"),
        float("inf"),
        True,
        False,
        None,
        "0.5",
        1j,
        torch.tensor(True),
    ],
)
def test_what_is_no_rate_is_refused_everywhere(value: Any) -> None:
    cases: list[tuple[Any, str]] = [(value, "drop_rate"), ([0.1, value], "drop_rate[1]")]
    cases.append(({"a": value}, "drop_rate['a']"))
    for drop_rate, source in cases:
        with pytest.raises(OptionError) as error:
            resolve_rates(drop_rate, None, ["a", "b"])
        assert str(error.value).startswith(f"{source} is {value!r}, of type {type(value).__name__}")
        assert "Expected a number from 0 up to, but not including, 1. Instead: " in str(error.value)


@given(st.floats().filter(lambda rate: not 0 <= rate < 1), distributions)
def test_no_number_outside_the_range_passes(rate: float, distribution: str) -> None:
    with pytest.raises(OptionError, match="drop_rate is"):
        resolve_rates(rate, distribution, NAMES)


def one_too_few(num_blocks: int, drop_rate: float) -> list[float]:
    return [drop_rate] * (num_blocks - 1)


def too_high(num_blocks: int, drop_rate: float) -> list[float]:
    return [1.0] * num_blocks


def no_list(num_blocks: int, drop_rate: float) -> Iterable[float]:
    return drop_rate  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("drop_rate", "distribution", "kind", "arrived", "instead"),
    [
        ([0.1] * 3, None, OptionError, "drop_rate holds 3 rates for 4 blocks", "give 4 rates"),
        ([], None, OptionError, "drop_rate holds 0 rates for 4 blocks", "give 4 rates"),
        ({0.1, 0.2, 0.3, 0.4}, None, OptionError, "drop_rate is {", "pass the share"),
        ({"layer3.0": 0.1}, None, SelectionError, "'layer3.0'", 'did you mean "layer'),
        ({"stage*": 0.1}, None, SelectionError, "'stage*'", 'choose from "layer1.0"'),
        ({0: 0.1}, None, SelectionError, "names 0", 'choose from "layer1.0"'),
        ({}, None, SelectionError, "empty mapping", 'choose from "layer1.0"'),
        ([0.1] * 4, "linear", OptionError, "drop_distribution is 'linear'", "leave drop_distr"),
        ({"*": 0.1}, "uniform", OptionError, "drop_distribution is 'uniform'", "leave drop_distr"),
        (0.1, "unifrom", SelectionError, '"unifrom"', 'did you mean "uniform"?'),
        (0.1, 3, OptionError, "drop_distribution is 3, of type int", "pass the rates themselves"),
        (0.1, one_too_few, OptionError, "one_too_few(4, 0.1) holds 3 rates", "give 4 rates"),
        (0.1, too_high, OptionError, "too_high(4, 0.1)[0] is 1.0", "pass the share"),
        (0.1, no_list, OptionError, "returned 0.1 from no_list(4, 0.1)", "return a list"),
    ],
)
def test_each_bad_case_says_what_arrived_and_what_to_do(
    drop_rate: Any,
    distribution: str | Callable[..., Any] | None,
    kind: type[StochasticDepthError],
    arrived: str,
    instead: str,
) -> None:
    with pytest.raises(kind) as error:
        resolve_rates(drop_rate, distribution, NAMES)
    assert type(error.value) is kind
    assert arrived in error.value.arrived
    assert instead in error.value.instead
    assert error.value.expected
