"""Promise: `benchmarks/ranks.py` simulates the ranks' waiting right, checked at made-up costs.

With balanced draws all ranks run as many blocks in one step, and every block is dropped on its
share of the ranks.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import ranks_simulated as benchmark

pytest.importorskip("matplotlib")

LINEAR = tuple(0.5 * (block + 1) / 54 for block in range(54))
UNIFORM = (0.2,) * 24
RATES = pytest.mark.parametrize("rates", [LINEAR, UNIFORM], ids=["linear", "uniform"])


def names(rates: tuple[float, ...]) -> tuple[str, ...]:
    """Two stages."""
    return tuple(f"{2 * block // len(rates)}.{block}" for block in range(len(rates)))


@RATES
def test_independent_draws_drop_each_block_at_its_rate(rates: tuple[float, ...]) -> None:
    kept = benchmark.independent(50, 200, names(rates), rates)
    assert np.abs(1 - kept.mean(axis=(0, 1)) - rates).max() < 0.03


@RATES
def test_balanced_draws_drop_each_block_at_its_rate(rates: tuple[float, ...]) -> None:
    steps = [benchmark.balanced(step, 64, names(rates), rates) for step in range(400)]
    assert np.abs(1 - np.mean(steps, axis=(0, 1)) - rates).max() < 0.03


def test_blocks_of_a_stage_stay_side_by_side() -> None:
    order = benchmark._random_order(names(LINEAR), np.random.default_rng(0))
    assert sum(a // 27 != b // 27 for a, b in itertools.pairwise(order)) == 1
    assert order != sorted(order)


@RATES
def test_balanced_ranks_run_as_many_blocks(rates: tuple[float, ...]) -> None:
    costs = benchmark.Costs(names(rates), (1.0,) * len(rates), rest=0.5)
    for ranks in benchmark.WORLDS:
        for step in range(5):
            seconds = costs.of(benchmark.balanced(step, ranks, names(rates), rates))
            assert seconds.max() == seconds.min()
            assert abs(seconds.mean() - costs.plain + sum(rates)) < 1


@RATES
def test_each_block_is_dropped_on_its_share_of_the_ranks(rates: tuple[float, ...]) -> None:
    ranks = 1000
    wholes = [np.array(benchmark.with_whole_sum(rates, u)) for u in (0.0, 1.0)]
    for step in range(5):
        dropped = (~benchmark.balanced(step, ranks, names(rates), rates)).mean(axis=0)
        assert min(np.abs(dropped - whole).max() for whole in wholes) < 1 / ranks + 1e-12


def test_slowest_over_mean_by_hand() -> None:
    seconds = np.array([[1.0, 2.0, 3.0, 3.0], [2.0, 1.0, 1.0, 1.0]])
    # Groups of two ranks: (2 + 3) / 2 and (2 + 1) / 2 over 2.25 and 1.25.
    assert benchmark.slowest_over_mean(seconds, 2).value == pytest.approx(4 / 3.5)
    assert benchmark.slowest_over_mean(seconds, 4).value == pytest.approx(5 / 3.5)
    assert benchmark.slowest_over_mean(seconds, 1).value == 1


def test_the_way_through() -> None:
    costs = benchmark.Costs(("0", "1", "2", "3"), (1.0, 1.0, 2.0, 2.0), rest=1.0)
    found = benchmark.simulated(costs, (0.5,) * 4, 20)
    lines = {
        name: [point.value for point in line] for name, line in found["slowest_over_mean"].items()
    }
    assert set(lines["same"]) == {1.0}
    # Two of four blocks are dropped on every rank, so equal blocks leave nobody waiting.
    assert set(lines["balanced, equal costs"]) == {1.0}
    assert lines["different"] == sorted(lines["different"])
    # Of a thousand ranks, one runs everything: seven seconds, where four are the mean.
    assert lines["different"][-1] == pytest.approx(7 / 4, rel=0.01)
    assert found["saving_left_at_most_ranks"]["different"] == pytest.approx(0, abs=0.02)
    # Balanced draws count blocks, not seconds: at worst both cheap ones are dropped, 5 over 4.
    assert 1 < lines["different, balanced"][-1] <= 5 / 4
    assert found["mean_to_plain"] == pytest.approx(4 / 7)
