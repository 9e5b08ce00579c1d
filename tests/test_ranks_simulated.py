"""Promise: `benchmarks/ranks.py` simulates the ranks' waiting right, checked at made-up costs.

With balanced draws all ranks run as many blocks in one step, and every block is dropped on its
share of the ranks.
"""

from __future__ import annotations

import numpy as np
import pytest

import ranks_simulated as benchmark
from stochastic_depth.distributions import linear
from stochastic_depth.draw import balanced, balancing_numbers, rates_of_a_forward, uniforms

pytest.importorskip("matplotlib")

LINEAR = tuple(linear(54, 0.5))
UNIFORM = (0.2,) * 24
RATES = pytest.mark.parametrize("rates", [LINEAR, UNIFORM], ids=["linear", "uniform"])


def names(rates: tuple[float, ...]) -> tuple[str, ...]:
    """Two stages."""
    return tuple(f"{2 * block // len(rates)}.{block}" for block in range(len(rates)))


@RATES
@pytest.mark.parametrize("ranks", [1, 2, 64, 1000])
def test_balanced_draws_are_the_librarys(rates: tuple[float, ...], ranks: int) -> None:
    by_name = dict(zip(names(rates), rates, strict=True))
    for step in range(3):
        ours = benchmark.balanced_on_ranks(step, names(rates), rates, ranks)
        for rank in {0, 1 % ranks, ranks // 3, ranks - 1}:
            theirs = balanced(0, step, 0, by_name, rank / ranks)
            assert ours[rank].tolist() == [theirs[name] for name in by_name]


def test_independent_draws_are_the_librarys() -> None:
    numbers = benchmark.uniforms(2, 3, 4)
    assert numbers.shape == (2, 3, 4)
    assert numbers[1, 2, 3] == uniforms(0, 1, 0, ("0", "1", "2", "3"), 2)[3]


@RATES
def test_balanced_ranks_run_as_many_blocks(rates: tuple[float, ...]) -> None:
    costs = benchmark.Costs(names(rates), (1.0,) * len(rates), rest=0.5)
    for ranks in benchmark.WORLDS:
        for step in range(5):
            seconds = costs.of(benchmark.balanced_on_ranks(step, names(rates), rates, ranks))
            assert seconds.max() == seconds.min()
            assert abs(seconds.mean() - costs.plain + sum(rates)) < 1


@RATES
def test_each_block_is_dropped_on_its_share_of_the_ranks(rates: tuple[float, ...]) -> None:
    ranks = 1000
    by_name = dict(zip(names(rates), rates, strict=True))
    for step in range(5):
        dropped = (~benchmark.balanced_on_ranks(step, names(rates), rates, ranks)).mean(axis=0)
        whole = rates_of_a_forward(by_name, balancing_numbers(0, step, 0)[0])
        assert np.abs(dropped - list(whole.values())).max() < 1 / ranks + 1e-12


def test_slowest_over_mean_by_hand() -> None:
    seconds = np.array([[1.0, 2.0, 3.0, 3.0], [2.0, 1.0, 1.0, 1.0]])
    # Groups of two ranks: (2 + 3) / 2 and (2 + 1) / 2 over 2.25 and 1.25.
    assert benchmark.slowest_over_mean(seconds, 2).value == pytest.approx(4 / 3.5)
    assert benchmark.slowest_over_mean(seconds, 4).value == pytest.approx(5 / 3.5)
    assert benchmark.slowest_over_mean(seconds, 1).value == 1


def test_the_way_through() -> None:
    costs = benchmark.Costs(("0", "1", "2", "3"), (1.0, 1.0, 2.0, 2.0), rest=1.0)
    found = benchmark.simulated(costs, (0.5,) * 4, benchmark.uniforms(20, 1024, 4))
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
