"""Promise: rates may change while a model trains, and a logger sees what they come to."""

from __future__ import annotations

import copy
from typing import Any

import pytest

import stochastic_depth as sd
from networks import assert_equal
from riding import KEY, Run, images

oldest = pytest.mark.oldest


@oldest
@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_set_drop_rate_changes_the_rates_and_not_the_numbers_that_are_drawn(mode: str) -> None:
    options: dict[str, Any] = {"mode": mode, "schedule": None}
    changed, other = Run(rate=0.2, **options), Run(rate=0.6, **options)
    changed.steps(3)
    last = changed.depth.last_gates
    changed.depth.set_drop_rate(0.6)
    assert changed.depth.last_gates == last
    assert changed.depth.state_dict()["step"] == 3
    drawn = other.steps(8)
    assert changed.steps(5) == drawn[3:]
    changed.depth.set_drop_rate(0.0)
    changed.steps(1)
    assert all(changed.depth.last_gates.values())


@oldest
def test_set_drop_rate_takes_what_apply_takes_and_leaves_the_rest() -> None:
    run = Run(schedule=None)
    names = [block.name for block in run.depth.blocks]
    run.depth.set_drop_rate({names[0]: 0.3})
    assert [block.drop_rate for block in run.depth.blocks] == [0.3, *[0.0] * (len(names) - 1)]
    run.depth.set_drop_rate(0.4, "uniform")
    with pytest.raises(sd.OptionError):
        run.depth.set_drop_rate(1.0)
    assert {block.drop_rate for block in run.depth.blocks} == {0.4}


@oldest
def test_an_average_follows_the_rates() -> None:
    run = Run(schedule=None)
    average = copy.deepcopy(copy.deepcopy(run.model))
    twin = sd.get_stochastic_depth(average)
    run.depth.set_drop_rate(0.1, "uniform")
    assert {block.drop_rate for block in twin.blocks} == {0.1}
    run.model.eval()
    average.eval()
    assert_equal(average(images()), run.model(images()))


@oldest
def test_metrics_are_named_alike_everywhere() -> None:
    run = Run(schedule=None)
    assert set(run.depth.metrics()) == {f"{KEY}/drop_rate"}
    run.steps(1)
    metrics, gates = run.depth.metrics(), run.depth.last_gates
    rates = [block.drop_rate for block in run.depth.blocks]
    assert metrics == {
        f"{KEY}/drop_rate": sum(rates) / len(rates),
        f"{KEY}/blocks_run": float(sum(gates.values())),
        f"{KEY}/skipped": 1 - sum(gates.values()) / len(gates),
    }


@oldest
def test_metrics_of_mode_sample_are_means_over_the_rows() -> None:
    run = Run(schedule=None, mode="sample")
    run.steps(1)
    rows = len(images())
    expected = sum(len(kept) / rows for kept in run.depth.last_gates.values())
    assert run.depth.metrics()[f"{KEY}/blocks_run"] == pytest.approx(expected, abs=1e-12)


@oldest
def test_metrics_behind_an_empty_batch() -> None:
    run = Run(schedule=None, mode="sample")
    run.model(images()[:0])
    assert run.depth.metrics()[f"{KEY}/blocks_run"] == 0
